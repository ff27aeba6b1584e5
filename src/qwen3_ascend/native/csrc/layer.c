/* The exported operations of a layer: checks, and shares rows or heads among threads.
 *
 * `scratch` is the caller's: floats on a border of 64 bytes, as many as qwen3_ascend_row_scratch or
 * qwen3_ascend_attention_scratch says for each thread.
 */
#include "floats.h"
#include "layer.h"
#include "pool.h"

#include <stddef.h>

static const struct layer_table *find_layer(int path)
{
    if (!has_float_path(path)) return NULL;
#if defined(__x86_64__)
    if (path == FLOAT_AVX2) return &layer_avx2;
    if (path == FLOAT_AVX512) return &layer_avx512;
#endif
    return &layer_baseline;
}

/* Rows of a part: fewer are not worth a thread's joining. */
enum { ROWS_TOGETHER = 4 };

/* One of the operations on rows; the others' fields are not looked at. */
struct rows_job {
    const struct layer_table *table;
    const struct add_norm *add_norm;
    const struct norm_rotate *norm_rotate;
    const struct gated *gated;
    const struct feed *feed;
    const void *values; /* of `feed` */
    int64_t rows, columns;
    float *scratch;
};

static void do_row(const struct rows_job *job, int64_t row, float *scratch)
{
    if (job->add_norm) job->table->add_norm(job->add_norm, row, scratch);
    if (job->norm_rotate) job->table->norm_rotate(job->norm_rotate, row, scratch);
    if (job->gated) job->table->gated(job->gated, row, scratch);
    if (job->feed) job->table->feed(job->feed, job->values, job->columns, row, scratch);
}

static void do_rows(const void *context, int64_t part)
{
    const struct rows_job *job = context;
    float *scratch = job->scratch + share_index() * row_scratch(job->columns);
    int64_t first = part * ROWS_TOGETHER, last = first + ROWS_TOGETHER;
    for (int64_t row = first; row < last && row < job->rows; row++) do_row(job, row, scratch);
}

static int share_rows(struct rows_job job, int threads)
{
    share_work(do_rows, &job, (job.rows + ROWS_TOGETHER - 1) / ROWS_TOGETHER, threads);
    return STATUS_OK;
}

/* Floats of scratch for an operation on rows of `columns` by so many threads. */
QWEN3_ASCEND_API int64_t qwen3_ascend_row_scratch(int threads, int64_t columns)
{
    return threads * row_scratch(columns);
}

/* See struct add_norm. */
QWEN3_ASCEND_API int qwen3_ascend_add_norm(int path, int threads, const struct add_norm *job,
                                           float *scratch)
{
    const struct layer_table *table = find_layer(path);
    if (table == NULL) return STATUS_NO_PATH;
    struct rows_job rows = {.table = table, .add_norm = job, .rows = job->rows,
                            .columns = job->columns, .scratch = scratch};
    return share_rows(rows, threads);
}

/* See struct norm_rotate; the rows of its scratch have `head_dim` columns. */
QWEN3_ASCEND_API int qwen3_ascend_norm_rotate(int path, int threads, const struct norm_rotate *job,
                                              float *scratch)
{
    const struct layer_table *table = find_layer(path);
    if (table == NULL) return STATUS_NO_PATH;
    struct rows_job rows = {.table = table, .norm_rotate = job, .rows = job->rows,
                            .columns = job->cache.head_dim, .scratch = scratch};
    return share_rows(rows, threads);
}

/* See struct gated. */
QWEN3_ASCEND_API int qwen3_ascend_gated(int path, int threads, const struct gated *job,
                                        float *scratch)
{
    const struct layer_table *table = find_layer(path);
    if (table == NULL) return STATUS_NO_PATH;
    struct rows_job rows = {.table = table, .gated = job, .rows = job->rows,
                            .columns = job->columns, .scratch = scratch};
    return share_rows(rows, threads);
}

/* Feeds values [rows, columns] of the feed's type. */
QWEN3_ASCEND_API int qwen3_ascend_feed(int path, int threads, const struct feed *feed,
                                       const void *values, int64_t rows, int64_t columns,
                                       float *scratch)
{
    const struct layer_table *table = find_layer(path);
    if (table == NULL) return STATUS_NO_PATH;
    struct rows_job job = {.table = table, .feed = feed, .values = values, .rows = rows,
                           .columns = columns, .scratch = scratch};
    return share_rows(job, threads);
}

/* ---- widening ---- */

/* Values of a part: a few microseconds. */
enum { WIDENED_TOGETHER = 1 << 14 };

struct widen_job {
    const struct layer_table *table;
    const uint16_t *values;
    int64_t count;
    float *out;
};

static void widen_part(const void *context, int64_t part)
{
    const struct widen_job *job = context;
    int64_t first = part * WIDENED_TOGETHER, left = job->count - first;
    int64_t count = left < WIDENED_TOGETHER ? left : WIDENED_TOGETHER;
    job->table->widen(job->values + first, DTYPE_BF16, count, count, job->out + first);
}

