# Every target does its own set-up: a virtual environment in .venv, this package and its pinned
# dependencies. It is redone only when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=

bin := $(VENV)/bin
installed := $(VENV)/.installed

.PHONY: train test test-matrix peft-suite lint format bench gpu clean

train: $(installed)
	$(bin)/lora-fast train $(ARGS)

test: $(installed)
	$(bin)/python tests/run.py --jobs $(JOBS) $(ARGS)

test-matrix: $(installed)
	$(bin)/python tests/matrix.py --jobs $(JOBS) $(ARGS)

peft-suite: $(installed)
	$(bin)/python tests/peft_suite/run.py --jobs $(JOBS) $(ARGS)

lint: $(installed)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

format: $(installed)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

bench: $(installed)
	$(bin)/python -m pytest bench -q --benchmark-max-time 0.3 --benchmark-disable-gc \
	    --benchmark-columns median,iqr,rounds --benchmark-sort name $(ARGS)
	$(bin)/python -m bench.linear
	$(bin)/python -m bench.decoder_layer
	$(bin)/python -m bench.gated_mlp

gpu: $(installed)
	$(bin)/python -m bench.gpu_day $(ARGS)

clean:
	rm -rf .venv .matrix build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(bin)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(installed): pyproject.toml constraints.txt | $(bin)/python
	@echo "Installing lora_fast and its pinned dependencies into $(VENV), once (minutes)."
	$(bin)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@
