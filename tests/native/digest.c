/* Prints one digest per kernel, dtype and shape, so that two processors can be compared:
 * digest PATH, where PATH is 0 (baseline), 1 (AVX2) or 2 (AVX-512). */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int qwen3_ascend_has_path(int path);
int qwen3_ascend_quantize_w8a8_nz(int path, int dtype, const void *source, int64_t rows,
                                  int64_t columns, int64_t row_stride, const void *steps,
                                  int64_t count, float *scratch, uint8_t *strips, float *scales,
                                  double *signal, double *noise, int64_t *position);
int qwen3_ascend_error_w8a8_nz(int path, int dtype, const void *source, int64_t rows,
                               int64_t columns, int64_t row_stride, const uint8_t *strips,
                               const float *scales, double *signal, double *noise);
int qwen3_ascend_pack_nz_rows(int path, int dtype, int flags, const void *source, int64_t rows,
                              int64_t columns, int64_t row_stride, uint8_t *strips,
                              int64_t strip_stride, int64_t padded_rows, int64_t *position);
int qwen3_ascend_unpack_nz_rows(int path, const uint8_t *strips, int64_t strip_stride, int64_t rows,
                                int64_t row_bytes, uint8_t *destination, int64_t row_stride);
int qwen3_ascend_search_scales(int path, const float *source, int64_t rows, int64_t columns,
                               int64_t row_stride, const float *importance, int64_t width,
                               int least, int most, const float *ratios, int64_t count,
                               float *scales);
int qwen3_ascend_compensate_block(int path, const float *weights, int64_t rows, int64_t columns,
                                  int64_t weights_stride, const float *scales, const float *factor,
                                  int64_t factor_stride, int least, int most, int8_t *codes,
                                  float *errors);

int qwen3_ascend_change_rows(int path, int dtype, const void *source, int64_t rows, int64_t columns,
                             int64_t row_stride, const void *steps, int64_t count, float *out);
int qwen3_ascend_rotate_outputs(int path, int dtype, const void *source, int64_t rows,
                                int64_t columns, int64_t row_stride, const float *signs,
                                const float *base, int64_t size, int64_t order, float factor,
                                int64_t lanes, float *scratch, float *out);
int qwen3_ascend_round_rows(int path, int dtype, const void *source, int64_t rows, int64_t columns,
                            int64_t row_stride, const void *steps, int64_t count, float *scratch,
                            uint16_t *stored, double *signal, double *noise, int64_t *position);
int qwen3_ascend_square_sums(int path, int dtype, const void *source, int64_t rows, int64_t columns,
                             int64_t row_stride, int by_column, double *sums);
int qwen3_ascend_error_bf16(int path, int dtype, const void *source, int64_t rows, int64_t columns,
                            int64_t row_stride, const uint16_t *stored, double *signal,
                            double *noise);

/* `struct step` of kernels.h. */
struct step {
    const float *outputs, *inputs, *base;
    int64_t size, order;
    float factor;
};

enum { ROWS = 67, COLUMNS = 1051, STRIDE = 1060, BF16 = 1, FP16 = 2, FP32 = 3 };

static uint64_t seed = 1;

static uint32_t next_random(void)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 32);
}

static uint64_t digest(uint64_t state, const void *data, size_t count)
{
    const uint8_t *bytes = data;
    for (size_t i = 0; i < count; i++) state = (state ^ bytes[i]) * 1099511628211u;
    return state;
}

/* Finite bits: everywhere in the format, or in a narrow range of exponents from subnormal on. */
static void fill(void *data, int dtype, int narrow)
{
    for (int i = 0; i < ROWS * STRIDE; i++) {
        uint32_t bits = next_random();
        if (dtype == FP32) {
            uint32_t limit = narrow ? 0x02800000u : 0x7f800000u;
            ((uint32_t *)data)[i] = (bits & 0x7fffffffu) % limit | (bits & 0x80000000u);
        } else {
            uint32_t limit = narrow ? 0x0280u : dtype == BF16 ? 0x7f80u : 0x7c00u;
            ((uint16_t *)data)[i] = (uint16_t)((bits >> 16) % limit | (bits & 0x8000u));
        }
    }
}

