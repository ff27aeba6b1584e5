/* Products of int8 activations with int8 weights that lie in FRACTAL_NZ, as they are stored.
 *
 * FRACTAL_NZ of [K, N] puts 32 outputs side by side for each of the K inputs (K padded to 16): a
 * strip. A processor multiplies four neighbouring *inputs* at once, so four rows of a strip are
 * interleaved on the way: in registers for one row of activations, into a tile in the nearest cache
 * for several. No weight is kept in another form.
 */
#ifndef QWEN3_ASCEND_PRODUCTS_H
#define QWEN3_ASCEND_PRODUCTS_H

#include "kernels.h"

/* The instruction sets that there are kernels for. */
enum product_path {
    PRODUCT_PLAIN = 0,
    PRODUCT_AVX2 = 1,
    PRODUCT_AVX_VNNI = 2,
    PRODUCT_AVX512_VNNI = 3,
    PRODUCT_DOTPROD = 4,
    PRODUCT_COUNT = 5,
};

/* Inputs that are multiplied at once, and rows of activations that no path has more of in a block. */
enum { QUAD = 4, MOST_BLOCK_ROWS = 12 };

/* [rows, inputs] activations times [inputs, outputs] weights:
 *
 *     sum = activations @ weights + added[output]        exact, in int32
 *     y   = (float)sum * row_scales[row] * output_scales[output] + bias[output]
 *
 * each step rounded to float32. Without output_scales `out` takes the sums; without any other, its
 * step is left out. */
struct int8_product {
    const int8_t *strips;
    int64_t rows, inputs, outputs;
    const int32_t *added;
    const float *row_scales, *output_scales, *bias;
    void *out; /* [rows, outputs] */
    int out_dtype;
};

/* The activations as the kernels read them: blocks of rows, each [padded inputs / 4][rows of the
 * block] quads, and what `flipped` weights add to the sum of each row. */
struct packed_rows {
    const int32_t *quads;
    const int32_t *corrections;
};

struct product_path_table {
    int block_rows; /* of the largest block */
    int flipped;    /* weights are read as unsigned, 128 more than they are */
    void (*strips)(const struct int8_product *product, struct packed_rows rows, int64_t first,
                   int64_t last);
};

static inline int64_t padded_inputs(int64_t inputs)
{
    return (inputs + ROW_GROUP - 1) / ROW_GROUP * ROW_GROUP;
}

extern const struct product_path_table products_plain, products_avx2, products_avx_vnni,
    products_avx512_vnni, products_dotprod;

#endif
