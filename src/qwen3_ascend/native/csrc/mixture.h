/* Mixtures of experts: tokens are given to experts, sorted by them, multiplied by the weights of
 * each, and what comes of it is added up for each token.
 *
 * A routed row is a token at one of its experts: there are tokens * per_token of them, those of an
 * expert side by side, in the order of the tokens. The weights of no expert without rows are read.
 */
#ifndef QWEN3_ASCEND_MIXTURE_H
#define QWEN3_ASCEND_MIXTURE_H

#include "kernels.h"

enum { MOST_EXPERTS = 1024 };

/* Which experts each token is given to. */
struct routing {
    int64_t tokens, experts, per_token;
    int normalize;    /* whether the weights of a token are divided by their sum */
    float *weights;   /* [tokens, per_token], softmax of the logits, descending */
    int32_t *places;  /* [tokens, per_token], routed row of each; while routing: the expert */
    int32_t *starts;  /* [experts + 1], routed rows of each expert */
    int32_t *sources; /* [tokens * per_token], the token of each routed row */
};

/* Weights of all experts, one after the other, and the rows of each. */
struct expert_rows {
    int64_t experts;
    const int32_t *starts; /* [experts + 1] */
    int64_t weight_bytes;  /* of an expert */
};

#endif
