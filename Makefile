# The two commands of the README: `make demo` and `make test`. Each sets up its own virtual environment.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := -c tests/constraints.txt

.PHONY: demo test unseen nightly mutants bench lint types unit format clean
SECONDS ?= 40
NIGHTLY := tests/benchmarks/results/nightly.json

# Waiting threads that spin would starve a neighbour, or themselves, on a busy machine.
demo: export OMP_WAIT_POLICY := PASSIVE
unit: export OMP_NUM_THREADS := 1

demo: .venv/demo.stamp
	$(BIN)/lagcompile solve specs/digits_extraprop.yaml --baseline --force

test: lint types unit

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test.stamp
	$(BIN)/mypy

unit: .venv/test.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Fresh cases in an environment that stands: prints what fails, with the line that repeats it, and nothing else.
unseen:
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.unseen --seconds $(SECONDS)

# What is too long for `make test`; counts are kept in tests/benchmarks/results.
nightly: .venv/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.unseen --nightly $(NIGHTLY)

# Small faults in ir, runtime, check and the run store: the tests that cover them must notice 90 %.
mutants: .venv/mutants.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

bench: .venv/bench.stamp
	$(BIN)/python -m tests.benchmarks

format: .venv/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/base.stamp: pyproject.toml tests/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $(CONSTRAINTS) torch
	touch $@

.venv/demo.stamp: .venv/base.stamp
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[plots,data]'
	touch $@

.venv/test.stamp: .venv/base.stamp
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[test]'
	touch $@

.venv/mutants.stamp: .venv/test.stamp
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[mutants]'
	touch $@

.venv/bench.stamp: .venv/test.stamp
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e '.[bench]'
	touch $@
