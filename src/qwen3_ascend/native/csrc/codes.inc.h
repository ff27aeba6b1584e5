/* Codes of int8 and int4, widened as they are read; a part of floats.inc.h. A path says beforehand:
 *
 *     READ_INT8(from)   LANES neighbouring codes as integers
 *     READ_INT4(from)   the same of half as many bytes
 *
 * A code has at most 9 bits with its offset and a scale has 8, so that their product is exact.
 */

typedef int32_t integers_of_lanes __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef uint32_t words_of_lanes __attribute__((vector_size(VECTOR_BYTES), may_alias));

/* Outputs of codes that are computed together for few rows. */
enum { CODE_VECTORS = 4, CODE_OUTPUTS = CODE_VECTORS * LANES };

INLINE const uint8_t *code_of(const struct stored_codes *codes, int64_t output, int64_t input)
{
    return codes->data + output / codes->strip_outputs * codes->strip_stride +
           input * codes->input_stride + output % codes->strip_outputs * codes->bits / 8;
}

INLINE int32_t read_word(const uint8_t *from)
{
    int32_t word;
    memcpy(&word, from, sizeof word);
    return word;
}

INLINE int32_t low_half(uint8_t pair) { return (int32_t)((pair & 15) ^ 8) - 8; }
INLINE int32_t high_half(uint8_t pair) { return (int32_t)(pair >> 4 ^ 8) - 8; }

INLINE vector widen_codes(const uint8_t *from, int bits)
{
    if (bits == 8) {
        integers_of_lanes codes = READ_INT8(from);
        return __builtin_convertvector(codes, vector);
    }
    integers_of_lanes codes = READ_INT4(from);
    return __builtin_convertvector(codes, vector);
}

#ifndef ROUND_TO_BF16
#define ROUND_TO_BF16 round_to_bf16
/* Half to even. */
INLINE vector round_to_bf16(vector values)
{
    words_of_lanes bits = (words_of_lanes)values;
    return (vector)((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}
#endif

/* What the codes of LANES outputs of a group are multiplied with, and what is added then. */
struct group_scales {
    vector scale, shift;
};

/* Of outputs that there are not, zero. */
INLINE vector read_scales(const struct float_product *product, const uint16_t *from, int64_t output)
{
    uint32_t bits[LANES] __attribute__((aligned(64))) = {0};
    int64_t count = least(LANES, product->outputs - output);
    if (count == LANES)
        for (int lane = 0; lane < LANES; lane++) bits[lane] = (uint32_t)from[lane] << 16;
    else
        for (int64_t lane = 0; lane < count; lane++) bits[lane] = (uint32_t)from[lane] << 16;
    return *(const vector *)bits;
}

INLINE struct group_scales scales_of(const struct float_product *product, int64_t output,
                                     int64_t input)
{
    const struct stored_codes *codes = &product->codes;
    struct group_scales found = {(vector){0} + 1.0f, {0}};
    int64_t place = input / codes->group * product->outputs + output;
    if (codes->scales) found.scale = read_scales(product, codes->scales + place, output);
    if (codes->offsets)
        found.shift = found.scale * read_scales(product, codes->offsets + place, output);
    return found;
}

/* The last input, and one more, of those from `input` on that share scales. */
INLINE int64_t end_of_group(const struct float_product *product, int64_t input)
{
    int64_t group = product->codes.group;
    return least((input / group + 1) * group, product->inputs);
}

/* How codes are read; constants, where it is inlined. */
struct code_form {
    int bits;
    int rounded; /* what they stand for, to bfloat16 */
};

INLINE vector weights_of(const uint8_t *from, struct code_form form, struct group_scales scales)
{
    vector weights = scales.shift;
    ADD_PRODUCT(weights, widen_codes(from, form.bits), scales.scale);
    return form.rounded ? ROUND_TO_BF16(weights) : weights;
}

/* ---- few rows ---- */

#define TAKE_CODES(row) vector a##row = {0}, b##row = {0}, c##row = {0}, d##row = {0};
#define MULTIPLY_CODES(row)                                                                        \
    each = x[input * rows + row] - (vector){0};                                                    \
    ADD_PRODUCT(a##row, a, each);                                                                  \
    ADD_PRODUCT(b##row, b, each);                                                                  \
    ADD_PRODUCT(c##row, c, each);                                                                  \
    ADD_PRODUCT(d##row, d, each);
#define GIVE_CODES(row)                                                                            \
    memcpy(sums[row], (vector[]){a##row, b##row, c##row, d##row}, sizeof sums[row]);

/* READ reads codes of STEP inputs, with the way to the next one, or 0 where there is none; MULTIPLY
 * takes them with a row. A column beyond the last that is stored is read as the last, and dropped
 * in the end. */
#define DEFINE_FEW_CODES(NAME, COUNT, STEP, READ, MULTIPLY)                                        \
    INLINE void NAME##_##COUNT(const struct float_product *product, struct code_form form,         \
                               const float *x, int64_t output, float (*sums)[CODE_OUTPUTS])        \
    {                                                                                              \
        const struct stored_codes *codes = &product->codes;                                        \
        int64_t rows = COUNT, stride = codes->input_stride, places[CODE_VECTORS];                  \
        for (int i = 0; i < CODE_VECTORS; i++)                                                     \
            places[i] = least(output + i * LANES, codes->stored_outputs - LANES);                  \
        EACH_##COUNT(TAKE_CODES) for (int64_t input = 0; input < product->inputs;)                 \
        {                                                                                          \
            const uint8_t *from[CODE_VECTORS];                                                     \
            struct group_scales scales[CODE_VECTORS];                                              \
            for (int i = 0; i < CODE_VECTORS; i++) {                                               \
                from[i] = code_of(codes, places[i], input);                                        \
                scales[i] = scales_of(product, places[i], input);                                  \
            }                                                                                      \
            int64_t end = end_of_group(product, input);                                            \
            for (int64_t offset = 0; input < end; input += STEP, offset += STEP * stride) {        \
                int64_t next = input + STEP <= end ? stride : 0;                                   \
                vector a = READ(from[0] + offset, next, form, scales[0]);                          \
                vector b = READ(from[1] + offset, next, form, scales[1]);                          \
                vector c = READ(from[2] + offset, next, form, scales[2]);                          \
                vector d = READ(from[3] + offset, next, form, scales[3]), each;                    \
                EACH_##COUNT(MULTIPLY)                                                             \
            }                                                                                      \
        }                                                                                          \
        EACH_##COUNT(GIVE_CODES)                                                                   \
    }

INLINE vector one_code(const uint8_t *from, int64_t next, struct code_form form,
                       struct group_scales scales)
{
    (void)next;
    return weights_of(from, form, scales);
}

DEFINE_FEW_CODES(codes, 1, 1, one_code, MULTIPLY_CODES)
DEFINE_FEW_CODES(codes, 2, 1, one_code, MULTIPLY_CODES)

typedef void (*few_codes)(const struct float_product *product, struct code_form form,
                          const float *x, int64_t output, float (*sums)[CODE_OUTPUTS]);

/* `one` and `two` multiply one row and two, and are inlined. */
INLINE void multiply_form(const struct float_product *product, struct code_form form, few_codes one,
                          few_codes two, const float *x, int64_t first, int64_t last)
{
    float sums[FEW_CODE_ROWS][CODE_OUTPUTS] __attribute__((aligned(64)));
    for (int64_t output = first; output < last; output += CODE_OUTPUTS) {
        if (product->rows == 1)
            one(product, form, x, output, sums);
        else
            two(product, form, x, output, sums);
        for (int64_t row = 0; row < product->rows; row++)
            store_row(product, row, output, least(CODE_OUTPUTS, last - output), sums[row]);
    }
}

/* Does something with each form that there is, as a constant. */
#define WITH_FORM(product, DO, ...)                                                                \
    if ((product)->codes.bits == 8 && (product)->codes.rounded)                                    \
        DO(product, ((struct code_form){8, 1}), __VA_ARGS__);                                      \
    else if ((product)->codes.bits == 8)                                                           \
        DO(product, ((struct code_form){8, 0}), __VA_ARGS__);                                      \
    else if ((product)->codes.rounded)                                                             \
        DO(product, ((struct code_form){4, 1}), __VA_ARGS__);                                      \
    else                                                                                           \
        DO(product, ((struct code_form){4, 0}), __VA_ARGS__);

static void multiply_codes(const struct float_product *product, const float *x, int64_t first,
                           int64_t last)
{
    WITH_FORM(product, multiply_form, codes_1, codes_2, x, first, last)
}

/* ---- more rows ---- */

INLINE void widen_column(const struct float_product *product, struct code_form form,
                         int64_t output, int64_t input, int64_t count, float *tile)
{
    int64_t known = least(input + count, product->inputs), place = input;
    while (place < known) {
        struct group_scales scales = scales_of(product, output, place);
        const uint8_t *from = code_of(&product->codes, output, place);
        int64_t end = least(end_of_group(product, place), known);
        for (; place < end; place++, from += product->codes.input_stride)
            *(vector *)(tile + (place - input) * UNIT_OUTPUTS) = weights_of(from, form, scales);
    }
    for (; place < input + count; place++)
        *(vector *)(tile + (place - input) * UNIT_OUTPUTS) = (vector){0};
}

INLINE void widen_unit(const struct float_product *product, struct code_form form, int64_t output,
                       int64_t input, int64_t count, float *tile)
{
    for (int column = 0; column < UNIT_OUTPUTS; column += LANES) {
        int64_t place = least(output + column, product->codes.stored_outputs - LANES);
        widen_column(product, form, place, input, count, tile + column);
    }
}

static void make_codes(const struct float_product *product, int64_t output, int64_t input,
                       int64_t count, float *tile)
{
    WITH_FORM(product, widen_unit, output, input, count, tile)
}
