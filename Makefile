# Every verb works on a fresh clone. `make` alone lists them.

PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
CASES ?= 100000
MUTANTS ?= /tmp/slipstream-mutants
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Sizes that make a benchmark take seconds; one that is not listed runs at its own size.
SMALL_bench_busy := --samples 4000 --rounds 1 --networks tiny
SMALL_bench_cached := --rows 50000 --batch 128 --cache-ratio 0.2 --warmup-steps 4 --steps 8 --rounds 1
SMALL_bench_cold_path := --memory 1GiB --table 8MiB --steps 4 --batch 128
SMALL_bench_compression := --seeds 1 --ways none,int4 --set dataset.num_samples=8000
SMALL_bench_lists := --rows 3000 --steps 3 --batch 128 --table-rows 2000 --rounds 1
SMALL_bench_memory := --samples 4000,8000
SMALL_bench_preprocess := --rows 20000 --slow-rows 2000
SMALL_bench_quality := --rows 4000 --seeds 1 --pipeline tiny --set dataset.source=criteo
SMALL_bench_quantized := --rows 20000 --batch 256 --steps 4 --rounds 1 --tables 4
SMALL_bench_scaling := --samples 8000 --batch 256 --rounds 1
SMALL_bench_score := --rows 20000 --rounds 1
SMALL_bench_serve := --rows 5000 --samples 500 --calls 5
SMALL_bench_size := --rounds 1 --budgets 10% --set dataset.num_samples=4000
SMALL_bench_tables := --seeds 1 --steps 20 --set dataset.num_samples=5000
SMALL_bench_train := --rows 20000 --steps 4 --batch 64 --rounds 1
SMALL_bench_segregate := --rows 20000 --slow-rows 2000
SMALL_bench_tt := --rows 50000 --ranks 8 --batch 128 --steps 3 --distribution zipf

.DEFAULT_GOAL := help
.PHONY: help setup all cluster-demo test test-all fuzz mutants test-gpu lint fmt type bench docs golden clean distclean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(STAMP): pyproject.toml constraints.txt
	@echo 'installing into $(VENV); the first time takes minutes'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(STAMP) ## make .venv and install slipstream into it; does nothing when nothing changed

all: setup ## set up, run the shipped pipeline `tiny` from raw text to trained model, write its report
	$(BIN)/slipstream run --runs $(RUNS)
	$(BIN)/slipstream report --runs $(RUNS) --out $(RUNS)/tiny/report.html

test: setup ## run the tests that take seconds each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-all: setup ## run the slow tests too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not gpu"

fuzz: setup ## damage what every reader reads, 100,000 times each (CASES=1000 for a look)
	OMP_NUM_THREADS=1 SLIPSTREAM_FUZZ=$(CASES) $(BIN)/python -m pytest -n auto --dist worksteal --timeout 0 $(if $(wildcard /dev/shm),--basetemp=/dev/shm/slipstream-fuzz) tests/fuzz

mutants: $(STAMP) ## change the code on purpose, 400 times, and see whether a test notices; goes on where it stopped
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[mutants]'
	$(BIN)/python benchmarks/mutants.py --work $(MUTANTS)

test-gpu: setup ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

cluster-demo: setup ## run `tiny` on two workers and two ranks of this machine; nothing of it runs on
	$(BIN)/python examples/cluster_demo.py tiny --runs $(RUNS)/cluster-demo

lint: setup ## check code style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fmt: setup ## put code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup ## check types
	$(BIN)/mypy

bench: setup ## run every benchmark once at a small size: they work, the figures mean nothing
	@set -e; $(foreach file,$(sort $(wildcard benchmarks/bench_*.py)), \
	  echo; echo "== $(file) $(SMALL_$(basename $(notdir $(file))))"; \
	  $(BIN)/python $(file) $(SMALL_$(basename $(notdir $(file))));)

docs: setup ## write docs/reference from the command line and the config dataclasses
	$(BIN)/python docs/generate_reference.py

golden: setup ## renew tests/golden; review the change like code
	SLIPSTREAM_GOLDEN=renew $(BIN)/python -m pytest -m "not gpu" -k golden

clean: ## remove caches and what killed runs left behind; finished runs stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	@if [ -d $(RUNS) ]; then find $(RUNS) -mindepth 3 -maxdepth 3 -type d \
	  \( -name '.*.partial' -o -name '.*.removed' \) -prune -exec rm -rf {} +; fi

distclean: clean ## clean, and remove all runs and .venv too
	rm -rf $(RUNS) $(VENV)
