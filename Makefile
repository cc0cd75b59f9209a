# Two commands do everything on a machine that has only Python 3.11 or 3.12: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed
READY_DEV := $(VENV)/.installed-dev

.PHONY: help setup setup-dev demo test test-all lint types clean

help:
	@echo "make demo      create .venv, install, convert data, train a student and evaluate it (CPU, minutes)"
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

# On the real keyframe where FSMDE_REAL_DATA names a folder with one, otherwise on rendered boxes with held-out scenes.
demo: setup
	@if [ -d "$$FSMDE_REAL_DATA/nuscenes_keyframe" ]; then \
	  kind=keyframe; dataroot="$$FSMDE_REAL_DATA/nuscenes_keyframe"; splits=mini_train; held_out=mini_train; \
	else \
	  kind=boxes; dataroot=demo/boxes; splits="mini_train mini_val"; held_out=mini_val; \
	  $(RUN) -m data_prep.boxes --out "$$dataroot" || exit 1; \
	fi; \
	for split in $$splits; do \
	  $(RUN) -m data_prep.nuscenes --dataroot "$$dataroot" --version v1.0-mini --split $$split \
	    --out records/demo_$${kind}_$$split || exit 1; \
	done; \
	$(RUN) -m fsmde_jax.main --config configs/demo.py --workdir runs/demo_$$kind \
	  --config.data.train_records=records/demo_$${kind}_mini_train \
	  --config.data.eval_records=records/demo_$${kind}_$$held_out

lint: setup-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: setup-dev
	$(RUN) -m mypy

test: lint types
	$(RUN) -m pytest -m "not slow"

test-all: lint types
	$(RUN) -m pytest

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
