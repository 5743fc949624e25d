# make help    the targets
# make demo    install, tune exits of the embedded target, measure and plot them: offline but for the installation
#
# Variables: SYSTEM_PYTHON (makes the .venv; default: python3.11, else another from 3.10 to 3.13), PIP_FLAGS (for every pip install),
# SETUP_FLAGS (for install_dependencies.sh, which also reads TORCH_INDEX_URL), BASE_IMAGE and others for images (see Dockerfile).

SYSTEM_PYTHON ?=
PIP_FLAGS ?=
SETUP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALL = SYSTEM_PYTHON="$(SYSTEM_PYTHON)" PIP_FLAGS="$(PIP_FLAGS)" bash install_dependencies.sh --venv $(VENV) $(SETUP_FLAGS)

IMAGE ?= early-exit
DOCKER ?= docker
DOCKER_FLAGS ?=
BUILD_ARGS = $(foreach name,BASE_IMAGE TORCH_VERSION TORCH_INDEX_URL PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_CERT,$(if $($(name)),--build-arg $(name)="$($(name))"))
OUT_FOLDER = $(abspath $(if $(filter %.jsonl,$(OUT)),$(dir $(OUT)),$(OUT)))
DATASET_FILE = $(abspath $(wildcard $(DATASET)))

# The oldest torch and libraries that requirements.txt admits, in an environment of its own.
OLDEST := .venv-oldest

# Words that the bugs which test-planted plants have in their descriptions.
BUGS ?=

# The demo's sweep, made for 2 CPU cores. See `bash run_sweep_ultrachat_two_stage.sh --help`. Word problems, because exits learn them in minutes.
DEMO_DEVICE ?= cpu
DEMO := env PYTHON=$(BIN)/python HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DEVICE=$(DEMO_DEVICE) SEED=0 NUM_THREADS=2 \
	MODEL_PATH=assets/pydoc-llama-7m DATASET=arithmetic LAYERS="1 3 7" OUTPUT_DIR=runs/demo EVAL_DIR=runs/demo/evaluation \
	MAX_STEPS_HEAD=100   LR_HEAD=3e-3   LR_SCHEDULE_HEAD=cosine   BATCH_SIZE_HEAD=8   GRAD_ACCUM_HEAD=1 \
	MAX_STEPS_FTLAST=300 LR_FTLAST=3e-3 LR_SCHEDULE_FTLAST=cosine BATCH_SIZE_FTLAST=8 GRAD_ACCUM_FTLAST=1 DRAFT_VOCAB=1024 \
	MAX_LENGTH=256 WARMUP_RATIO=0.05 SAVE_EVERY=0 EVAL_EVERY=0 QUALITY_DATASETS=arithmetic QUALITY_MAX_BATCHES=16 \
	SPEC_NUM_PROMPTS=32 SPEC_PROMPT_LEN=0 SPEC_MAX_NEW=128 SPEC_T=0.7 SPEC_TOP_P=0.95 SPEC_GAMMA=4
# The same path through the code in a fraction of the time; its figures mean nothing.
DEMO_SHORT := $(DEMO) LAYERS=3 MAX_STEPS_HEAD=4 MAX_STEPS_FTLAST=4 QUALITY_MAX_BATCHES=2 SPEC_NUM_PROMPTS=2 SPEC_MAX_NEW=24 \
	OUTPUT_DIR=runs/demo_short EVAL_DIR=runs/demo_short/evaluation

# Pictures: the embedded LLaVA with each of its drafts in turn, chains and trees.
LLAVA := assets/shapes-llava
DEMO_LLAVA := env HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m commands.benchmark_llava --target $(LLAVA) --device cpu --num_threads 2 --end 40 --max_new_tokens 96 --runs 2

# Flags of benchmark.py that variables set.
DATASET ?=
OUT ?= runs/benchmark
EXPERIMENT ?=
HEADLESS ?=
BENCH = $(BIN)/python benchmark.py --out $(OUT) $(if $(DATASET),--dataset $(DATASET)) $(if $(HEADLESS),--require_headless)

.DEFAULT_GOAL := help
.PHONY: help setup setup-gpu demo demo-short demo-llava test test-planted test-oldest test-aarch64 aarch64-wheels check bench bench-toy smoke-hf autojudge specexec list-presets validate-configs validate-results docker-engine docker-build docker-build-gpu docker-test docker-bench clean

help: ## list the targets
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 25

setup: $(VENV)/.installed ## make the .venv with the tested versions; done once

