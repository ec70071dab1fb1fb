# Two commands on a fresh machine: `make demo` and `make test`. CI calls these targets too.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-long bench check lint types links setup

demo: setup  ## prepare the demo data, train fellrec, fedavg and local, compare them
	$(BIN)/fellray prepare jobs/demo.yaml
	$(BIN)/fellray compare jobs/demo.yaml --methods fellrec,fedavg,local

test: setup check  ## lint, types, and every everyday test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-long: setup  ## the tests that take minutes each
	$(BIN)/python -m pytest -m long

bench: setup  ## ratios against named rivals, arms interleaved
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m fellray.jobs.bench
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m fellray.jobs.roofline

check: lint types

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup links
	$(BIN)/mypy -p fellray

links:  ## for type checkers, which read neither setuptools' mapping nor our hook
	@for f in platform actors serve jobs; do ln -sfn ../$$f fellray/$$f; done

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(READY)
