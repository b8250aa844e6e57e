# Everything runs in .venv, which the first target you call creates from nothing but python3.
# `make PYTHON=python3.12 test` builds it with another interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint bench clean

help:
	@echo "make demo   distil a student on real data; prints where its report is"
	@echo "make test   run the tests"
	@echo "make lint   ruff and mypy"
	@echo "make bench  time the loss against its peers on this machine; prints one table"
	@echo "make clean  remove .venv, caches and runs/"

demo: .venv/installed
	$(BIN)/fsp-distill compare configs/network-minimisation-digits.yaml

test: .venv/installed
	$(BIN)/python -m pytest -n auto

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache build runs *.egg-info

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	touch $@
