# Two commands for a fresh clone:
#   make demo   installs, converts the shipped tiny model and asks it a question
#   make test   installs what the tests need and passes them
# Both make their own virtual environments and need nothing but Python (and gcc for the simulator).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SIM := .venv-sim
SIM_BIN := $(SIM)/bin

# torch_npu must have torch's version. It is installed without its dependencies, because torch is
# already there, and in an environment of its own, because torch would import it by itself.
TORCH_NPU := 2.13.0

# The models of the tests are tiny: more threads only wait for each other.
SIM_RUN := OMP_NUM_THREADS=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(SIM_BIN)/python -m pytest -q

.PHONY: demo test lint unit simulated clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

$(SIM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(SIM)
	$(SIM_BIN)/pip install --quiet --disable-pip-version-check -e ".[simulated]"
	$(SIM_BIN)/pip install --quiet --disable-pip-version-check --no-deps torch_npu==$(TORCH_NPU)
	touch $@

demo: $(VENV)/.installed
	$(BIN)/qwen3-ascend convert tests/data/tiny-qwen3 out/tiny --overwrite
	$(BIN)/qwen3-ascend generate out/tiny --prompt "What does river mean?"

test: lint unit simulated

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VENV)/.dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -q

# Real torch_npu on a simulated device: streams that run at once and streams that run late, with
# and without torch_npu's task queue.
simulated: $(SIM)/.installed
	ASCEND_SIM_STREAMS=eager TASK_QUEUE_ENABLE=0 $(SIM_RUN) tests/ascend_sim tests/npu
	ASCEND_SIM_STREAMS=eager TASK_QUEUE_ENABLE=1 $(SIM_RUN) tests/ascend_sim tests/npu
	ASCEND_SIM_STREAMS=lazy TASK_QUEUE_ENABLE=0 $(SIM_RUN) tests/ascend_sim tests/npu
	ASCEND_SIM_STREAMS=lazy TASK_QUEUE_ENABLE=1 $(SIM_RUN) tests/ascend_sim tests/npu

clean:
	rm -rf $(VENV) $(SIM) out build src/*.egg-info
