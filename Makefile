# `make train` on a fresh clone sets up, fuses the demo, trains on it and leaves pictures. `make help` lists the rest.
#
# Real use gives the same commands variables; a path with spaces needs quotes inside its variable:
#   make fuse BASE=models/Qwen-Image LORAS="lightning.safetensors 'my style.safetensors:0.8'" FUSED=models/fused
#   make train FUSED=models/fused DATASET=data/mine OUT=models/my-lora ARGS="--lora_rank 32"

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.lorafuse-installed

DEMO := examples/shapes
BUILD := build/demo

BASE ?= $(DEMO)/base
LORAS ?= $(DEMO)/lightning.safetensors
FUSED ?= $(BUILD)/fused
DATASET ?= $(BUILD)/dataset
OUT ?= $(BUILD)/lora
ARGS ?=
FUSE_ARGS ?=
LAUNCH_ARGS ?= --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

# What the demo trains with; used only on the demo's own data set.
DEMO_ARGS := --config $(DEMO)/train.yaml --original_model $(DEMO)/base --overwrite_output_dir

# A fused checkpoint that was named without saying of what is taken as it is, not made from the demo.
TRAIN_NEEDS := fuse
ifneq ($(origin FUSED),file)
ifeq ($(origin BASE),file)
TRAIN_NEEDS := $(STAMP)
endif
endif
ifeq ($(DATASET),$(BUILD)/dataset)
TRAIN_NEEDS += $(BUILD)/dataset/metadata.csv
TRAIN_ARGS = $(DEMO_ARGS)
endif

.PHONY: help setup demo fuse train test check format experiment bench bench-fuse bench-fuse-scaling bench-step clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' Makefile
	@echo; sed -n 's/^# \{0,1\}//p' Makefile | head -5

setup: $(STAMP) ## Make .venv with everything in it

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -c constraints.txt -e ".[dev]"
	touch $@

demo: $(BUILD)/dataset/metadata.csv ## Draw the demo's data set

$(BUILD)/dataset/metadata.csv: $(DEMO)/make_dataset.py $(DEMO)/drawing.py | $(STAMP)
	$(BIN)/python $(DEMO)/make_dataset.py --out $(BUILD)/dataset

fuse: $(STAMP) ## Fuse LORAS into BASE as FUSED (default: the demo); does nothing when it is up to date
	@loras=($(LORAS)); $(BIN)/lorafuse fuse $(BASE) "$${loras[@]/#/--lora=}" --out $(FUSED) --force $(FUSE_ARGS)

train: $(TRAIN_NEEDS) ## Train a LoRA on FUSED with DATASET as OUT (default: the demo)
	@$(BIN)/accelerate launch $(LAUNCH_ARGS) -m lorafuse_train train --fused_model $(FUSED) \
	  --dataset_base_path $(DATASET) --output_path $(OUT) $(TRAIN_ARGS) $(ARGS)

test: $(STAMP) ## Run the tests (CPU, no network)
	@$(BIN)/python -m pytest -n 2 -q

check: $(STAMP) ## Lint, check the format and the types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(STAMP) ## Format the code
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

# make bench-fuse SIZE=12 ROUNDS=7 RANK=256 LORAS=2 COLD=1 ONLY="lorafuse naive" OUT=/mnt/disk/bench KEEP=1
# COLD=1: inputs not in the page cache; COLD=all: nothing is (root). Also PEER_SIZE and PEER_ROUNDS (spare other
# programs), FUSE_ARGS, and for bench-fuse-scaling SIZES="3 6 12". Needs SIZE for the base and as much for a result.
bench-fuse bench-fuse-scaling: OUT = build/bench
bench-fuse: LORAS = 1
bench-fuse bench-fuse-scaling: SIZE ?= 6
bench-fuse bench-fuse-scaling: ROUNDS ?= 5
bench-fuse bench-fuse-scaling: RANK ?= 64
bench-fuse-scaling: SIZES ?= 3 6 12
BENCH_STATES := 0=warm 1=cold all=all-cold
BENCH_STATE = $(or $(patsubst $(COLD)=%,%,$(filter $(COLD)=%,$(BENCH_STATES))),$(COLD),warm)
BENCH_ARGS = --size $(SIZE) --rounds $(ROUNDS) --rank $(RANK) --state $(BENCH_STATE) --out "$(OUT)" \
  --fuse-args="$(FUSE_ARGS)" $(if $(filter 1,$(KEEP)),--keep)

bench: bench-fuse bench-step ## Run the benchmarks; see bench-fuse and bench-step

bench-fuse: $(STAMP) ## Compare a fuse with cp, diffusers, peft (SIZE=6 ROUNDS=5 RANK=64 LORAS=1 COLD=0 ONLY= OUT=)
	@$(BIN)/python -m benchmarks.fuse $(BENCH_ARGS) --loras $(LORAS) $(if $(ONLY),--only $(ONLY)) \
	  $(if $(PEER_SIZE),--peer-size $(PEER_SIZE)) $(if $(PEER_ROUNDS),--peer-rounds $(PEER_ROUNDS))

bench-fuse-scaling: $(STAMP) ## How a fuse grows with SIZES="3 6 12", rank and number of LoRAs; start-up times
	@$(BIN)/python -m benchmarks.scaling $(BENCH_ARGS) --sizes $(SIZES)

bench-step: $(STAMP) ## Time a LoRA step beside diffusers' own loop, at the real size on a GPU (STEP_ARGS="--rank 16")
	@$(BIN)/python -m benchmarks.train_step $(STEP_ARGS)

# make experiment SEEDS=1 STEPS=240 STYLE=neon ONLY="plain default" DOCS=build/experiment; go on with the same command.
experiment: SEEDS ?= 3
experiment: STEPS ?= 480
experiment: JOBS ?= 1
experiment: STYLE ?= ink
experiment: DOCS ?= docs
experiment: OUT = build/experiment

experiment: $(STAMP) ## Compare ways to train on a few-step base, docs/few-step.md (SEEDS=3 STEPS=480 JOBS=1 STYLE= OUT=)
	@$(BIN)/python $(DEMO)/experiment.py --out "$(OUT)" --docs "$(DOCS)" --seeds $(SEEDS) --steps $(STEPS) \
	  --jobs $(JOBS) --style $(STYLE) $(if $(ONLY),--only $(ONLY)) $(EXPERIMENT_ARGS)

clean: ## Remove what the demo made (not .venv)
	rm -rf build
