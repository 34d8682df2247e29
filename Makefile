# make sample: sixteen digits.  make test: the tests, on two cores (WORKERS=N).  Both make .venv first, from the versions in constraints.txt.
# make bench: the standard set; on a GPU for example with BATCH_SIZES=1,64,256 AGAINST=diffusers,diffusers+

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
BATCH_SIZES ?= 1,8
AGAINST ?= diffusers

.PHONY: sample test test-slow test-all bench lint format clean

sample: $(STAMP)
	$(BIN)/ddim sample --steps 50 --eta 0.0

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist worksteal

test-all: test test-slow

bench: $(STAMP)
	$(BIN)/ddim bench --batch-sizes 1,64 --against $(AGAINST)
	$(BIN)/ddim bench --architecture cifar10 --batch-sizes $(BATCH_SIZES) --against $(AGAINST)
	$(BIN)/python tests/benchmarks/cold_start.py
	$(BIN)/python tests/benchmarks/host_memory.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) outputs build dist .pytest_cache .ruff_cache .mypy_cache

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $(STAMP)
