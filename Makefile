# Two commands for a newcomer: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart install test test-slow lint checkpoint clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

quickstart: $(STAMP)
	$(BIN)/padst quickstart --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Train the embedded checkpoint of `padst quickstart` again: 4000 steps, 8.2 million tokens (47 minutes on two cores).
checkpoint: $(STAMP)
	$(BIN)/python -m padst_cli.assets.train --output build/checkpoint --steps 4000

clean:
	rm -rf $(VENV) build *.egg-info
