/* The exported product: checks, packs the activations, and shares the strips among threads. */
#include "pool.h"
#include "products.h"
#include "rows.h"

#include <stddef.h>
#include <string.h>

#if defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
static int has_dot_products(void) { return getauxval(AT_HWCAP) >> 20 & 1; } /* HWCAP_ASIMDDP */
#else
static int has_dot_products(void) { return 1; } /* every aarch64 Mac */
#endif
#elif defined(__x86_64__)
#include <cpuid.h>

/* GCC 12 knows no name for it. */
static int has_avx_vnni(void)
{
    unsigned a, b, c, d;
    if (!__builtin_cpu_supports("avx2") || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return 0;
    return a >> 4 & 1;
}
#endif

static const struct product_path_table *find_path(int path)
{
    if (path == PRODUCT_PLAIN) return &products_plain;
#if defined(__aarch64__)
    if (path == PRODUCT_DOTPROD && has_dot_products()) return &products_dotprod;
#elif defined(__x86_64__)
    int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (path == PRODUCT_AVX2 && __builtin_cpu_supports("avx2")) return &products_avx2;
    if (path == PRODUCT_AVX_VNNI && has_avx_vnni()) return &products_avx_vnni;
    if (path == PRODUCT_AVX512_VNNI && wide && __builtin_cpu_supports("avx512vnni"))
        return &products_avx512_vnni;
#endif
    return NULL;
}

struct job {
    struct int8_product product;
    const struct product_path_table *path;
    struct packed_rows packed;
    const int8_t *rows;
    int64_t row_stride, strips, parts;
};

static int32_t sum_of(const int8_t *row, int64_t count)
{
    int32_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += row[i];
    return sum;
}

/* A block of rows, [quads][rows of the block], zero behind the last input and the last row. */
static void pack_block(const struct job *job, int64_t row, int64_t block, int32_t *quads)
{
    int64_t inputs = job->product.inputs, whole = inputs / QUAD;
    int64_t padded = padded_inputs(inputs) / QUAD;
    for (int64_t i = 0; i < block; i++) {
        int64_t present = row + i < job->product.rows ? inputs : 0;
        const int8_t *from = job->rows + (row + i) * job->row_stride;
        int64_t quad = 0;
        for (; present && quad < whole; quad++)
            memcpy(quads + quad * block + i, from + quad * QUAD, QUAD);
        for (; quad < padded; quad++) {
            int64_t left = present - quad * QUAD;
            int32_t tail = 0;
            if (left > 0) memcpy(&tail, from + quad * QUAD, (size_t)(left < QUAD ? left : QUAD));
            quads[quad * block + i] = tail;
        }
    }
}

enum { PACKED_TOGETHER = 4 * MOST_BLOCK_ROWS };

/* Blocks of the largest size begin at its multiples, so parts may be packed on their own. */
static void pack_part(const void *context, int64_t part)
{
    const struct job *job = context;
    int64_t most = job->path->block_rows, padded = padded_inputs(job->product.inputs) / QUAD;
    int64_t unit = PACKED_TOGETHER / most * most;
    int64_t row = part * unit, last = row + unit < job->product.rows ? row + unit : job->product.rows;
    while (row < last) {
        int64_t block = block_of(job->product.rows - row, most);
        pack_block(job, row, block, (int32_t *)job->packed.quads + row * padded);
        for (int64_t i = row; i < row + block && i < job->product.rows; i++) {
            int32_t sum = job->path->flipped
                              ? sum_of(job->rows + i * job->row_stride, job->product.inputs)
                              : 0;
            ((int32_t *)job->packed.corrections)[i] = -128 * sum;
        }
        row += block;
    }
}

static void multiply_part(const void *context, int64_t part)
{
    const struct job *job = context;
    job->path->strips(&job->product, job->packed, job->strips * part / job->parts,
                      job->strips * (part + 1) / job->parts);
}

/* More than one, so that a thread that is held up holds up little. */
enum { PARTS_OF_A_THREAD = 8 };

/* 1 when this processor has the instructions of a product path, 0 when not. */
QWEN3_ASCEND_API int qwen3_ascend_has_instructions(int path) { return find_path(path) != NULL; }

/* [count, inputs] int8 rows times a weight in FRACTAL_NZ; see struct int8_product. `scratch` takes
 * (count + MOST_BLOCK_ROWS) * (inputs padded to 16, and 4) bytes, on a border of four. */
QWEN3_ASCEND_API int qwen3_ascend_int8_product(int path, int threads, const int8_t *strips,
                                               int64_t outputs, int64_t inputs, const int8_t *rows,
                                               int64_t count, int64_t row_stride, void *scratch,
                                               const int32_t *added, const float *row_scales,
                                               const float *output_scales, const float *bias,
                                               void *out, int out_dtype)
{
    const struct product_path_table *table = find_path(path);
    if (table == NULL) return STATUS_NO_PATH;
    if (count < 0 || inputs < 0 || outputs < 0) return STATUS_BAD_ARGUMENT;
    int64_t quad_bytes = (count + MOST_BLOCK_ROWS) * padded_inputs(inputs);
    struct packed_rows packed = {scratch, (int32_t *)((char *)scratch + quad_bytes)};
    struct job job = {
        {strips, count, inputs, outputs, added, row_scales, output_scales, bias, out, out_dtype},
        table, packed, rows, row_stride, (outputs + STRIP_ROWS - 1) / STRIP_ROWS, 0};
    int64_t unit = PACKED_TOGETHER / table->block_rows * table->block_rows;
    share_work(pack_part, &job, (count + unit - 1) / unit, threads);
    job.parts = threads * PARTS_OF_A_THREAD < job.strips ? threads * PARTS_OF_A_THREAD : job.strips;
    share_work(multiply_part, &job, job.parts, threads);
    return STATUS_OK;
}
