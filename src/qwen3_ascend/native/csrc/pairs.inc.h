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

/* A vector is a run of an output and that of its neighbour; or where runs of an output are neighbours,
 * two of its own. */
typedef float vector_of_halves __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(2)));

INLINE vector read_halves(const uint16_t *weights, int64_t ahead)
{
    __builtin_prefetch((const char *)weights + ahead, 0, 0);
    return *(const vector_of_halves *)weights;
}

/* Adds RUNS runs of strips to the sums of `places` pairs of outputs: what they are multiplied with
 * stays in registers, and each strip is read as it lies. What is `ahead` bytes behind is fetched. */
#define DEFINE_ADD_STRIPS(COUNT, RUNS)                                                             \
    static void add_strips_##COUNT##_##RUNS(const uint16_t *weights, int64_t run_stride,           \
                                            const float *x, int64_t places, int64_t ahead,         \
                                            float (*sums)[COUNT][LANES])                           \
    {                                                                                              \
        vector each[RUNS][COUNT];                                                                  \
        UNROLL for (int i = 0; i < RUNS * COUNT; i++) each[i / COUNT][i % COUNT] =                 \
            ((const vector *)x)[i];                                                                \
        for (int64_t place = 0; place < places; place++, weights += 2 * RUN_INPUTS) {              \
            vector totals[COUNT];                                                                  \
            UNROLL for (int row = 0; row < COUNT; row++) totals[row] =                             \
                *(vector *)sums[place][row];                                                       \
            UNROLL for (int run = 0; run < RUNS; run++)                                            \
            {                                                                                      \
                vector halves = read_halves(weights + run * run_stride, ahead);                    \
                UNROLL for (int row = 0; row < COUNT; row++)                                       \
                    ADD_PAIRS(totals[row], halves, each[run][row]);                                \
            }                                                                                      \
            UNROLL for (int row = 0; row < COUNT; row++) *(vector *)sums[place][row] =             \
                totals[row];                                                                       \
        }                                                                                          \
    }

enum { PLACE_BYTES = 4 * RUN_INPUTS, PREFETCH_PLACES = PREFETCH_BYTES / PLACE_BYTES };

/* The sums of `count` outputs of strips, which begin with an even one, of two in a place. Towards
 * the end of these outputs it is those of the next strips that are fetched. */
#define DEFINE_SUM_STRIPS(COUNT, RUNS)                                                             \
    DEFINE_ADD_STRIPS(COUNT, RUNS)                                                                 \
    DEFINE_ADD_STRIPS(COUNT, 1)                                                                    \
    static void sum_strips_##COUNT(const struct float_product *product, const float *x,            \
                                   int64_t output, int64_t count, float (*sums)[COUNT][LANES])     \
    {                                                                                              \
        const uint16_t *weights = product->weights + output * RUN_INPUTS;                          \
        int64_t runs = runs_of(product), stride = product->run_stride, run = 0;                    \
        int64_t places = (count + 1) / 2, last = least(places, PREFETCH_PLACES);                   \
        int64_t first = places - last, next = 2 * RUNS * stride - first * PLACE_BYTES;             \
        for (; run + RUNS <= runs; run += RUNS) {                                                  \
            const uint16_t *from = weights + run * stride;                                         \
            const float *by = x + run * LANES * COUNT;                                             \
            add_strips_##COUNT##_##RUNS(from, stride, by, first, PREFETCH_BYTES, sums);            \
            add_strips_##COUNT##_##RUNS(from + first * 2 * RUN_INPUTS, stride, by, last, next,     \
                                        sums + first);                                             \
        }                                                                                          \
        for (; run < runs; run++)                                                                  \
            add_strips_##COUNT##_1(weights + run * stride, stride, x + run * LANES * COUNT,        \
                                   places, PREFETCH_BYTES, sums);                                  \
    }

/* The same of plain rows, an output in a place; two sums each, since one would wait for itself. */
#define DEFINE_SUM_ROWS(COUNT)                                                                     \
    static void sum_rows_##COUNT(const struct float_product *product, const float *x,              \
                                 int64_t output, int64_t count, float (*sums)[COUNT][LANES])       \
    {                                                                                              \
        int64_t vectors = runs_of(product) / 2;                                                    \
        for (int64_t place = 0; place < count; place++) {                                          \
            const uint16_t *weights =                                                              \
                product->weights + (output + place) * product->output_stride;                      \
            vector totals[2][COUNT] = {{{0}}};                                                     \
            const vector *each = (const vector *)x;                                                \
            for (int64_t i = 0; i < vectors; i += 2) {                                             \
                UNROLL for (int part = 0; part < 2; part++)                                        \
                {                                                                                  \
                    if (part == 1 && i + 1 == vectors) break;                                      \
                    vector halves =                                                                    \
                        read_halves(weights + (i + part) * 2 * RUN_INPUTS, PREFETCH_BYTES);        \
                    UNROLL for (int row = 0; row < COUNT; row++)                                   \
                        ADD_PAIRS(totals[part][row], halves, each[(i + part) * COUNT + row]);      \
                }                                                                                  \
            }                                                                                      \
            for (int row = 0; row < COUNT; row++)                                                  \
                *(vector *)sums[place][row] = totals[0][row] + totals[1][row];                     \
        }                                                                                          \
    }

#define DEFINE_FEW_PAIRS(COUNT, RUNS)                                                              \
    DEFINE_SUM_STRIPS(COUNT, RUNS)                                                                 \
    DEFINE_SUM_ROWS(COUNT)                                                                         \
    static void few_pairs_##COUNT(const struct float_product *product, const float *x,             \
                                  int64_t output, int64_t count)                                   \
    {                                                                                              \
        float sums[FEW_SUMS / COUNT][COUNT][LANES] __attribute__((aligned(64)));                   \
        int outputs = product->run_stride == RUN_INPUTS ? 1 : 2; /* of a place */                  \
        memset(sums, 0, sizeof sums);                                                              \
        (outputs == 1 ? sum_rows_##COUNT : sum_strips_##COUNT)(product, x, output, count, sums);   \
        for (int64_t i = 0; i < count; i++)                                                        \
            for (int row = 0; row < COUNT; row++) {                                                \
                const float *lanes = sums[i / outputs][row] + i % outputs * LANES / outputs;       \
                float total = 0.0f;                                                                \
                for (int lane = 0; lane < LANES / outputs; lane++) total += lanes[lane];           \
                store(product, row, output + i, total);                                            \
            }                                                                                      \
    }

/* As many runs as leave registers for the rows' sums. */
DEFINE_FEW_PAIRS(1, 8)
DEFINE_FEW_PAIRS(2, 8)
DEFINE_FEW_PAIRS(3, 6)
DEFINE_FEW_PAIRS(4, 4)
DEFINE_FEW_PAIRS(5, 3)
DEFINE_FEW_PAIRS(6, 2)
DEFINE_FEW_PAIRS(7, 2)
DEFINE_FEW_PAIRS(8, 2)

static void (*const few_pairs[FEW_PAIR_ROWS + 1])(const struct float_product *product,
                                                  const float *x, int64_t output,
                                                  int64_t count) = {
    NULL,        few_pairs_1, few_pairs_2, few_pairs_3, few_pairs_4,
    few_pairs_5, few_pairs_6, few_pairs_7, few_pairs_8};

static void multiply_few_pairs(const struct float_product *product, const float *x, int64_t first,
                               int64_t last)
{
    for (int64_t output = first, count; output < last; output += count) {
        count = least(FEW_SUMS / product->rows / 2 * 2, last - output);
        few_pairs[product->rows](product, x, output, count);
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
