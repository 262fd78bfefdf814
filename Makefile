# Each target but test-gpu and clean makes .venv when there is none, or when pyproject.toml or constraints.txt have changed.
# PYTHON: the interpreter that .venv is made from. DEMO_ARGS: options of the demo, e.g. DEMO_ARGS=--quick.

PYTHON ?= python3
DEMO_ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
INTEGRATION := $(VENV)/integration-installed
BENCH := $(VENV)/bench-installed
NEWER_TRITON := build/triton-3.9.0
PIP_INSTALL := $(RUN) -m pip install --disable-pip-version-check -c constraints.txt
TOO_OLD := "Python 3.10 or newer is needed: make PYTHON=python3.12, for one"

.DEFAULT_GOAL := help
.PHONY: help demo test test-newer integration bench bench-kernels test-gpu lint kernels-check ops-table clean

help:
	@echo 'make demo           train a deep equilibrium model on handwritten digits (DEMO_ARGS=--quick: shorter)'
	@echo 'make test           the tests, then those of the Triton kernels in the interpreter'
	@echo 'make test-newer     the tests of the Triton kernels with a newer Triton than torch asks for'
	@echo 'make integration    the tests beside TorchOpt, which it installs too (Python 3.10 to 3.12)'
	@echo 'make bench          the benchmarks, briefly, beside peers, which it installs too'
	@echo 'make bench-kernels  the kernels alone, briefly, each against the same in plain torch'
	@echo 'make test-gpu       the tests that need a GPU, by $$(PYTHON) as it is: nothing is installed'
	@echo 'make lint           style, types, and the layers of the packages'
	@echo 'make kernels-check  compile every kernel for each supported GPU and judge the code'
	@echo 'make ops-table      count the passes of every op anew, for docs/kernels.md'
	@echo 'make clean          remove .venv, builds and caches'

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and $(TOO_OLD))'
	@echo 'installing into $(VENV) (the first time takes minutes, longer where torch brings CUDA along)'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) -q -e '.[dev]' || { echo 'that failed; once more, with all that pip says:'; $(PIP_INSTALL) -e '.[dev]'; }
	@touch $@

$(INTEGRATION): $(INSTALLED)
	$(PIP_INSTALL) -q -e '.[integration]'
	@touch $@

$(BENCH): $(INSTALLED)
	$(PIP_INSTALL) -q -e '.[bench]'
	@touch $@

demo: $(INSTALLED)
	$(RUN) examples/deq_digits.py $(DEMO_ARGS)

# Triton reads TRITON_INTERPRET once, at import: its interpreter needs a process of its own.
test: $(INSTALLED)
	$(RUN) -m pytest
	TRITON_INTERPRET=1 $(RUN) -m pytest -m interpreter

# A folder that comes before .venv: pip would not install that Triton beside torch's CUDA build.
$(NEWER_TRITON):
	$(RUN) -m pip install --disable-pip-version-check -q --no-deps --target $@.part $(subst build/triton-,triton==,$@)
	mv $@.part $@

test-newer: $(INSTALLED) $(NEWER_TRITON)
	PYTHONPATH=$(NEWER_TRITON) $(RUN) -c 'import triton; assert triton.__file__.startswith("$(CURDIR)/$(NEWER_TRITON)"), triton'
	PYTHONPATH=$(NEWER_TRITON) $(RUN) -m pytest tests/kernels/test_launch.py tests/kernels/test_sizes.py
	PYTHONPATH=$(NEWER_TRITON) TRITON_INTERPRET=1 $(RUN) -m pytest tests/kernels -m interpreter

# The directory is named because pytest leaves it out by itself; without TorchOpt its tests are errors.
integration: $(INTEGRATION)
	$(RUN) -m pytest tests/integration

# Brief runs are not kept among the results.
bench: $(BENCH)
	$(RUN) -m bench run --quick --out build/bench

bench-kernels: $(INSTALLED)
	$(RUN) -m tritonimplicit_kernels.bench --quick --out build/bench-kernels

test-gpu:
	PYTHONPATH=.:kernels $(PYTHON) -m pytest -m gpu

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

kernels-check: $(INSTALLED)
	$(RUN) -m tools.kernels_check

# Passes and launches are counted in Triton's interpreter; a test tells when this is due.
ops-table: $(INSTALLED)
	TRITON_INTERPRET=1 $(RUN) -m tools.ops_table

clean:
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
