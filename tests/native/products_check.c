/* Holds the products of int8 and of floats against sums in double precision on processors that
 * Python does not run on here: products_check. Prints what differs, and each set of instructions
 * that it has run.
 *
 * All numbers are whole and small, so that every sum is exact in float32 whatever its order.
 */
#include "floats.h"
#include "products.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int qwen3_ascend_has_instructions(int path);
int qwen3_ascend_int8_product(int path, int threads, const int8_t *strips, int64_t outputs,
                              int64_t inputs, const int8_t *rows, int64_t count, int64_t row_stride,
                              void *scratch, const int32_t *added, const float *row_scales,
                              const float *output_scales, const float *bias, void *out,
                              int out_dtype);
int qwen3_ascend_float_product(int path, int threads, const uint16_t *weights, int64_t outputs,
                               int64_t inputs, int64_t output_stride, int64_t run_stride,
                               int row_dtype, const void *rows, int64_t count, int64_t row_stride,
                               float *scratch, const float *bias, void *out, int out_dtype);
int qwen3_ascend_code_product(int path, int threads, const struct stored_codes *codes,
                              int64_t outputs, int64_t inputs, int row_dtype, const void *rows,
                              int64_t count, int64_t row_stride, float *scratch, const float *bias,
                              void *out, int out_dtype);

enum { OUTPUTS = 72, INPUTS = 203, STRIPS = 5, PADDED = 208, MOST_ROWS = 29, THREADS = 3 };
enum { GROUP = 32, GROUPS = (INPUTS + GROUP - 1) / GROUP };

static const int64_t row_counts[] = {1, 2, 3, 5, 12, 13, MOST_ROWS};
static int weights[OUTPUTS][INPUTS], activations[MOST_ROWS][INPUTS];
static float scratch[(MOST_ROWS + MOST_FLOAT_BLOCK) * PADDED + 64], found[MOST_ROWS * OUTPUTS];
static uint64_t seed = 1;
static int failures;

static int random_between(int least, int most)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return least + (int)((seed >> 40) % (uint64_t)(most - least + 1));
}

static void draw(int least, int most)
{
    for (int output = 0; output < OUTPUTS; output++)
        for (int input = 0; input < INPUTS; input++)
            weights[output][input] = random_between(least, most);
    for (int row = 0; row < MOST_ROWS; row++)
        for (int input = 0; input < INPUTS; input++)
            activations[row][input] = random_between(least, most);
}

static uint16_t as_bf16(int value)
{
    union { float value; uint32_t bits; } both = {(float)value};
    return (uint16_t)(both.bits >> 16);
}

static float *aligned(void) { return (float *)(((uintptr_t)scratch + 63) / 64 * 64); }

/* What a weight stands for under the scale of a group and its offset. */
static int scale_of(int group, int output) { return 1 << (group + output) % 3; }
static int offset_of(int group, int output) { return (group * 5 + output) % 7 - 3; }

static void compare(const char *what, int path, int64_t rows, int scaled)
{
    for (int64_t row = 0; row < rows; row++)
        for (int output = 0; output < OUTPUTS; output++) {
            double wanted = 0;
            for (int input = 0; input < INPUTS; input++) {
                int weight = weights[output][input], group = input / GROUP;
                if (scaled)
                    weight = (weight + offset_of(group, output)) * scale_of(group, output);
                wanted += (double)activations[row][input] * weight;
            }
            double sum = found[row * OUTPUTS + output];
            if (sum == wanted || failures++ >= 5) continue;
            printf("%s, path %d, %ld rows: [%ld, %d] is %g, not %g\n", what, path, (long)rows,
                   (long)row, output, sum, wanted);
        }
}

static void check_int8(int path)
{
    static int8_t strips[STRIPS * PADDED * STRIP_ROWS], rows[MOST_ROWS * INPUTS];
    memset(strips, 0, sizeof strips);
    for (int output = 0; output < OUTPUTS; output++)
        for (int input = 0; input < INPUTS; input++)
            strips[(output / STRIP_ROWS * PADDED + input) * STRIP_ROWS + output % STRIP_ROWS] =
                (int8_t)weights[output][input];
    for (int i = 0; i < MOST_ROWS * INPUTS; i++)
        rows[i] = (int8_t)activations[i / INPUTS][i % INPUTS];
    for (size_t i = 0; i < sizeof row_counts / sizeof *row_counts; i++) {
        static float ones[MOST_ROWS + OUTPUTS];
        for (int j = 0; j < MOST_ROWS + OUTPUTS; j++) ones[j] = 1.0f;
        memset(found, 0xff, sizeof found);
        qwen3_ascend_int8_product(path, THREADS, strips, OUTPUTS, INPUTS, rows, row_counts[i],
                                  INPUTS, aligned(), NULL, ones, ones, NULL, found, DTYPE_FP32);
        compare("int8", path, row_counts[i], 0);
    }
}

