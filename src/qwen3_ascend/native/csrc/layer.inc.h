/* A layer's operations in one instruction set: included by floats_*.c behind floats.inc.h, whose
 * vectors and blocks of products it uses. layer.h says what each operation is.
 *
 * Rows are widened to float32 in the caller's scratch and padded with zeros to whole vectors, so
 * that loops have no ends of their own.
 */
#include "bf16.h"
#include "layer.h"

/* FOLD(v) of floats_*.c: the sums of the lanes of a vector that are four apart, [4]. */

/* Kept out of line: inlined into its caller, GCC 12 no longer vectorizes such a loop. */
#define LOOP static __attribute__((noinline))

typedef int32_t integers __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef float vector_anywhere __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(4)));
typedef uint16_t halves __attribute__((vector_size(VECTOR_BYTES / 2), may_alias, aligned(2)));
typedef float floats4 __attribute__((vector_size(16), may_alias));
typedef uint32_t words4_of_floats __attribute__((vector_size(16), may_alias, aligned(4)));
typedef uint32_t pairs __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(2)));

INLINE int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

INLINE const uint8_t *at(const void *values, int dtype, int64_t place)
{
    int64_t bytes = dtype == DTYPE_FP32 ? 4 : dtype == DTYPE_BF16 ? 2 : 1;
    return (const uint8_t *)values + place * bytes;
}

/* Whole vectors first: GCC 12 makes less of the plain loop. */
LOOP void widen_halves(const uint16_t *values, int64_t count, float *out)
{
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        integers each = __builtin_convertvector(*(const halves *)(values + i), integers);
        *(vector_anywhere *)(out + i) = (vector)(each << 16);
    }
    for (; i < count; i++) out[i] = from_bf16(values[i]);
}

/* `count` values as float32, zeros after them up to `padded`. */
LOOP void widen(const void *values, int dtype, int64_t count, int64_t padded, float *out)
{
    if (dtype == DTYPE_BF16)
        widen_halves(values, count, out);
    else if (dtype == DTYPE_BYTE)
        for (int64_t i = 0; i < count; i++) out[i] = ((const int8_t *)values)[i];
    else
        memcpy(out, values, (size_t)count * sizeof *out);
    for (int64_t i = count; i < padded; i++) out[i] = 0.0f;
}

/* What activations of `dtype` are able to hold. */
LOOP void round_values(float *values, int dtype, int64_t count)
{
    if (dtype == DTYPE_BF16)
        for (int64_t i = 0; i < count; i++) values[i] = from_bf16(to_bf16(values[i]));
}

LOOP void narrow_values(const float *values, int dtype, int64_t count, void *out)
{
    if (dtype == DTYPE_BF16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)out)[i] = to_bf16(values[i]);
    else
        memcpy(out, values, (size_t)count * sizeof *values);
}

INLINE float sum_of_vector(vector lanes)
{
    floats4 four = FOLD(lanes);
    return (four[0] + four[1]) + (four[2] + four[3]);
}

LOOP float sum_of_squares(const float *values, int64_t padded)
{
    vector first = {0}, second = {0};
    for (int64_t i = 0; i < padded; i += UNIT_OUTPUTS) {
        vector a = *(const vector *)(values + i), b = *(const vector *)(values + i + LANES);
        ADD_PRODUCT(first, a, a);
        ADD_PRODUCT(second, b, b);
    }
    return sum_of_vector(first + second);
}

/* Magnitude bits order like the values; those of a NaN are the largest of all. */
LOOP float largest_magnitude(const float *values, int64_t count)
{
    const int32_t *bits = (const int32_t *)values;
    int32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t magnitude = bits[i] & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    float value;
    memcpy(&value, &largest, sizeof value);
    return value;
}

/* ---- codes ---- */

/* Adding it leaves no bit behind the point, rounded half to even. */
static const float ROUNDER = 0x1.8p23f;

INLINE int8_t to_code(float value)
{
    value = value < -128.0f ? -128.0f : value > 127.0f ? 127.0f : value;
    float rounded = value + ROUNDER;
    int32_t bits;
    memcpy(&bits, &rounded, sizeof bits);
    return (int8_t)bits;
}

LOOP void divide_to_codes(const float *values, int64_t count, float divisor, int8_t *codes)
{
    for (int64_t i = 0; i < count; i++) codes[i] = to_code(values[i] / divisor);
}

LOOP void static_codes(const float *values, int64_t count, float reciprocal, float offset,
                       int8_t *codes)
{
    for (int64_t i = 0; i < count; i++) codes[i] = to_code(values[i] * reciprocal + offset);
}

/* A row of zeros has the scale 0 and the codes 0. */
INLINE float quantize_row(const float *values, int64_t count, int8_t *codes)
{
    float scale = largest_magnitude(values, count) / 127.0f;
    divide_to_codes(values, count, scale == 0.0f ? 1.0f : scale, codes);
    return scale;
}

