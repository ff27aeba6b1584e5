/* See mixture.h. The products are those of one expert after the other, each shared by all threads:
 * the weights of an expert take longer to read than the threads to meet. */
#include "bf16.h"
#include "floats.h"
#include "mixture.h"
#include "pool.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

static float value_at(const void *values, int dtype, int64_t place)
{
    return dtype == DTYPE_BF16 ? from_bf16(((const uint16_t *)values)[place])
                               : ((const float *)values)[place];
}

/* Tokens, or rows, of a part. */
enum { ROWS_TOGETHER = 4 };

static int64_t parts_of(int64_t rows) { return (rows + ROWS_TOGETHER - 1) / ROWS_TOGETHER; }

/* ---- routing ---- */

struct routing_job {
    const struct routing *routing;
    int dtype;
    const void *logits; /* [tokens, experts] */
};

/* The greatest logits in descending order, equal ones in the order of the experts. */
static void choose_experts(const struct routing *routing, const float *logits, int32_t *chosen)
{
    uint8_t is_taken[MOST_EXPERTS] = {0};
    for (int64_t rank = 0; rank < routing->per_token; rank++) {
        int32_t best = -1;
        for (int32_t expert = 0; expert < routing->experts; expert++)
            if (!is_taken[expert] && (best < 0 || logits[expert] > logits[best])) best = expert;
        is_taken[best] = 1;
        chosen[rank] = best;
    }
}

static void weigh_experts(const struct routing *routing, int dtype, const float *logits,
                          const int32_t *chosen, float *weights)
{
    float greatest = logits[chosen[0]], total = 0.0f;
    for (int64_t rank = 0; rank < routing->per_token; rank++)
        weights[rank] = expf(logits[chosen[rank]] - greatest);
    if (routing->normalize)
        for (int64_t rank = 0; rank < routing->per_token; rank++) total += weights[rank];
    else
        for (int64_t expert = 0; expert < routing->experts; expert++)
            total += expf(logits[expert] - greatest);
    for (int64_t rank = 0; rank < routing->per_token; rank++) {
        weights[rank] /= total;
        if (dtype == DTYPE_BF16) weights[rank] = from_bf16(to_bf16(weights[rank]));
    }
}

static void route_tokens(const void *context, int64_t part)
{
    const struct routing_job *job = context;
    const struct routing *routing = job->routing;
    int64_t first = part * ROWS_TOGETHER, last = first + ROWS_TOGETHER;
    float logits[MOST_EXPERTS];
    for (int64_t token = first; token < last && token < routing->tokens; token++) {
        for (int64_t i = 0; i < routing->experts; i++)
            logits[i] = value_at(job->logits, job->dtype, token * routing->experts + i);
        int32_t *chosen = routing->places + token * routing->per_token;
        choose_experts(routing, logits, chosen);
        weigh_experts(routing, job->dtype, logits, chosen,
                      routing->weights + token * routing->per_token);
    }
}

/* Experts become routed rows. */
static void sort_by_expert(const struct routing *routing)
{
    int64_t rows = routing->tokens * routing->per_token;
    int32_t next[MOST_EXPERTS], *starts = routing->starts;
    memset(starts, 0, (size_t)(routing->experts + 1) * sizeof *starts);
    for (int64_t i = 0; i < rows; i++) starts[routing->places[i] + 1]++;
    for (int64_t expert = 0; expert < routing->experts; expert++) {
        next[expert] = starts[expert];
        starts[expert + 1] += starts[expert];
    }
    for (int64_t i = 0; i < rows; i++) {
        int32_t place = next[routing->places[i]]++;
        routing->sources[place] = (int32_t)(i / routing->per_token);
        routing->places[i] = place;
    }
}

/* See struct routing; `dtype` is that of the logits, to which weights are rounded. */
QWEN3_ASCEND_API int qwen3_ascend_route(int threads, const struct routing *routing, int dtype,
                                        const void *logits)
{
    if (routing->experts > MOST_EXPERTS || routing->per_token < 1 ||
        routing->per_token > routing->experts)
        return STATUS_BAD_ARGUMENT;
    struct routing_job job = {routing, dtype, logits};
    share_work(route_tokens, &job, parts_of(routing->tokens), threads);
    sort_by_expert(routing);
    return STATUS_OK;
}

/* ---- rows of tokens at their experts ---- */

struct gather_job {
    const int32_t *sources;
    int64_t rows, row_bytes;
    const char *from;
    char *to;
    const float *scales;
    float *gathered_scales;
};

static void gather_rows(const void *context, int64_t part)
{
    const struct gather_job *job = context;
    int64_t first = part * ROWS_TOGETHER, last = first + ROWS_TOGETHER;
    for (int64_t row = first; row < last && row < job->rows; row++) {
        int64_t source = job->sources[row];
        memcpy(job->to + row * job->row_bytes, job->from + source * job->row_bytes,
               (size_t)job->row_bytes);
        if (job->scales) job->gathered_scales[row] = job->scales[source];
    }
}

