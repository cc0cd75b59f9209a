# Two commands do everything on a machine that has only Python 3.11 or 3.12: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed
READY_DEV := $(VENV)/.installed-dev

.PHONY: help setup setup-dev demo test test-all lint types clean

help:
	@echo "make demo      create .venv, install, render a world, train a student on it and evaluate it (CPU, minutes)"
	@echo "make test      lint, type check and the fast tests"
	@echo "make test-all  the same with the slow tests"
	@echo "make setup     only create .venv and install; make setup-dev adds what the tests compare against"

setup: $(READY)

setup-dev: $(READY_DEV)

$(READY): requirements.txt requirements-devkit.txt pyproject.toml
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else 'Python 3.11 or 3.12 is needed, this is %d.%d; choose one: make setup PYTHON=python3.11' % v)"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt
	$(RUN) -m pip install --quiet --no-deps -r requirements-devkit.txt
	$(RUN) -m pip install --quiet -e .
	touch $(READY)

$(READY_DEV): $(READY)
	$(RUN) -m pip install --quiet -e ".[dev]"
	touch $(READY_DEV)

# Renders a small world (train and held-out scenes), converts it as a recorded dataset, trains a student and evaluates it.
# Each step goes on from what is there: `make demo` again after an interruption costs little.
demo: setup
	$(RUN) -m data_prep.world --rig nuscenes --scenes 400 --val_scenes 40 --frames 1 --image_size 96x160 --out data/world
	for split in train val; do \
	  $(RUN) -m data_prep.nuscenes --dataroot data/world --version v1.0-trainval --split $$split \
	    --image_size native --out records/world_$$split || exit 1; \
	done
	$(RUN) -m fsmde_jax.main --config configs/world.py --workdir runs/world

lint: setup-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: setup-dev
	$(RUN) -m mypy

# Two workers, a file each at a time, in the order of tests/conftest.py.
TOGETHER := -n 2 --dist loadfile --no-loadscope-reorder

test: lint types
	$(RUN) -m pytest $(TOGETHER) -m "not slow"

test-all: lint types
	$(RUN) -m pytest $(TOGETHER)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
