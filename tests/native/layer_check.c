/* Holds the operations of a layer against sums in double precision on processors that Python does
 * not run on here: layer_check PATH. Prints what differs; exits with 77 where the path does not run.
 */
#include "layer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

int qwen3_ascend_has_float_path(int path);
int64_t qwen3_ascend_row_scratch(int threads, int64_t columns);
int64_t qwen3_ascend_attention_scratch(int path, int threads, int64_t group, int64_t head_dim);
int qwen3_ascend_add_norm(int path, int threads, const struct add_norm *job, float *scratch);
int qwen3_ascend_gated(int path, int threads, const struct gated *job, float *scratch);
int qwen3_ascend_attention(int path, int threads, const struct attention *job,
                           const struct feed *feed, float *scratch, float *row_scratch);

enum { THREADS = 3, COLUMNS = 333, ROWS = 5, HEADS = 6, KV_HEADS = 2, LENGTH = 203, BLOCK = 16 };

static int path, failures;
static uint64_t seed = 1;

static float next_random(void) /* exact in bfloat16 */
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (float)((int)(seed >> 57) - 64) / 32.0f;
}

static void *aligned_floats(int64_t count)
{
    void *values = aligned_alloc(64, (size_t)(count / 16 + 1) * 64);
    if (values == NULL) abort();
    return values;
}

static float *random_floats(int64_t count)
{
    float *values = aligned_floats(count);
    for (int64_t i = 0; i < count; i++) values[i] = next_random();
    return values;
}

static uint16_t *as_bf16(const float *values, int64_t count)
{
    uint16_t *halves = aligned_floats(count);
    for (int64_t i = 0; i < count; i++) {
        union { float value; uint32_t bits; } both = {values[i]};
        halves[i] = (uint16_t)(both.bits >> 16);
    }
    return halves;
}

static void expect(const char *what, int64_t place, double found, double wanted, double bound)
{
    if (fabs(found - wanted) <= bound) return;
    if (failures++ < 5)
        printf("path %d, %s, %ld: %g is not %g\n", path, what, (long)place, found, wanted);
}

static void check_norm(void)
{
    float *hidden = random_floats(ROWS * COLUMNS), *delta = random_floats(ROWS * COLUMNS);
    float *weight = random_floats(COLUMNS), *total = aligned_floats(ROWS * COLUMNS);
    float *out = aligned_floats(ROWS * COLUMNS);
    struct add_norm job = {DTYPE_FP32, ROWS, COLUMNS, hidden, delta, weight, 1e-6f, total,
                           {FEED_FLOAT, DTYPE_FP32, out, NULL, 1.0f, 0.0f}};
    qwen3_ascend_add_norm(path, THREADS, &job,
                          aligned_floats(qwen3_ascend_row_scratch(THREADS, COLUMNS)));
    for (int row = 0; row < ROWS; row++) {
        double squares = 0.0;
        for (int i = 0; i < COLUMNS; i++)
            squares += pow((double)hidden[row * COLUMNS + i] + delta[row * COLUMNS + i], 2);
        for (int i = 0; i < COLUMNS; i++) {
            double sum = (double)hidden[row * COLUMNS + i] + delta[row * COLUMNS + i];
            double wanted = sum / sqrt(squares / COLUMNS + 1e-6) * weight[i];
            expect("norm", row * COLUMNS + i, out[row * COLUMNS + i], wanted, 1e-6 + fabs(wanted) * 1e-6);
        }
    }
}