/* Row `sources[i]` of `from` becomes row i of `to`, and so its scale, if there are scales. */
QWEN3_ASCEND_API int qwen3_ascend_gather(int threads, const int32_t *sources, int64_t rows,
                                         int64_t row_bytes, const void *from, void *to,
                                         const float *scales, float *gathered_scales)
{
    struct gather_job job = {sources, rows, row_bytes, from, to, scales, gathered_scales};
    share_work(gather_rows, &job, parts_of(rows), threads);
    return STATUS_OK;
}

/* ---- products ---- */

int qwen3_ascend_int8_product(int path, int threads, const int8_t *strips, int64_t outputs,
                              int64_t inputs, const int8_t *rows, int64_t count,
                              int64_t row_stride, void *scratch, const int32_t *added,
                              const float *row_scales, const float *output_scales,
                              const float *bias, void *out, int out_dtype);

int qwen3_ascend_float_product(int path, int threads, const uint16_t *weights, int64_t outputs,
                               int64_t inputs, int64_t output_stride, int64_t run_stride,
                               int row_dtype, const void *rows, int64_t count, int64_t row_stride,
                               float *scratch, const float *bias, void *out, int out_dtype);

int qwen3_ascend_code_product(int path, int threads, const struct stored_codes *codes,
                              int64_t outputs, int64_t inputs, int row_dtype, const void *rows,
                              int64_t count, int64_t row_stride, float *scratch,
                              const float *bias, void *out, int out_dtype);

int qwen3_ascend_group_product(int path, int threads, const struct stored_codes *codes,
                               int64_t outputs, int64_t inputs, const struct grouped *grouped,
                               const int8_t *rows, int64_t count, int64_t row_stride,
                               float *scratch, const float *bias, void *out, int out_dtype);

/* Bytes of a value. */
static int64_t size_of(int dtype) { return dtype == DTYPE_FP32 ? 4 : dtype == DTYPE_BF16 ? 2 : 1; }

/* An expert and its routed rows. */
struct turn {
    int64_t expert, row, count;
};

/* The next expert that has rows; 0 after the last one. Begin with an expert of -1. */
static int next_turn(const struct expert_rows *experts, struct turn *turn)
{
    while (++turn->expert < experts->experts) {
        turn->row = experts->starts[turn->expert];
        turn->count = experts->starts[turn->expert + 1] - turn->row;
        if (turn->count > 0) return 1;
    }
    return 0;
}

static const void *weight_of(const struct expert_rows *experts, const void *first, int64_t expert)
{
    return (const char *)first + expert * experts->weight_bytes;
}

/* qwen3_ascend_int8_product of the rows of each expert with its weights; the scales of outputs are
 * [experts, outputs], and scratch is that of all rows at once. */
QWEN3_ASCEND_API int qwen3_ascend_int8_experts(int path, int threads,
                                               const struct expert_rows *experts,
                                               const int8_t *strips, int64_t outputs,
                                               int64_t inputs, const int8_t *rows, void *scratch,
                                               const float *row_scales, const float *output_scales,
                                               void *out, int out_dtype)
{
    int64_t out_bytes = outputs * size_of(out_dtype);
    for (struct turn turn = {-1, 0, 0}; next_turn(experts, &turn);) {
        int status = qwen3_ascend_int8_product(
            path, threads, weight_of(experts, strips, turn.expert), outputs, inputs,
            rows + turn.row * inputs, turn.count, inputs, scratch, NULL, row_scales + turn.row,
            output_scales + turn.expert * outputs, NULL, (char *)out + turn.row * out_bytes,
            out_dtype);
        if (status) return status;
    }
    return STATUS_OK;
}

/* The same of qwen3_ascend_float_product. */
QWEN3_ASCEND_API int qwen3_ascend_float_experts(int path, int threads,
                                                const struct expert_rows *experts,
                                                const uint16_t *weights, int64_t outputs,
                                                int64_t inputs, int64_t output_stride,
                                                int64_t run_stride, int row_dtype,
                                                const void *rows, float *scratch, void *out,
                                                int out_dtype)
{
    int64_t in_bytes = inputs * size_of(row_dtype), out_bytes = outputs * size_of(out_dtype);
    for (struct turn turn = {-1, 0, 0}; next_turn(experts, &turn);) {
        int status = qwen3_ascend_float_product(
            path, threads, weight_of(experts, weights, turn.expert), outputs, inputs,
            output_stride, run_stride, row_dtype, (const char *)rows + turn.row * in_bytes,
            turn.count, inputs, scratch, NULL, (char *)out + turn.row * out_bytes, out_dtype);
        if (status) return status;
    }
    return STATUS_OK;
}

/* The codes of an expert, of those of the first one; scales and offsets are
 * [experts, groups, outputs]. */
static struct stored_codes codes_of(const struct expert_rows *experts,
                                    const struct stored_codes *first, int64_t outputs,
                                    int64_t inputs, int64_t expert)
{
    struct stored_codes codes = *first;
    int64_t shared = (inputs + codes.group - 1) / codes.group * outputs * expert;
    codes.data = weight_of(experts, codes.data, expert);
    if (codes.scales) codes.scales += shared;
    if (codes.offsets) codes.offsets += shared;
    return codes;
}

