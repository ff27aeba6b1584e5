/* Products of float activations with weights as they are stored: bfloat16 in FRACTAL_NZ of [N, K],
 * or row by row; or codes of int8 or int4, whose outputs lie side by side.
 *
 * FRACTAL_NZ of [N, K] puts 16 inputs side by side for each of the N outputs (a strip, K padded to
 * 16). So bfloat16 comes in runs of 16 inputs of one output, 32 bytes, in both forms; what differs
 * is how far the next output and the next 16 inputs are.
 *
 * Codes lie the other way round: those of neighbouring outputs for one input, 32 bytes of them in
 * FRACTAL_NZ of [K, N], a row of the matrix otherwise.
 */
#ifndef QWEN3_ASCEND_FLOATS_H
#define QWEN3_ASCEND_FLOATS_H

#include "kernels.h"

enum { RUN_INPUTS = RUN_BYTES / 2 };

/* The instruction sets that there are kernels for. */
enum float_path {
    FLOAT_BASELINE = 0,
    FLOAT_AVX2 = 1,
    FLOAT_AVX512 = 2,
    FLOAT_AVX512_BF16 = 3,
};

/* Rows of activations up to which weights are multiplied as they are read, and rows of the largest
 * block beyond. Pairs are not widened, so they are kept for more rows; codes are widened with more
 * effort. */
enum { FEW_ROWS = 4, FEW_PAIR_ROWS = 8, FEW_CODE_ROWS = 2, MOST_FLOAT_BLOCK = 12 };

/* Codes of `bits` bits. A code c of a group stands for (c + offset) * scale, which is rounded to
 * bfloat16 if `rounded`: where it is multiplied in that type, by definition. */
struct stored_codes {
    const uint8_t *data;
    int bits;                            /* 8, or 4: the first of two in the lower half */
    int64_t stored_outputs;              /* with padding, a multiple of 32 */
    int64_t strip_outputs, strip_stride; /* of a strip, bytes to the next one */
    int64_t input_stride;                /* bytes to the next input */
    const uint16_t *scales, *offsets;    /* bfloat16 [groups, outputs]; NULL for 1 and for 0 */
    int64_t group;                       /* inputs that share them */
    int rounded;
};

/* Inputs that share a scale in `grouped`: sums of so many products of numbers of four bits are
 * exact in float32. */
enum { GROUP_INPUTS = 256 };

/* w4a8, as checkpoint/schemes/w4a8.py defines it, of int8 codes 16 h + l + 8 with codes of int4:
 *
 *     sum(c) = sum over g of f16(sum of c * code in g, exact, * scales[g])    c = h or l; in f16
 *     y      = (16 * sum(h) + sum(l) + shift) * row_scale + bias
 *
 * with f16 for rounding to float16; all else is rounded to float32 step by step. */
struct grouped {
    const float *scales;     /* [groups, outputs] */
    const float *shift;      /* [outputs] */
    const float *row_scales; /* [rows of the result] */
};

/* y = activations @ weights' + bias, summed in float32 in an order of the kernel's choice, rounded
 * once to the dtype of `out`. */
struct float_product {
    const uint16_t *weights; /* NULL if they are codes */
    int64_t output_stride, run_stride; /* in elements, to the next output and the next run */
    struct stored_codes codes;
    const struct grouped *grouped; /* NULL if not; if so, `rows` counts halves of codes */
    int64_t rows, inputs, outputs;
    const float *bias;
    void *out; /* [rows, outputs] */
    int out_dtype;
};

/* The activations as the kernels read them, inputs padded to 16 with zeros. Few rows of runs:
 * float32 [runs][rows][8 even inputs, 8 odd inputs]. All else: blocks of rows, each [words][rows of
 * the block]; a word is an input in float32, or two neighbours in bfloat16 for pairs. */
typedef void (*multiply_outputs)(const struct float_product *product, const float *x, int64_t first,
                                 int64_t last);

struct float_path_table {
    int block_rows;
    int unit; /* outputs that are computed together */
    multiply_outputs few, few_codes, many;
    /* Of bfloat16 activations, instead of `many`, `few_codes` and `few`; NULL where there are no such
     * instructions. */
    multiply_outputs pairs, code_pairs, few_pairs;
};

/* Whether this processor has the instructions of a path's floats: those of AVX2 include FMA. */
int has_float_path(int path);

extern const struct float_path_table floats_baseline, floats_avx2, floats_avx512,
    floats_avx512_bf16;

#endif
