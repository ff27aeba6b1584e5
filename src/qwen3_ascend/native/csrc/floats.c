/* The exported products of floats: check, pack the activations, share the outputs. */
#include "floats.h"
#include "pool.h"
#include "rows.h"

#include <stddef.h>
#include <string.h>

int has_float_path(int path)
{
#if defined(__x86_64__)
    int fused = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int wide = fused && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (path == FLOAT_AVX2) return fused;
    if (path == FLOAT_AVX512) return wide;
    if (path == FLOAT_AVX512_BF16) return wide && __builtin_cpu_supports("avx512bf16");
#endif
    return path == FLOAT_BASELINE;
}

static const struct float_path_table *find_path(int path)
{
    if (!has_float_path(path)) return NULL;
#if defined(__x86_64__)
    if (path == FLOAT_AVX2) return &floats_avx2;
    if (path == FLOAT_AVX512) return &floats_avx512;
    if (path == FLOAT_AVX512_BF16) return &floats_avx512_bf16;
#endif
    return &floats_baseline;
}

struct job {
    struct float_product product;
    const struct float_path_table *path;
    const void *rows;   /* of activations */
    int64_t row_stride; /* in elements */
    int row_dtype;      /* DTYPE_BYTE: int8 codes, of which each row is two */
    float *packed;
    multiply_outputs multiply;
    int64_t parts;
};

/* The high half of a code is one row, the low one the next; see struct grouped. */
static float half_of(const struct job *job, int64_t row, int64_t column)
{
    int code = ((const int8_t *)job->rows)[row / 2 * job->row_stride + column];
    return (float)(row % 2 ? (code & 15) - 8 : (code + 128) / 16 - 8);
}