static void feed_row(const struct feed *feed, float *values, int64_t columns, int64_t row)
{
    int8_t *codes = (int8_t *)feed->out + row * columns;
    if (feed->form == FEED_PER_TOKEN) {
        feed->scales[row] = quantize_row(values, columns, codes);
    } else if (feed->form == FEED_STATIC) {
        round_values(values, feed->dtype, columns);
        static_codes(values, columns, feed->reciprocal, feed->offset, codes);
    } else {
        narrow_values(values, feed->dtype, columns,
                      (void *)at(feed->out, feed->dtype, row * columns));
    }
}

static void feed_stored(const struct feed *feed, const void *values, int64_t columns, int64_t row,
                        float *scratch)
{
    widen(at(values, feed->dtype, row * columns), feed->dtype, columns, columns, scratch);
    feed_row(feed, scratch, columns, row);
}

/* ---- norms ---- */

LOOP void add_values(float *values, const float *added, int64_t count)
{
    for (int64_t i = 0; i < count; i++) values[i] += added[i];
}

LOOP void scale_values(float *values, float scale, const float *weight, int64_t count)
{
    for (int64_t i = 0; i < count; i++) values[i] = values[i] * scale * weight[i];
}

INLINE float norm_of(const float *values, int64_t count, int64_t padded, float epsilon)
{
    return 1.0f / __builtin_sqrtf(sum_of_squares(values, padded) / (float)count + epsilon);
}

static void add_norm(const struct add_norm *job, int64_t row, float *scratch)
{
    int64_t columns = job->columns, padded = round_up(columns, UNIT_OUTPUTS);
    int64_t place = row * columns;
    float *values = scratch, *other = scratch + padded;
    widen(at(job->hidden, job->dtype, place), job->dtype, columns, padded, values);
    if (job->delta) {
        widen(at(job->delta, job->dtype, place), job->dtype, columns, padded, other);
        add_values(values, other, columns);
        round_values(values, job->dtype, columns);
        narrow_values(values, job->dtype, columns, (void *)at(job->total, job->dtype, place));
    }
    widen(job->weight, job->dtype, columns, padded, other);
    scale_values(values, norm_of(values, columns, padded, job->epsilon), other, columns);
    feed_row(&job->feed, values, columns, row);
}

LOOP void rotate_values(float *values, const float *cosines, const float *sines, int64_t half)
{
    for (int64_t i = 0; i < half; i++) {
        float first = values[i], second = values[half + i];
        values[i] = first * cosines[i] + -second * sines[i];
        values[half + i] = second * cosines[half + i] + first * sines[half + i];
    }
}

static void norm_rotate_head(const struct norm_rotate *job, int64_t row, const float *weight,
                             float *values)
{
    int64_t size = job->cache.head_dim, padded = round_up(size, UNIT_OUTPUTS);
    scale_values(values, norm_of(values, size, padded, job->epsilon), weight, size);
    round_values(values, job->dtype, size);
    rotate_values(values, job->cosines + row * size, job->sines + row * size, size / 2);
    round_values(values, job->dtype, size);
}

static void write_head(const struct layer_cache *cache, void *blocks, float *scales, int64_t place,
                       const float *values)
{
    int64_t size = cache->head_dim;
    if (cache->dtype == DTYPE_BYTE)
        scales[place] = quantize_row(values, size, (int8_t *)blocks + place * size);
    else
        narrow_values(values, cache->dtype, size, (void *)at(blocks, cache->dtype, place * size));
}

static void norm_rotate(const struct norm_rotate *job, int64_t row, float *scratch)
{
    const struct layer_cache *cache = &job->cache;
    int64_t size = cache->head_dim, padded = round_up(size, UNIT_OUTPUTS);
    int64_t all = job->heads + 2 * cache->kv_heads, slot = job->slots[row] * cache->kv_heads;
    float *values = scratch, *weight = scratch + padded;
    const uint8_t *from = at(job->qkv, job->dtype, row * all * size);
    widen(job->query_weight, job->dtype, size, padded, weight);
    for (int64_t head = 0; head < all; head++) {
        int64_t key = head - job->heads, value = key - cache->kv_heads;
        widen(at(from, job->dtype, head * size), job->dtype, size, padded, values);
        if (key == 0) widen(job->key_weight, job->dtype, size, padded, weight);
        if (value >= 0) {
            write_head(cache, cache->values, cache->value_scales, slot + value, values);
            continue;
        }
        norm_rotate_head(job, row, weight, values);
        if (key >= 0)
            write_head(cache, cache->keys, cache->key_scales, slot + key, values);
        else
            narrow_values(values, job->dtype, size,
                          (void *)at(job->query, job->dtype, (row * job->heads + head) * size));
    }
}

/* ---- exponentials ---- */

INLINE vector splat(float value) { return (vector){0} + value; }

/* Of each lane `a` where `chosen` has all bits set, `b` where it has none. */
INLINE vector choose(integers chosen, vector a, vector b)
{
    return (vector)((chosen & (integers)a) | (~chosen & (integers)b));
}

