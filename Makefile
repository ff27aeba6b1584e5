# Two commands for a fresh clone: `make demo` runs the main job on the shipped tiny model,
# `make test` installs what the tests need and passes them. Both make their own environments.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint unit clean

$(BIN)/qwen3-ascend: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e .

$(VENV)/.dev: pyproject.toml | $(BIN)/qwen3-ascend
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

demo: $(BIN)/qwen3-ascend
	$(BIN)/qwen3-ascend convert tests/data/tiny-qwen3 out/tiny --overwrite
	$(BIN)/qwen3-ascend generate out/tiny --prompt "What does river mean?"

test: lint unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VENV)/.dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -q

clean:
	rm -rf $(VENV) .venv-sim out build src/*.egg-info
