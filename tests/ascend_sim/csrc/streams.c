/* Streams and the execution of their tasks. */
#include <unistd.h>

#include "sim.h"

pthread_mutex_t sim_lock = PTHREAD_MUTEX_INITIALIZER;
Stream sim_default_stream = {.id = 0};
Stream *sim_streams = &sim_default_stream;
int sim_lazy;
int (*sim_run_kernel)(int64_t kernel, int keep);
void (*sim_drop_kernel)(int64_t kernel);
static int streams_made = 1;
static int report_at_launch, torch_queues;

enum { KERNEL_FAILED = 507015 }; /* what a card answers when a core reports an exception */

__attribute__((constructor)) static void choose_schedule(void) {
    sim_lazy = !strcmp(sim_setting("ASCEND_SIM_STREAMS", "eager"), "lazy");
    /* An error on torch_npu's queue thread would end that thread; there it waits for the next
     * synchronisation, as on a card.  Without the queue it can point at the failing line. */
    torch_queues = strcmp(sim_setting("TASK_QUEUE_ENABLE", "0"), "0") != 0;
    report_at_launch = !sim_lazy && !torch_queues;
}

API void sim_set_callbacks(int (*run)(int64_t, int), void (*drop)(int64_t)) {
    sim_run_kernel = run;
    sim_drop_kernel = drop;
}

Stream *sim_stream(aclrtStream handle) { return handle ? (Stream *)handle : &sim_default_stream; }

/* ---------------------------------------------------------------- tasks */
Task *sim_task(TaskKind kind, const char *name) {
    Task *task = calloc(1, sizeof *task);
    task->kind = kind;
    task->name = name;
    return task;
}

void sim_append(TaskList *list, Task *task) {
    if (list->tail)
        list->tail->next = task;
    else
        list->head = task;
    list->tail = task;
    list->count++;
}

void sim_free_tasks(Task *first) {
    while (first) {
        Task *next = first->next;
        if (first->kind == TASK_KERNEL && sim_drop_kernel) sim_drop_kernel(first->kernel);
        free(first->collective);
        free(first);
        first = next;
    }
}

static int value_reached(Task *task) {
    uint64_t found = *(volatile uint64_t *)task->destination, wanted = task->bytes;
    switch (task->value) { /* the four comparisons of aclrtValueWait */
    case 0: return found >= wanted;
    case 1: return found == wanted;
    case 2: return (found & wanted) != 0;
    default: return ~(found | wanted) != 0;
    }
}

static void apply_update(Task *task) {
    Task *old = task->group->tasks.head;
    task->group->tasks.head = task->replacement;
    task->replacement = NULL;
    sim_free_tasks(old);
}

/* A kernel uses its workspace as scratch: what else lies there is lost. */
static int scratch(Task *task) {
    if (!task->workspace_bytes) return 0;
    if (!sim_is_device(task->workspace, task->workspace_bytes))
        return sim_fail(KERNEL_FAILED, "the workspace of a kernel, %zu bytes at %p, is no device memory",
                        task->workspace_bytes, (void *)task->workspace);
    sim_poison(task->workspace, task->workspace_bytes);
    return 0;
}

/* Without callbacks a kernel does nothing at all, so that a measurement sees the host alone. */
static int run_kernel(Task *task) {
    if (!sim_run_kernel) return 0;
    int error = scratch(task);
    if (!error) error = sim_run_kernel(task->kernel, task->captured);
    return error ? error : scratch(task);
}

/* 0 = done, BLOCKED = try again later, > 0 = an error code */
static int run(Stream *stream, Task *task) {
    switch (task->kind) {
    case TASK_KERNEL: return run_kernel(task);
    case TASK_HOST_FUNCTION: task->host_function(task->argument); return 0;
    case TASK_COPY: memmove(task->destination, task->source, task->bytes); return 0;
    case TASK_SET: memset(task->destination, (int)task->value, task->bytes); return 0;
    case TASK_NOTHING: return 0;
    case TASK_RECORD:
        task->event->time = sim_now();
        if (task->event->external) task->event->recorded = 1;
        return 0;
    case TASK_WAIT:
        return task->awaited == stream ? 0 : sim_drain(task->awaited, task->awaited_count);
    case TASK_EXTERNAL_WAIT: return task->event->recorded ? 0 : BLOCKED;
    case TASK_EXTERNAL_RESET: task->event->recorded = 0; return 0;
    case TASK_VALUE_WAIT: return value_reached(task) ? 0 : BLOCKED;
    case TASK_VALUE_WRITE: *(uint64_t *)task->destination = task->bytes; return 0;
    case TASK_UPDATE: apply_update(task); return 0;
    case TASK_REPLAY: return sim_advance_replay(task, run, stream);
    case TASK_COLLECTIVE: return sim_run_collective(task);
    case TASK_GROUP: return sim_fail(ACL_ERROR_RT_INTERNAL_ERROR, "a task group outside a replay");
    }
    return 0;
}

/* Runs the stream until `until` of its tasks are done.  Never waits for another thread: the caller
 * may hold Python's lock, which that thread may need to finish. */
