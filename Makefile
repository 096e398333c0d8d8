# speeder-engine: `make` lists the targets

PYTHON ?= python3
# installed before everything else; a build for another device: make setup TORCH="--index-url URL torch==2.13.0"
TORCH ?= torch==2.13.0
# real data for `make demo`: a folder with items, interactions and images
DATA ?=
# processes that run the tests
WORKERS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
INSTALLED := .venv/.installed
LAYOUT := build/layout/speeder_engine
RARELY := site-packages/(pip|transformers/models|.*/tests?)/
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.DELETE_ON_ERROR:
.PHONY: help setup demo test lint types kernels bench bench-guard gpu sanitize sanitize-cache sanitize-cpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## make .venv with everything in it (PYTHON=python3.12, TORCH=...)

demo: setup  ## train, export and recommend on a made catalogue, or on a real one with DATA=folder
	$(BIN)/speeder demo $(if $(DATA),--data "$(DATA)")

test: setup lint types  ## lint, types and tests (FULL=1: ten times as many random steps of the cache manager)
	$(BIN)/pytest tests -n $(WORKERS) --dist loadfile

lint: setup  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy can't follow the editable finder: it gets the package as a tree of links
types: setup  ## mypy, strict on the package and the benchmarks
	@rm -rf build/layout && mkdir -p $(LAYOUT)
	@cd $(LAYOUT) && ln -s ../../../engine/* ../../../triton_kernels ../../../export .
	$(BIN)/mypy

kernels: setup  ## compile every Triton kernel for every GPU, with none here: registers, spills, shared memory
	$(BIN)/python bench/compile_kernels.py

bench: setup  ## everything side by side with its alternatives, 15 minutes (ARGS="latency --shape tiny")
	$(BIN)/python bench/run.py $(or $(ARGS),all --shape 0.5b)

bench-guard: setup  ## ratios and instruction counts against the committed ones (ARGS=--update)
	$(BIN)/python bench/guard.py $(ARGS)

# nothing of .venv: the machine's own Python, with CUDA's torch in it
gpu:  ## build, test and measure on a machine with CUDA, with its own python3 and no network (OUT=folder)
	@$(PYTHON) bench/make_gpu.py $(if $(OUT),--out "$(OUT)")

SANITIZE = $(CXX) -std=c++20 -g -O1
CACHE_STRESS = -Icsrc tests/native/stress.cpp csrc/[bs]*_*.cpp
CPU_STRESS = -Icsrc/cpu tests/native/cpu_stress.cpp $(filter-out %/bindings.cpp,$(wildcard csrc/cpu/*.cpp))
ADDRESS = -fsanitize=address,undefined -fno-sanitize-recover=all
THREAD = -fsanitize=thread
TIMES_TEN := $(if $(FULL),0)

sanitize:  ## random cache operations, layouts and CPU passes under ASan+UBSan and, on several threads, TSan (FULL=1: ten times as many)
	@mkdir -p build
	@$(MAKE) --no-print-directory -j2 sanitize-cache sanitize-cpu

sanitize-cache:
	$(SANITIZE) $(CACHE_STRESS) $(ADDRESS) -o build/stress-address
	build/stress-address 1000000$(TIMES_TEN)
	$(SANITIZE) $(CACHE_STRESS) $(THREAD) -o build/stress-thread
	build/stress-thread 500000$(TIMES_TEN) 4
	$(SANITIZE) -Icsrc tests/native/row_stress.cpp csrc/row_layout.cpp $(ADDRESS) -o build/row-stress
	build/row-stress 100000$(TIMES_TEN)

sanitize-cpu:
	$(SANITIZE) $(CPU_STRESS) $(ADDRESS) -o build/cpu-stress-address
	build/cpu-stress-address 30$(TIMES_TEN)
	$(SANITIZE) $(CPU_STRESS) $(THREAD) -o build/cpu-stress-thread
	build/cpu-stress-thread 30$(TIMES_TEN)

clean:  ## remove everything made here: .venv, builds, caches, demo
	rm -rf .venv build dist demo *.egg-info engine/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find engine triton_kernels export tests bench -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/pip:
	@echo "making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "speeder-engine needs Python 3.11 or newer: make PYTHON=python3.11")'
	@$(PYTHON) -m venv .venv

# the first torch stays: the constraint keeps what follows from replacing it; bytecode on all cores, pip would take one,
# and without what is next to never imported
$(INSTALLED): $(SOURCES) | $(BIN)/pip
	@echo "installing $(TORCH)"
	@$(PIP) install --no-compile $(TORCH)
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > .venv/constraints.txt
	@echo "installing speeder-engine with its tools, building its C++ extension"
	@$(PIP) install --no-compile --constraint .venv/constraints.txt --editable ".[dev]"
	@$(BIN)/python -m compileall -qq -j 0 -x '$(RARELY)' .venv/lib || true  # some packages ship files of other Pythons
	@touch $@
