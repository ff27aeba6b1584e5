/* The products of one instruction set. Each floats_*.c includes this text once, after it has said
 * what its vectors are:
 *
 *     VECTOR_BYTES            of a vector of float32; NARROW_BYTES, at most a run of weights
 *     ADD_PRODUCT(sum, a, b)  adds a * b, rounding once or twice; ADD_NARROW for narrow ones
 *     BLOCK_ROWS, DEFINE_BLOCKS, NAME_BLOCKS   the blocks of rows that have a kernel
 *
 * A weight of bfloat16 is the upper half of the float32 that it stands for. So a vector of weights,
 * two to 32 bits, is two vectors of float32: shifted up, the even inputs; masked, the odd ones.
 */
#include "bf16.h"
#include "floats.h"
#include "rows.h"

#include <stddef.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef float narrow __attribute__((vector_size(NARROW_BYTES), may_alias));
typedef uint32_t words __attribute__((vector_size(NARROW_BYTES), may_alias));
typedef uint32_t words_anywhere __attribute__((vector_size(NARROW_BYTES), may_alias, aligned(2)));
typedef uint32_t words4 __attribute__((vector_size(16), may_alias));
typedef uint32_t words4_anywhere __attribute__((vector_size(16), may_alias, aligned(2)));

enum {
    LANES = VECTOR_BYTES / 4,
    NARROW_LANES = NARROW_BYTES / 4,
    RUN_VECTORS = RUN_BYTES / NARROW_BYTES,
    UNIT_OUTPUTS = 2 * LANES, /* that are in registers at once, for several rows */
};

INLINE void store(const struct float_product *product, int64_t row, int64_t output, float sum)
{
    float y = product->bias ? sum + product->bias[output] : sum;
    int64_t place = row * product->outputs + output;
    if (product->out_dtype == DTYPE_FP32)
        ((float *)product->out)[place] = y;
    else
        ((uint16_t *)product->out)[place] = to_bf16(y);
}

/* Neighbouring outputs of a row. */
INLINE void store_row(const struct float_product *product, int64_t row, int64_t output,
                      int64_t count, const float *sums)
{
    for (int64_t i = 0; i < count; i++) store(product, row, output + i, sums[i]);
}

INLINE int64_t runs_of(const struct float_product *product)
{
    return (product->inputs + RUN_INPUTS - 1) / RUN_INPUTS;
}

INLINE int64_t padded_inputs(const struct float_product *product)
{
    return runs_of(product) * RUN_INPUTS;
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- few rows: weights are widened in registers ---- */

/* Outputs times rows whose sums are kept in the nearest cache; how far ahead memory is asked for. */
enum { FEW_SUMS = 512, PREFETCH_BYTES = 1024 };

INLINE words upper(words pairs) { return pairs & 0xffff0000u; }

INLINE float sum_of_lanes(narrow sums)
{
    float total = 0.0f;
    for (int lane = 0; lane < NARROW_LANES; lane++) total += sums[lane];
    return total;
}

INLINE words read_words(const uint16_t *weights)
{
    return *(const words_anywhere *)weights;
}

/* Adds the products of a vector of weights and of what each row has for them, to a sum of even inputs
 * and one of odd ones: a single one would wait for itself. */
#define ADD_WIDENED(COUNT, totals, pairs, evens, odds)                                             \
    {                                                                                              \
        narrow even = (narrow)((pairs) << 16), odd = (narrow)upper(pairs);                         \
        UNROLL for (int row = 0; row < COUNT; row++)                                               \
        {                                                                                          \
            ADD_NARROW(totals[0][row], even, evens);                                               \
            ADD_NARROW(totals[1][row], odd, odds);                                                 \
        }                                                                                          \
    }

/* Of run `i` and its vector `part`, what a row multiplies even inputs with; odd ones lie behind. */
#define EVENS_AT(x, COUNT, i, row, part)                                                           \
    ((const narrow *)((x) + ((i) * COUNT + (row)) * RUN_INPUTS + (part) * NARROW_LANES))
#define ODDS_AT(x, COUNT, i, row, part) (EVENS_AT(x, COUNT, i, row, part) + RUN_VECTORS)

/* Adds RUNS runs of strips to the sums of `count` outputs: what they are multiplied with stays in
 * registers, and each strip is read as it lies. */
#define DEFINE_ADD_RUNS(COUNT, RUNS)                                                               \
    static void add_runs_##COUNT##_##RUNS(const uint16_t *weights, int64_t run_stride,             \
                                          const float *x, int64_t count,                           \
                                          float (*sums)[COUNT][NARROW_LANES])                      \
    {                                                                                              \
        narrow evens[RUNS][RUN_VECTORS][COUNT], odds[RUNS][RUN_VECTORS][COUNT];                    \
        UNROLL for (int run = 0; run < RUNS; run++)                                                \
            UNROLL for (int part = 0; part < RUN_VECTORS; part++)                                  \
                UNROLL for (int row = 0; row < COUNT; row++)                                       \
        {                                                                                          \
            evens[run][part][row] = *EVENS_AT(x, COUNT, run, row, part);                           \
            odds[run][part][row] = *ODDS_AT(x, COUNT, run, row, part);                             \
        }                                                                                          \
        for (int64_t output = 0; output < count; output++, weights += RUN_INPUTS) {                \
            narrow totals[2][COUNT] = {{{0}}};                                                     \
            UNROLL for (int row = 0; row < COUNT; row++) totals[0][row] =                          \
                *(narrow *)sums[output][row];                                                      \
            UNROLL for (int run = 0; run < RUNS; run++)                                            \
            {                                                                                      \
                const uint16_t *from = weights + run * run_stride;                                 \
                __builtin_prefetch((const char *)from + PREFETCH_BYTES);                           \
                UNROLL for (int part = 0; part < RUN_VECTORS; part++)                              \
                    ADD_WIDENED(COUNT, totals, read_words(from + part * 2 * NARROW_LANES),         \
                                evens[run][part][row], odds[run][part][row])                       \
            }                                                                                      \
            UNROLL for (int row = 0; row < COUNT; row++) *(narrow *)sums[output][row] =            \
                totals[0][row] + totals[1][row];                                                   \
        }                                                                                          \
    }

