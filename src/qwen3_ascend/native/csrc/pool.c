/* One pool of threads for the process.
 *
 * A step of a model calls kernels a hundred times, each for some tens of microseconds, so a worker
 * that has just finished looks for more work for a while (`SPINS`) before it sleeps: waking one up
 * costs as much as a small product. Parts are taken from a counter, so that a thread which the
 * system holds up delays one part and not its whole share.
 *
 * Only one caller uses the pool at a time: another one does its work alone. So does a child process
 * after fork, which has no threads but the one that forked, until it makes its own.
 */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

enum { MOST_THREADS = 256, SPINS = 4000 };

/* What is to be done now. A worker that joins late finds no parts left, so it needs nothing here. */
struct job {
    work_function work;
    const void *context;
    int64_t parts;
};

static struct {
    pthread_mutex_t use;    /* held by the caller that has the pool */
    pthread_mutex_t sleep;  /* of the condition */
    pthread_cond_t wake;
    struct job job;
    atomic_llong next;      /* the part that is to be taken next */
    atomic_int wanted;      /* workers that may still join the job */
    atomic_int busy;        /* workers that have joined it and not left it */
    atomic_uint generation; /* of the job; a sleeping worker waits for another one */
    atomic_int asleep;
    int started;            /* workers that run */
} pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER,
          {NULL, NULL, 0}, 0, 0, 0, 0, 0, 0};

/* The caller of a job is 0, its workers are numbered as they join. */
static _Thread_local int index_in_job;

int share_index(void) { return index_in_job; }

static void take_parts(struct job job)
{
    for (;;) {
        long long part = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed);
        if (part >= job.parts) return;
        job.work(job.context, part);
    }
}

/* Until there is another job than that of `seen`. */
static unsigned wait_for_job(unsigned seen)
{
    for (int spin = 0; spin < SPINS; spin++) {
        unsigned now = atomic_load_explicit(&pool.generation, memory_order_acquire);
        if (now != seen) return now;
        PAUSE();
    }
    pthread_mutex_lock(&pool.sleep);
    atomic_fetch_add(&pool.asleep, 1);
    while (atomic_load(&pool.generation) == seen) pthread_cond_wait(&pool.wake, &pool.sleep);
    atomic_fetch_sub(&pool.asleep, 1);
    pthread_mutex_unlock(&pool.sleep);
    return atomic_load(&pool.generation);
}

static void *run_worker(void *unused)
{
    unsigned seen = 0;
    (void)unused;
    for (;;) {
        seen = wait_for_job(seen);
        atomic_fetch_add(&pool.busy, 1); /* before `wanted`: the caller reads them in that order */
        index_in_job = atomic_fetch_sub(&pool.wanted, 1);
        if (index_in_job > 0) take_parts(pool.job);
        atomic_fetch_sub(&pool.busy, 1);
    }
    return NULL;
}

static void forget_threads(void)
{
    pthread_mutex_init(&pool.use, NULL);
    pthread_mutex_init(&pool.sleep, NULL);
    pthread_cond_init(&pool.wake, NULL);
    atomic_store(&pool.wanted, 0);
    atomic_store(&pool.busy, 0);
    atomic_store(&pool.asleep, 0);
    pool.started = 0;
}

/* As many workers as can be had, up to `count`. */
static void start_workers(int count)
{
    if (count > MOST_THREADS - 1) count = MOST_THREADS - 1;
    if (pool.started == 0 && count > 0) {
        static atomic_flag registered = ATOMIC_FLAG_INIT;
        if (!atomic_flag_test_and_set(&registered)) pthread_atfork(NULL, NULL, forget_threads);
    }
    while (pool.started < count) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, run_worker, NULL) != 0) return;
        pthread_detach(thread);
        pool.started++;
    }
}

static void announce(struct job job, int workers)
{
    pool.job = job;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.wanted, workers);
    atomic_fetch_add(&pool.generation, 1);
    if (atomic_load(&pool.asleep) > 0) {
        pthread_mutex_lock(&pool.sleep);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.sleep);
    }
}

/* No worker joins any more, and those that did have left. One that takes long may be waiting for a
 * processor, perhaps this one. */
static void close_job(void)
{
    atomic_store(&pool.wanted, 0);
    for (int spin = 0; atomic_load(&pool.busy) > 0; spin++)
        if (spin < SPINS)
            PAUSE();
        else
            sched_yield();
}

void share_work(work_function work, const void *context, int64_t parts, int threads)
{
    int workers = (parts < threads ? (int)parts : threads) - 1;
    if (workers < 1 || pthread_mutex_trylock(&pool.use) != 0) {
        for (int64_t part = 0; part < parts; part++) work(context, part);
        return;
    }
    struct job job = {work, context, parts};
    start_workers(workers);
    announce(job, workers);
    take_parts(job);
    close_job();
    pthread_mutex_unlock(&pool.use);
}
