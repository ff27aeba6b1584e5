/* The exported product of floats: checks, packs the activations, shares the outputs. */
#include "floats.h"
#include "pool.h"
#include "rows.h"

#include <stddef.h>
#include <string.h>

int has_float_path(int path)
{
#if defined(__x86_64__)
    int fused = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (path == PATH_AVX2) return fused;
    if (path == PATH_AVX512)
        return fused && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return path == PATH_BASELINE;
}

static const struct float_path_table *find_path(int path)
{
    if (!has_float_path(path)) return NULL;
#if defined(__x86_64__)
    if (path == PATH_AVX2) return &floats_avx2;
    if (path == PATH_AVX512) return &floats_avx512;
#endif
    return &floats_baseline;
}

struct job {
    struct float_product product;
    const struct float_path_table *path;
    const uint8_t *rows; /* of activations */
    int64_t row_stride;  /* in elements */
    int row_dtype;
    float *packed;
    int64_t parts;
};

static float element(const struct job *job, int64_t row, int64_t column)
{
    int64_t place = row * job->row_stride + column;
    if (job->row_dtype == DTYPE_FP32) return ((const float *)job->rows)[place];
    uint32_t bits = (uint32_t)((const uint16_t *)job->rows)[place] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static int64_t runs_of(const struct job *job)
{
    return (job->product.inputs + RUN_INPUTS - 1) / RUN_INPUTS;
}

static float element_or_zero(const struct job *job, int64_t row, int64_t column)
{
    if (row >= job->product.rows || column >= job->product.inputs) return 0.0f;
    return element(job, row, column);
}

/* [runs][rows][8 even inputs, 8 odd inputs] */
static void pack_few(const struct job *job)
{
    float *to = job->packed;
    for (int64_t run = 0; run < runs_of(job); run++)
        for (int64_t row = 0; row < job->product.rows; row++)
            for (int odd = 0; odd < 2; odd++)
                for (int pair = 0; pair < RUN_INPUTS / 2; pair++)
                    *to++ = element_or_zero(job, row, run * RUN_INPUTS + 2 * pair + odd);
}

/* A block, [padded inputs][rows of the block]. */
static void pack_block(const struct job *job, int64_t row, int64_t block)
{
    int64_t padded = runs_of(job) * RUN_INPUTS;
    float *to = job->packed + row * padded;
    for (int64_t i = 0; i < block; i++)
        for (int64_t column = 0; column < padded; column++)
            to[column * block + i] = element_or_zero(job, row + i, column);
}

/* Rows that are packed by one part: a multiple of every block but the last. */
enum { PACKED_TOGETHER = MOST_FLOAT_BLOCK };

static void pack_part(const void *context, int64_t part)
{
    const struct job *job = context;
    int64_t row = part * PACKED_TOGETHER, last = row + PACKED_TOGETHER;
    while (row < last && row < job->product.rows) {
        int64_t block = block_of(job->product.rows - row, job->path->block_rows);
        pack_block(job, row, block);
        row += block;
    }
}

static void multiply_part(const void *context, int64_t part)
{
    const struct job *job = context;
    const struct float_product *product = &job->product;
    int64_t units = (product->outputs + job->path->unit - 1) / job->path->unit;
    int64_t first = units * part / job->parts * job->path->unit;
    int64_t last = units * (part + 1) / job->parts * job->path->unit;
    if (last > product->outputs) last = product->outputs;
    if (product->rows <= FEW_ROWS)
        job->path->few(product, job->packed, first, last);
    else
        job->path->many(product, job->packed, first, last);
}

/* More than one, so that a thread that is held up holds up little. */
enum { PARTS_OF_A_THREAD = 8 };

/* [count, inputs] rows of `row_dtype` times bfloat16 weights; see struct float_product. `scratch`
 * takes 4 * (count + MOST_FLOAT_BLOCK) * (inputs padded to 16) bytes, on a border of 64. */
QWEN3_ASCEND_API int qwen3_ascend_float_product(int path, int threads, const uint16_t *weights,
                                                int64_t outputs, int64_t inputs,
                                                int64_t output_stride, int64_t run_stride,
                                                int row_dtype, const void *rows, int64_t count,
                                                int64_t row_stride, float *scratch,
                                                const float *bias, void *out, int out_dtype)
{
    const struct float_path_table *table = find_path(path);
    if (table == NULL) return STATUS_NO_PATH;
    if (count < 0 || inputs < 1 || outputs < 1) return STATUS_BAD_ARGUMENT;
    struct job job = {{weights, output_stride, run_stride, count, inputs, outputs, bias, out,
                       out_dtype}, table, rows, row_stride, row_dtype, scratch, 0};
    if (count <= FEW_ROWS)
        pack_few(&job);
    else
        share_work(pack_part, &job, (count + PACKED_TOGETHER - 1) / PACKED_TOGETHER, threads);
    int64_t units = (outputs + table->unit - 1) / table->unit;
    job.parts = threads * PARTS_OF_A_THREAD < units ? threads * PARTS_OF_A_THREAD : units;
    share_work(multiply_part, &job, job.parts, threads);
    return STATUS_OK;
}
