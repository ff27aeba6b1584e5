/* Products of pairs of bfloat16; a part of floats.inc.h. A path says beforehand:
 *
 *     ADD_PAIRS(sums, a, b)    adds both products of each pair, in float32
 *     JOIN_PAIRS(even, odd)    float32 that bfloat16 has exactly, side by side as that
 *
 * A tile holds pairs of neighbouring inputs, [pairs][UNIT_OUTPUTS]: half of the bytes and half of
 * the products.
 */

typedef int32_t word_anywhere __attribute__((may_alias));

#define MULTIPLY_PAIRS(row)                                                                        \
    each = (vector)((integers_of_lanes){0} + ((const word_anywhere *)x)[row]);                     \
    ADD_PAIRS(a##row, first, each);                                                                \
    ADD_PAIRS(b##row, second, each);

#define DEFINE_PAIR_BLOCK(COUNT)                                                                   \
    static void multiply_pairs_##COUNT(const float *tile, int64_t pairs, const float *x,           \
                                       float *sums)                                                \
    {                                                                                              \
        EACH_##COUNT(TAKE) for (int64_t i = 0; i < pairs; i++, tile += UNIT_OUTPUTS, x += COUNT)   \
        {                                                                                          \
            vector first = ((const vector *)tile)[0], second = ((const vector *)tile)[1], each;    \
            EACH_##COUNT(MULTIPLY_PAIRS)                                                           \
        }                                                                                          \
        EACH_##COUNT(GIVE)                                                                         \
    }
#define NAME_PAIR_BLOCK(COUNT) [COUNT] = multiply_pairs_##COUNT

DEFINE_PAIR_BLOCK(1)
DEFINE_PAIR_BLOCK(2)
DEFINE_PAIR_BLOCK(4)
DEFINE_PAIR_BLOCK(8)
DEFINE_PAIR_BLOCK(12)
static const multiply_block multiply_pair_blocks[MOST_FLOAT_BLOCK + 1] = {
    NAME_PAIR_BLOCK(1), NAME_PAIR_BLOCK(2), NAME_PAIR_BLOCK(4), NAME_PAIR_BLOCK(8),
    NAME_PAIR_BLOCK(12)};

/* See widen_runs. */
static void pair_runs(const struct float_product *product, int64_t output, int64_t input,
                      int64_t count, float *tile)
{
    for (int64_t place = 0; place < count; place += RUN_INPUTS)
        for (int column = 0; column < UNIT_OUTPUTS; column += 4) {
            const uint16_t *outputs[4];
            runs_at(product, output + column, input + place, outputs);
            for (int half = 0; half < RUN_INPUTS; half += RUN_INPUTS / 2) {
                words4 pairs[4];
                turn_pairs(outputs, half, pairs);
                for (int i = 0; i < 4; i++)
                    *(words4 *)(tile + ((place + half) / 2 + i) * UNIT_OUTPUTS + column) = pairs[i];
            }
        }
}

static void pair_codes(const struct float_product *product, int64_t output, int64_t input,
                       int64_t count, float *tile)
{
    float wide[RUN_INPUTS * UNIT_OUTPUTS] __attribute__((aligned(64)));
    for (int64_t place = 0; place < count; place += RUN_INPUTS) {
        make_codes(product, output, input + place, RUN_INPUTS, wide);
        for (int pair = 0; pair < RUN_INPUTS / 2; pair++, tile += UNIT_OUTPUTS)
            for (int column = 0; column < UNIT_OUTPUTS; column += LANES) {
                const float *even = wide + 2 * pair * UNIT_OUTPUTS + column;
                *(vector *)(tile + column) =
                    JOIN_PAIRS(*(const vector *)even, *(const vector *)(even + UNIT_OUTPUTS));
            }
    }
}

static const struct tiling pairs_of_runs = {2, pair_runs, multiply_pair_blocks};
static const struct tiling pairs_of_codes = {2, pair_codes, multiply_pair_blocks};

static void multiply_pairs(const struct float_product *product, const float *x, int64_t first,
                           int64_t last)
{
    if (product->grouped)
        multiply_group_tiles(product, &pairs_of_codes, x, first, last);
    else
        multiply_tiles(product, product->weights ? &pairs_of_runs : &pairs_of_codes, x, first,
                       last);
}
