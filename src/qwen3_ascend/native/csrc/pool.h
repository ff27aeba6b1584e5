/* Threads that share the work of one call. */
#ifndef QWEN3_ASCEND_POOL_H
#define QWEN3_ASCEND_POOL_H

#include <stdint.h>

/* Does part `part` of some work, of which `context` tells the rest. */
typedef void (*work_function)(const void *context, int64_t part);

/* Does the parts 0 .. parts - 1, each once, in any order, on up to `threads` threads, of which the
 * caller is one; returns when all are done, and what they wrote is seen by the caller. */
void share_work(work_function work, const void *context, int64_t parts, int threads);

/* Which of a job's threads does the part that calls: 0 .. threads - 1, each once at a time. */
int share_index(void);

#endif
