# The suite on the CPU; without a command it runs the tests.
#
#   make docker-build        or: docker build -t early-exit .
#   docker run --rm early-exit
#   docker run --rm -v early-exit:/data early-exit python prove.py --model_path assets/pydoc-llama-7m ... --out_dir /data/proof
#
# /data is for what outlives a container: downloads from the hub are in /data/hf_cache.
#
# Build arguments:
#   BASE_IMAGE       a Debian or Ubuntu that still gets updates; where it has no Python, apt's is installed
#   TORCH_INDEX_URL  PyTorch's index of CPU builds, or a mirror of it
#   PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, PIP_CERT
#                    as pip reads them, for the build alone; the image's history shows them, so give no passwords
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE}
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_CERT

WORKDIR /app
RUN useradd --create-home suite && install -d -o suite -g suite /app && install -d -m 1777 /data
# Before the sources, so that a change to them installs nothing anew.
COPY install_dependencies.sh ./
COPY requirements/ requirements/
RUN PIP_FLAGS=--no-cache-dir ./install_dependencies.sh && rm -rf /var/lib/apt/lists/* \
    && git config --system safe.directory /app # whoever the container runs as, results name the revision
COPY --chown=suite:suite . .

USER suite
ENV PATH=/app/.venv/bin:$PATH HF_HOME=/data/hf_cache PYTHONUNBUFFERED=1
VOLUME /data
CMD ["make", "test"]
