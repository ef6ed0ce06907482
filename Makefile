# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test lint format docs clean

help:
	@echo "make demo   the whole pipeline on a small real model"
	@echo "make test   the test suite"
	@echo "make lint   linters, types, and whether generated pages are up to date"
	@echo "make docs   write docs/cli.md from --help, and the tables of docs/scale.md"
	@echo "make format sort imports and lay out the code"
	@echo "make clean  remove the virtual environment and builds"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

# Re-running reuses what is done: remove runs/demo to start over.
demo: $(STAMP)
	$(BIN)/factorctl demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/render_cli.py --check
	$(BIN)/python docs/render_scale.py --check

docs: $(STAMP)
	$(BIN)/python docs/render_cli.py
	$(BIN)/python docs/render_scale.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
