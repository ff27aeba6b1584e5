/* llama.cpp's first token, for benchmarks/startup.py: maps a model, reads a prompt of so many tokens,
   says which the most probable next one is and waits until its input ends, so that its memory can be read.

       first_token MODEL.gguf THREADS TOKENS

   All else is as llama.cpp has it by itself: weights are mapped, the cache has its own types. */

#include <stdio.h>
#include <stdlib.h>

#include "llama.h"

static void errors_only(enum ggml_log_level level, const char *text, void *unused) {
    (void)unused;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static int fail(const char *what) {
    fprintf(stderr, "first_token: %s\n", what);
    return 1;
}

static int most_probable(const float *logits, int count) {
    int best = 0;
    for (int token = 1; token < count; token++)
        if (logits[token] > logits[best]) best = token;
    return best;
}

int main(int argc, char **argv) {
    if (argc != 4) return fail("give MODEL.gguf THREADS TOKENS");
    int threads = atoi(argv[2]), count = atoi(argv[3]);
    llama_log_set(errors_only, NULL);
    llama_backend_init();
    struct llama_model *model =
        llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return fail("the model does not load");
    struct llama_context_params params = llama_context_default_params();
    params.n_threads = params.n_threads_batch = threads;
    struct llama_context *context = llama_init_from_model(model, params);
    llama_token *prompt = malloc(sizeof *prompt * count);
    if (!context || !prompt) return fail("no memory for a context");
    for (int at = 0; at < count; at++) prompt[at] = 1000 + at;
    if (llama_decode(context, llama_batch_get_one(prompt, count))) return fail("decoding failed");
    int tokens = llama_vocab_n_tokens(llama_model_get_vocab(model));
    printf("token %d\n", most_probable(llama_get_logits_ith(context, -1), tokens));
    fflush(stdout);
    while (getchar() != EOF) continue;
    return 0;
}