/* The sums of `count` outputs of strips, RUNS of them together, or one. */
#define DEFINE_SUM_RUNS(COUNT, RUNS)                                                               \
    DEFINE_ADD_RUNS(COUNT, RUNS)                                                                   \
    DEFINE_ADD_RUNS(COUNT, 1)                                                                      \
    static void sum_runs_##COUNT(const struct float_product *product, const float *x,              \
                                 int64_t output, int64_t count,                                    \
                                 float (*sums)[COUNT][NARROW_LANES])                               \
    {                                                                                              \
        const uint16_t *weights = product->weights + output * product->output_stride;              \
        int64_t runs = runs_of(product), stride = product->run_stride, run = 0;                    \
        for (; run + RUNS <= runs; run += RUNS)                                                    \
            add_runs_##COUNT##_##RUNS(weights + run * stride, stride,                              \
                                      x + run * RUN_INPUTS * COUNT, count, sums);                  \
        for (; run < runs; run++)                                                                  \
            add_runs_##COUNT##_1(weights + run * stride, stride, x + run * RUN_INPUTS * COUNT,     \
                                 count, sums);                                                     \
    }

/* The same of plain rows, from end to end. */
#define DEFINE_SUM_ROW(COUNT)                                                                      \
    static void sum_row_##COUNT(const struct float_product *product, const float *x,               \
                                int64_t output, int64_t count,                                     \
                                float (*sums)[COUNT][NARROW_LANES])                                \
    {                                                                                              \
        int64_t runs = runs_of(product);                                                           \
        for (int64_t i = 0; i < count; i++) {                                                      \
            const uint16_t *weights = product->weights + (output + i) * product->output_stride;    \
            narrow totals[2][COUNT] = {{{0}}};                                                     \
            for (int64_t run = 0; run < runs; run++, weights += RUN_INPUTS) {                      \
                __builtin_prefetch((const char *)weights + PREFETCH_BYTES);                        \
                UNROLL for (int part = 0; part < RUN_VECTORS; part++)                              \
                    ADD_WIDENED(COUNT, totals, read_words(weights + part * 2 * NARROW_LANES),      \
                                *EVENS_AT(x, COUNT, run, row, part),                               \
                                *ODDS_AT(x, COUNT, run, row, part))                                \
            }                                                                                      \
            UNROLL for (int row = 0; row < COUNT; row++) *(narrow *)sums[i][row] =                 \
                totals[0][row] + totals[1][row];                                                   \
        }                                                                                          \
    }

#define DEFINE_FEW(COUNT, RUNS)                                                                    \
    DEFINE_SUM_RUNS(COUNT, RUNS)                                                                   \
    DEFINE_SUM_ROW(COUNT)                                                                          \
    static void few_##COUNT(const struct float_product *product, const float *x, int64_t first,    \
                            int64_t count)                                                         \
    {                                                                                              \
        float sums[FEW_SUMS / COUNT][COUNT][NARROW_LANES] __attribute__((aligned(64)));            \
        memset(sums, 0, sizeof sums);                                                              \
        if (product->run_stride == RUN_INPUTS)                                                     \
            sum_row_##COUNT(product, x, first, count, sums);                                       \
        else                                                                                       \
            sum_runs_##COUNT(product, x, first, count, sums);                                      \
        for (int64_t output = 0; output < count; output++)                                         \
            for (int row = 0; row < COUNT; row++)                                                  \
                store(product, row, first + output,                                                \
                      sum_of_lanes(*(const narrow *)sums[output][row]));                           \
    }

