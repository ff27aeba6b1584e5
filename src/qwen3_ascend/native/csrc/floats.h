/* Products of float activations with bfloat16 weights as they are stored: FRACTAL_NZ of [N, K], or
 * row by row.
 *
 * FRACTAL_NZ of [N, K] puts 16 inputs side by side for each of the N outputs (a strip, K padded to
 * 16). So weights come in runs of 16 inputs of one output, 32 bytes, in both forms; what differs is
 * how far the next output and the next 16 inputs are.
 */
#ifndef QWEN3_ASCEND_FLOATS_H
#define QWEN3_ASCEND_FLOATS_H

#include "kernels.h"

enum { RUN_INPUTS = RUN_BYTES / 2 };

/* Rows of activations up to which weights are multiplied as they are read, and rows of the largest
 * block beyond. */
enum { FEW_ROWS = 4, MOST_FLOAT_BLOCK = 12 };

/* y = activations @ weights' + bias, summed in float32 in an order of the kernel's choice, rounded
 * once to the dtype of `out`. */
struct float_product {
    const uint16_t *weights;
    int64_t output_stride, run_stride; /* in elements, to the next output and the next run */
    int64_t rows, inputs, outputs;
    const float *bias;
    void *out; /* [rows, outputs] */
    int out_dtype;
};

/* The activations in float32, as the kernels read them. Of few rows: [runs][rows][8 even inputs, 8
 * odd inputs]. Of more: blocks of rows, each [padded inputs][rows of the block]. */
struct float_path_table {
    int block_rows;
    int unit; /* outputs that are computed together */
    void (*few)(const struct float_product *product, const float *x, int64_t first, int64_t last);
    void (*many)(const struct float_product *product, const float *x, int64_t first, int64_t last);
};

/* Whether this processor has the instructions of a path's floats: those of AVX2 include FMA. */
int has_float_path(int path);

extern const struct float_path_table floats_baseline, floats_avx2, floats_avx512;

#endif
