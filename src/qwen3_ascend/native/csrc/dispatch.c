/* The exported functions: check the arguments, set the floating-point mode, call one path. */
#include "kernels.h"

#include <float.h>
#include <stddef.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

/* A library built with -ffast-math, or torch.set_flush_denormal, may have told this thread to
 * flush subnormals; the kernels need the IEEE default: round to nearest, keep subnormals. */
typedef uint64_t float_mode;

_Static_assert(FLT_EVAL_METHOD == 0, "float32 steps must be rounded to float32");

static float_mode enter_ieee_mode(void)
{
    float_mode saved = 0;
#if defined(__x86_64__)
    saved = _mm_getcsr();
    _mm_setcsr(0x1f80u);
#elif defined(__aarch64__)
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
#endif
    return saved;
}

static void leave_ieee_mode(float_mode saved)
{
#if defined(__x86_64__)
    _mm_setcsr((unsigned)saved);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(saved));
#else
    (void)saved;
#endif
}

static const struct path_table *find_path(int path)
{
    if (path == PATH_BASELINE) return &path_table_baseline;
#if defined(__x86_64__)
    if (path == PATH_AVX2 && __builtin_cpu_supports("avx2")) return &path_table_avx2;
    if (path == PATH_AVX512 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return &path_table_avx512;
#endif
    return NULL;
}

static int matrix_is_valid(struct matrix source)
{
    static const uintptr_t alignment[] = {1, 2, 2, 4};
    if (source.dtype < DTYPE_BYTE || source.dtype > DTYPE_FP32) return 0;
    if (source.rows < 0 || source.columns < 0) return 0;
    if (source.rows > 1 && source.row_stride < source.columns) return 0;
    return (uintptr_t)source.data % alignment[source.dtype] == 0;
}

static int rotation_is_valid(struct rotation rotation, int64_t length)
{
    int64_t size = rotation.size, order = rotation.order;
    if (order < 1 || order > MOST_ORDER || (order > 1 && order % 4 != 0)) return 0;
    if (size < order || size % order != 0) return 0;
    int64_t doublings = size / order;
    return (doublings & (doublings - 1)) == 0 && length % size == 0;
}

static int rows_are_valid(struct rows source)
{
    if (!matrix_is_valid(source.matrix) || source.matrix.dtype == DTYPE_BYTE) return 0;
    for (int64_t i = 0; i < source.count; i++) {
        const struct step *step = source.steps + i;
        if (step->rotation.size > 1 && step->inputs == NULL) return 0;
        if (!rotation_is_valid(step->rotation, source.matrix.columns)) return 0;
    }
    return source.count == 0 || source.scratch != NULL;
}

QWEN3_ASCEND_API int qwen3_ascend_abi(void) { return QWEN3_ASCEND_ABI; }

/* 1 when this processor and operating system can run the path, 0 when not. */
QWEN3_ASCEND_API int qwen3_ascend_has_path(int path) { return find_path(path) != NULL; }

/* Whether every weight is finite; position gets the [row, column] of the first that is not. */
QWEN3_ASCEND_API int qwen3_ascend_find_not_finite(int path, int dtype, const void *source,
                                                  int64_t rows, int64_t columns, int64_t row_stride,
                                                  int64_t *position)
{
    struct matrix matrix = {source, rows, columns, row_stride, dtype};
    const struct path_table *table = find_path(path);
    if (table == NULL) return STATUS_NO_PATH;
    if (!matrix_is_valid(matrix) || dtype == DTYPE_BYTE) return STATUS_BAD_ARGUMENT;
    return table->find(matrix, position);
}

/* [rows, columns] weights, after `count` steps in a scratch of [32][columns], -> strips of [columns
 * padded to 16][32 channels] int8, one per 32 rows, plus per row a scale (a bfloat16 value), signal
 * and noise. position gets the [row, column] of the first NaN or Inf, after which the outputs hold
 * nothing of use. */
QWEN3_ASCEND_API int qwen3_ascend_quantize_w8a8_nz(int path, int dtype, const void *source,
                                                   int64_t rows, int64_t columns,
                                                   int64_t row_stride, const struct step *steps,
                                                   int64_t count, float *scratch, uint8_t *strips,
                                                   float *scales, double *signal, double *noise,
                                                   int64_t *position)
{
    struct rows changed = {{source, rows, columns, row_stride, dtype}, steps, count, scratch};
    const struct path_table *table = find_path(path);
    if (table == NULL) return STATUS_NO_PATH;
    if (!rows_are_valid(changed)) return STATUS_BAD_ARGUMENT;
    float_mode saved = enter_ieee_mode();
    struct error_sums sums = {signal, noise};
    int status = table->quantize(changed, strips, scales, sums, position);
    leave_ieee_mode(saved);
    return status;
}

/* The signal and noise that quantization reports, from codes and scales that are already stored. */
QWEN3_ASCEND_API int qwen3_ascend_error_w8a8_nz(int path, int dtype, const void *source,
                                                int64_t rows, int64_t columns, int64_t row_stride,
                                                const uint8_t *strips, const float *scales,
                                                double *signal, double *noise)
{
    struct matrix matrix = {source, rows, columns, row_stride, dtype};
    const struct path_table *table = find_path(path);
    if (table == NULL) return STATUS_NO_PATH;
    if (!matrix_is_valid(matrix) || dtype == DTYPE_BYTE) return STATUS_BAD_ARGUMENT;
    float_mode saved = enter_ieee_mode();
    struct error_sums sums = {signal, noise};
    int status = table->measure(matrix, strips, scales, sums);
    leave_ieee_mode(saved);
    return status;
}

/* Rows of a matrix -> the same rows of its strips; `strips` points at the first of these rows in
 * strip 0. Rows up to padded_rows are filled with zeros. */
QWEN3_ASCEND_API int qwen3_ascend_pack_nz_rows(int path, int dtype, int flags, const void *source,
                                               int64_t rows, int64_t columns, int64_t row_stride,
                                               uint8_t *strips, int64_t strip_stride,
                                               int64_t padded_rows, int64_t *position)
{
    struct matrix matrix = {source, rows, columns, row_stride, dtype};
    const struct path_table *table = find_path(path);
    if (table == NULL) return STATUS_NO_PATH;
    if (!matrix_is_valid(matrix) || padded_rows < rows) return STATUS_BAD_ARGUMENT;
    if (dtype == DTYPE_BYTE && flags != 0) return STATUS_BAD_ARGUMENT;
    if (dtype == DTYPE_FP32 && !(flags & PACK_TO_BF16)) return STATUS_BAD_ARGUMENT;
    float_mode saved = enter_ieee_mode();
    int status = table->pack(matrix, flags, strips, strip_stride, padded_rows, position);
    leave_ieee_mode(saved);
    return status;
}

/* The inverse of packing, in bytes; `strips` points at the first row wanted in strip 0. */
QWEN3_ASCEND_API int qwen3_ascend_unpack_nz_rows(int path, const uint8_t *strips,
                                                 int64_t strip_stride, int64_t rows,
                                                 int64_t row_bytes, uint8_t *destination,
                                                 int64_t row_stride)
{
    const struct path_table *table = find_path(path);
    if (table == NULL) return STATUS_NO_PATH;
    if (rows < 0 || row_bytes < 0) return STATUS_BAD_ARGUMENT;
    if (rows > 1 && row_stride < row_bytes) return STATUS_BAD_ARGUMENT;
    return table->unpack(strips, strip_stride, rows, row_bytes, destination, row_stride);
}

/* Rows after `count` steps -> float32 [rows, columns], which may be the source. */
QWEN3_ASCEND_API int qwen3_ascend_change_rows(int path, int dtype, const void *source, int64_t rows,
                                              int64_t columns, int64_t row_stride,
                                              const struct step *steps, int64_t count, float *out)
{
    struct rows changed = {{source, rows, columns, row_stride, dtype}, steps, count, out};
    const struct path_table *table = find_path(path);
    if (table == NULL) return STATUS_NO_PATH;
    if (!rows_are_valid(changed)) return STATUS_BAD_ARGUMENT;
    float_mode saved = enter_ieee_mode();
    table->change(changed, out);
    leave_ieee_mode(saved);
    return STATUS_OK;
}

/* Blocks of `size` neighbours in every column, times their signs, rotated -> float32 [rows,
 * columns], which may be the source; `lanes` columns at a time, in a scratch of [size][lanes]. */
QWEN3_ASCEND_API int qwen3_ascend_rotate_outputs(int path, int dtype, const void *source,
                                                 int64_t rows, int64_t columns, int64_t row_stride,
                                                 const float *signs, const float *base,
                                                 int64_t size, int64_t order, float factor,
                                                 int64_t lanes, float *scratch, float *out)
{
    struct matrix matrix = {source, rows, columns, row_stride, dtype};
    struct rotation rotation = {base, size, order, factor};
    const struct path_table *table = find_path(path);
    if (table == NULL) return STATUS_NO_PATH;
    if (!matrix_is_valid(matrix) || dtype == DTYPE_BYTE || !rotation_is_valid(rotation, rows))
        return STATUS_BAD_ARGUMENT;
    if (lanes < ROTATED_COLUMNS || lanes % ROTATED_COLUMNS != 0) return STATUS_BAD_ARGUMENT;
    float_mode saved = enter_ieee_mode();
    table->rotate_outputs(matrix, signs, rotation, lanes, scratch, out);
    leave_ieee_mode(saved);
    return STATUS_OK;
}

/* Sums of the squares of every row, or of every column. */
QWEN3_ASCEND_API int qwen3_ascend_square_sums(int path, int dtype, const void *source, int64_t rows,
                                              int64_t columns, int64_t row_stride, int by_column,
                                              double *sums)
{
    struct matrix matrix = {source, rows, columns, row_stride, dtype};
    const struct path_table *table = find_path(path);
    if (table == NULL) return STATUS_NO_PATH;
    if (!matrix_is_valid(matrix) || dtype == DTYPE_BYTE) return STATUS_BAD_ARGUMENT;
    float_mode saved = enter_ieee_mode();
    table->square_sums(matrix, by_column, sums);
    leave_ieee_mode(saved);
    return STATUS_OK;
}

/* Per row the signal, and the noise of what bfloat16 [rows, columns] has made of it. */
QWEN3_ASCEND_API int qwen3_ascend_error_bf16(int path, int dtype, const void *source, int64_t rows,
                                             int64_t columns, int64_t row_stride,
                                             const uint16_t *stored, double *signal, double *noise)
{
    struct matrix matrix = {source, rows, columns, row_stride, dtype};
    const struct path_table *table = find_path(path);
    if (table == NULL) return STATUS_NO_PATH;
    if (!matrix_is_valid(matrix) || dtype == DTYPE_BYTE) return STATUS_BAD_ARGUMENT;
    float_mode saved = enter_ieee_mode();
    struct error_sums sums = {signal, noise};
    table->rounding_errors(matrix, stored, sums);
    leave_ieee_mode(saved);
    return STATUS_OK;
}

/* Rows, after `count` steps in a scratch of [4][columns], -> bfloat16 [rows, columns], signal and noise.
 * position gets the [row, column] of the first NaN or Inf of the bfloat16. */
QWEN3_ASCEND_API int qwen3_ascend_round_rows(int path, int dtype, const void *source, int64_t rows,
                                             int64_t columns, int64_t row_stride,
                                             const struct step *steps, int64_t count,
                                             float *scratch, uint16_t *stored, double *signal,
                                             double *noise, int64_t *position)
{
    struct rows changed = {{source, rows, columns, row_stride, dtype}, steps, count, scratch};
    const struct path_table *table = find_path(path);
    if (table == NULL) return STATUS_NO_PATH;
    if (scratch == NULL || !rows_are_valid(changed)) return STATUS_BAD_ARGUMENT;
    float_mode saved = enter_ieee_mode();
    struct error_sums sums = {signal, noise};
    int status = table->round_rows(changed, stored, sums, position);
    leave_ieee_mode(saved);
    return status;
}

/* The scale of each group of `width` columns, [rows, groups]: of the ratios to the widest one that
 * which leaves the least error, each square counting as much as its column's importance. */
QWEN3_ASCEND_API int qwen3_ascend_search_scales(int path, const float *source, int64_t rows,
                                                int64_t columns, int64_t row_stride,
                                                const float *importance, int64_t width, int least,
                                                int most, const float *ratios, int64_t count,
                                                float *scales)
{
    struct matrix matrix = {source, rows, columns, row_stride, DTYPE_FP32};
    struct search search = {{least, most}, width, importance, ratios, count};
    const struct path_table *table = find_path(path);
    if (table == NULL) return STATUS_NO_PATH;
    if (!matrix_is_valid(matrix) || width < 1 || most < 1) return STATUS_BAD_ARGUMENT;
    float_mode saved = enter_ieee_mode();
    int status = table->search(matrix, search, scales);
    leave_ieee_mode(saved);
    return status;
}

/* Codes [rows, columns] of a block of at most 128 columns, one after the other: what a column is
 * off, divided by the factor's diagonal, is its error; the columns behind it lose the error times
 * their place in its row of the factor. */
QWEN3_ASCEND_API int qwen3_ascend_compensate_block(int path, const float *weights, int64_t rows,
                                                   int64_t columns, int64_t weights_stride,
                                                   const float *scales, const float *factor,
                                                   int64_t factor_stride, int least, int most,
                                                   int8_t *codes, float *errors)
{
    struct block block = {{least, most}, rows, columns, weights, weights_stride, scales, factor,
                          factor_stride};
    const struct path_table *table = find_path(path);
    if (table == NULL) return STATUS_NO_PATH;
    if (rows < 0 || columns < 0 || columns > BLOCK_COLUMNS) return STATUS_BAD_ARGUMENT;
    float_mode saved = enter_ieee_mode();
    int status = table->compensate(block, codes, errors);
    leave_ieee_mode(saved);
    return status;
}