/* e^x within two units in the last place, for x in [-87, 88]; beyond, that of the border: 2^n times
 * a polynomial on [-ln 2 / 2, ln 2 / 2] (coefficients of Cephes' expf). A NaN stays one. */
INLINE vector exponential(vector x)
{
    x = choose(x < -87.0f, splat(-87.0f), x);
    x = choose(x > 88.0f, splat(88.0f), x);
    vector shifted = x * 1.44269504f + ROUNDER, n = shifted - ROUNDER, y = splat(1.9875691500e-4f);
    ADD_PRODUCT(x, n, splat(-0.693359375f));
    ADD_PRODUCT(x, n, splat(2.12194440e-4f));
    static const float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                         1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f};
    for (int i = 0; i < 7; i++) {
        vector next = splat(coefficients[i]);
        ADD_PRODUCT(next, y, x);
        y = next;
    }
    return (vector)((integers)y + ((integers)shifted << 23));
}

LOOP void gate_values(float *gate, const float *up, int64_t padded)
{
    for (int64_t i = 0; i < padded; i += LANES) {
        vector x = *(const vector *)(gate + i);
        *(vector *)(gate + i) = x / (1.0f + exponential(-x)) * *(const vector *)(up + i);
    }
}

static void gated(const struct gated *job, int64_t row, float *scratch)
{
    int64_t columns = job->columns, padded = round_up(columns, UNIT_OUTPUTS);
    float *gate = scratch, *up = scratch + padded;
    const uint8_t *from = at(job->gate_up, job->dtype, row * 2 * columns);
    widen(from, job->dtype, columns, padded, gate);
    widen(at(from, job->dtype, columns), job->dtype, columns, padded, up);
    gate_values(gate, up, padded);
    feed_row(&job->feed, gate, columns, row);
}

/* ---- the largest value ---- */

/* A lane keeps the first of its largest; of lanes that are equal the earliest counts. */
static int64_t largest_place(const float *values, int64_t count)
{
    int64_t place = 0, whole = count / LANES * LANES;
    vector largest = splat(-__builtin_inff());
    integers places = {0}, here = {0}, strange = {0};
    for (int i = 0; i < LANES; i++) here[i] = i, places[i] = -1;
    for (int64_t i = 0; i < whole; i += LANES, here += LANES) {
        vector each = *(const vector_anywhere *)(values + i);
        integers better = (each > largest) | ((places < 0) & (each == largest));
        strange |= each != each;
        largest = choose(better, each, largest);
        places = (better & here) | (~better & places);
    }
    float best = -__builtin_inff();
    int any = 0, is_strange = 0;
    for (int i = 0; i < LANES; i++) {
        is_strange |= strange[i] != 0;
        if (places[i] < 0) continue;
        if (!any || largest[i] > best || (largest[i] == best && places[i] < place))
            best = largest[i], place = places[i], any = 1;
    }
    for (int64_t i = whole; i < count; i++) {
        is_strange |= values[i] != values[i];
        if (!any || values[i] > best) best = values[i], place = i, any = 1;
    }
    for (int64_t i = 0; is_strange && i < count; i++)
        if (values[i] != values[i]) return i;
    return place;
}

/* ---- attention: keys in blocks, each softmax corrected by the next block's maximum ---- */

/* Queries whose sums are kept at a time; keys of a block; queries up to which keys of bfloat16 are
 * multiplied as they are read, where widening them first does not pay, and vectors of pairs of
 * theirs whose sums are kept in registers. */
enum { QUERIES = 192, KEYS = 64, FEW_QUERIES = 8, PAIRS_TOGETHER = 2 };

/* What the queries of a part have in the scratch, each for `room` of them, as many as blocks of
 * products may write. */
struct queries {
    int64_t count, room, width; /* width: of a head, padded */
    int few;
    float *rows;      /* [room][width], times 1 / sqrt(head_dim); of many, in blocks of products */
    float *keys;      /* [KEYS][width] */
    float *tile;      /* [KEYS / UNIT_OUTPUTS][width][UNIT_OUTPUTS], keys turned */
    float *values;    /* [width / UNIT_OUTPUTS][KEYS][UNIT_OUTPUTS] */
    float *scores;    /* [KEYS / UNIT_OUTPUTS][room][UNIT_OUTPUTS] */
    float *weights;   /* [KEYS][rows of the block], in blocks of rows */
    float *outputs;   /* [width / UNIT_OUTPUTS][room][UNIT_OUTPUTS] */
    float *maxima, *totals; /* [room] */
};

static int64_t attention_scratch(int64_t queries, int64_t head_dim)
{
    int64_t room = queries + BLOCK_ROWS, width = round_up(head_dim, UNIT_OUTPUTS);
    return 2 * room * width + 3 * KEYS * width + 2 * room * KEYS + 2 * round_up(room, 16) + 16;
}

