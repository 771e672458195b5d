# Every target does its own set-up in .venv. PYTHON chooses the interpreter that the environment is made from.
BIN := .venv/bin
PYTEST := $(BIN)/pytest

.PHONY: help demo test test-slow bench gpu check clean

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: ## pretrain a small GPT on Python's standard library and write runs/demo/report.html
	@.ci/install
	$(BIN)/hotloop demo

test: ## the tests, under 15 minutes on 2 cores
	@.ci/install test
	$(PYTEST) -q -m "not slow"

test-slow: ## the tests that take minutes
	@.ci/install test
	$(PYTEST) -q -m slow

bench: ## every benchmark, as a table
	@.ci/install test bench
	$(PYTEST) benchmarks -q -o python_files='bench_*.py' --benchmark-columns=median,min,rounds

gpu: ## on a machine with a GPU: correctness, then benchmarks, as JSON under benchmarks/results/
	@.ci/install test bench
	$(BIN)/python benchmarks/gpu.py

check: ## ruff, format, mypy on an installed wheel
	@.ci/install check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	.ci/typecheck

clean: ## remove the environment and build products; runs/ stays
	rm -rf .venv build *.egg-info kernels/_C*.so
