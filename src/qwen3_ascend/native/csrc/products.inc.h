/* The products of one instruction set. Each products_*.c includes this text once, after it has said
 * what its vectors are:
 *
 *     vector, VECTOR_BYTES    of the quads in a tile; NARROW_BYTES of those made in registers
 *     FLIPPED                 whether DOT takes weights that are 128 too large, as unsigned bytes
 *     DOT(sums, weights, x)   adds to each int32 the product of a quad of weights and one of x
 *     interleave              four rows of a strip to quads, in the order of the outputs
 *     BLOCK_ROWS              rows of the largest block
 *     NOTE_LEAST(made)        where DOT is not exact for weights of -128: looks for them in a quad,
 *                             declared with IS_LEAST, which says whether there was one
 *
 * Sums of integers are exact in any order, so every path finds the same.
 */
#include "bf16.h"
#include "products.h"
#include "rows.h"

#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* Inputs of a tile, and rows whose sums are kept beside it: both fit into the nearest cache. */
enum { TILE_INPUTS = 256, TILE_ROWS = 144 };

enum {
    STRIP_QUAD_BYTES = QUAD * RUN_BYTES, /* a quad of each output of a strip */
    PANEL_BYTES = 2 * VECTOR_BYTES,      /* those of the outputs that are in registers at once */
    PANELS = STRIP_QUAD_BYTES / PANEL_BYTES,
    PANEL_OUTPUTS = PANEL_BYTES / QUAD,
    NARROWS = STRIP_QUAD_BYTES / NARROW_BYTES,
};

typedef int32_t vector __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef int32_t narrow __attribute__((vector_size(NARROW_BYTES), may_alias));

/* ---- what becomes of the sums ---- */

/* `count` outputs from `output` on of one row. */
INLINE void scale_sums(const struct int8_product *product, const int32_t *sums, int64_t row,
                       int64_t output, int64_t count, float *scaled)
{
    const float *scales = product->output_scales + output;
    float row_scale = product->row_scales ? product->row_scales[row] : 1.0f;
    for (int64_t i = 0; i < count; i++) scaled[i] = (float)sums[i] * row_scale * scales[i];
    if (product->bias)
        for (int64_t i = 0; i < count; i++) scaled[i] = scaled[i] + product->bias[output + i];
}

INLINE void store_row(const struct int8_product *product, int32_t *sums, int64_t row,
                      int64_t output, int64_t count)
{
    int64_t place = row * product->outputs + output;
    if (product->added)
        for (int64_t i = 0; i < count; i++) sums[i] += product->added[output + i];
    if (product->output_scales == NULL) {
        memcpy((int32_t *)product->out + place, sums, (size_t)count * sizeof *sums);
        return;
    }
    float scaled[STRIP_ROWS];
    scale_sums(product, sums, row, output, count, scaled);
    if (product->out_dtype == DTYPE_FP32) {
        memcpy((float *)product->out + place, scaled, (size_t)count * sizeof *scaled);
        return;
    }
    uint16_t *out = (uint16_t *)product->out + place;
    for (int64_t i = 0; i < count; i++) out[i] = to_bf16(scaled[i]);
}

static void store_sums(const struct int8_product *product, int32_t *sums, int64_t row, int64_t rows,
                       int64_t strip)
{
    int64_t output = strip * STRIP_ROWS, left = product->outputs - output;
    for (int64_t i = 0; i < rows; i++)
        if (left >= STRIP_ROWS)
            store_row(product, sums + i * STRIP_ROWS, row + i, output, STRIP_ROWS);
        else
            store_row(product, sums + i * STRIP_ROWS, row + i, output, left);
}

/* ---- weights of -128, which some instructions cannot multiply ---- */

#ifndef NOTE_LEAST
#define NOTE_LEAST(made) ((void)0)
#define DECLARE_LEAST
#define IS_LEAST 0
#endif

/* ---- one row: quads are made in registers ---- */

/* Far enough ahead for memory. */
enum { PREFETCH_BYTES = 2048 };

/* Whether a weight of the strip cannot be multiplied so. */
static int multiply_row(const int8_t *strip, int64_t quads, const int32_t *x, int32_t *sums)
{
    narrow totals[NARROWS], made[NARROWS];
    DECLARE_LEAST
    for (int part = 0; part < NARROWS; part++) totals[part] = ((const narrow *)sums)[part];
    for (int64_t i = 0; i < quads; i++, strip += STRIP_QUAD_BYTES) {
        __builtin_prefetch(strip + PREFETCH_BYTES, 0, 0);
        __builtin_prefetch(strip + PREFETCH_BYTES + STRIP_QUAD_BYTES / 2, 0, 0);
        narrow each = (narrow){0} + x[i];
        interleave(strip, made);
        NOTE_LEAST(made);
        for (int part = 0; part < NARROWS; part++) NARROW_DOT(totals[part], made[part], each);
    }
    for (int part = 0; part < NARROWS; part++) ((narrow *)sums)[part] = totals[part];
    return IS_LEAST;
}

