# Two targets do everything on a fresh machine; both make .venv first if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Neither Ray nor the hub client reports usage from here
export RAY_USAGE_STATS_ENABLED = 0
export HF_HUB_DISABLE_TELEMETRY = 1
DEMO ?= demo-out
EVIDENCE ?= evidence-out
FORM ?= quick
# Files of tests, and runs of the evidence, side by side
JOBS ?= 2
# The images in docker/ install one half each with the same target
EXTRAS ?= pipeline,trainer,dev

.PHONY: help install peers demo evidence test lint types imports pytest clean

help:
	@echo "make demo    install, then photographs -> features -> trained student, in minutes on a CPU (results in $(DEMO)/)"
	@echo "make evidence  does it work? a toy world's experiment, added to examples/toyworld/results and docs/results.md (FORM=quick, full or confirmation; AGAIN=1 compares with runs made anew)"
	@echo "make test    install, then ruff, mypy --strict, import rules and the test suite"
	@echo "make clean   remove $(DEMO)/ and caches (not .venv)"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $(STAMP)

# what benchmarks/store_read.py compares the store with: an environment of its own on top of this one
peers: install
	PYTHON=$(BIN)/python benchmarks/peers/install.sh

demo: install
	$(BIN)/python examples/demo/run.py $(DEMO)

# What the results hold already is not run again
evidence: install
	$(BIN)/python examples/toyworld/evidence.py $(EVIDENCE) --form $(FORM) --jobs $(JOBS) $(if $(AGAIN),--again)

test: lint types imports pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

imports: install
	$(BIN)/lint-imports --no-cache

pytest: install
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

clean:
	rm -rf $(DEMO) .mypy_cache .ruff_cache .pytest_cache .hypothesis build