int sim_drain(Stream *stream, uint64_t until) {
    for (;;) {
        pthread_mutex_lock(&sim_lock);
        Task *task = stream->pending.head;
        if (stream->done >= until || !task || stream->running) {
            int stuck = stream->done < until && (task || stream->running);
            pthread_mutex_unlock(&sim_lock);
            return stuck ? BLOCKED : 0;
        }
        stream->running = 1;
        stream->runner = pthread_self();
        pthread_mutex_unlock(&sim_lock);

        int result = run(stream, task);

        pthread_mutex_lock(&sim_lock);
        stream->running = 0;
        if (result == BLOCKED) {
            pthread_mutex_unlock(&sim_lock);
            return BLOCKED;
        }
        if (result > 0 && !stream->error) stream->error = result;
        stream->pending.head = task->next;
        if (!task->next) stream->pending.tail = NULL;
        stream->done++;
        pthread_mutex_unlock(&sim_lock);
        free(task->replay);
        free(task->collective);
        free(task);
    }
}

void sim_run_everything(void) {
    for (int progress = 1; progress;) {
        progress = 0;
        for (Stream *stream = sim_streams; stream; stream = stream->next) {
            uint64_t before = stream->done;
            if (stream->pending.head) sim_drain(stream, UINT64_MAX);
            progress |= stream->done != before;
        }
    }
}

int sim_nothing_is_queued(void) {
    for (Stream *stream = sim_streams; stream; stream = stream->next)
        if (stream->pending.head || stream->running) return 0;
    return !torch_queues;
}

/* A card does not come back from a hang or a failed collective: the process has to end. */
static int lost;
static const char *lost_since;
int sim_lost(void) {
    return lost ? sim_fail(lost, "the device is lost since %s; the process must end", lost_since) : 0;
}
void sim_lose(int error, const char *since) {
    lost = error;
    lost_since = since;
}

static int busy_elsewhere(Stream *stream) {
    return stream->running && !pthread_equal(stream->runner, pthread_self());
}

static int anything_busy_elsewhere(void) {
    for (Stream *stream = sim_streams; stream; stream = stream->next)
        if (busy_elsewhere(stream)) return 1;
    return 0;
}

/* A minute, on busy machines; collectives have a patience of their own. */
enum { PATIENCE = 1200000, NAP = 50, IDLE_ROUNDS = 20, IDLE_NAP = 1000 };

/* Naps while another thread or another process can bring the work on; 0 = nobody can. */
static int somebody_works(int *naps) {
    if (!sim_waits_for_peers() && (!anything_busy_elsewhere() || ++*naps > PATIENCE)) return 0;
    usleep(NAP);
    return 1;
}

void sim_settle(void) {
    int naps = 0;
    do sim_run_everything();
    while (sim_waits_for_peers() && somebody_works(&naps));
}

int sim_synchronize(Stream *stream) {
    int naps = 0;
    if (sim_lost()) return sim_lost();
    sim_drain(stream, stream->issued);
    if (stream->done < stream->issued) sim_run_everything();
    /* Whoever worked may have ended just before that was asked, and left the rest to this thread. */
    for (int idle = 0; stream->done < stream->issued && idle < IDLE_ROUNDS;) {
        idle = somebody_works(&naps) ? 0 : idle + 1;
        if (idle) usleep(IDLE_NAP);
        sim_drain(stream, stream->issued);
        if (stream->done < stream->issued) sim_run_everything();
    }
    if (sim_lost()) return sim_lost();
    if (stream->done < stream->issued) {
        sim_lose(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, "a stream hung");
        return sim_fail(lost,
                        "stream %d would hang: a task waits for an event that nobody will record "
                        "(a graph was replayed without update(), or updated too early); %llu of "
                        "%llu tasks done",
                        stream->id, (unsigned long long)stream->done,
                        (unsigned long long)stream->issued);
    }
    int error = stream->error;
    stream->error = 0;
    return error; /* the failing kernel has left its message with sim_set_error */
}

int sim_submit(Stream *stream, Task *task) {
    if (sim_lost()) return sim_free_tasks(task), sim_lost();
    if (sim_capture_task(stream, task)) return 0;
    pthread_mutex_lock(&sim_lock);
    stream->issued++;
    sim_append(&stream->pending, task);
    pthread_mutex_unlock(&sim_lock);
    if (sim_lazy) return 0;
    int others_may_wait = task->kind == TASK_RECORD || task->kind == TASK_VALUE_WRITE;
    if (sim_drain(stream, UINT64_MAX) == 0 && others_may_wait) sim_run_everything();
    return 0;
}

API int sim_launch(void *handle, const char *name, int64_t kernel, int64_t hidden_copies) {
    Plan plan = {.kernel = kernel, .hidden_copies = hidden_copies};
    return sim_launch_plan(handle, name, plan, NULL);
}

