# What there is to do here; `make` alone lists it. The environment is built once, into .venv.

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint docs bench gpu-check clean

help:  ## lists these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: .venv/installed  ## the whole life of a small model on this machine, in minutes
	$(BIN)/temper quickstart

test: .venv/installed  ## runs all tests, without the network
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

lint: .venv/installed  ## checks style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

docs: .venv/installed-docs  ## builds the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/installed-bench  ## measures what has a benchmark, beside its peers (an hour on a quiet machine)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/tasks.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/sft.py
	$(BIN)/python benchmarks/dpo.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/results.py

gpu-check: .venv/installed-bench  ## conformance tests and benchmarks on the GPU of this machine
	$(BIN)/python benchmarks/gpu.py; status=$$?; [ $$status -eq 2 ] || $(BIN)/python benchmarks/results.py; exit $$status

clean:  ## removes what the commands above make, but not .venv
	rm -rf site build dist .pytest_cache .ruff_cache .hypothesis temper-out src/*.egg-info
	find src tests benchmarks tools docs -name __pycache__ -type d -exec rm -rf {} +

# torch comes first and pinned, so that nothing else pulls another one.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Temper needs Python 3.11 or newer; this is %d.%d. Say which: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet 'torch==2.13.0' -c constraints.txt
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	@touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/pip install --quiet -e '.[docs]' -c constraints.txt
	@touch $@

.venv/installed-bench: .venv/installed
	$(BIN)/pip install --quiet -e '.[bench]' -c constraints.txt
	@touch $@
