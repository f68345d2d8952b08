# Every target makes the virtual environment and installs what it needs, once.
# Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.PHONY: help setup demo check test full faults docs bench clean
help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/'

setup: .venv/.dev  ## the virtual environment with everything that tests need

demo: .venv/.core  ## train on the shipped photographs, evaluate, explain: runs/demo/report.html
	$(BIN)/vitrail demo

check: .venv/.dev  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: .venv/.dev  ## the tests of every change
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

full: .venv/.dev  ## the slow tests too: every registered model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m ""

faults: .venv/.dev  ## what may go wrong: every case of docs/reliability.md
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m fault

docs: .venv/.dev  ## run every block of README.md and docs/
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/docs

bench: .venv/.bench  ## speed beside timm, torchvision, transformers and vit-pytorch, as tables
	$(BIN)/python benchmarks/ceiling.py
	$(BIN)/python benchmarks/forward.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/recording.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/augmentation.py

clean:  ## remove the virtual environment and caches
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("vitrail needs Python 3.11 or newer; got %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	@echo "installing into .venv, which takes a minute or two and says nothing meanwhile"

.venv/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) .
	@touch $@

.venv/.bench: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[dev,bench]'
	@touch .venv/.core .venv/.dev $@

.venv/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[dev]'
	@touch .venv/.core $@