/* As many runs as leave registers of sixteen for the sums and the weights. */
DEFINE_FEW(1, 4)
DEFINE_FEW(2, 2)
DEFINE_FEW(3, 2)
DEFINE_FEW(4, 2)

static void multiply_few(const struct float_product *product, const float *x, int64_t first,
                         int64_t last)
{
    for (int64_t output = first, count; output < last; output += count) {
        count = least(FEW_SUMS / product->rows, last - output);
        if (product->rows == 1) few_1(product, x, output, count);
        if (product->rows == 2) few_2(product, x, output, count);
        if (product->rows == 3) few_3(product, x, output, count);
        if (product->rows == 4) few_4(product, x, output, count);
    }
}

/* ---- more rows: weights are widened once, and lie in a tile [words][UNIT_OUTPUTS] ---- */

/* The tile, the sums of TILE_ROWS and a block of activations fit into the nearest cache. */
enum { TILE_WORDS = 4096 / UNIT_OUTPUTS, TILE_ROWS = 144, PREFETCH_RUNS = 4 };

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (words4){__VA_ARGS__})
#endif

/* Four pairs of inputs of four outputs, each output a row, to rows of pairs. */
INLINE void turn_pairs(const uint16_t *const *outputs, int64_t offset, words4 *pairs)
{
    words4 a = *(const words4_anywhere *)(outputs[0] + offset);
    words4 b = *(const words4_anywhere *)(outputs[1] + offset);
    words4 c = *(const words4_anywhere *)(outputs[2] + offset);
    words4 d = *(const words4_anywhere *)(outputs[3] + offset);
    words4 ab_low = SHUFFLE(a, b, 0, 4, 1, 5), ab_high = SHUFFLE(a, b, 2, 6, 3, 7);
    words4 cd_low = SHUFFLE(c, d, 0, 4, 1, 5), cd_high = SHUFFLE(c, d, 2, 6, 3, 7);
    pairs[0] = SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
    pairs[1] = SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
    pairs[2] = SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
    pairs[3] = SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
}

/* The same, each pair widened to two inputs. */
INLINE void widen_square(const uint16_t *const *outputs, int64_t offset, float *tile)
{
    words4 pairs[4];
    turn_pairs(outputs, offset, pairs);
    for (int i = 0; i < 4; i++) {
        *(words4 *)(tile + 2 * i * UNIT_OUTPUTS) = pairs[i] << 16;
        *(words4 *)(tile + (2 * i + 1) * UNIT_OUTPUTS) = pairs[i] & 0xffff0000u;
    }
}

/* The runs of four outputs. Outputs that there are not are read as the last one, and dropped in the
 * end. */
INLINE void runs_at(const struct float_product *product, int64_t output, int64_t input,
                    const uint16_t **outputs)
{
    const uint16_t *runs = product->weights + input / RUN_INPUTS * product->run_stride;
    for (int i = 0; i < 4; i++) {
        outputs[i] = runs + least(output + i, product->outputs - 1) * product->output_stride;
        __builtin_prefetch(outputs[i] + PREFETCH_RUNS * product->run_stride);
    }
}

static void widen_runs(const struct float_product *product, int64_t output, int64_t input,
                       int64_t count, float *tile)
{
    for (int64_t place = 0; place < count; place += RUN_INPUTS)
        for (int column = 0; column < UNIT_OUTPUTS; column += 4) {
            const uint16_t *outputs[4];
            runs_at(product, output + column, input + place, outputs);
            for (int half = 0; half < RUN_INPUTS; half += RUN_INPUTS / 2)
                widen_square(outputs, half, tile + (place + half) * UNIT_OUTPUTS + column);
        }
}