$(VENV)/.installed: $(wildcard requirements/*.txt)
	$(INSTALL)

setup-gpu: ## the same with the CUDA build of torch; needs an NVIDIA driver
	$(INSTALL) --gpu

demo: setup ## tune and compare 6 exits of the embedded target on 2 CPU cores, in under 10 minutes: runs/demo/evaluation/
	$(DEMO) bash run_sweep_ultrachat_two_stage.sh

demo-short: setup ## the demo's steps at their smallest, for CI
	$(DEMO_SHORT) bash run_sweep_ultrachat_two_stage.sh

demo-llava: setup ## decode behind pictures with three drafts, in under 3 minutes: runs/demo_llava/, with contact sheets
	$(DEMO_LLAVA) --model $(LLAVA)-draft --out runs/demo_llava/small_llava
	$(DEMO_LLAVA) --model $(LLAVA)-blind --out runs/demo_llava/text_only
	$(DEMO_LLAVA) --checkpoint $(LLAVA)-exit/layer1.safetensors --out runs/demo_llava/early_exit
	for draft in small_llava text_only early_exit; do $(BIN)/python -m commands.plot_results runs/demo_llava/$$draft/results.jsonl --out_dir runs/demo_llava/$$draft/plots; done

test: setup ## all tests, offline
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-planted: setup ## plant the bugs of tests/planted_bugs.json one by one, and see that a test fails on each; BUGS="word …" chooses some
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/plant_bugs.py $(BUGS)

test-oldest: ## all tests and the short demo with Python 3.12 and the oldest libraries, torch 2.6.0 under the name that NVIDIA's 25.01 gives it; downloads 3 GB once
	bash requirements/make_oldest.sh $(OLDEST)
	$(MAKE) test demo-short VENV=$(OLDEST)

test-aarch64: setup ## the tests of the C++ for a GH200's CPU, under qemu-user; needs qemu-user and g++-aarch64-linux-gnu
	bash tests/aarch64.sh

aarch64-wheels: setup ## list the wheels that a GH200 gets: docs/aarch64-wheels.txt
	bash requirements/aarch64_wheels.sh > docs/aarch64-wheels.tmp && mv docs/aarch64-wheels.tmp docs/aarch64-wheels.txt

check: setup validate-configs ## lint, the rule of the import levels, and the presets
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest -q tests/test_house.py

bench: setup ## decoding methods side by side: DATASET (builtin, a name or a file), OUT, EXPERIMENT, HEADLESS=1
	$(BENCH) --experiment $(or $(EXPERIMENT),embedded_all)

bench-toy: setup ## the whole harness in seconds, on random weights: OUT
	$(BENCH) --experiment toy_all --max_samples 3 --max_new_tokens 16 --runs 2

smoke-hf: setup ## a few tokens of every method with the embedded target, loaded as from the hub: OUT
	$(BENCH) --hf_model assets/pydoc-llama-7m --checkpoint assets/pydoc-llama-7m-exit/layer1.safetensors \
		--followers assets/pydoc-llama-7m-exit/followers.safetensors --autojudge_checkpoint assets/pydoc-llama-7m-exit/judge.safetensors --max_samples 2 --max_new_tokens 8

autojudge: setup ## AutoJudge beside exact decoding: DATASET, OUT, EXPERIMENT
	$(BENCH) --experiment $(or $(EXPERIMENT),embedded_autojudge_k4)

specexec: setup ## SpecExec beside vanilla decoding: DATASET, OUT
	$(BENCH) --experiment $(or $(EXPERIMENT),embedded_specexec)

list-presets: setup ## what EXPERIMENT can be, and the presets of models and methods
	$(BIN)/python benchmark.py --list_presets

validate-configs: setup ## check the presets
	$(BIN)/python -m commands.validate_configs

validate-results: setup ## check benchmark.py's JSONL strictly: OUT
	$(BIN)/python -m commands.validate_results --strict --path $(OUT)

docker-engine:
	@command -v $(DOCKER) >/dev/null || { echo "error: $(DOCKER) is not installed; install Docker, name another by DOCKER=podman, or do without: make setup" >&2; exit 2; }
	@$(DOCKER) info >/dev/null 2>&1 || { echo "error: $(DOCKER) does not reach its engine; start it, and see that you may use it: $(DOCKER) info" >&2; exit 2; }

docker-build: docker-engine ## an image for the CPU; IMAGE names it, BASE_IMAGE and other build arguments as in Dockerfile
	$(DOCKER) build $(BUILD_ARGS) -t $(IMAGE) .

docker-build-gpu: docker-engine ## an image for NVIDIA GPUs, IMAGE-gpu; build arguments as in Dockerfile.gpu
	$(DOCKER) build $(BUILD_ARGS) -f Dockerfile.gpu -t $(IMAGE)-gpu .

docker-test: docker-engine ## all tests, in the image; for GPUs IMAGE=early-exit-gpu DOCKER_FLAGS="--gpus all --ipc host"
	$(DOCKER) run --rm $(DOCKER_FLAGS) $(IMAGE)

# Files have the same paths inside, and results belong to who starts the container: a user without a name there, who needs a home.
docker-bench: docker-engine ## make bench in the image: DATASET, OUT, EXPERIMENT; downloads are kept in the volume early-exit
	mkdir -p $(OUT_FOLDER)
	$(DOCKER) run --rm $(DOCKER_FLAGS) --user "$$(id -u):$$(id -g)" -e HOME=/tmp -e USER=suite -v early-exit:/data -v $(OUT_FOLDER):$(OUT_FOLDER) \
		$(if $(DATASET_FILE),-v $(DATASET_FILE):$(DATASET_FILE):ro) $(IMAGE) \
		make bench OUT=$(abspath $(OUT)) DATASET=$(or $(DATASET_FILE),$(DATASET)) EXPERIMENT=$(EXPERIMENT)

clean: ## delete the demos' results and the caches of the tools, but no other run and not the .venv
	rm -rf runs/demo runs/demo_short runs/demo_llava .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
