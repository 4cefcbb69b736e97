# Every target makes its own environment: a fresh machine needs Python 3.10 or newer, make and a package index.
PYTHON ?= python3
# The version that tests and demo were run with. The package itself pins nothing.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
CHECKED := stylemaster_core nodes tests bench web recipes __init__.py

.PHONY: demo comfy tiny gpu test test-lowest test-newest lint types unit fuzz comfy-tests clean

demo: $(VENV)/.installed  ## the small model restyles a photograph and a boat, and measures it
	$(BIN)/stylemaster demo --out demo --overwrite

comfy: $(VENV)/.installed  ## a ComfyUI with the pack, at the template of the small model
	$(BIN)/python -m recipes.start_comfy

# PROFILE=gpu for a CUDA machine; PROFILE=smoke tries every stage in minutes and ships nothing.
# REAL="--art FOLDER --photos FOLDER" learns from real pictures, too; see docs/training.md.
PROFILE ?= cpu
tiny: $(VENV)/.installed  ## train the small model from nothing; goes on where it stopped
	$(if $(REAL),$(BIN)/pip install -q -e '.[teacher]')
	$(BIN)/python -m recipes.tiny --profile $(PROFILE) $(REAL) $(if $(filter smoke,$(PROFILE)),--out runs/smoke,--ship)

# GPU="--only right" for one piece; GPU="--toy --device cpu" rehearses all of them in minutes.
gpu: $(VENV)/.installed  ## all that is to be tried on a GPU, in pieces; call again until it ends
	$(BIN)/python -m bench.gpu $(GPU)

test: lint types unit comfy-tests
	$(MAKE) fuzz FUZZ="--seconds 60"

lint: $(VENV)/.installed
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

types: $(VENV)/.installed
	$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python

unit: $(VENV)/.installed  ## everything that needs no ComfyUI
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/comfy -q -n 2 --dist loadfile

# The lowest versions that pyproject.toml allows, and the newest, each in an environment of its own.
# TORCH=torch takes the newest PyTorch, too; docs/compatibility.md says what was run.
TESTS ?= tests --ignore tests/comfy --ignore tests/unit/test_tiny_recipe.py
test-lowest: VERSIONS := lowest-direct
test-newest: VERSIONS := highest
test-lowest test-newest: test-%:  ## all unit tests but the recipe's, which trains for minutes
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet $(TORCH) uv
	.venv-$*/bin/uv pip install --quiet --python .venv-$* --resolution $(VERSIONS) \
		--reinstall-package filelock '$(TORCH)' -e '.[dev]'
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -q -n 2 --dist loadfile $(TESTS)

# FUZZ=--long plays everything, by count; --report writes docs/reliability.md.
FUZZ ?= --seconds 240
fuzz: $(VENV)/.installed  ## damaged files, hostile names, kills, misbehaving servers; seeded
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(FUZZ)

# COMFYUI_PATHS=/a/ComfyUI:/b/ComfyUI names several; docs/tested_comfyui.json keeps what passed where.
comfy-tests: $(VENV)/.installed  ## against every ComfyUI found; skipped, saying so, where there is none
	$(BIN)/python -m pytest tests/comfy -q --record-comfyui

ifneq ($(wildcard wheels),)  # unpacked from a bundle: no index, and PyTorch is the machine's own
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv --system-site-packages $(VENV)
	$(BIN)/python -m pip install --quiet --no-index --no-deps wheels/*.whl
	touch $@
else
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@
endif

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest demo