static void check_runs(int path)
{
    static uint16_t strips[PADDED / RUN_INPUTS * 80 * RUN_INPUTS], rows[MOST_ROWS * INPUTS];
    memset(strips, 0, sizeof strips);
    for (int output = 0; output < OUTPUTS; output++)
        for (int input = 0; input < INPUTS; input++)
            strips[(input / RUN_INPUTS * 80 + output) * RUN_INPUTS + input % RUN_INPUTS] =
                as_bf16(weights[output][input]);
    for (int i = 0; i < MOST_ROWS * INPUTS; i++)
        rows[i] = as_bf16(activations[i / INPUTS][i % INPUTS]);
    for (size_t i = 0; i < sizeof row_counts / sizeof *row_counts; i++) {
        memset(found, 0xff, sizeof found);
        qwen3_ascend_float_product(path, THREADS, strips, OUTPUTS, INPUTS, RUN_INPUTS,
                                   80 * RUN_INPUTS, DTYPE_BF16, rows, row_counts[i], INPUTS,
                                   aligned(), NULL, found, DTYPE_FP32);
        compare("bfloat16", path, row_counts[i], 0);
    }
}

static void put_code(uint8_t *data, int bits, int output, int input)
{
    int strip_outputs = RUN_BYTES * 8 / bits, place = output % strip_outputs;
    uint8_t *run = data + (output / strip_outputs * PADDED + input) * RUN_BYTES;
    if (bits == 8)
        run[place] = (uint8_t)weights[output][input];
    else
        run[place / 2] |= (uint8_t)((weights[output][input] & 15) << place % 2 * 4);
}

static void check_codes(int path, int bits)
{
    static uint8_t data[STRIPS * PADDED * RUN_BYTES];
    static uint16_t scales[GROUPS * OUTPUTS], offsets[GROUPS * OUTPUTS];
    static float rows[MOST_ROWS * INPUTS];
    int strip_outputs = RUN_BYTES * 8 / bits;
    memset(data, 0, sizeof data);
    for (int output = 0; output < OUTPUTS; output++) {
        for (int input = 0; input < INPUTS; input++) put_code(data, bits, output, input);
        for (int group = 0; group < GROUPS; group++) {
            scales[group * OUTPUTS + output] = as_bf16(scale_of(group, output));
            offsets[group * OUTPUTS + output] = as_bf16(offset_of(group, output));
        }
    }
    for (int i = 0; i < MOST_ROWS * INPUTS; i++)
        rows[i] = (float)activations[i / INPUTS][i % INPUTS];
    struct stored_codes codes = {
        .data = data, .bits = bits, .strip_outputs = strip_outputs,
        .stored_outputs = (OUTPUTS + strip_outputs - 1) / strip_outputs * strip_outputs,
        .strip_stride = PADDED * RUN_BYTES, .input_stride = RUN_BYTES, .scales = scales,
        .offsets = offsets, .group = GROUP};
    for (size_t i = 0; i < sizeof row_counts / sizeof *row_counts; i++) {
        memset(found, 0xff, sizeof found);
        qwen3_ascend_code_product(path, THREADS, &codes, OUTPUTS, INPUTS, DTYPE_FP32, rows,
                                  row_counts[i], INPUTS, aligned(), NULL, found, DTYPE_FP32);
        compare(bits == 8 ? "codes of int8" : "codes of int4", path, row_counts[i], 1);
    }
}

int main(void)
{
    for (int path = 0; path < PRODUCT_COUNT; path++) {
        if (!qwen3_ascend_has_instructions(path)) continue;
        draw(-127, 127);
        check_int8(path);
        printf("int8 %d\n", path);
    }
    for (int path = FLOAT_BASELINE; path <= FLOAT_AVX512_BF16; path++) {
        if (!has_float_path(path)) continue;
        draw(-8, 7);
        check_runs(path);
        check_codes(path, 8);
        check_codes(path, 4);
        printf("floats %d\n", path);
    }
    return failures != 0;
}
