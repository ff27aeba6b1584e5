/* Products of codes of int8 with groups of codes of int4, as w4a8 defines them; a part of
 * floats.inc.h. Halves of a code are two rows, the high one first; see struct grouped.
 */

/* To the nearest number that float16 has, half to even; what is too large becomes infinite. */
INLINE vector round_to_half(vector values)
{
    words_of_lanes sign = (words_of_lanes)values & 0x80000000u;
    vector size = (vector)((words_of_lanes)values ^ sign);
    words_of_lanes power = (words_of_lanes)size & 0x7f800000u; /* not above size */
    words_of_lanes subnormal = (words_of_lanes)(power < 0x38800000u); /* 2^-14 */
    power = (power & ~subnormal) | (0x38800000u & subnormal);
    vector border = (vector)power * 12288.0f; /* beside it float32 has just float16's bits */
    vector rounded = (size + border) - border;
    words_of_lanes large = (words_of_lanes)(size >= 65520.0f);
    return (vector)(((words_of_lanes)rounded & ~large) | (0x7f800000u & large) | sign);
}

/* Adds rows of integer sums of a group, under its scales, to those of the groups before it. */
INLINE void add_group(const struct float_product *product, int64_t group, int64_t output,
                      int64_t unit, int64_t rows, const float *sums, float *totals)
{
    float scales[CODE_OUTPUTS] __attribute__((aligned(64))) = {0};
    int64_t count = least(unit, product->outputs - output);
    memcpy(scales, product->grouped->scales + group * product->outputs + output,
           (size_t)count * sizeof *scales);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t lane = 0; lane < unit; lane += LANES) {
            vector sum = *(const vector *)(sums + row * unit + lane);
            vector *total = (vector *)(totals + row * unit + lane);
            *total = round_to_half(*total + round_to_half(sum * *(const vector *)(scales + lane)));
        }
}

/* A row of the result from both halves' totals. */
static void store_halves(const struct float_product *product, int64_t row, int64_t output,
                         int64_t count, const float *high, const float *low)
{
    const struct grouped *grouped = product->grouped;
    for (int64_t i = 0; i < count; i++) {
        float sum = 16.0f * high[i] + low[i] + grouped->shift[output + i];
        store(product, row, output + i, sum * grouped->row_scales[row]);
    }
}

/* One row of codes: both halves are multiplied with the codes as they are read. */
static void multiply_few_groups(const struct float_product *product, const float *x, int64_t first,
                                int64_t last)
{
    float sums[FEW_CODE_ROWS][CODE_OUTPUTS] __attribute__((aligned(64)));
    for (int64_t output = first; output < last; output += CODE_OUTPUTS) {
        float totals[FEW_CODE_ROWS][CODE_OUTPUTS] __attribute__((aligned(64))) = {{0}};
        struct float_product one = *product;
        for (int64_t start = 0; start < product->inputs; start += GROUP_INPUTS) {
            one.codes.data = code_of(&product->codes, 0, start);
            one.inputs = least(GROUP_INPUTS, product->inputs - start);
            codes_2(&one, (struct code_form){4, 0}, x + start * FEW_CODE_ROWS, output, sums);
            add_group(product, start / GROUP_INPUTS, output, CODE_OUTPUTS, FEW_CODE_ROWS, sums[0],
                      totals[0]);
        }
        store_halves(product, 0, output, least(CODE_OUTPUTS, last - output), totals[0], totals[1]);
    }
}

static void multiply_group_tiles(const struct float_product *product, const struct tiling *tiling,
                                 const float *x, int64_t first, int64_t last)
{
    float sums[(TILE_ROWS + BLOCK_ROWS) * UNIT_OUTPUTS] __attribute__((aligned(64)));
    float totals[TILE_ROWS * UNIT_OUTPUTS] __attribute__((aligned(64)));
    for (int64_t output = first; output < last; output += UNIT_OUTPUTS)
        for (int64_t row = 0; row < product->rows; row += TILE_ROWS) {
            int64_t rows = least(TILE_ROWS, product->rows - row);
            size_t size = (size_t)((rows + BLOCK_ROWS) * UNIT_OUTPUTS) * sizeof *sums;
            memset(totals, 0, sizeof totals);
            for (int64_t start = 0; start < product->inputs; start += GROUP_INPUTS) {
                memset(sums, 0, size);
                multiply_unit(product, tiling, x, row, rows, output, start,
                              least(start + GROUP_INPUTS, padded_inputs(product)), sums);
                add_group(product, start / GROUP_INPUTS, output, UNIT_OUTPUTS, rows, sums, totals);
            }
            for (int64_t i = 0; i < rows; i += 2)
                store_halves(product, (row + i) / 2, output, least(UNIT_OUTPUTS, last - output),
                             totals + i * UNIT_OUTPUTS, totals + (i + 1) * UNIT_OUTPUTS);
        }
}
