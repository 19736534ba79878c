# The two commands: `make run` and `make test`. Both set up what they need in .venv first and re-use it afterwards.
# Another interpreter: make PYTHON=/path/to/python3.12 run      Arguments of the run: make run ARGS="--max-new-tokens 64"

SHELL   := /bin/sh
VENV    := .venv
BIN     := $(VENV)/bin
PYTHON  ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
             $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null && { echo $$p; break; }; done)
# An environment made in another folder points there: the stamps carry the folder they were made in.
HERE    := $(shell pwd | cksum | cut -d' ' -f1)
MADE    := $(VENV)/.made-$(HERE)
RUNS    := $(VENV)/.runs-$(HERE)
TESTS   := $(VENV)/.tests-$(HERE)
SITE    := $(VENV)/.site-$(HERE)
PIP     := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# Tests run in as many processes as there are processors, at most four; one: make test WORKERS=0 ARGS=--pdb
WORKERS ?= auto
PYTEST  := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal
ARGS    ?=

.PHONY: help run test test-all lint bench docs clean setup

help:
	@echo 'make run       set up, then stream, run, generate with and verify the model that ships with the package'
	@echo 'make test      set up, then the default tests          make test-all   with the slow ones, and without the JIT'
	@echo 'make lint      ruff and mypy --strict                  make bench      benchmarks (pytest-benchmark)'
	@echo 'make docs      the documentation as a site, in site/'
	@echo 'make clean     remove .venv, build products and tool caches'

run: $(RUNS)
	@$(BIN)/wse-emu run $(ARGS)

test: $(TESTS)
	$(PYTEST) $(ARGS)

test-all: $(TESTS)
	$(PYTEST) -m 'not oracle' $(ARGS)
	NUMBA_DISABLE_JIT=1 $(BIN)/python -m pytest -m 'nojit and not slow' $(ARGS)

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(TESTS)
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

docs: $(SITE)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'site/index.html'

setup: $(TESTS)

$(MADE):
	@test -n '$(PYTHON)' || { echo 'wse-emu needs Python 3.11 or newer: apt-get install python3, or make PYTHON=/path/to/python' >&2; exit 1; }
	@echo 'Setting up $(VENV) with $(PYTHON) (once; needs the network) ...'
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); $(PYTHON) -m virtualenv --quiet $(VENV); } 2>/dev/null \
	  || { rm -rf $(VENV); echo 'could not make a virtual environment: apt-get install python3-venv' >&2; exit 1; }
	@touch $@

$(RUNS): $(MADE) pyproject.toml
	@$(PIP) --editable .
	@touch $@

$(TESTS): $(MADE) pyproject.toml
	@$(PIP) --editable '.[dev]'
	@touch $@ $(RUNS)

$(SITE): $(MADE) pyproject.toml
	@$(PIP) --editable '.[docs]'
	@touch $@ $(RUNS)

clean:
	rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .coverage htmlcov
	find wse_emu kernels tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