/* The same of qwen3_ascend_code_product; `first` are the codes of the first expert. */
QWEN3_ASCEND_API int qwen3_ascend_code_experts(int path, int threads,
                                               const struct expert_rows *experts,
                                               const struct stored_codes *first, int64_t outputs,
                                               int64_t inputs, int row_dtype, const void *rows,
                                               float *scratch, void *out, int out_dtype)
{
    int64_t in_bytes = inputs * size_of(row_dtype), out_bytes = outputs * size_of(out_dtype);
    for (struct turn turn = {-1, 0, 0}; next_turn(experts, &turn);) {
        struct stored_codes codes = codes_of(experts, first, outputs, inputs, turn.expert);
        int status = qwen3_ascend_code_product(
            path, threads, &codes, outputs, inputs, row_dtype,
            (const char *)rows + turn.row * in_bytes, turn.count, inputs, scratch, NULL,
            (char *)out + turn.row * out_bytes, out_dtype);
        if (status) return status;
    }
    return STATUS_OK;
}

/* The same of qwen3_ascend_group_product; the scales are [experts, groups, outputs], the shift is
 * [experts, outputs]. */
QWEN3_ASCEND_API int qwen3_ascend_group_experts(int path, int threads,
                                                const struct expert_rows *experts,
                                                const struct stored_codes *first, int64_t outputs,
                                                int64_t inputs, const struct grouped *grouped,
                                                const int8_t *rows, float *scratch, void *out,
                                                int out_dtype)
{
    int64_t groups = (inputs + GROUP_INPUTS - 1) / GROUP_INPUTS;
    int64_t out_bytes = outputs * size_of(out_dtype);
    for (struct turn turn = {-1, 0, 0}; next_turn(experts, &turn);) {
        struct stored_codes codes = codes_of(experts, first, outputs, inputs, turn.expert);
        struct grouped own = {grouped->scales + turn.expert * groups * outputs,
                              grouped->shift + turn.expert * outputs,
                              grouped->row_scales + turn.row};
        int status = qwen3_ascend_group_product(
            path, threads, &codes, outputs, inputs, &own, rows + turn.row * inputs, turn.count,
            inputs, scratch, NULL, (char *)out + turn.row * out_bytes, out_dtype);
        if (status) return status;
    }
    return STATUS_OK;
}

/* ---- sums of tokens ---- */

struct combine_job {
    const struct routing *routing;
    int dtype;
    int64_t columns;
    const void *outputs; /* [tokens * per_token, columns] */
    void *out;           /* [tokens, columns] */
};

/* Columns that are summed up together: their sums stay in the nearest cache. */
enum { COLUMNS_TOGETHER = 512 };

static void add_bf16(float *sums, const uint16_t *values, float weight, int64_t count)
{
    for (int64_t i = 0; i < count; i++) sums[i] += from_bf16(values[i]) * weight;
}

static void add_floats(float *sums, const float *values, float weight, int64_t count)
{
    for (int64_t i = 0; i < count; i++) sums[i] += values[i] * weight;
}

static void combine_columns(const struct combine_job *job, int64_t token, int64_t column,
                            int64_t count)
{
    const struct routing *routing = job->routing;
    float sums[COLUMNS_TOGETHER] = {0};
    for (int64_t rank = 0; rank < routing->per_token; rank++) {
        int64_t i = token * routing->per_token + rank;
        int64_t place = routing->places[i] * job->columns + column;
        if (job->dtype == DTYPE_BF16)
            add_bf16(sums, (const uint16_t *)job->outputs + place, routing->weights[i], count);
        else
            add_floats(sums, (const float *)job->outputs + place, routing->weights[i], count);
    }
    int64_t place = token * job->columns + column;
    if (job->dtype == DTYPE_BF16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)job->out)[place + i] = to_bf16(sums[i]);
    else
        memcpy((float *)job->out + place, sums, (size_t)count * sizeof *sums);
}

static void combine_tokens(const void *context, int64_t part)
{
    const struct combine_job *job = context;
    int64_t first = part * ROWS_TOGETHER, last = first + ROWS_TOGETHER;
    for (int64_t token = first; token < last && token < job->routing->tokens; token++)
        for (int64_t column = 0; column < job->columns; column += COLUMNS_TOGETHER) {
            int64_t left = job->columns - column;
            combine_columns(job, token, column, left < COLUMNS_TOGETHER ? left : COLUMNS_TOGETHER);
        }
}

/* The outputs of each token's experts [routed rows, columns], times their weights, added up in
 * descending order of these; [tokens, columns], rounded to `dtype`, which the outputs have too. */
QWEN3_ASCEND_API int qwen3_ascend_combine(int threads, const struct routing *routing, int dtype,
                                          int64_t columns, const void *outputs, void *out)
{
    struct combine_job job = {routing, dtype, columns, outputs, out};
    share_work(combine_tokens, &job, parts_of(routing->tokens), threads);
    return STATUS_OK;
}
