# `make demo` trains a small model with four peers on this machine; it sets everything up in .venv first.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
MUTANTS := .venv/.mutants
PIP := $(BIN)/pip install -qq --disable-pip-version-check --constraint constraints.txt

MONITORING := tests/swarm/test_monitoring.py
# What takes minutes of real processes each: faults, liars, monitors, doctors, simulations beside a swarm.
LONG := $(addprefix tests/swarm/test_,reliability.py liars.py monitor_swarm.py diagnoses.py simulated.py)

.PHONY: demo test swarm-test monitoring-test prometheus faults mutants lint bench reliability clean

demo: $(READY)
	$(BIN)/p2p-diloco swarm peers/runs/tiny.toml --peers 4

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --ignore tests/swarm
	$(BIN)/python -m pytest tests/swarm $(addprefix --ignore ,$(MONITORING) $(LONG))

swarm-test: $(READY)
	$(BIN)/python -m pytest $(LONG)

monitoring-test: prometheus $(READY)
	$(BIN)/python -m pytest $(MONITORING)

prometheus:
	@command -v prometheus >/dev/null && command -v promtool >/dev/null || \
		{ echo "prometheus or promtool is missing; on Debian: apt-get install prometheus" >&2; exit 1; }

# Thousands of random schedules of faults on swarms in memory; about half an hour on two cores.
faults: $(READY)
	$(BIN)/python -m tests.explorer --seeds 0:5000
	$(BIN)/python -m tests.explorer --broken

# Small changes to what decides and computes, each against the tests of its file; about half an hour on two cores.
mutants: $(MUTANTS)
	$(BIN)/python -m tests.mutants

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks

reliability: $(READY)
	$(BIN)/python -m benchmarks --markdown matrix onslaught partition churn

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .mutants.jsonl build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(MUTANTS): $(READY)
	@$(PIP) --editable '.[dev,mutants]'
	@touch $@

# torch first and alone: its pin then stands before anything that depends on torch is resolved.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "p2p-diloco needs Python 3.10 or newer, '$(PYTHON)' is not; name another: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "'$(PYTHON)' cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "Setting up .venv: a few minutes the first time"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) --editable '.[dev]'
	@touch $@