static struct queries place_queries(const struct attention *job, int64_t count, float *scratch)
{
    int64_t head_dim = job->cache.head_dim;
    struct queries queries = {.count = count, .room = count + BLOCK_ROWS,
                              .width = round_up(head_dim, UNIT_OUTPUTS)};
    queries.few = count <= FEW_QUERIES && job->cache.dtype == DTYPE_BF16 &&
                  head_dim % (PAIRS_TOGETHER * UNIT_OUTPUTS) == 0;
    int64_t rows = queries.room * queries.width, keys = KEYS * queries.width;
    queries.keys = scratch;
    queries.tile = queries.keys + keys;
    queries.values = queries.tile + keys;
    queries.rows = queries.values + keys;
    queries.outputs = queries.rows + rows;
    queries.scores = queries.outputs + rows;
    queries.weights = queries.scores + queries.room * KEYS;
    queries.maxima = queries.weights + queries.room * KEYS;
    queries.totals = queries.maxima + round_up(queries.room, 16);
    return queries;
}

/* Which block of products a query belongs to: where that begins, and how many rows it has. */
INLINE int64_t block_at(int64_t count, int64_t begin)
{
    return block_of(count - begin, BLOCK_ROWS);
}

static void take_query(const struct queries *queries, int64_t begin, int64_t block, int64_t index,
                       const float *values, int64_t size, float factor)
{
    float *rows = queries->rows + begin * queries->width + (index - begin);
    for (int64_t i = 0; i < queries->width; i++)
        rows[i * block] = values && i < size ? values[i] * factor : 0.0f;
}

/* Of every 2 * LANES values first the even ones, then the odd ones. */
static void take_query_in_pairs(const struct queries *queries, int64_t index, const float *values,
                                float factor)
{
    float *row = queries->rows + index * queries->width;
    for (int64_t start = 0; start < queries->width; start += UNIT_OUTPUTS)
        for (int64_t i = 0; i < UNIT_OUTPUTS; i++)
            row[start + i % 2 * LANES + i / 2] = values ? values[start + i] * factor : 0.0f;
}

static void take_queries(const struct attention *job, const struct queries *queries, int64_t row,
                         int64_t kv_head, float *values)
{
    int64_t size = job->cache.head_dim, group = job->heads / job->cache.kv_heads;
    float factor = 1.0f / __builtin_sqrtf((float)size);
    for (int64_t begin = 0, block; begin < queries->count; begin += block) {
        block = block_at(queries->count, begin);
        for (int64_t index = begin; index < begin + block; index++) {
            int64_t place = (row + index / group) * job->heads + kv_head * group + index % group;
            const float *present = index < queries->count ? values : NULL;
            if (present)
                widen(at(job->query, job->dtype, place * size), job->dtype, size, size, values);
            if (queries->few)
                take_query_in_pairs(queries, index, present, factor);
            else
                take_query(queries, begin, block, index, present, size, factor);
        }
    }
    for (int64_t i = 0; i < queries->room; i++)
        queries->maxima[i] = -__builtin_inff(), queries->totals[i] = 0.0f;
    memset(queries->outputs, 0, (size_t)(queries->room * queries->width) * sizeof(float));
}

/* The place of a token in the cache, in heads. */
INLINE int64_t head_place(const struct attention *job, int64_t request, int64_t token,
                          int64_t kv_head)
{
    int64_t block = job->block_table[request * job->table_width + token / job->block_size];
    return (block * job->block_size + token % job->block_size) * job->cache.kv_heads + kv_head;
}

INLINE void read_head(const struct layer_cache *cache, const void *blocks, const float *scales,
                      int64_t place, int64_t padded, float *out)
{
    int64_t size = cache->head_dim;
    widen(at(blocks, cache->dtype, place * size), cache->dtype, size, padded, out);
    if (scales)
        for (int64_t i = 0; i < size; i++) out[i] *= scales[place];
}

/* `count` keys and values from token `start` on. Keys behind them are zeros; their scores are
 * hidden. */
static void read_keys(const struct attention *job, const struct queries *queries, int64_t request,
                      int64_t kv_head, int64_t start, int64_t count)
{
    int64_t width = queries->width;
    const struct layer_cache *cache = &job->cache;
    for (int64_t i = 0; i < count; i++) {
        int64_t place = head_place(job, request, start + i, kv_head);
        float *row = queries->keys + i * width;
        read_head(cache, cache->values, cache->value_scales, place, width, row);
        for (int64_t column = 0; column < width; column += UNIT_OUTPUTS)
            memcpy(queries->values + (column * KEYS + i * UNIT_OUTPUTS), row + column,
                   UNIT_OUTPUTS * sizeof *row);
        read_head(cache, cache->keys, cache->key_scales, place, width, row);
    }
    memset(queries->keys + count * width, 0, (size_t)((KEYS - count) * width) * sizeof(float));
}

