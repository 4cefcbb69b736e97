# Every target makes its own environment: a fresh machine needs Python 3.10 or newer, make and a package index.
PYTHON ?= python3
# The version that tests and demo were run with. The package itself pins nothing.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
CHECKED := stylemaster_core nodes tests bench web recipes __init__.py

.PHONY: demo test lint types unit comfy clean

demo: $(VENV)/.installed  ## the whole pipeline, on a clip and style pictures drawn by code
	$(BIN)/stylemaster demo --out demo --overwrite

test: lint types unit comfy

lint: $(VENV)/.installed
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

types: $(VENV)/.installed
	$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python

unit: $(VENV)/.installed  ## everything that needs no ComfyUI
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/comfy -q -n 2 --dist loadfile

comfy: $(VENV)/.installed  ## against a real ComfyUI; skipped, saying so, where none is found
	$(BIN)/python -m pytest tests/comfy -q

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo
