/* The kernels of one processor path. Each path_*.c includes this text once under its own target,
 * so there is one definition of every result and the compiler does the rest.
 *
 * Why the paths agree to the last bit:
 *   - absolute maxima are integer maxima of the magnitude bits, which order like the values;
 *   - scale, quotient and rounding are single IEEE float32 operations, never a reciprocal and
 *     never contracted (-ffp-contract=off), in round-to-nearest mode (dispatch.c sees to it);
 *   - the order of each error sum is fixed: lane = column mod 8, every lane adds its columns in
 *     ascending order from 0.0, then lanes are added 4 apart, 2 apart, 1 apart.
 * The terms of the sums are float64 and, for the codes that quantize() writes, exact: a weight has
 * at most 24 significant bits, code * scale at most 16, their difference at most 24 (a multiple of
 * the weight's last bit, and no larger than the weight), a square at most 48. The terms of a search
 * for scales are float32, added in the same order in float64.
 */
#include "kernels.h"

#include <stddef.h>
#include <string.h>

/* 256 columns: a strip's tile of codes and one row of floats stay in L1. Packing keeps no tile
 * unless it converts, and its check costs less in longer rows. */
enum { TILE_COLUMNS = 256, PACK_COLUMNS = 1024, LANES = 8 };

/* Kept out of line: inlined into its caller, GCC 12 no longer vectorizes such a loop. */
#define LOOP static __attribute__((noinline))
#define INLINE static inline __attribute__((always_inline))

typedef uint8_t bytes16 __attribute__((vector_size(16)));

#if defined(__clang__)
#define INTERLEAVE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define INTERLEAVE(a, b, ...) __builtin_shuffle(a, b, (bytes16){__VA_ARGS__})
#endif

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

INLINE uint32_t float_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float bits_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* ---- element types ---- */

INLINE int64_t element_bytes(int dtype)
{
    return dtype == DTYPE_FP32 ? 4 : dtype == DTYPE_BYTE ? 1 : 2;
}

INLINE const uint8_t *element(struct matrix source, int64_t row, int64_t column)
{
    const uint8_t *data = source.data;
    return data + (row * source.row_stride + column) * element_bytes(source.dtype);
}

INLINE float widen_bf16(uint16_t half) { return bits_float((uint32_t)half << 16); }

/* Exact for subnormals too: the bits are read as a float32 2^112 times too small. */
INLINE float widen_fp16(uint16_t half)
{
    uint32_t magnitude = half & 0x7fffu, sign = (half & 0x8000u) << 16;
    uint32_t bits = float_bits(bits_float(magnitude << 13) * 0x1p112f);
    uint32_t not_finite = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
    return bits_float(bits | not_finite | sign);
}

/* Round to nearest even; every NaN becomes 0x7fc0, as in torch. */
INLINE uint16_t narrow_bf16(float value)
{
    uint32_t bits = float_bits(value);
    uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

/* `count` elements as float32, zeros after them up to `padded`. */
LOOP void widen_row(const void *row, int dtype, int64_t count, int64_t padded, float *out)
{
    const uint16_t *halves = row;
    if (dtype == DTYPE_BF16)
        for (int64_t i = 0; i < count; i++) out[i] = widen_bf16(halves[i]);
    else if (dtype == DTYPE_FP16)
        for (int64_t i = 0; i < count; i++) out[i] = widen_fp16(halves[i]);
    else
        memcpy(out, row, (size_t)count * sizeof *out);
    for (int64_t i = count; i < padded; i++) out[i] = 0.0f;
}

/* ---- finiteness: magnitude bits at or above the exponent's mask are Inf or NaN ---- */

/* Signed on purpose: the magnitude is never negative, and SSE2 has the signed maximum only. */
INLINE uint32_t largest_half(const uint16_t *row, int64_t count)
{
    int16_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        int16_t magnitude = (int16_t)(row[i] & 0x7fff);
        largest = magnitude > largest ? magnitude : largest;
    }
    return (uint32_t)largest;
}

INLINE uint32_t largest_word(const uint32_t *row, int64_t count)
{
    int32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t magnitude = (int32_t)(row[i] & 0x7fffffffu);
        largest = magnitude > largest ? magnitude : largest;
    }
    return (uint32_t)largest;
}

INLINE uint32_t largest_magnitude(const void *row, int dtype, int64_t count)
{
    return dtype == DTYPE_FP32 ? largest_word(row, count) : largest_half(row, count);
}

INLINE uint32_t infinity_bits(int dtype)
{
    return dtype == DTYPE_FP32 ? 0x7f800000u : dtype == DTYPE_FP16 ? 0x7c00u : 0x7f80u;
}

INLINE float magnitude_float(uint32_t magnitude, int dtype)
{
    if (dtype == DTYPE_BF16) return widen_bf16((uint16_t)magnitude);
    if (dtype == DTYPE_FP16) return widen_fp16((uint16_t)magnitude);
    return bits_float(magnitude);
}

INLINE int64_t first_not_finite(const uint8_t *row, int dtype, int64_t count)
{
    int64_t size = element_bytes(dtype);
    for (int64_t i = 0; i < count; i++)
        if (largest_magnitude(row + i * size, dtype, 1) >= infinity_bits(dtype)) return i;
    return -1;
}

static int find(struct matrix source, int64_t *position)
{
    for (int64_t row = 0; row < source.rows; row++) {
        const uint8_t *values = element(source, row, 0);
        uint32_t largest = largest_magnitude(values, source.dtype, source.columns);
        if (largest < infinity_bits(source.dtype)) continue;
        position[0] = row;
        position[1] = first_not_finite(values, source.dtype, source.columns);
        return STATUS_NOT_FINITE;
    }
    return STATUS_OK;
}

/* ---- rotations: additions in one order, whatever the width of the processor ---- */

/* As many floats as a register holds, anywhere in memory; the bits of them; as many halves. */
typedef float floats __attribute__((vector_size(4 * PATH_FLOATS), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * PATH_FLOATS)));
typedef uint16_t halves __attribute__((vector_size(2 * PATH_FLOATS)));

#define FLOATS(place) (*(floats *)(place))

/* Constant vectors: what a macro of place and distance says for each place. */
#define FOUR(of, place, apart) \
    of(place, apart), of(place + 1, apart), of(place + 2, apart), of(place + 3, apart)