static uint64_t run(int path, int dtype, int64_t rows, int64_t columns, const void *source)
{
    static uint8_t strips[96 * STRIDE * 4], restored[ROWS * STRIDE * 4];
    float scales[ROWS] = {0};
    double sums[4][ROWS] = {{0}};
    int64_t position[2] = {-1, -1};
    int64_t padded_rows = (rows + 15) / 16 * 16;
    int flags = dtype == BF16 ? 1 : 2;
    memset(strips, 0x5a, sizeof strips);
    int status = qwen3_ascend_quantize_w8a8_nz(path, dtype, source, rows, columns, STRIDE, NULL, 0,
                                               NULL, strips, scales, sums[0], sums[1], position);
    status += qwen3_ascend_error_w8a8_nz(path, dtype, source, rows, columns, STRIDE, strips, scales,
                                         sums[2], sums[3]);
    if (memcmp(sums[0], sums[2], 2 * sizeof sums[0]) != 0) status += 100;
    uint64_t state = digest(14695981039346656037u, strips, sizeof strips);
    state = digest(digest(state, scales, sizeof scales), sums, sizeof sums);
    status += qwen3_ascend_pack_nz_rows(path, dtype, flags, source, rows, columns, STRIDE, strips,
                                        padded_rows * 32, padded_rows, position);
    status += qwen3_ascend_unpack_nz_rows(path, strips, padded_rows * 32, rows, columns * 2,
                                          restored, STRIDE * 2);
    state = digest(digest(state, strips, sizeof strips), restored, sizeof restored);
    return digest(state, &status, sizeof status);
}

/* The search for scales, and a block of columns: weights, factors and scales of about 1. */
static uint64_t choose(int path, int64_t columns)
{
    static float weights[ROWS * STRIDE], factor[128 * STRIDE], steps[ROWS * 128], errors[ROWS * 128];
    static float scales[ROWS * STRIDE];
    static int8_t codes[ROWS * 128];
    const float ratios[] = {1.05f, 1.0f, 0.9f, 0.5f};
    for (int i = 0; i < ROWS * STRIDE; i++) weights[i] = (float)next_random() / 0x1p31f - 1.0f;
    for (int i = 0; i < 128 * STRIDE; i++) factor[i] = (float)next_random() / 0x1p31f + 0.5f;
    for (int i = 0; i < ROWS * 128; i++) steps[i] = (float)next_random() / 0x1p33f + 0.1f;
    memset(scales, 0, sizeof scales);
    memset(codes, 0, sizeof codes);
    memset(errors, 0, sizeof errors);
    int status = qwen3_ascend_search_scales(path, weights, ROWS, columns, STRIDE, factor, 70, -8, 7,
                                            ratios, 4, scales);
    int64_t block = columns < 128 ? columns : 128;
    status += qwen3_ascend_compensate_block(path, weights, ROWS, block, STRIDE, steps, factor,
                                            STRIDE, -8, 7, codes, errors);
    uint64_t state = digest(14695981039346656037u, scales, sizeof scales);
    state = digest(digest(state, codes, sizeof codes), errors, sizeof errors);
    return digest(state, &status, sizeof status);
}

/* Blocks of order * doublings neighbours, both ways; the base need not be orthogonal. */
static uint64_t turn(int path, int64_t order, int64_t doublings, float *data)
{
    enum { LENGTH = 2560, BREADTH = 21 };
    static float signs[LENGTH], base[64 * 64], scratch[32 * LENGTH];
    int64_t size = order * doublings, length = LENGTH / size * size;
    for (int i = 0; i < size; i++) signs[i] = next_random() & 1 ? 1.0f : -1.0f;
    for (int64_t i = size; i < length; i++) signs[i] = signs[i - size];
    for (int i = 0; i < order * order; i++) base[i] = next_random() & 1 ? 1.0f : -1.0f;
    struct step step = {NULL, signs, base, size, order, 0.3f};
    int status = qwen3_ascend_change_rows(path, FP32, data, BREADTH, length, length, &step, 1, data);
    status += qwen3_ascend_rotate_outputs(path, FP32, data, length, BREADTH, BREADTH, signs, base,
                                          size, order, 0.7f, 32, scratch, data);
    uint64_t state = digest(14695981039346656037u, data, LENGTH * BREADTH * sizeof *data);
    return digest(state, &status, sizeof status);
}

