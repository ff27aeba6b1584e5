# Tools of others that quantize, for benchmarks/quality.py: `make -s peer-NAME` makes the environment of
# one, if it is not there, and prints where it is.
PEERS := llm-compressor msmodelslim auto-round

define peer
$(call keyed,$(1))/.installed:
	$$(call environment,$(1))

peer-$(1): $(call keyed,$(1))/.installed
	@echo $$(<D)
endef

$(foreach name,$(PEERS),$(eval $(call peer,$(name))))

.PHONY: quality peers $(PEERS:%=peer-%)

peers: $(PEERS:%=peer-%)  ## environments of the tools that accuracy is compared with (4 GB)

quality: $(VENV)/.dev $(VENV)/.smol  ## accuracy per bit, ours and the peers', on three models (hours)
	PYTHONPATH=tests $(BIN)/python benchmarks/quality.py