#if PATH_FLOATS == 4
#define EACH(of, apart) FOUR(of, 0, apart)
#elif PATH_FLOATS == 8
#define EACH(of, apart) FOUR(of, 0, apart), FOUR(of, 4, apart)
#else
#define EACH(of, apart) \
    FOUR(of, 0, apart), FOUR(of, 4, apart), FOUR(of, 8, apart), FOUR(of, 12, apart)
#endif
#define PARTNER(place, apart) ((place) ^ (apart))
#define SIGN(place, apart) ((place) & (apart) ? -1.0f : 1.0f)

#if defined(__clang__)
#define SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define SHUFFLE(v, ...) __builtin_shuffle(v, (words){__VA_ARGS__})
#endif

/* Pairs within a register: a + b in the first place, a - b, which is a + -b, in the second. */
#define BUTTERFLY(v, apart) (SHUFFLE(v, EACH(PARTNER, apart)) + (v) * (floats){EACH(SIGN, apart)})

/* All pairs within a register: 1, 2, ... apart. */
INLINE floats butterflies_within(floats v)
{
    v = BUTTERFLY(v, 1);
    v = BUTTERFLY(v, 2);
#if PATH_FLOATS > 4
    v = BUTTERFLY(v, 4);
#endif
#if PATH_FLOATS > 8
    v = BUTTERFLY(v, 8);
#endif
    return v;
}

/* So many registers take part in steps that are done at once; a path with fewer would spill. */
enum { MOST_ACROSS = PATH_FLOATS == 16 ? 16 : 8 };

/* Pairs of registers, 1, 2, ... apart. */
INLINE void butterflies_across(floats *v, int count)
{
    UNROLL for (int apart = 1; apart < count; apart *= 2)
        UNROLL for (int i = 0; i < count; i++)
            if (!(i & apart)) {
                floats a = v[i], b = v[i + apart];
                v[i] = a + b;
                v[i + apart] = a - b;
            }
}

/* Floats of a row of any type, from element `i` on; see widen_bf16 and widen_fp16. */
INLINE floats widen_floats(const void *row, int dtype, int64_t i)
{
    if (dtype == DTYPE_FP32) return FLOATS((const float *)row + i);
    halves half;
    memcpy(&half, (const uint16_t *)row + i, sizeof half);
    words bits = __builtin_convertvector(half, words);
    if (dtype == DTYPE_BF16) return (floats)(bits << 16);
    words magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
    words not_finite = (words)(magnitude >= 0x7c00u) & 0x7f800000u;
    return (floats)((words)((floats)(magnitude << 13) * 0x1p112f) | not_finite | sign);
}

/* The first steps of blocks that are a multiple of eight registers long, in one go: elements of a
 * row, times its factor and those of its columns, then pairs within and across registers. `last`
 * is the factor of all, or 1. */
enum { BEGUN = 8 * PATH_FLOATS };

INLINE void begin_blocks(const void *row, int dtype, float factor, const float *factors,
                         int64_t count, float last, float *out)
{
    for (int64_t i = 0; i < count; i += BEGUN) {
        floats v[8];
        UNROLL for (int j = 0; j < 8; j++) {
            int64_t at = i + j * PATH_FLOATS;
            v[j] = widen_floats(row, dtype, at) * factor * FLOATS(factors + at);
            v[j] = butterflies_within(v[j]);
        }
        butterflies_across(v, 8);
        UNROLL for (int j = 0; j < 8; j++) FLOATS(out + i + j * PATH_FLOATS) = v[j] * last;
    }
}

LOOP void begin_bf16(const void *row, float factor, const float *factors, int64_t count, float last,
                     float *out)
{
    begin_blocks(row, DTYPE_BF16, factor, factors, count, last, out);
}

LOOP void begin_fp16(const void *row, float factor, const float *factors, int64_t count, float last,
                     float *out)
{
    begin_blocks(row, DTYPE_FP16, factor, factors, count, last, out);
}

LOOP void begin_fp32(const void *row, float factor, const float *factors, int64_t count, float last,
                     float *out)
{
    begin_blocks(row, DTYPE_FP32, factor, factors, count, last, out);
}

/* One to four steps at once, runs of whole registers apart: each value is loaded and stored once. */
INLINE void butterflies_by(int radix, float *x, int64_t count, int64_t run, float last)
{
    for (int64_t start = 0; start < count; start += radix * run)
        for (int64_t i = start; i < start + run; i += PATH_FLOATS) {
            floats v[MOST_ACROSS];
            UNROLL for (int j = 0; j < radix; j++) v[j] = FLOATS(x + i + j * run);
            butterflies_across(v, radix);
            UNROLL for (int j = 0; j < radix; j++) FLOATS(x + i + j * run) = v[j] * last;
        }
}

LOOP void butterflies_by_most(float *x, int64_t count, int64_t run, float last)
{
    butterflies_by(MOST_ACROSS, x, count, run, last);
}

LOOP void butterflies_by_eight(float *x, int64_t count, int64_t run, float last)
{
    butterflies_by(8, x, count, run, last);
}

LOOP void butterflies_by_four(float *x, int64_t count, int64_t run, float last)
{
    butterflies_by(4, x, count, run, last);
}

LOOP void butterflies_by_two(float *x, int64_t count, int64_t run, float last)
{
    butterflies_by(2, x, count, run, last);
}

LOOP void butterflies_of_any(float *x, int64_t count, int64_t run, float last)
{
    for (int64_t start = 0; start < count; start += 2 * run)
        for (int64_t i = start; i < start + run; i++) {
            float a = x[i], b = x[i + run];
            x[i] = (a + b) * last;
            x[i + run] = (a - b) * last;
        }
}

/* The steps from `run` apart to those half of `length` apart, then `last`. */
INLINE void butterflies(float *x, int64_t count, int64_t run, int64_t length, float last)
{
    while (run < length) {
        int64_t left = length / run;
        int radix = run % PATH_FLOATS ? 2 : (int)smaller(left, MOST_ACROSS);
        float factor = left == radix ? last : 1.0f;
        if (run % PATH_FLOATS)
            butterflies_of_any(x, count, run, factor);
        else if (radix == MOST_ACROSS)
            butterflies_by_most(x, count, run, factor);
        else if (radix == 8)
            butterflies_by_eight(x, count, run, factor);
        else if (radix == 4)
            butterflies_by_four(x, count, run, factor);
        else
            butterflies_by_two(x, count, run, factor);
        run *= radix;
    }
}