/* Four values of four rows, turned. */
INLINE void turn_square(const float *rows, int64_t width, float *out, int64_t out_width)
{
    words4 a = *(const words4 *)rows, b = *(const words4 *)(rows + width);
    words4 c = *(const words4 *)(rows + 2 * width), d = *(const words4 *)(rows + 3 * width);
    words4 ab_low = SHUFFLE(a, b, 0, 4, 1, 5), ab_high = SHUFFLE(a, b, 2, 6, 3, 7);
    words4 cd_low = SHUFFLE(c, d, 0, 4, 1, 5), cd_high = SHUFFLE(c, d, 2, 6, 3, 7);
    *(words4_of_floats *)out = SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
    *(words4_of_floats *)(out + out_width) = SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
    *(words4_of_floats *)(out + 2 * out_width) = SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
    *(words4_of_floats *)(out + 3 * out_width) = SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
}

LOOP void turn_keys(const float *keys, int64_t width, float *tile)
{
    for (int64_t key = 0; key < KEYS; key += 4)
        for (int64_t i = 0; i < width; i += 4)
            turn_square(keys + key * width + i, width,
                        tile + key / UNIT_OUTPUTS * UNIT_OUTPUTS * width + i * UNIT_OUTPUTS +
                            key % UNIT_OUTPUTS,
                        UNIT_OUTPUTS);
}

static void score_many(const struct queries *queries)
{
    turn_keys(queries->keys, queries->width, queries->tile);
    memset(queries->scores, 0, (size_t)(queries->room * KEYS) * sizeof(float));
    for (int64_t unit = 0; unit < KEYS / UNIT_OUTPUTS; unit++)
        for (int64_t begin = 0, block; begin < queries->count; begin += block) {
            block = block_at(queries->count, begin);
            multiply[block](queries->tile + unit * UNIT_OUTPUTS * queries->width, queries->width,
                            queries->rows + begin * queries->width,
                            queries->scores + (unit * queries->room + begin) * UNIT_OUTPUTS);
        }
}