/* `count` values of bfloat16 as float32. */
QWEN3_ASCEND_API int qwen3_ascend_widen(int path, int threads, const uint16_t *values,
                                        int64_t count, float *out)
{
    const struct layer_table *table = find_layer(path);
    if (table == NULL) return STATUS_NO_PATH;
    struct widen_job job = {table, values, count, out};
    share_work(widen_part, &job, (count + WIDENED_TOGETHER - 1) / WIDENED_TOGETHER, threads);
    return STATUS_OK;
}

/* ---- the largest value of each row ---- */

struct largest_job {
    const struct layer_table *table;
    const float *values;
    int64_t columns, *places;
};

static void find_largest(const void *context, int64_t row)
{
    const struct largest_job *job = context;
    job->places[row] = job->table->largest_place(job->values + row * job->columns, job->columns);
}

/* Where the largest of each row's `columns` values is, fewer than 2^31. */
QWEN3_ASCEND_API int qwen3_ascend_largest_places(int path, int threads, const float *values,
                                                 int64_t rows, int64_t columns, int64_t *places)
{
    const struct layer_table *table = find_layer(path);
    if (table == NULL) return STATUS_NO_PATH;
    struct largest_job job = {table, values, columns, places};
    share_work(find_largest, &job, rows, threads);
    return STATUS_OK;
}

/* ---- attention ---- */

struct attention_job {
    const struct layer_table *table;
    const struct attention *attention;
    int64_t tokens; /* of a part, at most */
    int64_t scratch_floats;
    float *scratch;
};

static int64_t parts_of(const struct attention_job *job, int64_t request)
{
    int64_t rows = job->attention->starts[request + 1] - job->attention->starts[request];
    int64_t pieces = (rows + job->tokens - 1) / job->tokens;
    return pieces * splits_of(job->attention, request) * job->attention->cache.kv_heads;
}

/* Parts that share keys follow each other, to find them in the cache; of these, the last tokens
 * come first: they see the most. */
static void attend_part(const void *context, int64_t part)
{
    const struct attention_job *job = context;
    const struct attention *attention = job->attention;
    int64_t request = 0;
    for (; part >= parts_of(job, request); request++) part -= parts_of(job, request);
    int64_t rows = attention->starts[request + 1] - attention->starts[request];
    int64_t turns = parts_of(job, request) / attention->cache.kv_heads;
    float *scratch = job->scratch + share_index() * job->scratch_floats;
    if (splits_of(attention, request) > 1) {
        job->table->attend_split(attention, request, part / turns, part % turns, scratch);
        return;
    }
    int64_t first = (turns - 1 - part % turns) * job->tokens;
    int64_t count = rows - first < job->tokens ? rows - first : job->tokens;
    job->table->attend(attention, request, part / turns, first, count, scratch);
}

static void join_part(const void *context, int64_t part)
{
    const struct attention_job *job = context;
    int64_t request = part / job->attention->cache.kv_heads;
    if (splits_of(job->attention, request) > 1)
        job->table->join_splits(job->attention, request, part % job->attention->cache.kv_heads,
                                job->scratch + share_index() * job->scratch_floats);
}

static int64_t tokens_together(const struct layer_table *table, const struct attention *job)
{
    int64_t group = job->heads / job->cache.kv_heads, most = 1;
    for (int64_t request = 0; request < job->requests; request++) {
        int64_t rows = job->starts[request + 1] - job->starts[request];
        most = rows > most ? rows : most;
    }
    int64_t tokens = table->attention_queries / group;
    return tokens < 1 ? 1 : tokens < most ? tokens : most;
}

/* Floats of scratch for attention by so many threads, whatever the step. */
QWEN3_ASCEND_API int64_t qwen3_ascend_attention_scratch(int path, int threads, int64_t group,
                                                        int64_t head_dim)
{
    const struct layer_table *table = find_layer(path);
    if (table == NULL) return 0;
    int64_t queries = table->attention_queries > group ? table->attention_queries : group;
    return threads * table->attention_scratch(queries, head_dim);
}

/* See struct attention; then feeds [rows, heads * head_dim] if that is more than the rounding. */
QWEN3_ASCEND_API int qwen3_ascend_attention(int path, int threads, const struct attention *job,
                                            const struct feed *feed, float *scratch,
                                            float *row_scratch)
{
    const struct layer_table *table = find_layer(path);
    if (table == NULL) return STATUS_NO_PATH;
    struct attention_job parts = {table, job, tokens_together(table, job), 0, scratch};
    int64_t group = job->heads / job->cache.kv_heads, total = 0;
    parts.scratch_floats = table->attention_scratch(parts.tokens * group, job->cache.head_dim);
    for (int64_t request = 0; request < job->requests; request++)
        total += parts_of(&parts, request);
    share_work(attend_part, &parts, total, threads);
    if (job->partials) share_work(join_part, &parts, job->requests * job->cache.kv_heads, threads);
    if (feed->form == FEED_FLOAT) return STATUS_OK;
    struct rows_job rows = {.table = table, .feed = feed, .values = job->out,
                            .rows = job->starts[job->requests],
                            .columns = job->heads * job->cache.head_dim, .scratch = row_scratch};
    return share_rows(rows, threads);
}