/* The base on x [order][run]: the sum of each row from its first column on. An order is a multiple
 * of four, and four sums at a time do not wait for each other. */
LOOP void base_on_registers(float *x, int64_t run, const float *base, int64_t order, float last)
{
    floats values[MOST_ORDER];
    for (int64_t i = 0; i < run; i += PATH_FLOATS) {
        for (int64_t j = 0; j < order; j++) values[j] = FLOATS(x + i + j * run);
        for (int64_t row = 0; row < order; row += 4) {
            const float *signs = base + row * order;
            floats totals[4];
            for (int k = 0; k < 4; k++) totals[k] = values[0] * signs[k * order];
            for (int64_t j = 1; j < order; j++)
                for (int k = 0; k < 4; k++) totals[k] += values[j] * signs[k * order + j];
            for (int k = 0; k < 4; k++) FLOATS(x + i + (row + k) * run) = totals[k] * last;
        }
    }
}

LOOP void base_on_any(float *x, int64_t run, const float *base, int64_t order, float last)
{
    float values[MOST_ORDER];
    for (int64_t i = 0; i < run; i++) {
        for (int64_t j = 0; j < order; j++) values[j] = x[i + j * run];
        for (int64_t row = 0; row < order; row++) {
            float total = values[0] * base[row * order];
            for (int64_t j = 1; j < order; j++) total += values[j] * base[row * order + j];
            x[i + row * run] = total * last;
        }
    }
}

/* What is left of blocks [order][length][lanes], `count` values, after the steps below `run`. */
INLINE void finish_blocks(float *x, int64_t count, int64_t run, int64_t lanes,
                          struct rotation rotation)
{
    int64_t length = rotation.size / rotation.order * lanes;
    if (rotation.order == 1) {
        butterflies(x, count, run, length, rotation.factor);
        return;
    }
    butterflies(x, count, run, length, 1.0f);
    for (int64_t start = 0; start < count; start += rotation.order * length)
        if (length % PATH_FLOATS == 0)
            base_on_registers(x + start, length, rotation.base, rotation.order, rotation.factor);
        else
            base_on_any(x + start, length, rotation.base, rotation.order, rotation.factor);
}

/* ---- rows that are changed before anything else is done with them ---- */

LOOP void multiply(float *x, const float *factors, int64_t count)
{
    for (int64_t i = 0; i < count; i++) x[i] *= factors[i];
}

LOOP void multiply_all(float *x, float factor, int64_t count)
{
    for (int64_t i = 0; i < count; i++) x[i] *= factor;
}

/* A row as float32, times the factors of a step. */
INLINE void scale_row(const void *row, int dtype, float factor, const float *factors, int64_t count,
                      float *out)
{
    if (row != out) widen_row(row, dtype, count, count, out);
    if (factor != 1.0f) multiply_all(out, factor, count);
    if (factors != NULL) multiply(out, factors, count);
}

INLINE void rotate_row(const void *row, int dtype, float factor, const float *factors,
                       struct rotation rotation, int64_t count, float *out)
{
    int64_t length = rotation.size / rotation.order;
    int is_done = rotation.size == BEGUN && rotation.order == 1;
    float last = is_done ? rotation.factor : 1.0f;
    if (length < BEGUN)
        scale_row(row, dtype, factor, factors, count, out);
    else if (dtype == DTYPE_BF16)
        begin_bf16(row, factor, factors, count, last, out);
    else if (dtype == DTYPE_FP16)
        begin_fp16(row, factor, factors, count, last, out);
    else
        begin_fp32(row, factor, factors, count, last, out);
    finish_blocks(out, count, length < BEGUN ? 1 : BEGUN, 1, rotation);
}

/* A row after all steps, float32. */
INLINE void change_row(struct rows source, int64_t row, float *out)
{
    const void *from = element(source.matrix, row, 0);
    int dtype = source.matrix.dtype;
    int64_t columns = source.matrix.columns;
    if (source.count == 0) widen_row(from, dtype, columns, columns, out);
    for (int64_t i = 0; i < source.count; i++) {
        const struct step *step = source.steps + i;
        float factor = step->outputs == NULL ? 1.0f : step->outputs[row];
        if (step->rotation.size > 1)
            rotate_row(from, dtype, factor, step->inputs, step->rotation, columns, out);
        else
            scale_row(from, dtype, factor, step->inputs, columns, out);
        from = out;
        dtype = DTYPE_FP32;
    }
}

/* Some rows: where they are, or changed in the scratch. */
static struct matrix changed_rows(struct rows source, int64_t row, int64_t count)
{
    struct matrix found = source.matrix;
    found.rows = count;
    found.data = element(source.matrix, row, 0);
    if (source.count == 0) return found;
    for (int64_t i = 0; i < count; i++)
        change_row(source, row + i, source.scratch + i * found.columns);
    found.data = source.scratch;
    found.row_stride = found.columns;
    found.dtype = DTYPE_FP32;
    return found;
}

static void change(struct rows source, float *out)
{
    for (int64_t row = 0; row < source.matrix.rows; row++)
        change_row(source, row, out + row * source.matrix.columns);
}

/* ---- rotations of outputs ---- */

/* Some columns of rows, times the signs of the rows, in a scratch of [rows][columns]: rows that lie
 * a power of two apart share few lines of a cache. The first three steps are done on the way. */
INLINE void gather_eights(struct matrix source, int dtype, const float *signs, float *scratch)
{
    for (int64_t i = 0; i < source.rows; i += 8)
        for (int64_t lane = 0; lane < source.columns; lane += PATH_FLOATS) {
            floats v[8];
            UNROLL for (int j = 0; j < 8; j++)
                v[j] = widen_floats(element(source, i + j, 0), dtype, lane) * signs[i + j];
            butterflies_across(v, 8);
            UNROLL for (int j = 0; j < 8; j++)
                FLOATS(scratch + (i + j) * source.columns + lane) = v[j];
        }
}

