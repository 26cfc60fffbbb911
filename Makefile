# What people do every day. `make quickstart` and `make test` set everything up (CPU, Linux x86-64, Python 3.11/3.12).

PYTHON_VENV := .venv/bin/python
# One thread a test process: the tests' own processes share the cores.
TEST := OMP_NUM_THREADS=1 $(PYTHON_VENV) -m pytest

.PHONY: quickstart setup test test-slow bench lint docs audit lock clean

quickstart: setup
	@$(PYTHON_VENV) -m verl_trb.main recipe=quickstart

setup:
	@scripts/setup_cpu.sh

test: setup
	@$(TEST)

test-slow: setup
	@$(TEST) -m slow

# Needs 14 GB of memory for the naive side of the loss; docs/performance.md.
bench: setup
	@$(PYTHON_VENV) scripts/bench_solver.py
	@$(PYTHON_VENV) scripts/bench_loss.py
	@$(PYTHON_VENV) scripts/bench_calls.py
	@$(PYTHON_VENV) scripts/bench_rollouts.py
	@$(PYTHON_VENV) scripts/bench_growth.py

lint: setup
	@$(PYTHON_VENV) -m ruff check .
	@$(PYTHON_VENV) -m ruff format --check --quiet . || echo "lint: some files are not formatted (ruff format .)"
	@$(PYTHON_VENV) -m mypy

# The site, build/docs/index.html; any broken link fails.
docs: setup
	@$(PYTHON_VENV) -m sphinx -W --keep-going -q -E -b html docs build/docs

# Known vulnerabilities of the locked packages; needs pypi.org itself.
audit: setup
	@$(PYTHON_VENV) scripts/audit.py

lock:
	@python3.11 scripts/lock.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