/* Rows that are changed as they are quantized, rounded, and written; and outputs of every type. */
static uint64_t change(int path, int dtype, int64_t order, int64_t doublings, const void *source)
{
    static float factors[2][STRIDE], base[64 * 64], scratch[64 * STRIDE], out[ROWS * STRIDE];
    static uint8_t strips[96 * STRIDE];
    static uint16_t stored[ROWS * STRIDE];
    float scales[ROWS];
    double sums[4][ROWS];
    int64_t position[2], size = order * doublings, columns = COLUMNS / size * size;
    for (int i = 0; i < STRIDE; i++)
        for (int j = 0; j < 2; j++) factors[j][i] = (float)next_random() / 0x1p31f - 1.0f;
    for (int i = 0; i < order * order; i++) base[i] = next_random() & 1 ? 1.0f : -1.0f;
    struct step steps[] = {{factors[1], factors[0], base, size, order, 0.3f},
                           {factors[0], NULL, NULL, 1, 1, 1.0f},
                           {NULL, factors[1], NULL, 1, 1, 1.0f}};
    memset(strips, 0x5a, sizeof strips);
    int status = qwen3_ascend_quantize_w8a8_nz(path, dtype, source, ROWS, columns, STRIDE, steps, 3,
                                               scratch, strips, scales, sums[0], sums[1], position);
    status += qwen3_ascend_round_rows(path, dtype, source, ROWS, columns, STRIDE, steps, 3, scratch,
                                      stored, sums[2], sums[3], position);
    uint64_t state = digest(14695981039346656037u, strips, sizeof strips);
    state = digest(digest(state, scales, sizeof scales), sums, sizeof sums);
    state = digest(state, stored, (size_t)(ROWS * columns) * sizeof *stored);
    status += qwen3_ascend_change_rows(path, dtype, source, ROWS, columns, STRIDE, steps, 3, out);
    state = digest(state, out, (size_t)(ROWS * columns) * sizeof *out);
    status += qwen3_ascend_rotate_outputs(path, dtype, source, ROWS / size * size, columns, STRIDE,
                                          factors[0], base, size, order, 0.7f, 64, scratch, out);
    state = digest(state, out, (size_t)(ROWS * columns) * sizeof *out);
    return digest(state, &status, sizeof status);
}

static uint64_t add_up(int path, int dtype, const void *source, const uint16_t *stored)
{
    static double sums[2 * COLUMNS];
    uint64_t state = 14695981039346656037u;
    for (int by_column = 0; by_column < 2; by_column++) {
        qwen3_ascend_square_sums(path, dtype, source, ROWS, COLUMNS, STRIDE, by_column, sums);
        state = digest(state, sums, (by_column ? COLUMNS : ROWS) * sizeof *sums);
    }
    qwen3_ascend_error_bf16(path, dtype, source, ROWS, COLUMNS, STRIDE, stored, sums, sums + ROWS);
    return digest(state, sums, 2 * ROWS * sizeof *sums);
}

int main(int count, char **arguments)
{
    static uint32_t source[ROWS * STRIDE];
    static const int64_t shapes[][2] = {{1, 1}, {32, 16}, {33, 17}, {64, 256}, {ROWS, COLUMNS}};
    int path = count > 1 ? atoi(arguments[1]) : 0;
    if (!qwen3_ascend_has_path(path)) return 77;
    for (int dtype = BF16; dtype <= FP32; dtype++)
        for (int narrow = 0; narrow < 2; narrow++)
            for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
                fill(source, dtype, narrow);
                printf("%d %d %zu %016llx\n", dtype, narrow, i,
                       (unsigned long long)run(path, dtype, shapes[i][0], shapes[i][1], source));
            }
    for (int64_t columns = 1; columns <= STRIDE; columns *= 10)
        printf("choose %d %016llx\n", (int)columns, (unsigned long long)choose(path, columns));
    static const int64_t sizes[][2] = {{1, 1}, {1, 4}, {1, 128}, {12, 1}, {12, 2}, {20, 128}, {36, 16}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        fill(source, FP32, 1); /* far from infinity, whose NaNs processors make differently */
        printf("turn %zu %016llx\n", i,
               (unsigned long long)turn(path, sizes[i][0], sizes[i][1], (float *)source));
    }
    for (int dtype = BF16; dtype <= FP32; dtype++) {
        static uint16_t stored[ROWS * STRIDE];
        fill(stored, BF16, 1);
        fill(source, dtype, 1);
        printf("sums %d %016llx\n", dtype,
               (unsigned long long)add_up(path, dtype, source, stored));
    }
    static const int64_t changed[][2] = {{1, 4}, {1, 64}, {12, 4}, {20, 1}, {1, 256}, {4, 256}};
    for (int dtype = BF16; dtype <= FP32; dtype++)
        for (size_t i = 0; i < sizeof changed / sizeof *changed; i++) {
            fill(source, dtype, 1);
            printf("change %d %zu %016llx\n", dtype, i,
                   (unsigned long long)change(path, dtype, changed[i][0], changed[i][1], source));
        }
    return 0;
}
