# Two commands for a newcomer: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart install test test-slow test-gpu bench-gpu sanitize lint checkpoint clean

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

# On a machine with a CUDA device and a torch built for it. What is left out, as the sanitizer where it is not installed,
# is said at the end.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu -rs tests/kernels

# The figures of BENCHMARKS.md on a GPU, goals beside them, in less than eight minutes; needs no model and no network.
bench-gpu: $(STAMP)
	mkdir -p build
	$(BIN)/python -m padst_cli.bench.gpu_table --output build/gpu.md

# The kernels' tests on a build that stops at every read or write outside memory and at undefined behaviour. Vectors are
# read unaligned on purpose.
SANITIZED := build/sanitized.so
LIBASAN = $$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)

$(SANITIZED): $(wildcard kernels/cpu/csrc/*)
	mkdir -p build
	$(CC) -std=gnu11 -O1 -g -fsanitize=address,undefined -fno-sanitize=alignment -fno-sanitize-recover=undefined \
	  -ffp-contract=fast -fno-math-errno -Wno-psabi -pthread -fPIC -shared kernels/cpu/csrc/*.c -o $@

sanitize: $(STAMP) $(SANITIZED)
	LD_PRELOAD="$(LIBASAN)" ASAN_OPTIONS=detect_leaks=0 PADST_TEST_LIBRARY=$(CURDIR)/$(SANITIZED) $(BIN)/python -m pytest \
	  tests/kernels/test_native.py tests/kernels/test_training.py tests/kernels/test_selftest.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Train the embedded checkpoint of `padst quickstart` again: 4000 steps, 8.2 million tokens (47 minutes on two cores).
checkpoint: $(STAMP)
	$(BIN)/python -m padst_cli.assets.train --output build/checkpoint --steps 4000

clean:
	rm -rf $(VENV) build *.egg-info