static float element(const struct job *job, int64_t row, int64_t column)
{
    if (job->row_dtype == DTYPE_BYTE) return half_of(job, row, column);
    int64_t place = row * job->row_stride + column;
    if (job->row_dtype == DTYPE_FP32) return ((const float *)job->rows)[place];
    uint32_t bits = (uint32_t)((const uint16_t *)job->rows)[place] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint16_t bf16_half_of(const struct job *job, int64_t row, int64_t column)
{
    float value = half_of(job, row, column);
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(bits >> 16); /* whole numbers of four bits have no more */
}

static int64_t padded_inputs(const struct job *job)
{
    return (job->product.inputs + RUN_INPUTS - 1) / RUN_INPUTS * RUN_INPUTS;
}

/* [runs][rows][8 even inputs, 8 odd inputs] */
static void pack_few(const struct job *job)
{
    const struct float_product *product = &job->product;
    float *to = job->packed;
    for (int64_t start = 0; start < product->inputs; start += RUN_INPUTS)
        for (int64_t row = 0; row < product->rows; row++)
            for (int odd = 0; odd < 2; odd++)
                for (int pair = 0; pair < RUN_INPUTS / 2; pair++) {
                    int64_t column = start + 2 * pair + odd;
                    *to++ = column < product->inputs ? element(job, row, column) : 0.0f;
                }
}

/* A row of a block, [padded inputs][rows of the block]; zeros behind the last row. */
static void pack_floats(const struct job *job, int64_t row, int64_t block, float *to)
{
    int64_t known = row < job->product.rows ? job->product.inputs : 0;
    for (int64_t column = 0; column < known; column++)
        to[column * block] = element(job, row, column);
    for (int64_t column = known; column < padded_inputs(job); column++) to[column * block] = 0.0f;
}

/* The same of pairs, [padded inputs / 2][rows of the block]. */
static void pack_pairs(const struct job *job, int64_t row, int64_t block, float *to)
{
    int64_t known = row < job->product.rows ? job->product.inputs : 0;
    const uint16_t *from = (const uint16_t *)job->rows + row * job->row_stride;
    int codes = job->row_dtype == DTYPE_BYTE;
    for (int64_t column = 0; column < padded_inputs(job); column += 2, to += block) {
        uint16_t pair[2] = {0, 0};
        if (column < known) pair[0] = codes ? bf16_half_of(job, row, column) : from[column];
        if (column + 1 < known)
            pair[1] = codes ? bf16_half_of(job, row, column + 1) : from[column + 1];
        memcpy(to, pair, sizeof *to);
    }
}

/* Vectors of pairs, [vectors][rows][two runs]: of strips each run twice, of plain rows two of them. */
static void pack_few_pairs(const struct job *job)
{
    const struct float_product *product = &job->product;
    int64_t run = RUN_INPUTS * sizeof(uint16_t), inputs = product->inputs;
    int twice = product->run_stride != RUN_INPUTS;
    char *to = (char *)job->packed;
    memset(to, 0, (size_t)(padded_inputs(job) * product->rows * (twice ? 4 : 2)));
    for (int64_t start = 0; start < inputs; start += RUN_INPUTS)
        for (int64_t row = 0; row < product->rows; row++) {
            const uint16_t *from = (const uint16_t *)job->rows + row * job->row_stride + start;
            int64_t left = (inputs - start) * (int64_t)sizeof *from, bytes = left < run ? left : run;
            int64_t vector = twice ? start / RUN_INPUTS : start / RUN_INPUTS / 2;
            char *place = to + (vector * product->rows + row) * 2 * run;
            if (!twice && start / RUN_INPUTS % 2) place += run;
            memcpy(place, from, (size_t)bytes);
            if (twice) memcpy(place + run, from, (size_t)bytes);
        }
}

/* Rows that are packed by one part: a multiple of every block but the last. */
enum { PACKED_TOGETHER = MOST_FLOAT_BLOCK };

static void pack_part(const void *context, int64_t part)
{
    const struct job *job = context;
    int pairs = job->multiply == job->path->pairs || job->multiply == job->path->code_pairs;
    int64_t words = padded_inputs(job) / (pairs ? 2 : 1);
    int64_t row = part * PACKED_TOGETHER, last = row + PACKED_TOGETHER;
    while (row < last && row < job->product.rows) {
        int64_t block = block_of(job->product.rows - row, job->path->block_rows);
        for (int64_t i = 0; i < block; i++)
            (pairs ? pack_pairs : pack_floats)(job, row + i, block,
                                               job->packed + row * words + i);
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
    job->multiply(product, job->packed, first, last);
}

/* Whether few_pairs reads nothing behind a row: two runs at a time, or those of strips. */
static int has_whole_vectors(const struct job *job)
{
    const struct float_product *product = &job->product;
    return product->run_stride != RUN_INPUTS ? product->output_stride == RUN_INPUTS
                                             : product->inputs % (2 * RUN_INPUTS) == 0;
}

/* Rows of pairs that are few: what more than some plain rows are multiplied with, whole, leaves no
 * room in the nearest cache; of strips only a part is needed at a time. */
static int64_t few_pair_rows(const struct job *job)
{
    return job->product.run_stride == RUN_INPUTS ? FEW_ROWS : FEW_PAIR_ROWS;
}

static multiply_outputs choose(const struct job *job)
{
    const struct float_path_table *path = job->path;
    int pairs = path->pairs != NULL && job->row_dtype != DTYPE_FP32;
    if (job->product.weights && job->product.rows <= few_pair_rows(job) && path->few_pairs &&
        job->row_dtype == DTYPE_BF16 && has_whole_vectors(job))
        return path->few_pairs;
    if (job->product.weights && job->product.rows <= FEW_ROWS) return path->few;
    if (job->product.weights || job->product.rows > FEW_CODE_ROWS)
        return pairs ? path->pairs : path->many;
    return pairs && !job->product.grouped ? path->code_pairs : path->few_codes;
}

/* More than one, so that a thread that is held up holds up little. */
enum { PARTS_OF_A_THREAD = 8 };

/* Outputs that a part has of strips, if there are enough for all threads: some pages of each strip,
 * which are read as they lie. */
enum { OUTPUTS_OF_STRIPS = 512 };

static int64_t parts_of(const struct job *job, int threads)
{
    int few = job->multiply == job->path->few || job->multiply == job->path->few_pairs;
    int64_t units = (job->product.outputs + job->path->unit - 1) / job->path->unit;
    int64_t parts = threads * PARTS_OF_A_THREAD;
    if (few && job->product.run_stride != RUN_INPUTS) {
        int64_t most = job->product.outputs / OUTPUTS_OF_STRIPS;
        parts = most < threads ? threads : most < parts ? most : parts;
    }
    return parts < units ? parts : units;
}

static int multiply(int path, int threads, struct job job)
{
    job.path = find_path(path);
    if (job.path == NULL) return STATUS_NO_PATH;
    if (job.product.rows < 0 || job.product.inputs < 1 || job.product.outputs < 1)
        return STATUS_BAD_ARGUMENT;
    if (job.product.rows == 0) return STATUS_OK;
    job.multiply = choose(&job);
    if (job.multiply == job.path->few)
        pack_few(&job);
    else if (job.multiply == job.path->few_pairs)
        pack_few_pairs(&job);
    else
        share_work(pack_part, &job, (job.product.rows + PACKED_TOGETHER - 1) / PACKED_TOGETHER,
                   threads);
    job.parts = parts_of(&job, threads);
    share_work(multiply_part, &job, job.parts, threads);
    return STATUS_OK;
}

/* 1 when this processor has the instructions of a float path, 0 when not. */
QWEN3_ASCEND_API int qwen3_ascend_has_float_path(int path) { return has_float_path(path); }

/* [count, inputs] rows of `row_dtype` times bfloat16 weights; see struct float_product. `scratch`
 * takes 4 * (count + MOST_FLOAT_BLOCK) * (inputs padded to 16) bytes, on a border of 64. */
QWEN3_ASCEND_API int qwen3_ascend_float_product(int path, int threads, const uint16_t *weights,
                                                int64_t outputs, int64_t inputs,
                                                int64_t output_stride, int64_t run_stride,
                                                int row_dtype, const void *rows, int64_t count,
                                                int64_t row_stride, float *scratch,
                                                const float *bias, void *out, int out_dtype)
{
    struct float_product product = {.weights = weights, .output_stride = output_stride,
                                    .run_stride = run_stride, .rows = count, .inputs = inputs,
                                    .outputs = outputs, .bias = bias, .out = out,
                                    .out_dtype = out_dtype};
    struct job job = {product, NULL, rows, row_stride, row_dtype, scratch, NULL, 0};
    return multiply(path, threads, job);
}

/* The same with codes; see struct stored_codes, of which `rounded` follows from `row_dtype`. */
QWEN3_ASCEND_API int qwen3_ascend_code_product(int path, int threads,
                                               const struct stored_codes *codes, int64_t outputs,
                                               int64_t inputs, int row_dtype, const void *rows,
                                               int64_t count, int64_t row_stride, float *scratch,
                                               const float *bias, void *out, int out_dtype)
{
    struct float_product product = {.codes = *codes, .rows = count, .inputs = inputs,
                                    .outputs = outputs, .bias = bias, .out = out,
                                    .out_dtype = out_dtype};
    product.codes.rounded = row_dtype == DTYPE_BF16 && codes->scales != NULL;
    struct job job = {product, NULL, rows, row_stride, row_dtype, scratch, NULL, 0};
    return multiply(path, threads, job);
}

/* int8 rows times groups of codes of int4; see struct grouped. `scratch` is that of twice as many
 * rows. */
QWEN3_ASCEND_API int qwen3_ascend_group_product(int path, int threads,
                                                const struct stored_codes *codes, int64_t outputs,
                                                int64_t inputs, const struct grouped *grouped,
                                                const int8_t *rows, int64_t count,
                                                int64_t row_stride, float *scratch,
                                                const float *bias, void *out, int out_dtype)
{
    struct float_product product = {.codes = *codes, .grouped = grouped, .rows = 2 * count,
                                    .inputs = inputs, .outputs = outputs, .bias = bias,
                                    .out = out, .out_dtype = out_dtype};
    struct job job = {product, NULL, rows, row_stride, DTYPE_BYTE, scratch, NULL, 0};
    if (codes->bits != 4 || codes->scales != NULL) return STATUS_BAD_ARGUMENT;
    return multiply(path, threads, job);
}