static void check_gates(void)
{
    float *gate_up = random_floats(ROWS * 2 * COLUMNS), scales[ROWS];
    int8_t codes[ROWS * COLUMNS];
    struct gated job = {DTYPE_FP32, ROWS, COLUMNS, gate_up,
                        {FEED_PER_TOKEN, DTYPE_FP32, codes, scales, 1.0f, 0.0f}};
    qwen3_ascend_gated(path, THREADS, &job,
                       aligned_floats(qwen3_ascend_row_scratch(THREADS, COLUMNS)));
    for (int row = 0; row < ROWS; row++) {
        double largest = 0.0, wanted[COLUMNS];
        for (int i = 0; i < COLUMNS; i++) {
            double gate = gate_up[row * 2 * COLUMNS + i];
            wanted[i] = gate / (1.0 + exp(-gate)) * gate_up[row * 2 * COLUMNS + COLUMNS + i];
            largest = fabs(wanted[i]) > largest ? fabs(wanted[i]) : largest;
        }
        expect("scale", row, scales[row], largest / 127.0, largest * 1e-7);
        for (int i = 0; i < COLUMNS; i++)
            expect("code", row * COLUMNS + i, codes[row * COLUMNS + i], wanted[i] / scales[row],
                   0.5 + 1e-4);
    }
}

/* One query's output, in double precision. */
static void attend(const float *query, const float *keys, const float *values, int size, int head,
                   int visible, double *out)
{
    double total = 0.0;
    for (int i = 0; i < size; i++) out[i] = 0.0;
    for (int token = 0; token < visible; token++) {
        int64_t place = ((int64_t)token * KV_HEADS + head / (HEADS / KV_HEADS)) * size;
        double score = 0.0;
        for (int i = 0; i < size; i++) score += (double)query[i] * keys[place + i];
        double weight = exp(score / sqrt((double)size));
        total += weight;
        for (int i = 0; i < size; i++) out[i] += weight * values[place + i];
    }
    for (int i = 0; i < size; i++) out[i] /= total;
}

/* The last `rows` tokens of a request whose blocks lie in order; as floats, or as bfloat16. */
static void check_attention(int rows, int size, int dtype)
{
    int64_t cached = (LENGTH + BLOCK) * KV_HEADS * size, count = (int64_t)rows * HEADS * size;
    float *query = random_floats(count), *keys = random_floats(cached);
    float *values = random_floats(cached), *out = aligned_floats(count);
    int32_t table[LENGTH / BLOCK + 1], lengths[] = {LENGTH}, starts[] = {0, rows};
    for (int i = 0; i <= LENGTH / BLOCK; i++) table[i] = i;
    int half = dtype == DTYPE_BF16;
    struct layer_cache cache = {dtype, KV_HEADS, size, keys, values, NULL, NULL};
    if (half) cache.keys = as_bf16(keys, cached), cache.values = as_bf16(values, cached);
    struct attention job = {dtype, 1, HEADS, BLOCK, half ? (void *)as_bf16(query, count) : query,
                            cache, table, LENGTH / BLOCK + 1, lengths, starts, out};
    struct feed feed = {FEED_FLOAT, dtype, out, NULL, 1.0f, 0.0f};
    int64_t scratch = qwen3_ascend_attention_scratch(path, THREADS, HEADS / KV_HEADS, size);
    qwen3_ascend_attention(path, THREADS, &job, &feed, aligned_floats(scratch), NULL);
    for (int row = 0; row < rows; row++)
        for (int head = 0; head < HEADS; head++) {
            int64_t place = ((int64_t)row * HEADS + head) * size;
            double *wanted = malloc((size_t)size * sizeof *wanted);
            attend(query + place, keys, values, size, head, LENGTH - rows + row + 1, wanted);
            for (int i = 0; i < size; i++) {
                union { uint32_t bits; float value; } both = {0};
                both.bits = half ? (uint32_t)((uint16_t *)out)[place + i] << 16 : 0;
                expect("attention", place + i, half ? both.value : out[place + i], wanted[i],
                       half ? 1.0 / 128 : 1e-5);
            }
            free(wanted);
        }
}

int main(int count, char **arguments)
{
    path = count > 1 ? atoi(arguments[1]) : 0;
    if (!qwen3_ascend_has_float_path(path)) return 77;
    check_norm();
    check_gates();
    for (int dtype = DTYPE_BF16; dtype <= DTYPE_FP32; dtype += DTYPE_FP32 - DTYPE_BF16) {
        check_attention(1, 128, dtype);
        check_attention(37, 128, dtype);
        check_attention(40, 36, dtype);
    }
    return failures != 0;
}