LOOP void gather_bf16(struct matrix source, const float *signs, float *scratch)
{
    source.dtype = DTYPE_BF16; /* which makes the size of an element known */
    gather_eights(source, DTYPE_BF16, signs, scratch);
}

LOOP void gather_fp16(struct matrix source, const float *signs, float *scratch)
{
    source.dtype = DTYPE_FP16;
    gather_eights(source, DTYPE_FP16, signs, scratch);
}

LOOP void gather_fp32(struct matrix source, const float *signs, float *scratch)
{
    source.dtype = DTYPE_FP32;
    gather_eights(source, DTYPE_FP32, signs, scratch);
}

/* The same without any steps, of fewer columns than the `lanes` of the scratch. */
LOOP void gather_any(struct matrix source, const float *signs, int64_t lanes, float *scratch)
{
    for (int64_t i = 0; i < source.rows; i++, scratch += lanes) {
        widen_row(element(source, i, 0), source.dtype, source.columns, lanes, scratch);
        for (int64_t lane = 0; lane < lanes; lane++) scratch[lane] *= signs[i];
    }
}

/* Some columns of a block, with the steps that are done while they are in L1. Returns how many rows
 * apart the next ones are. */
INLINE int64_t gather_block(struct matrix source, const float *signs, struct rotation rotation,
                            int64_t lanes, float *scratch)
{
    int64_t near = smaller(rotation.size / rotation.order, 64);
    if (source.columns < lanes || near < 8) {
        gather_any(source, signs, lanes, scratch);
        return 1;
    }
    for (int64_t row = 0; row < rotation.size; row += near) {
        struct matrix part = {element(source, row, 0), near, lanes, source.row_stride,
                              source.dtype};
        float *to = scratch + row * lanes;
        if (source.dtype == DTYPE_BF16)
            gather_bf16(part, signs + row, to);
        else if (source.dtype == DTYPE_FP16)
            gather_fp16(part, signs + row, to);
        else
            gather_fp32(part, signs + row, to);
        butterflies(to, near * lanes, 8 * lanes, near * lanes, 1.0f);
    }
    return near;
}

LOOP void scale_to(const float *from, float factor, int64_t count, float *out)
{
    for (int64_t i = 0; i < count; i++) out[i] = from[i] * factor;
}

static void rotate_outputs(struct matrix source, const float *signs, struct rotation rotation,
                           int64_t lanes, float *scratch, float *out)
{
    float factor = rotation.factor;
    rotation.factor = 1.0f; /* it is multiplied by on the way out */
    for (int64_t row = 0; row < source.rows; row += rotation.size)
        for (int64_t column = 0; column < source.columns; column += lanes) {
            int64_t count = smaller(lanes, source.columns - column);
            struct matrix block = {element(source, row, column), rotation.size, count,
                                   source.row_stride, source.dtype};
            int64_t run = gather_block(block, signs, rotation, lanes, scratch) * lanes;
            finish_blocks(scratch, rotation.size * lanes, run, lanes, rotation);
            for (int64_t i = 0; i < rotation.size; i++)
                scale_to(scratch + i * lanes, factor, count,
                         out + (row + i) * source.columns + column);
        }
}

/* ---- error sums ---- */

struct row_lanes {
    double signal[LANES], noise[LANES];
};

/* a * b + c; if the product is exact, a path that can rounds once, which is the same then. */
INLINE double add_product(double a, double b, double c, int is_exact)
{
#if defined(PATH_FUSES)
    if (is_exact) return __builtin_fma(a, b, c);
#else
    (void)is_exact;
#endif
    return a * b + c;
}

/* `count` is a multiple of LANES; padding holds zeros, which add nothing. */
INLINE void add_error_terms(const float *weights, const int32_t *codes, int64_t count, float scale,
                            struct row_lanes *lanes, int is_exact)
{
    double signal[LANES], noise[LANES];
    double step = scale;
    memcpy(signal, lanes->signal, sizeof signal);
    memcpy(noise, lanes->noise, sizeof noise);
    for (int64_t i = 0; i < count; i += LANES) {
        for (int lane = 0; lane < LANES; lane++) {
            double weight = weights[i + lane];
            double error = add_product(-(double)codes[i + lane], step, weight, is_exact);
            signal[lane] = add_product(weight, weight, signal[lane], is_exact);
            noise[lane] = add_product(error, error, noise[lane], is_exact);
        }
    }
    memcpy(lanes->signal, signal, sizeof signal);
    memcpy(lanes->noise, noise, sizeof noise);
}

/* Of codes that quantize() writes: every product is exact. */
LOOP void add_exact_errors(const float *weights, const int32_t *codes, int64_t count, float scale,
                           struct row_lanes *lanes)
{
    add_error_terms(weights, codes, count, scale, lanes, 1);
}

/* Of any codes. */
LOOP void add_errors(const float *weights, const int32_t *codes, int64_t count, float scale,
                     struct row_lanes *lanes)
{
    add_error_terms(weights, codes, count, scale, lanes, 0);
}

