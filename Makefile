# make demo, make test: each makes .venv when it is needed, and installs again only when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
# Several processes at once, each on one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet
IN_PARALLEL := --numprocesses=auto --maxprocesses=4 --dist=loadfile
OLDEST_KERAS := 3.12.4
OLDEST_KERAS_FOLDER := $(VENV)/keras-$(OLDEST_KERAS)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint format bench results clean

help:
	@echo "make demo    prune a small network by M-FAC and by magnitude, and compare"
	@echo "make test    lint, types, import rules and tests"
	@echo "make lint    the same without the tests"
	@echo "make format  put the code into its standard form"
	@echo "make bench   measure speed and memory on the CPU (about 15 minutes; for a GPU: tests/benchmarks/bench_gpu.py)"
	@echo "make results measure accuracy on the digits over ten seeds, and write docs/results.md"
	@echo "make clean   remove .venv, caches and builds"
	@echo "Another Python: make PYTHON=python3.12 test"

demo: $(VENV)/.installed-demo
	@$(BIN)/mfac demo

test: lint $(OLDEST_KERAS_FOLDER)/.installed
	@echo "== tests"
	@$(PYTEST) $(IN_PARALLEL) --ignore=tests/adapters/keras
	@for backend in tensorflow torch jax; do \
	  echo "== tests: Keras on $$backend"; \
	  KERAS_BACKEND=$$backend $(PYTEST) $(IN_PARALLEL) tests/adapters/keras || exit 1; \
	done
	@echo "== tests: Keras $(OLDEST_KERAS), the oldest that is supported, on torch"
	@# torch.compile takes minutes to compile its step.
	@PYTHONPATH=$(abspath $(OLDEST_KERAS_FOLDER)) KERAS_BACKEND=torch $(PYTEST) $(IN_PARALLEL) \
	  -m "not jit_compile" tests/adapters/keras

lint: $(VENV)/.installed-test
	@echo "== ruff: rules"
	@$(BIN)/ruff check
	@echo "== ruff: format"
	@$(BIN)/ruff format --check
	@echo "== mypy: types"
	@$(BIN)/mypy
	@echo "== import-linter: imports run one way"
	@$(BIN)/lint-imports --no-logo

format: $(VENV)/.installed-test
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: $(VENV)/.installed-test
	@$(BIN)/python tests/benchmarks/bench_pruning_step.py

results: $(VENV)/.installed-demo
	@$(BIN)/python tests/benchmarks/digits_results.py

clean:
	@rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find mfac_core adapters tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Removed $(VENV), caches and builds."

# Both installs share one environment, and the one for tests holds the one for the demo.
$(VENV)/.installed-demo: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing mfac-core, PyTorch and the packages of the demo into $(VENV) (several minutes the first time)"
	@$(INSTALL) --editable ".[torch,demo]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing mfac-core, PyTorch, TensorFlow, JAX and the test tools into $(VENV) (several minutes the first time)"
	@$(INSTALL) --editable ".[torch,demo,dev]"
	@touch $(VENV)/.installed-demo $@

$(OLDEST_KERAS_FOLDER)/.installed: $(VENV)/.installed-test
	@echo "Installing Keras $(OLDEST_KERAS) into $(OLDEST_KERAS_FOLDER)"
	@rm -rf $(OLDEST_KERAS_FOLDER)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps --target $(OLDEST_KERAS_FOLDER) \
	  keras==$(OLDEST_KERAS)
	@touch $@

$(VENV)/.created:
	@command -v "$(PYTHON)" > /dev/null || { \
	  echo "There is no $(PYTHON) here. Install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=python3.12"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1), but mfac-core needs Python 3.11, 3.12 or 3.13." \
	       "Name one: make PYTHON=python3.12"; exit 1; }
	@echo "Making $(VENV) with $$("$(PYTHON)" --version 2>&1)"
	@"$(PYTHON)" -m venv $(VENV)
	@touch $@
