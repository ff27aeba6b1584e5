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

/* ---- few rows: weights are multiplied as they are read, a vector of them at a time ---- */

/* A vector is the run of an output and that of its neighbour, or where runs of an output are
 * neighbours, two of its own. */
typedef float vector_of_halves __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(2)));

#define PAIR_SUM_OF(row) (*(vector *)sums[place][row])
#define TAKE_PAIR_SUM(row) vector a##row = PAIR_SUM_OF(row), b##row = {0};
#define MULTIPLY_FIRST(row) ADD_PAIRS(a##row, weights_of_two, ((const vector *)each)[row]);
#define MULTIPLY_SECOND(row) ADD_PAIRS(b##row, weights_of_two, ((const vector *)each)[row]);
#define GIVE_PAIR_SUM(row) PAIR_SUM_OF(row) = a##row + b##row;
#define READ_TWO(MULTIPLY)                                                                         \
    {                                                                                              \
        __builtin_prefetch((const char *)weights + PREFETCH_BYTES, 0, 0);                          \
        vector weights_of_two = *(const vector_of_halves *)weights;                                \
        MULTIPLY                                                                                   \
        weights += step;                                                                           \
        each += LANES * rows;                                                                      \
    }

/* The sums of `count` places of a vector each, `place_stride` apart; `steps` vectors, `step` apart,
 * come to a sum, of which so many are read side by side as `streams` says. */
#define DEFINE_FEW_PAIRS(COUNT)                                                                    \
    static void sum_few_pairs_##COUNT(const uint16_t *first, int64_t place_stride, int64_t step,   \
                                      int64_t steps, int64_t streams, const float *x,              \
                                      int64_t count, float (*sums)[COUNT][LANES])                  \
    {                                                                                              \
        enum { rows = COUNT };                                                                     \
        for (int64_t start = 0; start < steps; start += streams)                                   \
            for (int64_t place = 0; place < count; place++) {                                      \
                const uint16_t *weights = first + place * place_stride + start * step;             \
                const float *each = x + start * LANES * rows;                                      \
                int64_t i = start, last = least(start + streams, steps);                           \
                EACH_##COUNT(TAKE_PAIR_SUM) for (; i + 2 <= last; i += 2)                          \
                {                                                                                  \
                    READ_TWO(EACH_##COUNT(MULTIPLY_FIRST))                                         \
                    READ_TWO(EACH_##COUNT(MULTIPLY_SECOND))                                        \
                }                                                                                  \
                if (i < last) READ_TWO(EACH_##COUNT(MULTIPLY_FIRST))                               \
                EACH_##COUNT(GIVE_PAIR_SUM)                                                        \
            }                                                                                      \
    }                                                                                              \
    /* Outputs `output` ..; of strips, an even number of them, but for the last of all. */         \
    static void few_pairs_##COUNT(const struct float_product *product, const float *x,             \
                                  int64_t output, int64_t count)                                   \
    {                                                                                              \
        float sums[FEW_SUMS / COUNT][COUNT][LANES] __attribute__((aligned(64)));                   \
        int rows_apart = product->run_stride == RUN_INPUTS, outputs = rows_apart ? 1 : 2;          \
        int64_t steps = rows_apart ? runs_of(product) / 2 : runs_of(product);                      \
        int64_t step = rows_apart ? 2 * RUN_INPUTS : product->run_stride;                          \
        int64_t places = (count + outputs - 1) / outputs;                                          \
        memset(sums, 0, sizeof sums);                                                              \
        sum_few_pairs_##COUNT(product->weights + output * product->output_stride,                  \
                              outputs * product->output_stride, step, steps,                       \
                              rows_apart ? steps : FEW_STREAMS, x, places, sums);                  \
        for (int64_t i = 0; i < count; i++)                                                        \
            for (int row = 0; row < COUNT; row++) {                                                \
                const float *lanes = sums[i / outputs][row] + i % outputs * LANES / outputs;       \
                float total = 0.0f;                                                                \
                for (int lane = 0; lane < LANES / outputs; lane++) total += lanes[lane];           \
                store(product, row, output + i, total);                                            \
            }                                                                                      \
    }

DEFINE_FEW_PAIRS(1)
DEFINE_FEW_PAIRS(2)
DEFINE_FEW_PAIRS(3)
DEFINE_FEW_PAIRS(4)

static void multiply_few_pairs(const struct float_product *product, const float *x, int64_t first,
                               int64_t last)
{
    for (int64_t output = first, count; output < last; output += count) {
        count = least(FEW_SUMS / product->rows / 2 * 2, last - output);
        if (product->rows == 1) few_pairs_1(product, x, output, count);
        if (product->rows == 2) few_pairs_2(product, x, output, count);
        if (product->rows == 3) few_pairs_3(product, x, output, count);
        if (product->rows == 4) few_pairs_4(product, x, output, count);
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