static double add_lanes(double *lanes)
{
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* Uses the lanes up. */
static void store_sums(struct row_lanes *lanes, int64_t rows, int64_t row, struct error_sums sums)
{
    for (int64_t i = 0; i < rows; i++) {
        sums.signal[row + i] = add_lanes(lanes[i].signal);
        sums.noise[row + i] = add_lanes(lanes[i].noise);
    }
}

/* ---- quantization ---- */

INLINE float channel_scale(float absolute_maximum)
{
    float scale = widen_bf16(narrow_bf16(absolute_maximum / 127.0f));
    return scale == 0.0f ? 1.0f : scale;
}

/* Adding 1.5 * 2^23 rounds half to even and leaves the whole number in the low mantissa bits. That
 * holds up to 2^22, and a quotient is never beyond 191: at worst, absmax / 127 is one and a half
 * subnormal bfloat16 steps and the scale is one. */
LOOP void round_codes(const float *weights, int64_t count, float scale, int32_t *codes)
{
    const float magic = 0x1.8p23f;
    for (int64_t i = 0; i < count; i++) {
        int32_t code = (int32_t)(float_bits(weights[i] / scale + magic) - float_bits(magic));
        code = code > -128 ? code : -128;
        codes[i] = code < 127 ? code : 127;
    }
}

LOOP void narrow_codes(const int32_t *codes, int64_t count, uint8_t *out)
{
    for (int64_t i = 0; i < count; i++) out[i] = (uint8_t)codes[i];
}

/* Whatever a file holds in its padding, it is no error of a weight: zeros up to `padded`. */
LOOP void widen_codes(const uint8_t *codes, int64_t count, int64_t padded, int32_t *out)
{
    for (int64_t i = 0; i < count; i++) out[i] = (int8_t)codes[i];
    for (int64_t i = count; i < padded; i++) out[i] = 0;
}

/* 16 rows of 16 bytes become 16 columns: four rounds of the perfect shuffle. */
INLINE void transpose_square(const uint8_t *from, int64_t from_stride, uint8_t *to,
                             int64_t to_stride)
{
    bytes16 rows[16], next[16];
    for (int i = 0; i < 16; i++) memcpy(&rows[i], from + i * from_stride, 16);
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) {
            next[2 * i] = INTERLEAVE(rows[i], rows[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21,
                                     6, 22, 7, 23);
            next[2 * i + 1] = INTERLEAVE(rows[i], rows[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28,
                                         13, 29, 14, 30, 15, 31);
        }
        memcpy(rows, next, sizeof rows);
    }
    for (int i = 0; i < 16; i++) memcpy(to + i * to_stride, &rows[i], 16);
}

/* A tile is [32 channels][256 columns]; a strip is [columns][32 channels]. */
INLINE void tile_to_strip(const uint8_t *tile, int64_t columns, uint8_t *strip)
{
    for (int64_t column = 0; column < columns; column += 16)
        for (int row = 0; row < STRIP_ROWS; row += 16)
            transpose_square(tile + row * TILE_COLUMNS + column, TILE_COLUMNS,
                             strip + column * RUN_BYTES + row, RUN_BYTES);
}

INLINE void strip_to_tile(const uint8_t *strip, int64_t columns, uint8_t *tile)
{
    for (int64_t column = 0; column < columns; column += 16)
        for (int row = 0; row < STRIP_ROWS; row += 16)
            transpose_square(strip + column * RUN_BYTES + row, RUN_BYTES,
                             tile + row * TILE_COLUMNS + column, TILE_COLUMNS);
}

/* The scales of one strip's rows; brings the rows into L2, where the second pass finds them. */
INLINE int strip_scales(struct matrix source, float *scales, int64_t *position)
{
    for (int64_t i = 0; i < source.rows; i++) {
        const uint8_t *values = element(source, i, 0);
        uint32_t largest = largest_magnitude(values, source.dtype, source.columns);
        if (largest >= infinity_bits(source.dtype)) {
            position[0] = i;
            position[1] = first_not_finite(values, source.dtype, source.columns);
            return STATUS_NOT_FINITE;
        }
        scales[i] = channel_scale(magnitude_float(largest, source.dtype));
    }
    return STATUS_OK;
}

/* Some columns of a row as float32: where they are, or in a buffer that zeros fill up. */
INLINE const float *tile_row(struct matrix source, int64_t row, int64_t column, int64_t count,
                             int64_t padded, float *buffer)
{
    const void *place = element(source, row, column);
    if (source.dtype == DTYPE_FP32 && count == padded) return place;
    widen_row(place, source.dtype, count, padded, buffer);
    return buffer;
}

INLINE void quantize_strip(struct matrix source, const float *scales, uint8_t *strip,
                           struct row_lanes *lanes)
{
    float weights[TILE_COLUMNS];
    int32_t codes[TILE_COLUMNS];
    uint8_t tile[STRIP_ROWS * TILE_COLUMNS];
    memset(tile, 0, sizeof tile);
    for (int64_t column = 0; column < source.columns; column += TILE_COLUMNS) {
        int64_t count = smaller(TILE_COLUMNS, source.columns - column);
        int64_t padded = round_up(count, ROW_GROUP);
        for (int64_t i = 0; i < source.rows; i++) {
            const float *row = tile_row(source, i, column, count, padded, weights);
            round_codes(row, padded, scales[i], codes);
            narrow_codes(codes, padded, tile + i * TILE_COLUMNS);
            add_exact_errors(row, codes, padded, scales[i], &lanes[i]);
        }
        tile_to_strip(tile, padded, strip + column * RUN_BYTES);
    }
}

static int quantize(struct rows source, uint8_t *strips, float *scales, struct error_sums sums,
                    int64_t *position)
{
    int64_t strip_bytes = round_up(source.matrix.columns, ROW_GROUP) * RUN_BYTES;
    for (int64_t row = 0; row < source.matrix.rows; row += STRIP_ROWS) {
        int64_t rows = smaller(STRIP_ROWS, source.matrix.rows - row);
        struct matrix strip = changed_rows(source, row, rows);
        struct row_lanes lanes[STRIP_ROWS] = {0};
        int status = strip_scales(strip, scales + row, position);
        if (status != STATUS_OK) {
            position[0] += row;
            return status;
        }
        quantize_strip(strip, scales + row, strips + row / STRIP_ROWS * strip_bytes, lanes);
        store_sums(lanes, rows, row, sums);
    }
    return STATUS_OK;
}

INLINE void measure_strip(struct matrix source, int64_t row, int64_t rows, const uint8_t *strip,
                          const float *scales, struct row_lanes *lanes)
{
    float weights[TILE_COLUMNS];
    int32_t codes[TILE_COLUMNS];
    uint8_t tile[STRIP_ROWS * TILE_COLUMNS];
    for (int64_t column = 0; column < source.columns; column += TILE_COLUMNS) {
        int64_t count = smaller(TILE_COLUMNS, source.columns - column);
        int64_t padded = round_up(count, ROW_GROUP);
        strip_to_tile(strip + column * RUN_BYTES, padded, tile);
        for (int64_t i = 0; i < rows; i++) {
            widen_row(element(source, row + i, column), source.dtype, count, padded, weights);
            widen_codes(tile + i * TILE_COLUMNS, count, padded, codes);
            add_errors(weights, codes, padded, scales[row + i], &lanes[i]);
        }
    }
}

static int measure(struct matrix source, const uint8_t *strips, const float *scales,
                   struct error_sums sums)
{
    int64_t strip_bytes = round_up(source.columns, ROW_GROUP) * RUN_BYTES;
    for (int64_t row = 0; row < source.rows; row += STRIP_ROWS) {
        int64_t rows = smaller(STRIP_ROWS, source.rows - row);
        struct row_lanes lanes[STRIP_ROWS] = {0};
        measure_strip(source, row, rows, strips + row / STRIP_ROWS * strip_bytes, scales, lanes);
        store_sums(lanes, rows, row, sums);
    }
    return STATUS_OK;
}

/* ---- 32-byte runs between row-major and strips ---- */

/* Two runs at a time: together they are one cache line of the source, which is then read once. */
INLINE void pack_runs(const uint8_t *from, int64_t row_stride, int64_t rows, int64_t row_bytes,
                      uint8_t *strips, int64_t strip_stride)
{
    int64_t column = 0;
    for (; column + 2 * RUN_BYTES <= row_bytes; column += 2 * RUN_BYTES) {
        uint8_t *first = strips + column / RUN_BYTES * strip_stride;
        for (int64_t row = 0; row < rows; row++) {
            const uint8_t *line = from + row * row_stride + column;
            memcpy(first + row * RUN_BYTES, line, RUN_BYTES);
            memcpy(first + strip_stride + row * RUN_BYTES, line + RUN_BYTES, RUN_BYTES);
        }
    }
    for (; column < row_bytes; column += RUN_BYTES) {
        size_t count = (size_t)smaller(RUN_BYTES, row_bytes - column);
        uint8_t *strip = strips + column / RUN_BYTES * strip_stride;
        for (int64_t row = 0; row < rows; row++) {
            memcpy(strip + row * RUN_BYTES, from + row * row_stride + column, count);
            memset(strip + row * RUN_BYTES + count, 0, RUN_BYTES - count);
        }
    }
}

INLINE void clear_rows(uint8_t *strips, int64_t strip_stride, int64_t row_bytes, int64_t rows)
{
    for (int64_t column = 0; column < row_bytes; column += RUN_BYTES)
        memset(strips + column / RUN_BYTES * strip_stride, 0, (size_t)(rows * RUN_BYTES));
}

LOOP void convert_row(const void *row, int dtype, int64_t count, uint16_t *out)
{
    const uint16_t *halves = row;
    const uint32_t *words = row;
    if (dtype == DTYPE_FP16)
        for (int64_t i = 0; i < count; i++) out[i] = narrow_bf16(widen_fp16(halves[i]));
    else
        for (int64_t i = 0; i < count; i++) out[i] = narrow_bf16(bits_float(words[i]));
}

/* Notes each row's first bad column, if it has none from a tile further left. */
INLINE void note_not_finite(const uint8_t *values, int64_t stride, int dtype, int64_t rows,
                            int64_t column, int64_t count, int64_t *bad_column)
{
    for (int64_t i = 0; i < rows; i++) {
        const uint8_t *row = values + i * stride;
        if (largest_magnitude(row, dtype, count) >= infinity_bits(dtype) && bad_column[i] < 0)
            bad_column[i] = column + first_not_finite(row, dtype, count);
    }
}

/* Sixteen rows, tile by tile. The check reads the stored values, so that a float32 which rounds to
 * an infinite bfloat16 is found as well. */
INLINE void pack_group(struct matrix source, int flags, int64_t first_row, int64_t rows,
                       uint8_t *strips, int64_t strip_stride, int64_t *bad_column)
{
    uint16_t converted[ROW_GROUP * PACK_COLUMNS];
    int stored = flags & PACK_TO_BF16 ? DTYPE_BF16 : source.dtype;
    int64_t run_columns = RUN_BYTES / element_bytes(stored);
    for (int64_t column = 0; column < source.columns; column += PACK_COLUMNS) {
        int64_t count = smaller(PACK_COLUMNS, source.columns - column);
        const uint8_t *values = element(source, first_row, column);
        int64_t stride = source.row_stride * element_bytes(source.dtype);
        if (stored != source.dtype) {
            for (int64_t i = 0; i < rows; i++)
                convert_row(values + i * stride, source.dtype, count, converted + i * PACK_COLUMNS);
            values = (const uint8_t *)converted;
            stride = PACK_COLUMNS * (int64_t)sizeof *converted;
        }
        if (flags & PACK_CHECK_FINITE)
            note_not_finite(values, stride, stored, rows, column, count, bad_column);
        pack_runs(values, stride, rows, count * element_bytes(stored),
                  strips + column / run_columns * strip_stride, strip_stride);
    }
}

static int pack(struct matrix source, int flags, uint8_t *strips, int64_t strip_stride,
                int64_t padded_rows, int64_t *position)
{
    for (int64_t row = 0; row < source.rows; row += ROW_GROUP) {
        int64_t rows = smaller(ROW_GROUP, source.rows - row);
        int64_t bad_column[ROW_GROUP];
        memset(bad_column, 0xff, sizeof bad_column);
        pack_group(source, flags, row, rows, strips + row * RUN_BYTES, strip_stride, bad_column);
        for (int64_t i = 0; i < rows; i++) {
            if (bad_column[i] < 0) continue;
            position[0] = row + i;
            position[1] = bad_column[i];
            return STATUS_NOT_FINITE;
        }
    }
    int64_t row_bytes = source.columns * (flags & PACK_TO_BF16 ? 2 : element_bytes(source.dtype));
    if (padded_rows > source.rows)
        clear_rows(strips + source.rows * RUN_BYTES, strip_stride, row_bytes,
                   padded_rows - source.rows);
    return STATUS_OK;
}

static int unpack(const uint8_t *strips, int64_t strip_stride, int64_t rows, int64_t row_bytes,
                  uint8_t *destination, int64_t row_stride)
{
    for (int64_t group = 0; group < rows; group += ROW_GROUP) {
        int64_t end = smaller(rows, group + ROW_GROUP);
        for (int64_t column = 0; column < row_bytes; column += RUN_BYTES) {
            const uint8_t *strip = strips + column / RUN_BYTES * strip_stride;
            uint8_t *to = destination + column;
            size_t count = (size_t)smaller(RUN_BYTES, row_bytes - column);
            if (count == RUN_BYTES)
                for (int64_t row = group; row < end; row++)
                    memcpy(to + row * row_stride, strip + row * RUN_BYTES, RUN_BYTES);
            else
                for (int64_t row = group; row < end; row++)
                    memcpy(to + row * row_stride, strip + row * RUN_BYTES, count);
        }
    }
    return STATUS_OK;
}

/* ---- sums of squares, and errors of what may be no rounding: not every product is exact ---- */

LOOP void add_squares(const float *weights, int64_t count, double *lanes)
{
    for (int64_t i = 0; i < count; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            double weight = weights[i + lane];
            lanes[lane] = add_product(weight, weight, lanes[lane], 1);
        }
}

LOOP void add_squares_each(const float *weights, int64_t count, double *sums)
{
    for (int64_t i = 0; i < count; i++) {
        double weight = weights[i];
        sums[i] = add_product(weight, weight, sums[i], 1);
    }
}

INLINE void row_square_sums(struct matrix source, double *sums)
{
    float weights[TILE_COLUMNS];
    for (int64_t row = 0; row < source.rows; row++) {
        double lanes[LANES] = {0};
        for (int64_t column = 0; column < source.columns; column += TILE_COLUMNS) {
            int64_t count = smaller(TILE_COLUMNS, source.columns - column);
            int64_t padded = round_up(count, LANES);
            widen_row(element(source, row, column), source.dtype, count, padded, weights);
            add_squares(weights, padded, lanes);
        }
        sums[row] = add_lanes(lanes);
    }
}

INLINE void column_square_sums(struct matrix source, double *sums)
{
    float weights[TILE_COLUMNS];
    double lanes[LANES][TILE_COLUMNS];
    for (int64_t column = 0; column < source.columns; column += TILE_COLUMNS) {
        int64_t count = smaller(TILE_COLUMNS, source.columns - column);
        memset(lanes, 0, sizeof lanes);
        for (int64_t row = 0; row < source.rows; row++) {
            widen_row(element(source, row, column), source.dtype, count, count, weights);
            add_squares_each(weights, count, lanes[row % LANES]);
        }
        for (int half = LANES / 2; half > 0; half /= 2)
            for (int lane = 0; lane < half; lane++)
                for (int64_t i = 0; i < count; i++) lanes[lane][i] += lanes[lane + half][i];
        memcpy(sums + column, lanes[0], (size_t)count * sizeof *sums);
    }
}

static void square_sums(struct matrix source, int by_column, double *sums)
{
    if (by_column)
        column_square_sums(source, sums);
    else
        row_square_sums(source, sums);
}

LOOP void add_rounding_errors(const float *weights, const float *rounded, int64_t count,
                              struct row_lanes *lanes)
{
    for (int64_t i = 0; i < count; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            double weight = weights[i + lane], error = weight - rounded[i + lane];
            lanes->signal[lane] = add_product(weight, weight, lanes->signal[lane], 1);
            lanes->noise[lane] = add_product(error, error, lanes->noise[lane], 0);
        }
}

static void rounding_errors(struct matrix source, const uint16_t *stored, struct error_sums sums)
{
    float weights[TILE_COLUMNS], rounded[TILE_COLUMNS];
    for (int64_t row = 0; row < source.rows; row++) {
        struct row_lanes lanes = {0};
        for (int64_t column = 0; column < source.columns; column += TILE_COLUMNS) {
            int64_t count = smaller(TILE_COLUMNS, source.columns - column);
            int64_t padded = round_up(count, LANES);
            const uint16_t *halves = stored + row * source.columns + column;
            widen_row(element(source, row, column), source.dtype, count, padded, weights);
            widen_row(halves, DTYPE_BF16, count, padded, rounded);
            add_rounding_errors(weights, rounded, padded, &lanes);
        }
        store_sums(&lanes, 1, row, sums);
    }
}

/* ---- rounding ---- */

/* Rows whose error sums are made side by side, because those of one row wait for each other. */
enum { ROUNDED_ROWS = 4 };

LOOP void round_row(const float *weights, int64_t count, uint16_t *stored)
{
    for (int64_t i = 0; i < count; i++) stored[i] = narrow_bf16(weights[i]);
}

/* What rounding takes off a weight is exact in float32: a multiple of the weight's last bit, and at
 * most 2^16 of these. So every product is exact too. */
INLINE void add_rounded(float weight, uint16_t stored, int lane, struct row_lanes *lanes)
{
    double exact = weight, error = weight - widen_bf16(stored);
    lanes->signal[lane] = add_product(exact, exact, lanes->signal[lane], 1);
    lanes->noise[lane] = add_product(error, error, lanes->noise[lane], 1);
}

INLINE void measure_rounded(int rows, const float *weights, const uint16_t *stored, int64_t columns,
                            struct row_lanes *lanes)
{
    struct row_lanes found[ROUNDED_ROWS] = {0};
    int64_t whole = columns / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        UNROLL for (int row = 0; row < rows; row++)
            UNROLL for (int lane = 0; lane < LANES; lane++) {
                int64_t at = row * columns + i + lane;
                add_rounded(weights[at], stored[at], lane, &found[row]);
            }
    for (int row = 0; row < rows; row++)
        for (int64_t at = row * columns + whole; at < (row + 1) * columns; at++)
            add_rounded(weights[at], stored[at], (int)(at - row * columns - whole), &found[row]);
    memcpy(lanes, found, sizeof found);
}

LOOP void measure_rounded_row(const float *weights, const uint16_t *stored, int64_t columns,
                              struct row_lanes *lanes)
{
    measure_rounded(1, weights, stored, columns, lanes);
}

LOOP void measure_rounded_rows(const float *weights, const uint16_t *stored, int64_t columns,
                               struct row_lanes *lanes)
{
    measure_rounded(ROUNDED_ROWS, weights, stored, columns, lanes);
}

/* Changes, rounds and measures a few rows at a time, while they are in L1. */
static int round_rows(struct rows source, uint16_t *stored, struct error_sums sums,
                      int64_t *position)
{
    int64_t columns = source.matrix.columns;
    for (int64_t row = 0; row < source.matrix.rows;) {
        int rows = source.matrix.rows - row < ROUNDED_ROWS ? 1 : ROUNDED_ROWS;
        struct row_lanes lanes[ROUNDED_ROWS];
        uint16_t *to = stored + row * columns;
        for (int64_t i = 0; i < rows; i++)
            change_row(source, row + i, source.scratch + i * columns);
        round_row(source.scratch, rows * columns, to);
        struct matrix rounded = {to, rows, columns, columns, DTYPE_BF16};
        if (find(rounded, position) != STATUS_OK) {
            position[0] += row;
            return STATUS_NOT_FINITE;
        }
        if (rows == 1)
            measure_rounded_row(source.scratch, to, columns, lanes);
        else
            measure_rounded_rows(source.scratch, to, columns, lanes);
        store_sums(lanes, rows, row, sums);
        row += rows;
    }
    return STATUS_OK;
}

/* ---- search of scales ---- */

/* The widest scale that is searched: below, reciprocals overflow. */
#define LEAST_SEARCHED 0x1p-100f

INLINE float stored_scale(float exact)
{
    float scale = widen_bf16(narrow_bf16(exact));
    return scale == 0.0f ? 1.0f : scale;
}

/* The whole number next to it, half to even, between two whole numbers of at most 2^22. */
INLINE float nearest_integer(float exact, struct integers integers)
{
    const float magic = 0x1.8p23f, least = (float)integers.least, most = (float)integers.most;
    exact = exact > least ? exact : least;
    exact = exact < most ? exact : most;
    return exact + magic - magic;
}

/* The share of one weight: float32 steps, widened at the end. */
INLINE double error_term(float weight, float importance, float scale, float inverse,
                         struct integers integers)
{
    float error = nearest_integer(weight * inverse, integers) * scale - weight;
    return (double)(error * error * importance);
}

LOOP double group_error(const float *weights, const float *importance, int64_t count, float scale,
                        struct integers integers)
{
    double lanes[LANES] = {0};
    float inverse = 1.0f / scale;
    int64_t whole = count / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            lanes[lane] +=
                error_term(weights[i + lane], importance[i + lane], scale, inverse, integers);
    for (int64_t i = whole; i < count; i++)
        lanes[i - whole] += error_term(weights[i], importance[i], scale, inverse, integers);
    return add_lanes(lanes);
}

/* The scale under which no weight is clipped, before it is rounded. */
INLINE float widest_scale(const float *weights, int64_t count, struct integers integers)
{
    uint32_t largest = largest_magnitude(weights, DTYPE_FP32, count);
    if (-integers.least <= integers.most) return bits_float(largest) / (float)integers.most;
    for (int64_t i = 0; i < count; i++)
        if ((float_bits(weights[i]) & 0x7fffffffu) == largest)
            return weights[i] / (float)integers.least;
    return 0.0f;
}

/* The first of the scales with the least error. */
INLINE float searched_scale(const float *weights, const float *importance, int64_t count,
                            struct search search)
{
    float widest = widest_scale(weights, count, search.integers);
    float best = stored_scale(widest);
    double least = bits_float(0x7f800000u);
    if (-LEAST_SEARCHED < widest && widest < LEAST_SEARCHED) return best;
    for (int64_t i = 0; i < search.count; i++) {
        float scale = stored_scale(widest * search.ratios[i]);
        double error = group_error(weights, importance, count, scale, search.integers);
        if (error < least) least = error, best = scale;
    }
    return best;
}

static int search(struct matrix source, struct search search, float *scales)
{
    int64_t groups = (source.columns + search.width - 1) / search.width;
    for (int64_t row = 0; row < source.rows; row++)
        for (int64_t group = 0; group < groups; group++) {
            int64_t column = group * search.width;
            int64_t count = smaller(search.width, source.columns - column);
            scales[row * groups + group] =
                searched_scale((const float *)element(source, row, column),
                               search.importance + column, count, search);
        }
    return STATUS_OK;
}

/* ---- codes whose errors the columns behind them make up for ---- */

/* Rows of a block that are worked on together: each column of a tile is a few vectors. */
enum { BLOCK_ROWS = 32 };

/* Turns a column into its errors; notes its codes. */
LOOP void code_column(float *column, const float *scales, float diagonal, struct integers integers,
                      float *codes)
{
    for (int row = 0; row < BLOCK_ROWS; row++) {
        codes[row] = nearest_integer(column[row] / scales[row], integers);
        column[row] = (column[row] - codes[row] * scales[row]) / diagonal;
    }
}

/* Takes a column's errors, times its row of the factor, off the columns behind it. */
LOOP void spread_column(const float *errors, const float *factor, int64_t count, float *columns)
{
    for (int64_t i = 0; i < count; i++)
        for (int row = 0; row < BLOCK_ROWS; row++)
            columns[i * BLOCK_ROWS + row] -= errors[row] * factor[i];
}

INLINE void compensate_rows(struct block block, int64_t first, int64_t rows, int8_t *codes,
                            float *errors)
{
    float tile[BLOCK_COLUMNS][BLOCK_ROWS], scales[BLOCK_COLUMNS][BLOCK_ROWS];
    float found[BLOCK_COLUMNS][BLOCK_ROWS];
    for (int64_t column = 0; column < block.columns; column++)
        for (int64_t row = 0; row < BLOCK_ROWS; row++) {
            int64_t from = first + smaller(row, rows - 1); /* the last rows once more as padding */
            tile[column][row] = block.weights[from * block.weights_stride + column];
            scales[column][row] = block.scales[from * block.columns + column];
        }
    for (int64_t column = 0; column < block.columns; column++) {
        const float *factor = block.factor + column * (block.factor_stride + 1);
        code_column(tile[column], scales[column], factor[0], block.integers, found[column]);
        spread_column(tile[column], factor + 1, block.columns - column - 1, tile[column + 1]);
    }
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = 0; column < block.columns; column++) {
            codes[(first + row) * block.columns + column] = (int8_t)found[column][row];
            errors[(first + row) * block.columns + column] = tile[column][row];
        }
}

static int compensate(struct block block, int8_t *codes, float *errors)
{
    for (int64_t row = 0; row < block.rows; row += BLOCK_ROWS)
        compensate_rows(block, row, smaller(BLOCK_ROWS, block.rows - row), codes, errors);
    return STATUS_OK;
}

const struct path_table PATH_TABLE = {find,
                                      quantize,
                                      measure,
                                      pack,
                                      unpack,
                                      change,
                                      rotate_outputs,
                                      square_sums,
                                      rounding_errors,
                                      round_rows,
                                      search,
                                      compensate};
