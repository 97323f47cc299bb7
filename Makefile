# Needs git, make and Python 3.11 to 3.13; everything else is fetched into .venv.
#   make quickstart   set up, then train the quickstart recipe (again: ARGS='--name second')
#   make test         set up, then every check and every test that runs without a GPU
.PHONY: quickstart test setup lint wheels chaos clean
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && exit; done; echo python3)
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive

help:
	@sed -n 's/^#   //p' Makefile

#   make setup        make or refresh .venv (TORCH=2.13.0 or TORCH=/path/to/torch.whl chooses the torch build)
setup:
	@$(PYTHON) tools/setup.py

quickstart: setup
	$(BIN)/miles train quickstart $(ARGS)

#   make lint         the checks of make test without the tests
lint: setup
	$(BIN)/python tools/lock.py check
	$(BIN)/python tools/bounds.py
	$(BIN)/python tools/sizes.py
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

test: lint
	rm -f .coverage .coverage.*
	$(BIN)/python -m pytest -q -n 2 -m "not gpu" --cov --cov-report= --durations=10
	$(BIN)/python tools/cover.py

#   make wheels       build the five wheels and install each alone in a bare environment
wheels: setup
	$(BIN)/python tools/leak.py

#   make chaos        two minutes of a rollout service under load, its processes killed, stopped and slowed; every token recomputed
chaos: setup
	$(BIN)/python packages/miles-rollout/tools/chaos.py --seconds 120

clean:
	rm -rf dist .coverage .coverage.* .mypy_cache .ruff_cache