int sim_launch_plan(void *handle, const char *name, Plan plan, void *workspace) {
    Stream *stream = sim_stream(handle);
    sim_log((LogEntry){.kind = LOG_LAUNCH,
                       .kernel = plan.kernel,
                       .stream = stream->id,
                       .captured = stream->capture != NULL,
                       .update = stream->update != NULL},
            name);
    Task *task = sim_task(TASK_KERNEL, "kernel");
    task->kernel = plan.kernel;
    task->hidden_copies = plan.hidden_copies;
    task->workspace = workspace;
    task->workspace_bytes = plan.workspace;
    int error = sim_submit(stream, task);
    if (!error && report_at_launch && stream->error) {
        error = stream->error;
        stream->error = 0;
    }
    return error;
}

/* --------------------------------------------------------------- streams
 * A card has a limited number of them.  Whoever creates one takes one, and so do captured models:
 * one for the captured stream, one for each stream forked into the capture, one for each task
 * group, which the update exchanges as a whole. */
static int streams_used = 1, stream_limit;

static int limit_of_streams(void) {
    if (!stream_limit) stream_limit = atoi(sim_setting("ASCEND_SIM_STREAM_LIMIT", "2048"));
    return stream_limit;
}
API int sim_streams_used(void) { return streams_used; }
API int sim_set_stream_limit(int count) {
    int before = limit_of_streams();
    stream_limit = count;
    return before;
}
int sim_take_stream(Model *model) {
    if (streams_used >= limit_of_streams())
        return sim_fail(ACL_ERROR_RT_NO_STREAM_RESOURCE,
                        "the device has no stream left: %d are in use", streams_used);
    streams_used++;
    if (model) model->streams++;
    return 0;
}
void sim_give_streams(int count) { streams_used -= count; }

API int sim_stream_id(void *handle) { return sim_stream(handle)->id; }

API aclError aclrtCreateStreamWithConfig(aclrtStream *out, uint32_t priority, uint32_t flag) {
    (void)priority, (void)flag;
    int error = sim_take_stream(NULL);
    if (error) return error;
    Stream *stream = calloc(1, sizeof *stream);
    pthread_mutex_lock(&sim_lock);
    stream->id = streams_made++;
    stream->next = sim_streams;
    sim_streams = stream;
    pthread_mutex_unlock(&sim_lock);
    *out = stream;
    return 0;
}
API aclError aclrtCreateStream(aclrtStream *out) { return aclrtCreateStreamWithConfig(out, 0, 0); }
API aclError aclrtDestroyStream(aclrtStream handle) {
    return sim_synchronize(sim_stream(handle)), sim_give_streams(1), 0;
}
API aclError aclrtDestroyStreamForce(aclrtStream handle) {
    return (void)handle, sim_give_streams(1), 0;
}
API aclError aclrtStreamGetId(aclrtStream handle, int32_t *id) {
    return *id = sim_stream(handle)->id, 0;
}
API aclError aclrtSetStreamFailureMode(aclrtStream handle, uint64_t mode) {
    return (void)handle, (void)mode, 0;
}

API aclError aclrtSynchronizeStreamWithTimeout(aclrtStream handle, int32_t timeout) {
    (void)timeout;
    Stream *stream = sim_stream(handle);
    if (stream->capture)
        return sim_fail(ACL_ERROR_RT_STREAM_CAPTURED,
                        "synchronize of stream %d while it is being captured", stream->id);
    int error = sim_forbidden_in_capture("stream synchronize");
    if (error) return error;
    sim_log((LogEntry){.kind = LOG_SYNC, .stream = stream->id}, "synchronize_stream");
    return sim_synchronize(stream);
}
API aclError aclrtSynchronizeStream(aclrtStream handle) {
    return aclrtSynchronizeStreamWithTimeout(handle, -1);
}
API aclError aclrtSynchronizeDevice(void) {
    int error = sim_forbidden_in_capture("device synchronize");
    if (error) return error;
    sim_log((LogEntry){.kind = LOG_SYNC, .stream = -1}, "synchronize_device");
    for (Stream *stream = sim_streams; stream; stream = stream->next)
        if ((error = sim_synchronize(stream))) return error;
    return 0;
}
API aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) {
    return (void)timeout, aclrtSynchronizeDevice();
}
API aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus *status) {
    Stream *stream = sim_stream(handle);
    if (stream->capture)
        return sim_fail(ACL_ERROR_RT_STREAM_CAPTURED,
                        "query of stream %d while it is being captured", stream->id);
    *status =
        stream->done >= stream->issued ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
    if (sim_lazy) sim_drain(stream, stream->done + 1); /* who polls must see progress */
    return 0;
}

/* Forgets work that can never finish, so that one failed test does not fail all that follow. */
API void sim_abandon_pending(void) {
    lost = 0;
    for (Stream *stream = sim_streams; stream; stream = stream->next) {
        pthread_mutex_lock(&sim_lock);
        /* A task that torch_npu's queue thread is just running is that thread's to free. */
        for (int i = 0; busy_elsewhere(stream) && i < PATIENCE; i++) {
            pthread_mutex_unlock(&sim_lock);
            usleep(NAP);
            pthread_mutex_lock(&sim_lock);
        }
        Task *task = stream->pending.head;
        stream->pending = (TaskList){0};
        stream->done = stream->issued;
        stream->error = 0;
        pthread_mutex_unlock(&sim_lock);
        sim_free_tasks(task);
    }
}
