# Each target creates .venv when needed, and installs again only if pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
# Several processes in parallel, each on one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet
IN_PARALLEL := --numprocesses=auto --maxprocesses=4 --dist=loadfile
# The extra that installs CuPy for `make bench-gpu`; PyTorch brings the CUDA that it was built for.
CUDA ?= cuda13
OLDEST_KERAS := 3.12.4
OLDEST_KERAS_FOLDER := $(VENV)/keras-$(OLDEST_KERAS)
LOWEST := $(VENV)/lowest

# The parts of `make test`, `make lint` and `make test-core`; each is a target of its own.
LINT_RULES := lint-rules lint-format lint-imports
LINT := $(LINT_RULES) lint-types
TESTS := tests-core tests-torch tests-keras-tensorflow tests-keras-torch tests-keras-jax tests-keras-oldest test-lowest
# Runs all of the parts, whichever of them fail.
RUN_PARTS := $(BIN)/python tests/run_parts.py $(MAKE)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-core lint format bench bench-gpu results clean $(LINT) lint-types-core $(TESTS)

help:
	@echo "make demo        prune a small network by M-FAC and by magnitude, and compare them"
	@echo "make test        lint, types, import rules and all tests; runs to the end and prints a summary"
	@echo "make test-core   the same for the core alone; installs no framework"
	@echo "make test-lowest tests of the core with the lowest versions that pyproject.toml allows"
	@echo "make lint        rules, format, imports and types, without tests"
	@echo "make format      fix what ruff can fix, and format the code"
	@echo "make bench       measure speed, memory and error on the CPU (about 20 minutes)"
	@echo "make bench-gpu   test and measure on an NVIDIA GPU (8 minutes; for CUDA 12: make bench-gpu CUDA=cuda12)"
	@echo "make results     measure accuracy over five seeds, and write docs/results.md (about 35 minutes on two cores)"
	@echo "make clean       remove .venv, caches and builds"
	@echo "Parts of make test: make $(firstword $(LINT)), make $(firstword $(TESTS)), ..."
	@echo "With another Python: make PYTHON=python3.12 test"

demo: $(VENV)/.installed-demo
	@$(BIN)/mfac demo

test: $(VENV)/.installed-test
	@$(RUN_PARTS) $(LINT) $(TESTS)

test-core: $(VENV)/.installed-core
	@$(RUN_PARTS) $(LINT_RULES) lint-types-core tests-core

lint: $(VENV)/.installed-test
	@$(RUN_PARTS) $(LINT)

lint-rules: $(VENV)/.installed-core
	@$(BIN)/ruff check

lint-format: $(VENV)/.installed-core
	@$(BIN)/ruff format --check

lint-imports: $(VENV)/.installed-core
	@$(BIN)/lint-imports --no-logo

lint-types: $(VENV)/.installed-test
	@$(BIN)/mypy

lint-types-core: $(VENV)/.installed-core
	@$(BIN)/mypy mfac_core

tests-core: $(VENV)/.installed-core
	@$(PYTEST) $(IN_PARALLEL) tests/core mfac_core

tests-torch: $(VENV)/.installed-test
	@$(PYTEST) $(IN_PARALLEL) tests/adapters/torch tests/gpu

tests-keras-tensorflow tests-keras-torch tests-keras-jax: tests-keras-%: $(VENV)/.installed-test
	@KERAS_BACKEND=$* $(PYTEST) $(IN_PARALLEL) tests/adapters/keras

# The oldest supported Keras. torch.compile takes minutes to compile its step.
tests-keras-oldest: $(OLDEST_KERAS_FOLDER)/.installed
	@PYTHONPATH=$(abspath $(OLDEST_KERAS_FOLDER)) KERAS_BACKEND=torch $(PYTEST) $(IN_PARALLEL) \
	  -m "not jit_compile" tests/adapters/keras

test-lowest: $(LOWEST)/.installed
	@OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest --quiet $(IN_PARALLEL) tests/core

format: $(VENV)/.installed-core
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: $(VENV)/.installed-test
	@$(BIN)/python tests/benchmarks/bench_pruning_step.py

bench-gpu: $(VENV)/.installed-gpu
	@$(BIN)/python tests/benchmarks/bench_gpu.py

results: $(VENV)/.installed-demo
	@$(BIN)/python tests/benchmarks/results.py

clean:
	@rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find mfac_core adapters tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Removed $(VENV), caches and builds."

# These installs share one environment; the one for all tests includes the other two.
$(VENV)/.installed-demo: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing mfac-core, PyTorch and the packages of the demo into $(VENV) (several minutes the first time)"
	@$(INSTALL) --editable ".[torch,demo]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing mfac-core, PyTorch, TensorFlow, JAX and the test tools into $(VENV) (several minutes the first time)"
	@$(INSTALL) --editable ".[torch,demo,dev]"
	@touch $(VENV)/.installed-demo $(VENV)/.installed-core $@

$(VENV)/.installed-core: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing mfac-core and the tools for its tests into $(VENV)"
	@$(INSTALL) --editable ".[lint,test-core]"
	@touch $@

$(VENV)/.installed-gpu: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing mfac-core, PyTorch, CuPy for $(CUDA) and the test tools into $(VENV) (several minutes)"
	@$(INSTALL) --editable ".[torch,$(CUDA),test-core]"
	@touch $@

$(OLDEST_KERAS_FOLDER)/.installed: $(VENV)/.installed-test
	@echo "Installing Keras $(OLDEST_KERAS) into $(OLDEST_KERAS_FOLDER)"
	@rm -rf $(OLDEST_KERAS_FOLDER)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps --target $(OLDEST_KERAS_FOLDER) \
	  keras==$(OLDEST_KERAS)
	@touch $@

$(LOWEST)/.installed: $(VENV)/.created pyproject.toml
	@echo "Installing the lowest versions that pyproject.toml allows into $(LOWEST)"
	@"$(PYTHON)" -m venv --clear $(LOWEST)
	@$(LOWEST)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --only-binary :all: \
	  $$("$(PYTHON)" tests/lowest_versions.py)
	@touch $@

$(VENV)/.created:
	@command -v "$(PYTHON)" > /dev/null || { \
	  echo "$(PYTHON) was not found. Install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=python3.12"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1), but mfac-core needs Python 3.11, 3.12 or 3.13." \
	       "Name one: make PYTHON=python3.12"; exit 1; }
	@echo "Creating $(VENV) with $$("$(PYTHON)" --version 2>&1)"
	@"$(PYTHON)" -m venv $(VENV)
	@touch $@