/* ---- several rows: quads are made once, and lie in a tile [PANELS][quads][PANEL_BYTES] ---- */

/* Whether one of its weights cannot be multiplied so. */
static int make_tile(const int8_t *strip, int64_t quads, uint8_t *tile)
{
    narrow made[NARROWS];
    DECLARE_LEAST
    for (int64_t i = 0; i < quads; i++, strip += STRIP_QUAD_BYTES) {
        interleave(strip, made);
        NOTE_LEAST(made);
        for (int panel = 0; panel < PANELS; panel++)
            memcpy(tile + (panel * quads + i) * PANEL_BYTES,
                   (const uint8_t *)made + panel * PANEL_BYTES, PANEL_BYTES);
    }
    return IS_LEAST;
}

#define SUMS_OF(row) ((vector *)(sums + row * STRIP_ROWS))

/* Two variables for each row: of an array, GCC 12 stores every sum in every round. */
#define TAKE(row) vector a##row = SUMS_OF(row)[0], b##row = SUMS_OF(row)[1];
#define MULTIPLY(row)                                                                              \
    each = (vector){0} + x[row];                                                                   \
    DOT(a##row, first, each);                                                                      \
    DOT(b##row, second, each);
#define GIVE(row) SUMS_OF(row)[0] = a##row, SUMS_OF(row)[1] = b##row;

/* A panel of a tile times a block of COUNT rows. */
#define DEFINE_BLOCK(COUNT)                                                                        \
    static void multiply_##COUNT(const uint8_t *panel, int64_t quads, const int32_t *x,            \
                                 int32_t *sums)                                                    \
    {                                                                                              \
        EACH_##COUNT(TAKE) for (int64_t i = 0; i < quads; i++, panel += PANEL_BYTES, x += COUNT)   \
        {                                                                                          \
            vector first = ((const vector *)panel)[0], second = ((const vector *)panel)[1], each;  \
            EACH_##COUNT(MULTIPLY)                                                                 \
        }                                                                                          \
        EACH_##COUNT(GIVE)                                                                         \
    }

typedef void (*multiply_block)(const uint8_t *panel, int64_t quads, const int32_t *x,
                               int32_t *sums);

#define NAME_BLOCK(COUNT) [COUNT] = multiply_##COUNT

DEFINE_BLOCKS
static const multiply_block multiply[MOST_BLOCK_ROWS + 1] = {NAME_BLOCKS};

/* Rows `row` .. of one strip, from the inputs of all tiles; whether a weight of it cannot be
 * multiplied so. */
static int multiply_rows(const struct int8_product *product, struct packed_rows packed,
                          int64_t row, int64_t rows, const int8_t *strip, int32_t *sums)
{
    uint8_t tile[TILE_INPUTS * STRIP_ROWS] __attribute__((aligned(64)));
    int64_t quads = padded_inputs(product->inputs) / QUAD;
    for (int64_t start = 0; start < quads; start += TILE_INPUTS / QUAD) {
        int64_t count = quads - start < TILE_INPUTS / QUAD ? quads - start : TILE_INPUTS / QUAD;
        if (make_tile(strip + start * STRIP_QUAD_BYTES, count, tile)) return 1;
        for (int64_t done = 0; done < rows;) {
            int64_t block = block_of(product->rows - row - done, BLOCK_ROWS);
            const int32_t *x = packed.quads + (row + done) * quads + start * block;
            for (int panel = 0; panel < PANELS; panel++)
                multiply[block](tile + panel * count * PANEL_BYTES, count, x,
                                sums + done * STRIP_ROWS + panel * PANEL_OUTPUTS);
            done += block;
        }
    }
    return 0;
}

static void multiply_strips(const struct int8_product *product, struct packed_rows packed,
                            int64_t first, int64_t last)
{
    int32_t sums[(TILE_ROWS + BLOCK_ROWS) * STRIP_ROWS] __attribute__((aligned(64)));
    int64_t strip_bytes = padded_inputs(product->inputs) * RUN_BYTES;
    for (int64_t strip = first; strip < last; strip++)
        for (int64_t row = 0; row < product->rows; row += TILE_ROWS) {
            int64_t left = product->rows - row, rows = left < TILE_ROWS ? left : TILE_ROWS;
            for (int64_t i = 0; i < rows * STRIP_ROWS; i++)
                sums[i] = packed.corrections[row + i / STRIP_ROWS];
            const int8_t *weights = product->strips + strip * strip_bytes;
            int is_inexact =
                product->rows == 1
                    ? multiply_row(weights, strip_bytes / STRIP_QUAD_BYTES, packed.quads, sums)
                    : multiply_rows(product, packed, row, rows, weights, sums);
            if (is_inexact) { /* the first rows say so: nothing of the strip is stored yet */
                products_plain.strips(product, packed, strip, strip + 1);
                break;
            }
            store_sums(product, sums, row, rows, strip);
        }
}

const struct product_path_table PRODUCT_TABLE = {BLOCK_ROWS, FLIPPED, multiply_strips};