INLINE float largest_of(vector lanes)
{
    float largest = lanes[0];
    for (int i = 1; i < LANES; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}

/* Scores of a query become weights relative to the largest score so far; what its outputs are to be
 * multiplied with is returned. Only the first `visible` count, at least one of all blocks'. */
static float weigh(const struct queries *queries, int64_t index, int64_t visible)
{
    float *scores = queries->scores + index * UNIT_OUTPUTS;
    int64_t stride = queries->room * UNIT_OUTPUTS;
    vector largest = splat(queries->maxima[index]), total = {0};
    for (int64_t key = visible < 0 ? 0 : visible; key < KEYS; key++)
        scores[key / UNIT_OUTPUTS * stride + key % UNIT_OUTPUTS] = -__builtin_inff();
    for (int64_t unit = 0; unit < KEYS / UNIT_OUTPUTS; unit++)
        for (int64_t lane = 0; lane < UNIT_OUTPUTS; lane += LANES) {
            vector each = *(const vector *)(scores + unit * stride + lane);
            largest = choose(each > largest, each, largest);
        }
    float before = queries->maxima[index], maximum = largest_of(largest);
    for (int64_t unit = 0; unit < KEYS / UNIT_OUTPUTS; unit++)
        for (int64_t lane = 0; lane < UNIT_OUTPUTS; lane += LANES) {
            vector *place = (vector *)(scores + unit * stride + lane);
            vector each = *place - maximum;
            *place = choose(each < -87.0f, (vector){0}, exponential(each));
            total += *place;
        }
    float correction = before < maximum - 87.0f ? 0.0f : exponential(splat(before - maximum))[0];
    queries->maxima[index] = maximum;
    queries->totals[index] = queries->totals[index] * correction + sum_of_vector(total);
    return correction;
}

static void correct_outputs(const struct queries *queries, int64_t index, float correction)
{
    for (int64_t column = 0; column < queries->width; column += UNIT_OUTPUTS) {
        float *sums = queries->outputs + column * queries->room + index * UNIT_OUTPUTS;
        for (int64_t lane = 0; lane < UNIT_OUTPUTS; lane += LANES)
            *(vector *)(sums + lane) *= correction;
    }
}

/* The weights of a block of queries, a row for each key, as products read them. */
static void turn_weights(const struct queries *queries, int64_t begin, int64_t block)
{
    float *weights = queries->weights + begin * KEYS;
    int64_t stride = UNIT_OUTPUTS * queries->room, squares = block / 4 * 4;
    for (int64_t key = 0; key < KEYS; key += 4) {
        const float *scores = queries->scores + key / UNIT_OUTPUTS * stride +
                              begin * UNIT_OUTPUTS + key % UNIT_OUTPUTS;
        for (int64_t row = 0; row < squares; row += 4)
            turn_square(scores + row * UNIT_OUTPUTS, UNIT_OUTPUTS, weights + key * block + row,
                        block);
        for (int64_t row = squares; row < block; row++)
            for (int64_t i = 0; i < 4; i++)
                weights[(key + i) * block + row] = scores[row * UNIT_OUTPUTS + i];
    }
}

/* ---- few queries: keys and values are widened in registers, two queries at a time ---- */

/* Keys `start` to `end` of a request, for queries that all see `before` tokens, and each those of the
 * step up to its own. */
struct range {
    int64_t request, kv_head, start, end, before;
};

/* Where a block of keys and their values lie; behind the last they are repeated, and hidden. */
struct places {
    const uint16_t *keys[KEYS], *values[KEYS];
};

/* Of the block that begins with key `start`. */
static struct places find_keys(const struct attention *job, struct range range, int64_t start)
{
    struct places places;
    int64_t count = least(KEYS, range.end - start), size = job->cache.head_dim, run;
    for (int64_t i = 0; i < count; i += run) {
        int64_t left = job->block_size - (start + i) % job->block_size;
        int64_t place = head_place(job, range.request, start + i, range.kv_head) * size;
        run = least(left, count - i);
        for (int64_t key = i; key < i + run; key++, place += job->cache.kv_heads * size) {
            places.keys[key] = (const uint16_t *)job->cache.keys + place;
            places.values[key] = (const uint16_t *)job->cache.values + place;
        }
    }
    for (int64_t key = count; key < KEYS; key++) {
        places.keys[key] = places.keys[count - 1];
        places.values[key] = places.values[count - 1];
    }
    return places;
}

enum { CACHE_LINE = 64 }; /* bytes, of most processors */

/* Fetches the first keys of a range: later ones are fetched while something is computed. */
static void fetch_keys(const struct places *places, int64_t head_dim)
{
    for (int64_t key = 0; key < KEYS; key++)
        for (int64_t i = 0; i < head_dim; i += CACHE_LINE / (int64_t)sizeof(uint16_t))
            __builtin_prefetch(places->keys[key] + i);
}

INLINE vector even_values(pairs values) { return (vector)(values << 16); }
INLINE vector odd_values(pairs values) { return (vector)(values & 0xffff0000u); }

#define EACH_KEY(DO) DO(0) DO(1) DO(2) DO(3)
#define BEGIN_KEY(KEY) vector first##KEY = {0}, second##KEY = {0};
#define SCORE_KEY(KEY)                                                                             \
    {                                                                                              \
        pairs both = *(const pairs *)(keys[KEY] + i);                                              \
        __builtin_prefetch(values[KEY] + i);                                                       \
        vector even = even_values(both), odd = odd_values(both);                                   \
        ADD_PRODUCT(first##KEY, even, ((const vector *)(a + i))[0]);                               \
        ADD_PRODUCT(first##KEY, odd, ((const vector *)(a + i))[1]);                                \
        ADD_PRODUCT(second##KEY, even, ((const vector *)(b + i))[0]);                              \
        ADD_PRODUCT(second##KEY, odd, ((const vector *)(b + i))[1]);                               \
    }

/* The sums of four vectors' lanes. */
INLINE floats4 four_sums(vector a, vector b, vector c, vector d)
{
    words4 w = (words4)FOLD(a), x = (words4)FOLD(b), y = (words4)FOLD(c), z = (words4)FOLD(d);
    floats4 wx = (floats4)SHUFFLE(w, x, 0, 4, 1, 5) + (floats4)SHUFFLE(w, x, 2, 6, 3, 7);
    floats4 yz = (floats4)SHUFFLE(y, z, 0, 4, 1, 5) + (floats4)SHUFFLE(y, z, 2, 6, 3, 7);
    words4 left = (words4)wx, right = (words4)yz;
    return (floats4)SHUFFLE(left, right, 0, 1, 4, 5) + (floats4)SHUFFLE(left, right, 2, 3, 6, 7);
}

/* Scores of two queries for four keys; their values are fetched meanwhile. */
INLINE void score_four(const uint16_t *const *keys, const uint16_t *const *values, const float *a,
                       const float *b, int64_t width, float *scores_a, float *scores_b)
{
    EACH_KEY(BEGIN_KEY)
    for (int64_t i = 0; i < width; i += UNIT_OUTPUTS) { EACH_KEY(SCORE_KEY) }
    *(floats4 *)scores_a = four_sums(first0, first1, first2, first3);
    *(floats4 *)scores_b = four_sums(second0, second1, second2, second3);
}

static void score_few(const struct queries *queries, const struct places *places, int64_t count)
{
    int64_t width = queries->width;
    for (int64_t index = 0; index < queries->count; index += 2) {
        const float *query = queries->rows + index * width;
        float *scores = queries->scores + index * UNIT_OUTPUTS;
        for (int64_t key = 0; key < count; key += 4) {
            int64_t unit = key / UNIT_OUTPUTS * UNIT_OUTPUTS;
            float *place = scores + unit * queries->room + key - unit;
            score_four(places->keys + key, places->values + key, query, query + width, width, place,
                       place + UNIT_OUTPUTS);
        }
    }
}

#define EACH_PAIR(DO) DO(0) DO(1)
#define TAKE_PAIR(PAIR)                                                                            \
    vector a_even##PAIR = ((vector *)a)[2 * PAIR], a_odd##PAIR = ((vector *)a)[2 * PAIR + 1],      \
           b_even##PAIR = ((vector *)b)[2 * PAIR], b_odd##PAIR = ((vector *)b)[2 * PAIR + 1];
#define ADD_PAIR(PAIR)                                                                             \
    {                                                                                              \
        pairs both = *(const pairs *)(values[key] + column + PAIR * UNIT_OUTPUTS);                 \
        __builtin_prefetch(next[key] + column + PAIR * UNIT_OUTPUTS);                              \
        vector even = even_values(both), odd = odd_values(both);                                   \
        ADD_PRODUCT(a_even##PAIR, even, first);                                                    \
        ADD_PRODUCT(a_odd##PAIR, odd, first);                                                      \
        ADD_PRODUCT(b_even##PAIR, even, second);                                                   \
        ADD_PRODUCT(b_odd##PAIR, odd, second);                                                     \
    }
#define GIVE_PAIR(PAIR)                                                                            \
    ((vector *)a)[2 * PAIR] = a_even##PAIR, ((vector *)a)[2 * PAIR + 1] = a_odd##PAIR,             \
    ((vector *)b)[2 * PAIR] = b_even##PAIR, ((vector *)b)[2 * PAIR + 1] = b_odd##PAIR;

/* Adds `column` .. of `count` weighted values to the outputs of two queries; the next keys are
 * fetched meanwhile. */
static void add_few(const uint16_t *const *values, const uint16_t *const *next, int64_t column,
                    int64_t count, const float *weights, int64_t stride, float *a, float *b)
{
    EACH_PAIR(TAKE_PAIR)
    for (int64_t key = 0; key < count; key++) {
        const float *weight = weights + key / UNIT_OUTPUTS * stride + key % UNIT_OUTPUTS;
        vector first = splat(weight[0]), second = splat(weight[UNIT_OUTPUTS]);
        EACH_PAIR(ADD_PAIR)
    }
    EACH_PAIR(GIVE_PAIR)
}

static void attend_few(const struct queries *queries, const struct places *places,
                       const struct places *next, int64_t count, int64_t visible, int64_t group)
{
    int64_t width = queries->width;
    score_few(queries, places, count);
    for (int64_t index = 0; index < queries->count; index++) {
        float correction = weigh(queries, index, least(count, visible + index / group));
        float *row = queries->outputs + index * width;
        if (correction != 1.0f)
            for (int64_t i = 0; i < width; i += LANES) *(vector *)(row + i) *= correction;
    }
    for (int64_t index = 0; index < queries->count; index += 2)
        for (int64_t column = 0; column < width; column += PAIRS_TOGETHER * UNIT_OUTPUTS) {
            float *row = queries->outputs + index * width + column;
            add_few(places->values, next->keys, column, count, queries->scores + index * UNIT_OUTPUTS,
                    queries->room * UNIT_OUTPUTS, row, row + width);
        }
}

/* ---- many queries ---- */

/* One block of `count` keys, of which query i sees `visible` + i / group. */
static void attend_many(const struct queries *queries, int64_t count, int64_t visible,
                        int64_t group)
{
    score_many(queries);
    for (int64_t index = 0; index < queries->count; index++) {
        float correction = weigh(queries, index, least(count, visible + index / group));
        if (correction != 1.0f) correct_outputs(queries, index, correction);
    }
    for (int64_t begin = 0, block; begin < queries->count; begin += block) {
        block = block_at(queries->count, begin);
        turn_weights(queries, begin, block);
        for (int64_t column = 0; column < queries->width; column += UNIT_OUTPUTS)
            multiply[block](queries->values + column * KEYS, count,
                            queries->weights + begin * KEYS,
                            queries->outputs + column * queries->room + begin * UNIT_OUTPUTS);
    }
}

/* The place of value i of a query's output. */
INLINE int64_t output_place(const struct queries *queries, int64_t index, int64_t i)
{
    int64_t start = i / UNIT_OUTPUTS * UNIT_OUTPUTS, inside = i % UNIT_OUTPUTS;
    if (queries->few)
        return index * queries->width + start + inside % 2 * LANES + inside / 2;
    return start * queries->room + index * UNIT_OUTPUTS + inside;
}

static void give_outputs(const struct attention *job, const struct queries *queries, int64_t row,
                         int64_t kv_head, float *values)
{
    int64_t size = job->cache.head_dim, group = job->heads / job->cache.kv_heads;
    for (int64_t index = 0; index < queries->count; index++) {
        for (int64_t i = 0; i < size; i++)
            values[i] = queries->outputs[output_place(queries, index, i)] / queries->totals[index];
        int64_t head = kv_head * group + index % group;
        narrow_values(
            values, job->dtype, size,
            (void *)at(job->out, job->dtype, ((row + index / group) * job->heads + head) * size));
    }
}

static void attend_range_few(const struct attention *job, const struct queries *queries,
                             struct range range)
{
    int64_t group = job->heads / job->cache.kv_heads;
    struct places places, next = find_keys(job, range, range.start);
    fetch_keys(&next, job->cache.head_dim);
    for (int64_t start = range.start; start < range.end; start += KEYS) {
        places = next;
        if (start + KEYS < range.end) next = find_keys(job, range, start + KEYS);
        attend_few(queries, &places, &next, least(KEYS, range.end - start),
                   range.before + 1 - start, group);
    }
}

static void attend_range_many(const struct attention *job, const struct queries *queries,
                              struct range range)
{
    int64_t group = job->heads / job->cache.kv_heads;
    for (int64_t start = range.start; start < range.end; start += KEYS) {
        int64_t keys = least(KEYS, range.end - start);
        read_keys(job, queries, range.request, range.kv_head, start, keys);
        attend_many(queries, keys, range.before + 1 - start, group);
    }
}

static void attend_range(const struct attention *job, const struct queries *queries,
                         struct range range)
{
    if (queries->few)
        attend_range_few(job, queries, range);
    else
        attend_range_many(job, queries, range);
}

static void attend(const struct attention *job, int64_t request, int64_t kv_head, int64_t first,
                   int64_t count, float *scratch)
{
    int64_t group = job->heads / job->cache.kv_heads, row = job->starts[request] + first;
    int64_t rows = job->starts[request + 1] - job->starts[request];
    int64_t before = job->lengths[request] - rows + first; /* tokens that every query sees */
    struct queries queries = place_queries(job, count * group, scratch);
    take_queries(job, &queries, row, kv_head, queries.keys);
    attend_range(job, &queries, (struct range){request, kv_head, 0, before + count, before});
    give_outputs(job, &queries, row, kv_head, queries.keys);
}

/* ---- a long context in splits ---- */

/* What a query of a split has come to: the maximum, the total, the sums. */
INLINE float *partial_at(const struct attention *job, int64_t request, int64_t kv_head,
                         int64_t split, int64_t index)
{
    int64_t group = job->heads / job->cache.kv_heads;
    int64_t place = (request * job->cache.kv_heads + kv_head) * job->most_splits + split;
    return job->partials + (place * group + index) * (job->cache.head_dim + 2);
}

static void attend_split(const struct attention *job, int64_t request, int64_t kv_head,
                         int64_t split, float *scratch)
{
    int64_t group = job->heads / job->cache.kv_heads, length = job->lengths[request];
    struct queries queries = place_queries(job, group, scratch);
    take_queries(job, &queries, job->starts[request], kv_head, queries.keys);
    int64_t start = split * SPLIT_KEYS, end = least(start + SPLIT_KEYS, length);
    attend_range(job, &queries, (struct range){request, kv_head, start, end, length - 1});
    for (int64_t index = 0; index < group; index++) {
        float *partial = partial_at(job, request, kv_head, split, index);
        partial[0] = queries.maxima[index], partial[1] = queries.totals[index];
        for (int64_t i = 0; i < job->cache.head_dim; i++)
            partial[2 + i] = queries.outputs[output_place(&queries, index, i)];
    }
}

LOOP void add_scaled(float *sums, const float *values, float factor, int64_t count)
{
    for (int64_t i = 0; i < count; i++) sums[i] += values[i] * factor;
}

static void join_splits(const struct attention *job, int64_t request, int64_t kv_head,
                        float *scratch)
{
    int64_t group = job->heads / job->cache.kv_heads, size = job->cache.head_dim;
    int64_t splits = splits_of(job, request);
    for (int64_t index = 0; index < group; index++) {
        float maximum = partial_at(job, request, kv_head, 0, index)[0], total = 0.0f;
        for (int64_t split = 1; split < splits; split++) {
            float other = partial_at(job, request, kv_head, split, index)[0];
            maximum = other > maximum ? other : maximum;
        }
        memset(scratch, 0, (size_t)size * sizeof *scratch);
        for (int64_t split = 0; split < splits; split++) {
            const float *partial = partial_at(job, request, kv_head, split, index);
            float factor = exponential(splat(partial[0] - maximum))[0];
            total += partial[1] * factor;
            add_scaled(scratch, partial + 2, factor, size);
        }
        for (int64_t i = 0; i < size; i++) scratch[i] /= total;
        int64_t head = job->starts[request] * job->heads + kv_head * group + index;
        narrow_values(scratch, job->dtype, size, (void *)at(job->out, job->dtype, head * size));
    }
}

const struct layer_table LAYER_TABLE = {
    add_norm, norm_rotate, gated,        feed_stored, widen,
    largest_place, attend, attend_split, join_splits, attention_scratch, QUERIES};
