# Every target installs what it needs first, and prints the plain command that it runs.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS := docker/constraints.txt

# Inside the image everything is installed; elsewhere a virtual environment is created once.
ifdef SPOT_MEGATRON_IMAGE
PY := python3
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

RECIPE ?= qwen3_tiny_spot
SET ?=
GPUS ?=
NODES ?= 1
PORT ?= 8765

# NCCL needs the host's network, shared memory and InfiniBand. Files belong to the caller. `--env NAME` without a value
# passes the caller's value on.
IMAGE ?= spot_megatron
DOCKER_RUN = docker run --rm $(if $(shell command -v nvidia-smi),--gpus all) --ipc host --network host \
  --ulimit memlock=-1 --ulimit stack=67108864 $(addprefix --device ,$(wildcard /dev/infiniband)) \
  --user $(shell id -u):$(shell id -g) --env HOME=/tmp --env USER=spot --env HF_HOME=/hf \
  --env HF_TOKEN --env WANDB_API_KEY --env MASTER_ADDR --env MASTER_PORT --env NODE_RANK \
  --volume $(CURDIR):/workspace --volume $(or $(HF_HOME),$(HOME)/.cache/huggingface):/hf \
  $(foreach folder,$(MOUNT),--volume $(folder):$(folder))

.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z][a-z0-9-]*:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

setup: $(READY) ## make the virtual environment with pinned packages

$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet $$(grep -E '^torch==' $(CONSTRAINTS))
	$(PY) -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

train: $(READY) ## train, export and evaluate: RECIPE=name-or-file [SET="key=value ..."] [GPUS=n] [NODES=n]
	@$(PY) -m tools.launch '$(RECIPE)' $(if $(SET),--set $(SET)) $(if $(GPUS),--processes $(GPUS)) --nodes $(NODES)

slurm: $(READY) ## write (and submit) scripts for Slurm: RECIPE= NODES= [GPUS=8] [SUBMIT=1] [SBATCH="--partition=p"] [SLURM="--time 8:00:00"]
	$(PY) -m tools.slurm '$(RECIPE)' --nodes $(NODES) $(if $(GPUS),--gpus $(GPUS)) $(if $(SBATCH),--sbatch='$(SBATCH)') \
	  $(SLURM) $(if $(SUBMIT),--submit) $(if $(SET),--set $(SET))

docker: ## build the image for GPUs: [CUDA=12.9 for drivers older than 580] [IMAGE=name]
	docker build --file docker/Dockerfile$(if $(filter 12.9,$(CUDA)),.cu129) --tag $(IMAGE) .

sbom: ## write a software bill of materials of the pinned packages (CycloneDX): [OUT=sbom.json]
	$(PYTHON) -m venv build/sbom
	build/sbom/bin/pip install --quiet cyclonedx-bom==7.5.0
	build/sbom/bin/cyclonedx-py requirements $(CONSTRAINTS) --output-file $(or $(OUT),sbom.json)

shell: ## open a shell in the image with this folder mounted: [MOUNT="more folders"]
	$(DOCKER_RUN) --interactive --tty $(IMAGE)

train-docker: ## run make train in the image, once on each node: RECIPE= [SET=] [GPUS=] [NODES=] [MOUNT="/models"]
	$(DOCKER_RUN) $(IMAGE) make train RECIPE='$(RECIPE)' SET='$(SET)' GPUS='$(GPUS)' NODES='$(NODES)'

test: $(READY) ## run the CPU test suite
	OMP_NUM_THREADS=1 $(PY) -m pytest

test-gpu: $(READY) ## run the tests that need an NVIDIA GPU
	$(PY) -m pytest -m gpu tests/gpu -s

test-node: $(READY) ## run the tests that need two GPUs, with a table to paste into an issue: [SRUN="--partition=p" on Slurm]
	$(if $(SRUN),srun --nodes 1 --ntasks 1 --gpus-per-node 2 --time 15 $(SRUN)) $(PY) -m pytest -m node tests/gpu -s

NULL_CUDA := build/nullcuda
test-nullcuda: ## test the CUDA path without a GPU, on a CUDA that computes nothing: needs Python 3.12, g++ and 3 GB [ARGS=...]
	tests/nullcuda/make.sh $(NULL_CUDA) $(or $(PYTHON312),python3.12)
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(NULL_CUDA)/python -m pytest -m nullcuda tests/nullcuda $(ARGS)

