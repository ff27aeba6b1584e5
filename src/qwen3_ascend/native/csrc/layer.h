/* What a decoder layer computes beside its linears, each operation in one call.
 *
 * Everything is computed in float32 from activations of `dtype`, bfloat16 or float32, and rounded
 * where runtime/backends/reference.py, the definition, rounds. Sums are in an order of the kernel's
 * choice, so a result may differ from the definition's by their rounding.
 */
#ifndef QWEN3_ASCEND_LAYER_H
#define QWEN3_ASCEND_LAYER_H

#include "kernels.h"

/* What the linear that reads a result wants to be fed. */
enum feed_form { FEED_FLOAT = 0, FEED_PER_TOKEN = 1, FEED_STATIC = 2 };

/* How a result [rows, columns] is given to the linear that reads it:
 *
 *     FEED_FLOAT      rounded to `dtype`
 *     FEED_PER_TOKEN  scale = largest magnitude of the row / 127, code = round(x / scale)
 *     FEED_STATIC     rounded to `dtype`, then code = round(x * reciprocal + offset) */
struct feed {
    int form, dtype;
    void *out;     /* [rows, columns] of `dtype`, or of int8 codes */
    float *scales; /* [rows] of FEED_PER_TOKEN */
    float reciprocal, offset;
};

/* total = hidden + delta, rounded; x = total / sqrt(mean(total^2) + epsilon) * weight. */
struct add_norm {
    int dtype;
    int64_t rows, columns;
    const void *hidden, *delta; /* [rows, columns]; delta may be NULL */
    const void *weight;         /* [columns] */
    float epsilon;
    void *total; /* [rows, columns], NULL without delta */
    struct feed feed;
};

/* Keys and values of a layer in blocks: [slots][kv_heads][head_dim], a slot for each token. */
struct layer_cache {
    int dtype; /* of activations, or DTYPE_BYTE for int8 codes */
    int64_t kv_heads, head_dim;
    void *keys, *values;
    float *key_scales, *value_scales; /* [slots][kv_heads] of codes */
};

/* Norms and rotates queries and keys, each rounded, and writes keys and values to the cache. */
struct norm_rotate {
    int dtype;
    int64_t rows, heads;
    const void *qkv; /* [rows, heads + 2 * kv_heads, head_dim] */
    const void *query_weight, *key_weight; /* [head_dim] */
    float epsilon;
    const float *cosines, *sines; /* [rows, head_dim] */
    const int32_t *slots;         /* [rows] */
    void *query;                  /* [rows, heads, head_dim] */
    struct layer_cache cache;
};

/* Causal attention of requests whose queries are their last tokens. */
struct attention {
    int dtype;
    int64_t requests, heads, block_size;
    const void *query; /* [rows, heads, head_dim] */
    struct layer_cache cache;
    const int32_t *block_table; /* [requests][table_width] */
    int64_t table_width;
    const int32_t *lengths; /* [requests], tokens in the cache */
    const int32_t *starts;  /* [requests + 1], rows of each request */
    void *out;              /* [rows, heads, head_dim] */
    float *partials;        /* see SPLIT_KEYS; NULL where no context is longer than that */
    int64_t most_splits;    /* that a request has room for in `partials` */
};

/* A request of one token attends to so many keys at a time, whatever the number of threads, and
 * what comes of them is put together in the end: so a long context is shared by more threads than
 * the cache has heads. A split of a head has [heads of the group][maximum, total, head_dim sums],
 * where a sum is of values weighted by exp(score - maximum), and the total that of the weights. */
enum { SPLIT_KEYS = 1024 };

static inline int64_t splits_of(const struct attention *job, int64_t request)
{
    int64_t rows = job->starts[request + 1] - job->starts[request];
    return rows == 1 ? (job->lengths[request] + SPLIT_KEYS - 1) / SPLIT_KEYS : 1;
}

/* silu(gate) * up of rows [gate, up]. */
struct gated {
    int dtype;
    int64_t rows, columns; /* of the result */
    const void *gate_up;
    struct feed feed;
};

/* Floats of one thread's scratch, for rows of so many columns: two rows, padded. */
static inline int64_t row_scratch(int64_t columns) { return 2 * ((columns + 63) / 64 * 64); }

struct layer_table {
    void (*add_norm)(const struct add_norm *job, int64_t row, float *scratch);
    void (*norm_rotate)(const struct norm_rotate *job, int64_t row, float *scratch);
    void (*gated)(const struct gated *job, int64_t row, float *scratch);
    void (*feed)(const struct feed *feed, const void *values, int64_t columns, int64_t row,
                 float *scratch);
    /* As float32; zeros behind `count` up to `padded`. */
    void (*widen)(const void *values, int dtype, int64_t count, int64_t padded, float *out);
    /* The place of the first of the largest values, or of the first that is not a number. */
    int64_t (*largest_place)(const float *values, int64_t count);
    /* Of `count` tokens of a request from its `first` on, the heads that share one of the cache. */
    void (*attend)(const struct attention *job, int64_t request, int64_t kv_head, int64_t first,
                   int64_t count, float *scratch);
    /* A split of a request of one token; all of them, put together. */
    void (*attend_split)(const struct attention *job, int64_t request, int64_t kv_head,
                         int64_t split, float *scratch);
    void (*join_splits)(const struct attention *job, int64_t request, int64_t kv_head,
                        float *scratch);
    int64_t (*attention_scratch)(int64_t queries, int64_t head_dim); /* floats, of one thread */
    int attention_queries; /* tokens times heads that are computed together, at most */
};

extern const struct layer_table layer_baseline, layer_avx2, layer_avx512;

#endif
