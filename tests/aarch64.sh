#!/usr/bin/env bash
# Run the tests of the C++ as on a GH200's own CPU: compiled by Debian's cross compiler, and run by qemu-user, with Python, torch
# and all for aarch64. Twice: for Grace's core, Neoverse V2, which GCC 12 calls demeter, with SVE vectors of 128 bits as there, and
# for one without SVE, Neoverse N1.
#
#   bash tests/aarch64.sh                      # or make test-aarch64; the first time it fetches 1.5 GB into .cache/aarch64
#   bash tests/aarch64.sh tests/test_vlm.py    # with words for pytest
#
# Settings (environment variables):
#   CORES   (default: demeter neoverse-n1)
#   PYTHON  whose pip fetches the packages (default: .venv/bin/python)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=requirements/aarch64_platforms.sh
source requirements/aarch64_platforms.sh

readonly ROOT=$PWD/.cache/aarch64
readonly TESTS=(tests/test_native.py tests/test_static_llama.py -k "native or same_bits or number_of_threads or logits_are_transformers or every_width")

main() {
  local command core words=("$@")
  (($#)) || words=("${TESTS[@]}")
  for command in qemu-aarch64 aarch64-linux-gnu-g++; do
    command -v "$command" >/dev/null || { echo "error: no $command; as root: apt-get install qemu-user g++-aarch64-linux-gnu" >&2; exit 2; }
  done
  [[ -e $ROOT/.debian ]] || fetch_debian
  [[ $(cat "$ROOT/.packages" 2>/dev/null) == "$(wanted)" ]] || fetch_packages
  for core in ${CORES:-demeter neoverse-n1}; do
    echo "==== $core"
    compiler_for "$core"
    emulated "$core" -m pytest -q -p no:cacheprovider "${words[@]}"
  done
}

# Python 3.11 and what it needs, unpacked, from apt with lists and a state of its own.
fetch_debian() {
  local apt=$ROOT/apt package
  mkdir -p "$apt/lists/partial" "$apt/archives/partial"
  : >"$apt/status"
  local options=(-qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State::lists="$apt/lists" -o Dir::State::status="$apt/status"
    -o Dir::Cache="$apt" -o Dir::Cache::archives="$apt/archives" -o APT::Sandbox::User="$(id -un)")
  apt-get "${options[@]}" update
  apt-get "${options[@]}" install --yes --no-install-recommends --download-only python3.11 libpython3.11-stdlib libgomp1 libstdc++6 ||
    { echo "error: apt has no Python 3.11 for arm64; run this on Debian 12" >&2; exit 2; }
  for package in "$apt"/archives/*.deb; do dpkg -x "$package" "$ROOT"; done
  touch "$ROOT/.debian"
}

# The tested versions, but torch 2.6.0, whose build for aarch64 on PyPI is a small one for the CPU.
wanted() {
  sed '/^#/d; /^torch==/d; /^ruff==/d; /^tensorboard/d; /^grpcio==/d' requirements/constraints.txt
  echo torch==2.6.0
}

fetch_packages() {
  rm -rf "$ROOT/packages"
  wanted >"$ROOT/wanted"
  "${PYTHON:-.venv/bin/python}" -m pip install --quiet --no-deps --only-binary=:all: --python-version 311 "${PLATFORMS[@]/#/--platform=}" \
    --target "$ROOT/packages" -r "$ROOT/wanted"
  mv "$ROOT/wanted" "$ROOT/.packages"
}

# A g++ that takes -march=native for this core: a cross compiler cannot ask the machine.
compiler_for() {
  # shellcheck disable=SC2016
  printf '#!/usr/bin/env bash\nexec aarch64-linux-gnu-g++ "${@/#-march=native/-mcpu=%s}"\n' "$1" >"$ROOT/g++-$1"
  chmod +x "$ROOT/g++-$1"
}

emulated() {
  local core=$1
  CXX=$ROOT/g++-$core XDG_CACHE_HOME=$ROOT/compiled/$core PYTHONPATH=$ROOT/packages HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
    qemu-aarch64 -cpu max,sve-default-vector-length=16 -L "$ROOT" "$ROOT/usr/bin/python3.11" "${@:2}"
}

main "$@"
