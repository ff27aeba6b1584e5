/* Graph capture, replay and update.
 *
 * While a stream is captured its tasks are kept, not run.  A replay runs them again on the same
 * addresses with the same host arguments; only the tasks of a task group can be replaced.
 * Tasks of several captured streams are kept in the order in which they were issued, which is one
 * legal order of the graph. */
#include "sim.h"

int sim_capturing;
__thread int sim_relaxed_capture;
static uint32_t models_made = 1;

int sim_forbidden_in_capture(const char *what) {
    if (!sim_capturing || sim_relaxed_capture) return 0;
    return sim_fail(ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT,
                    "%s is not allowed while a stream is being captured", what);
}

static void count_task(Model *model, Task *task) {
    model->kernels += task->kind == TASK_KERNEL;
    model->hidden_copies += task->hidden_copies;
    model->copies += task->kind == TASK_COPY;
    model->prefetches += task->kind == TASK_NOTHING;
    model->groups += task->kind == TASK_GROUP;
    model->collectives += task->kind == TASK_COLLECTIVE;
}

int sim_capture_task(Stream *stream, Task *task) {
    if (!stream->update && !stream->capture) return 0;
    task->captured = 1;
    if (stream->update) {
        sim_append(&stream->update->tasks, task);
        return 1;
    }
    stream->capture_ops++;
    count_task(stream->capture, task);
    sim_append(stream->group ? &stream->group->tasks : &stream->capture->tasks, task);
    return 1;
}

/* Runs one model task; a group runs its own tasks one by one. */
static int run_model_task(Replay *replay, int (*run)(Stream *, Task *), Stream *stream) {
    Task *task = replay->position;
    if (task->kind != TASK_GROUP) return run(stream, task);
    if (!replay->in_group) {
        replay->in_group = 1;
        replay->group_position = task->group->tasks.head;
    }
    while (replay->group_position) {
        int result = run(stream, replay->group_position);
        if (result) return result;
        replay->group_position = replay->group_position->next;
    }
    replay->in_group = 0;
    return 0;
}

int sim_advance_replay(Task *task, int (*run)(Stream *, Task *), Stream *stream) {
    Replay *replay = task->replay;
    while (replay->position) {
        int result = run_model_task(replay, run, stream);
        if (result) return result;
        replay->position = replay->position->next;
    }
    return 0;
}

/* --------------------------------------------------------------- capture */
API aclError aclmdlRICaptureBegin(aclrtStream handle, aclmdlRICaptureMode mode) {
    (void)mode;
    Stream *stream = sim_stream(handle);
    if (stream->capture)
        return sim_fail(ACL_ERROR_RT_STREAM_CAPTURED, "stream %d is already captured", stream->id);
    if (stream == &sim_default_stream)
        return sim_fail(ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT,
                        "the default stream cannot be captured");
    Model *model = calloc(1, sizeof *model);
    int error = sim_take_stream(model);
    if (error) return error;
    model->id = models_made++;
    model->origin = stream;
    model->capturing = 1;
    stream->capture = model;
    stream->capture_ops = 1;
    sim_capturing++;
    return 0;
}

API aclError aclmdlRICaptureGetInfo(aclrtStream handle, aclmdlRICaptureStatus *status,
                                    aclmdlRI *model) {
    Stream *stream = sim_stream(handle);
    *status =
        stream->capture ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
    if (model) *model = stream->capture;
    return 0;
}

API aclError aclmdlRICaptureEnd(aclrtStream handle, aclmdlRI *out) {
    Stream *stream = sim_stream(handle);
    Model *model = stream->capture;
    if (!model)
        return sim_fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "stream %d is not captured", stream->id);
    if (model->origin != stream)
        return sim_fail(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED, "the capture began on stream %d",
                        model->origin->id);
    int unjoined = -1, open_group = -1;
    for (Stream *other = sim_streams; other; other = other->next) {
        if (other->capture != model) continue;
        if (other != stream && other->capture_ops) unjoined = other->id;
        if (other->group) open_group = other->id;
        other->capture = NULL;
        other->group = NULL;
    }
    model->capturing = 0;
    sim_capturing--;
    *out = model;
    if (unjoined >= 0)
        return sim_fail(ACL_ERROR_RT_STREAM_UNJOINED,
                        "stream %d was forked into the capture and not joined back", unjoined);
    if (open_group >= 0)
        return sim_fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS,
                        "a task group is still open on stream %d", open_group);
    return 0;
}

API aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode *mode) {
    int was_relaxed = sim_relaxed_capture;
    sim_relaxed_capture = *mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED;
    *mode = was_relaxed ? ACL_MODEL_RI_CAPTURE_MODE_RELAXED : ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
    return 0;
}

/* ---------------------------------------------------------------- replay */
API aclError aclmdlRIExecuteAsync(aclmdlRI handle, aclrtStream on) {
    Model *model = handle;
    Stream *stream = sim_stream(on);
    if (stream->capture) return sim_fail(ACL_ERROR_RT_MODEL_CAPTURED, "a replay inside a capture");
    Task *task = sim_task(TASK_REPLAY, "graph_replay");
    task->replay = calloc(1, sizeof *task->replay);
    *task->replay = (Replay){.model = model, .position = model->tasks.head};
    sim_log(
        (LogEntry){
            .kind = LOG_REPLAY, .stream = stream->id, .graph = model->id, .flag = model->kernels,
            .bytes = model->hidden_copies},
        task->name);
    int error = sim_submit(stream, task);
    if (!error && model->collectives) sim_peers_await(stream);
    return error;
}
/* The tasks leak on purpose: a replay may still be queued. */
API aclError aclmdlRIDestroy(aclmdlRI handle) {
    Model *model = handle;
    sim_run_everything();
    sim_give_streams(model->streams);
    model->streams = 0;
    return 0;
}
API aclError aclmdlRIGetId(aclmdlRI handle, uint32_t *id) { return *id = ((Model *)handle)->id, 0; }
API aclError aclmdlRIDebugPrint(aclmdlRI handle) {
    for (Task *task = ((Model *)handle)->tasks.head; task; task = task->next)
        fprintf(stderr, "  %s\n", task->name);
    return 0;
}

/* --------------------------------------------------------------- updates */
API aclError aclmdlRICaptureTaskGrpBegin(aclrtStream handle) {
    Stream *stream = sim_stream(handle);
    if (!stream->capture)
        return sim_fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "a task group outside a capture");
    if (stream->group)
        return sim_fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "a task group is already open");
    int error = sim_take_stream(stream->capture);
    if (error) return error;
    Group *group = calloc(1, sizeof *group);
    group->model = stream->capture;
    Task *task = sim_task(TASK_GROUP, "task_group");
    task->group = group;
    sim_submit(stream, task);
    stream->group = group;
    return 0;
}
API aclError aclmdlRICaptureTaskGrpEnd(aclrtStream handle, aclrtTaskGrp *out) {
    Stream *stream = sim_stream(handle);
    if (!stream->group)
        return sim_fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "no task group is open");
    *out = stream->group;
    stream->group = NULL;
    return 0;
}

static int updates_to_pass = -1; /* planted fault: how many updates work before all fail; -1 = off */
API void sim_fail_updates(int after) { updates_to_pass = after; }

API aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream handle, aclrtTaskGrp captured) {
    Stream *stream = sim_stream(handle);
    if (updates_to_pass == 0)
        return sim_fail(ACL_ERROR_RT_INTERNAL_ERROR, "planted fault: this update fails");
    updates_to_pass -= updates_to_pass > 0;
    if (stream->update || stream->capture)
        return sim_fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "stream %d already records or updates",
                        stream->id);
    stream->update = calloc(1, sizeof *stream->update);
    stream->update->updates = captured;
    return 0;
}
static int same_kinds(TaskList *a, TaskList *b) {
    if (a->count != b->count) return 0;
    for (Task *x = a->head, *y = b->head; x && y; x = x->next, y = y->next)
        if (x->kind != y->kind) return 0;
    return 1;
}
API aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream handle) {
    Stream *stream = sim_stream(handle);
    Group *update = stream->update;
    stream->update = NULL;
    if (!update) return sim_fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "no update is open");
    Group *captured = update->updates;
    if (!same_kinds(&update->tasks, &captured->tasks))
        return sim_fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS,
                        "an update must issue the kernels that were captured (%lld now, %lld then)",
                        (long long)update->tasks.count, (long long)captured->tasks.count);
    Task *task = sim_task(TASK_UPDATE, "graph_update");
    task->group = captured;
    task->replacement = update->tasks.head;
    free(update);
    sim_log((LogEntry){.kind = LOG_UPDATE, .stream = stream->id, .graph = captured->model->id},
            task->name);
    return sim_submit(stream, task);
}