test-slow: $(READY) ## run the long tests
	$(PY) -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev,slow]'
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow

test-faults: $(READY) ## kill, damage and fill up, and print a table (an hour): [ARGS="--kills 40 --damages 1 ..."]
	OMP_NUM_THREADS=1 $(PY) -m tests.faults $(ARGS)

test-mutants: $(READY) ## plant faults in a copy of the sources and list those that no test sees: [ARGS="--only sampler"]
	OMP_NUM_THREADS=1 $(PY) -m tests.mutants $(ARGS)

fuzz: $(READY) ## fuzz the readers of untrusted files with atheris: [TIME=900 seconds for each of four]
	$(PY) -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev,fuzz]'
	for target in recipe records answers safetensors; do $(PY) -m tests.fuzz $$target --seconds $(or $(TIME),900) || exit 1; done

# Megatron-Core 0.17 and later declare Python 3.12 but run on 3.11: the wheel is unpacked beside the virtual environment.
NEXT := build/mcore-next
$(NEXT)/.ready: $(READY)
	$(PY) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --dest $(NEXT) \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 megatron-core==0.19.2
	$(PY) -m zipfile -e $(NEXT)/megatron_core-*.whl $(NEXT)/site
	$(PY) -m pip install --quiet --no-deps --target $(NEXT)/site triton
	@touch $@

test-mcore-next: $(NEXT)/.ready ## run the CPU test suite on the newest supported megatron-core: [ARGS="tests/weights ..."]
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(NEXT)/site $(PY) -m pytest $(ARGS)

check: $(READY) ## run ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: $(READY) ## build the documentation site in build/site, after refreshing the recipe reference
	$(PY) -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev,docs]'
	$(PY) -m spot_megatron.recipe --markdown > docs/recipe-reference.md
	$(PY) -m zensical build --strict --config-file .zensical.toml

recipe-help: $(READY) ## print every recipe key with type, default and description: [ARGS="SECTION or --markdown"]
	$(PY) -m spot_megatron.recipe $(ARGS)

# One line for a variable that is missing; values are quoted, so that paths may have spaces.
need = $(foreach name,$(1),$(if $($(name)),,$(error $(name) is not set; see `make help` for what this target takes)))
DATA = $(or $(OUT),data/run)
SERVER = $(if $(BASE_URL),--base-url $(BASE_URL)) $(if $(MODEL),--model '$(MODEL)')

elicit: $(READY) ## sample the policy's answers and grade them: QUESTIONS= BASE_URL= MODEL= [OUT=dir] [ARGS=...]
	$(call need,QUESTIONS BASE_URL MODEL)$(PY) -m tools.elicit --questions '$(QUESTIONS)' $(SERVER) --output '$(DATA)/elicit' $(ARGS)

rectify: $(READY) ## have an oracle correct the wrong answers: BASE_URL= MODEL= [OUT=dir] [ARGS="--import-human file ..."]
	$(if $(findstring -human,$(ARGS)),,$(call need,BASE_URL MODEL))$(PY) -m tools.rectify --errors '$(DATA)/elicit/errors.jsonl' $(SERVER) --output '$(DATA)/rectify' $(ARGS)

pairs: $(READY) ## filter the corrections into pairs, with a report: TOKENIZER=policy [OUT=dir] [ARGS=...]
	$(call need,TOKENIZER)$(PY) -m tools.pairs --rectified '$(DATA)/rectify/rectified.jsonl' --tokenizer '$(TOKENIZER)' --output '$(DATA)/pairs.jsonl' --report '$(DATA)/report.html' $(ARGS)

data-demo: $(READY) ## from questions to a trained model on this machine, with a local server whose calls fail one time in ten: [OUT=dir] [PORT=8765]
	@set -e; out=$(or $(OUT),runs/data_demo); url=http://127.0.0.1:$(PORT)/v1; tiny=recipes/assets/qwen3_tiny; \
	show() { printf '+'; printf ' %q' "$$@"; echo; }; run() { show "$$@"; "$$@"; }; \
	mkdir -p $$out; rm -f $$out/server.json; \
	set -- $(PY) -m tools.oracle_server --port $(PORT) --policy $$tiny --fault-rate 0.1; \
	show "$$@"; "$$@" > $$out/server.json & server=$$!; trap "kill $$server 2> /dev/null && wait $$server || true" EXIT; \
	until test -s $$out/server.json; do kill -0 $$server 2> /dev/null || { wait $$server || exit $$?; exit 1; }; sleep 0.2; done; \
	run $(PY) -m tools.elicit --questions $$tiny/questions.jsonl --base-url $$url --model tiny --output $$out/elicit --prompt-suffix "" --max-tokens 128 --token-ids --timeout 60; \
	run $(PY) -m tools.rectify --errors $$out/elicit/errors.jsonl --base-url $$url --model tiny --output $$out/rectify --timeout 60; \
	run $(PY) -m tools.pairs --rectified $$out/rectify/rectified.jsonl --tokenizer $$tiny --output $$out/pairs.jsonl --report $$out/report.html; \
	run $(PY) -m tools.launch qwen3_tiny_spot --set name=data_demo output=$$out/train data.pairs=$$out/pairs.jsonl

