/* Products of pairs of bfloat16; a part of floats.inc.h. A path says beforehand:
 *
 *     ADD_PAIRS(sums, a, b)    adds both products of each pair, in float32
 *     ROUND_PAIRS(even, odd)   float32 rounded to bfloat16, half to even, side by side
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
                    ROUND_PAIRS(*(const vector *)even, *(const vector *)(even + UNIT_OUTPUTS));
            }
    }
}

/* A pair of codes; of the last one of an odd number, with zero if `next` is 0. */
INLINE vector pair_of_codes(const uint8_t *from, int64_t next, struct code_form form,
                            struct group_scales scales)
{
    struct code_form exact = {form.bits, 0};
    vector even = weights_of(from, exact, scales), odd = {0};
    if (next != 0) odd = weights_of(from + next, exact, scales);
    return ROUND_PAIRS(even, odd);
}

#define MULTIPLY_CODE_PAIRS(row)                                                                   \
    each = (vector)((integers_of_lanes){0} + ((const word_anywhere *)x)[input / 2 * rows + row]);  \
    ADD_PAIRS(a##row, a, each);                                                                    \
    ADD_PAIRS(b##row, b, each);                                                                    \
    ADD_PAIRS(c##row, c, each);                                                                    \
    ADD_PAIRS(d##row, d, each);

DEFINE_FEW_CODES(code_pairs, 1, 2, pair_of_codes, MULTIPLY_CODE_PAIRS)
DEFINE_FEW_CODES(code_pairs, 2, 2, pair_of_codes, MULTIPLY_CODE_PAIRS)

static void multiply_code_pairs(const struct float_product *product, const float *x, int64_t first,
                                int64_t last)
{
    WITH_FORM(product, multiply_form, code_pairs_1, code_pairs_2, x, first, last)
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
