# Two commands for everybody: `make demo` and `make test`. Each does all of its own set-up.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# The tests and the demo never need an account, a network service or telemetry.
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-min style quality bench bench-small docs dist clean

demo: $(VENV)/.demo
	$(BIN)/hf-ext demo

# Two processes with a thread each: most models here are too small for a second thread to help.
test: $(VENV)/.dev quality
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" --numprocesses 2 --dist worksteal

# The quick tests with the oldest versions that pyproject.toml allows, in an environment of their own.
test-min: .venv-min/.dev
	OMP_NUM_THREADS=1 .venv-min/bin/python -m pytest -m "not gpu and not slow and not real_model" --numprocesses 2 --dist worksteal

# Rewrites: formatting, fixable lint, the generated tables of README and docs.
style: $(VENV)/.dev docs
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Checks only: formatting, lint, types.
quality: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/python -m docs.generate

# Every script prints its ratios and rewrites its file in benchmarks/results/.
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.run_all

# What is published: the sdist, and the wheel that is built from it.
dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# What every method costs, at small sizes, and the table of the README: some ten minutes.
bench-small: $(VENV)/.bench
	$(BIN)/python -m benchmarks.summary
	$(BIN)/python -m docs.generate

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/.bench: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet -c constraints.txt -e ".[bench]"
	touch $@

.venv-min/.dev: pyproject.toml constraints-min.txt
	$(PYTHON) -m venv .venv-min
	.venv-min/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-min.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .venv-min build dist *.egg-info