doctor: $(READY) ## print what this machine can run
	$(PY) -m tools.doctor

dryrun: $(READY) ## build every rank without weights or GPUs: RECIPE=name-or-file GPUS=n [GPU=h800] [PAIRS=file] [SET="key=value ..."]
	$(PY) -m tools.dryrun '$(RECIPE)' $(if $(GPUS),--gpus $(GPUS)) $(if $(GPU),--gpu $(GPU)) $(if $(PAIRS),--pairs $(PAIRS)) \
	  $(if $(SET),--set $(SET))

import-hf: $(READY) ## convert a Hugging Face folder to a Megatron distributed checkpoint: HF=dir OUT=dir [SET="parallel.tensor=2 ..."]
	$(PY) -m tools.convert import --hf $(HF) --output $(OUT) $(if $(SET),--set $(SET))

export-hf: $(READY) ## convert a Megatron distributed checkpoint to a Hugging Face folder: CHECKPOINT=dir OUT=dir
	$(PY) -m tools.convert export --checkpoint $(CHECKPOINT) --output $(OUT)

verify-hf: $(READY) ## compare two Hugging Face folders layer by layer: A=dir B=dir [ARGS=--logits ...]
	$(PY) -m tools.convert verify --a $(A) --b $(B) $(ARGS)

plan: $(READY) ## estimate memory and time of a run: RECIPE= GPUS= [GPU=h800] [ARGS="--best --figure plan.html"]
	$(PY) -m tools.plan '$(RECIPE)' --gpus $(or $(GPUS),8) --gpu $(or $(GPU),h800) $(if $(SET),--set $(SET)) $(ARGS)

report: $(READY) ## write report.html of a run: RUN=dir [AGAINST="other runs"]
	$(PY) -m tools.report $(RUN) $(if $(AGAINST),--against $(AGAINST))

reproduce: $(READY) ## train a finished run again and compare metrics and weights: RUN=dir
	$(PY) -m tools.reproduce $(RUN)

eval: $(READY) ## evaluate a model: MODEL=dir [BASE=dir] [QUESTIONS=file or BENCHMARKS="aime24=file ..."] [ARGS="--base-url URL ..."]
	$(PY) -m tools.eval --model $(MODEL) $(if $(BASE),--base $(BASE)) $(if $(BENCHMARKS),--benchmark $(BENCHMARKS),--questions $(or $(QUESTIONS),recipes/assets/qwen3_tiny/heldout.jsonl)) $(ARGS)

study: $(READY) ## train the tiny model under every objective of the paper and compare: [SET="key=value ..."]
	$(PY) -m tools.study $(if $(SET),--set $(SET))

bench: $(READY) ## measure speed and memory against TRL, interleaved: [ARGS="--trl newest --responses 600 ..."]
	$(PY) -m benchmarks.against_trl $(ARGS)

bench-gpu: $(READY) ## measure attention, LM head, steps and memory against the plan on one GPU: [ARGS="--parts step_8b ..."]
	$(PY) -m benchmarks.gpu_suite $(ARGS)

tiny: $(READY) ## make the embedded model and its pairs again: [OUT=dir] (about 15 minutes on a core)
	$(PY) -m tools.tiny.make --output $(or $(OUT),recipes/assets/qwen3_tiny)

clean: ## remove the virtual environment and caches; runs/ is kept
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .cache

.PHONY: docs recipe-help elicit rectify pairs data-demo help setup train slurm docker shell train-docker test test-slow test-faults test-mutants fuzz reproduce test-gpu test-node test-nullcuda sbom test-mcore-next check doctor import-hf export-hf verify-hf plan dryrun report eval study bench bench-gpu tiny clean
