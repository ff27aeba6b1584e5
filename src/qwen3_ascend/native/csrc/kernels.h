/* The int8 and FRACTAL_NZ kernels of qwen3-ascend: what every file in this folder agrees on.
 *
 * A kernel is stateless: it allocates nothing, keeps nothing, and writes only where its arguments
 * point, so threads may run it on disjoint row blocks at once. Every processor path returns the
 * same bytes; path.inc.h says why.
 */
#ifndef QWEN3_ASCEND_KERNELS_H
#define QWEN3_ASCEND_KERNELS_H

#include <stdint.h>

#if defined(__GNUC__)
#define QWEN3_ASCEND_API __attribute__((visibility("default")))
#else
#error "the kernels use GCC vector types: build them with GCC or Clang"
#endif

/* Of loops over an array that has to stay in registers. */
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* Raised when a signature below changes; the Python side refuses any other number. */
#define QWEN3_ASCEND_ABI 13

enum status { STATUS_OK = 0, STATUS_NOT_FINITE = 1, STATUS_BAD_ARGUMENT = 2, STATUS_NO_PATH = 3 };
enum dtype { DTYPE_BYTE = 0, DTYPE_BF16 = 1, DTYPE_FP16 = 2, DTYPE_FP32 = 3 };
enum path { PATH_BASELINE = 0, PATH_AVX2 = 1, PATH_AVX512 = 2, PATH_COUNT = 3 };
enum pack_flags { PACK_CHECK_FINITE = 1, PACK_TO_BF16 = 2 };

/* FRACTAL_NZ in bytes: 32-byte wide strips, rows in groups of 16. */
enum { RUN_BYTES = 32, ROW_GROUP = 16, STRIP_ROWS = 32 };

/* A row-major matrix in memory; the strides count elements. */
struct matrix {
    const void *data;
    int64_t rows, columns, row_stride;
    int dtype;
};

/* Per row: sum of squares of the weights, and of the weights minus what the codes restore. */
struct error_sums {
    double *signal, *noise;
};

/* H x * factor in blocks of `size`: H = base of `order` (x) Sylvester's matrix. */
struct rotation {
    const float *base;
    int64_t size, order;
    float factor;
};

/* What a row becomes: x, times the factor of the row, times those of the columns, rotated. Either
 * factors may be NULL, but those of the columns only if the size is 1, which is no rotation. */
struct step {
    const float *outputs, *inputs; /* [rows], [columns] */
    struct rotation rotation;
};

/* Rows that are changed by `count` steps as they are read, in a scratch for as many of them as are
 * worked on together. */
struct rows {
    struct matrix matrix;
    const struct step *steps;
    int64_t count;
    float *scratch;
};

/* Columns that are rotated together are a multiple of this; the largest order. */
enum { ROTATED_COLUMNS = 16, MOST_ORDER = 512 };

/* The integers of a scheme. */
struct integers {
    int least, most;
};

/* A search of scales: what share of the widest scale to try. */
struct search {
    struct integers integers;
    int64_t width; /* columns that share a scale */
    const float *importance; /* of each column */
    const float *ratios;
    int64_t count;
};

/* A block of columns whose errors are made up for by the columns behind them. */
struct block {
    struct integers integers;
    int64_t rows, columns;
    const float *weights; /* [rows, columns] */
    int64_t weights_stride;
    const float *scales; /* [rows, columns] */
    const float *factor; /* [columns, columns], upper triangular */
    int64_t factor_stride;
};

enum { BLOCK_COLUMNS = 128 };

struct path_table {
    int (*find)(struct matrix source, int64_t *position);
    int (*quantize)(struct rows source, uint8_t *strips, float *scales, struct error_sums sums,
                    int64_t *position);
    int (*measure)(struct matrix source, const uint8_t *strips, const float *scales,
                   struct error_sums sums);
    int (*pack)(struct matrix source, int flags, uint8_t *strips, int64_t strip_stride,
                int64_t padded_rows, int64_t *position);
    int (*unpack)(const uint8_t *strips, int64_t strip_stride, int64_t rows, int64_t row_bytes,
                  uint8_t *destination, int64_t row_stride);
    void (*change)(struct rows source, float *out);
    void (*rotate_outputs)(struct matrix source, const float *signs, struct rotation rotation,
                           int64_t lanes, float *scratch, float *out);
    void (*square_sums)(struct matrix source, int by_column, double *sums);
    void (*rounding_errors)(struct matrix source, const uint16_t *stored, struct error_sums sums);
    int (*round_rows)(struct rows source, uint16_t *stored, struct error_sums sums,
                      int64_t *position);
    int (*search)(struct matrix source, struct search search, float *scales);
    int (*compensate)(struct block block, int8_t *codes, float *errors);
};

extern const struct path_table path_table_baseline;
extern const struct path_table path_table_avx2;
extern const struct path_table path_table_avx512;

#endif