#define SUMS_OF(row) ((vector *)(sums + row * UNIT_OUTPUTS))
/* Two variables for each row: an array would be stored and read in every round. */
#define TAKE(row) vector a##row = SUMS_OF(row)[0], b##row = SUMS_OF(row)[1];
#define MULTIPLY(row)                                                                              \
    each = x[row] - (vector){0};                                                                   \
    ADD_PRODUCT(a##row, first, each);                                                              \
    ADD_PRODUCT(b##row, second, each);
#define GIVE(row) SUMS_OF(row)[0] = a##row, SUMS_OF(row)[1] = b##row;

#define DEFINE_BLOCK(COUNT)                                                                        \
    static void multiply_##COUNT(const float *tile, int64_t inputs, const float *x, float *sums)   \
    {                                                                                              \
        EACH_##COUNT(TAKE) for (int64_t i = 0; i < inputs; i++, tile += UNIT_OUTPUTS, x += COUNT)  \
        {                                                                                          \
            vector first = ((const vector *)tile)[0], second = ((const vector *)tile)[1], each;    \
            EACH_##COUNT(MULTIPLY)                                                                 \
        }                                                                                          \
        EACH_##COUNT(GIVE)                                                                         \
    }

typedef void (*multiply_block)(const float *tile, int64_t inputs, const float *x, float *sums);

#define NAME_BLOCK(COUNT) [COUNT] = multiply_##COUNT

DEFINE_BLOCKS
static const multiply_block multiply[MOST_FLOAT_BLOCK + 1] = {NAME_BLOCKS};

/* How weights lie in a tile, and what multiplies it with a block of rows. */
struct tiling {
    int word_inputs; /* 1 of float32, or 2 of bfloat16 */
    void (*make)(const struct float_product *product, int64_t output, int64_t input, int64_t count,
                 float *tile);
    const multiply_block *multiply;
};

/* Adds the products with the inputs `start` .. `end` - 1, whole runs, to the sums of some rows. */
static void multiply_unit(const struct float_product *product, const struct tiling *tiling,
                          const float *x, int64_t row, int64_t rows, int64_t output, int64_t start,
                          int64_t end, float *sums)
{
    float tile[TILE_WORDS * UNIT_OUTPUTS] __attribute__((aligned(64)));
    int64_t words = padded_inputs(product) / tiling->word_inputs;
    end /= tiling->word_inputs;
    for (int64_t word = start / tiling->word_inputs; word < end; word += TILE_WORDS) {
        int64_t count = least(TILE_WORDS, end - word);
        tiling->make(product, output, word * tiling->word_inputs, count * tiling->word_inputs,
                     tile);
        for (int64_t done = 0; done < rows;) {
            int64_t block = block_of(product->rows - row - done, BLOCK_ROWS);
            const float *from = x + (row + done) * words + word * block;
            tiling->multiply[block](tile, count, from, sums + done * UNIT_OUTPUTS);
            done += block;
        }
    }
}

static void multiply_tiles(const struct float_product *product, const struct tiling *tiling,
                           const float *x, int64_t first, int64_t last)
{
    float sums[(TILE_ROWS + BLOCK_ROWS) * UNIT_OUTPUTS] __attribute__((aligned(64)));
    for (int64_t output = first; output < last; output += UNIT_OUTPUTS)
        for (int64_t row = 0; row < product->rows; row += TILE_ROWS) {
            int64_t rows = least(TILE_ROWS, product->rows - row);
            memset(sums, 0, (size_t)((rows + BLOCK_ROWS) * UNIT_OUTPUTS) * sizeof *sums);
            multiply_unit(product, tiling, x, row, rows, output, 0, padded_inputs(product), sums);
            for (int64_t i = 0; i < rows; i++)
                store_row(product, row + i, output, least(UNIT_OUTPUTS, last - output),
                          sums + i * UNIT_OUTPUTS);
        }
}

#include "codes.inc.h"
#include "groups.inc.h"

static const struct tiling floats_of_runs = {1, widen_runs, multiply};
static const struct tiling floats_of_codes = {1, make_codes, multiply};

static void multiply_many(const struct float_product *product, const float *x, int64_t first,
                          int64_t last)
{
    if (product->grouped)
        multiply_group_tiles(product, &floats_of_codes, x, first, last);
    else
        multiply_tiles(product, product->weights ? &floats_of_runs : &floats_of_codes, x, first,
                       last);
}

static void multiply_few_codes(const struct float_product *product, const float *x, int64_t first,
                               int64_t last)
{
    if (product->grouped)
        multiply_few_groups(product, x, first, last);
    else
        multiply_codes(product, x, first, last);
}

#ifdef ADD_PAIRS
#include "pairs.inc.h"
#else
#define multiply_pairs NULL
#define multiply_code_pairs NULL
#define multiply_few_pairs NULL
#endif

const struct float_path_table FLOAT_TABLE = {BLOCK_ROWS,     UNIT_OUTPUTS,  multiply_few,
                                             multiply_few_codes, multiply_many, multiply_pairs,
                                             multiply_code_pairs, multiply_few_pairs};
