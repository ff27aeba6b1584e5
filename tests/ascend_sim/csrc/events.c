/* Events: ordinary ones, the edges they form in a capture, and external ones (host updates). */
#include <unistd.h>

#include "sim.h"

static int events_made = 1;

static int make_event(aclrtEvent *out, int external) {
    Event *event = calloc(1, sizeof *event);
    event->id = events_made++;
    event->external = external;
    *out = event;
    return 0;
}
API aclError aclrtCreateEventWithFlag(aclrtEvent *out, uint32_t flag) {
    return make_event(out, flag == ACL_EVENT_EXTERNAL);
}
API aclError aclrtCreateEventExWithFlag(aclrtEvent *out, uint32_t flag) {
    return (void)flag, make_event(out, 0);
}
/* Leaked on purpose: queued tasks and captured models may still name the event. */
API aclError aclrtDestroyEvent(aclrtEvent handle) { return (void)handle, 0; }

API aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream on) {
    Event *event = handle;
    Stream *stream = sim_stream(on);
    event->used = 1;
    event->stream = stream;
    event->capture = event->external ? NULL : stream->capture;
    if (event->capture) { /* an edge of the captured graph, not a task */
        event->capture_ops = stream->capture_ops;
        return 0;
    }
    event->count = stream->issued + 1;
    Task *task = sim_task(TASK_RECORD, "event_record");
    task->event = event;
    return sim_submit(stream, task);
}

/* Waiting for an event of a capture pulls the waiting stream into it, or joins the recording one.
 */
static int wait_in_capture(Stream *stream, Event *event) {
    if (stream->capture && stream->capture != event->capture)
        return sim_fail(ACL_ERROR_STREAM_CAPTURE_CONFLICT, "stream %d belongs to another capture",
                        stream->id);
    if (!stream->capture) {
        int error = sim_take_stream(event->capture);
        if (error) return error;
    }
    stream->capture = event->capture;
    stream->capture_ops++; /* the edge itself has to be joined as well */
    if (event->stream != stream && event->stream->capture_ops == event->capture_ops)
        event->stream->capture_ops = 0;
    return 0;
}

API aclError aclrtStreamWaitEvent(aclrtStream handle, aclrtEvent awaited) {
    Event *event = awaited;
    Stream *stream = sim_stream(handle);
    if (event->external) {
        Task *task = sim_task(TASK_EXTERNAL_WAIT, "external_event_wait");
        task->event = event;
        return sim_submit(stream, task);
    }
    if (!event->used) return 0;
    if (event->capture && event->capture->capturing) return wait_in_capture(stream, event);
    if (stream->capture)
        return sim_fail(ACL_ERROR_RT_CAPTURE_DEPENDENCY,
                        "captured stream %d waits for an event recorded outside the capture",
                        stream->id);
    Task *task = sim_task(TASK_WAIT, "event_wait");
    task->awaited = event->stream;
    task->awaited_count = event->count;
    return sim_submit(stream, task);
}

API aclError aclrtResetEvent(aclrtEvent handle, aclrtStream stream) {
    Task *task = sim_task(TASK_EXTERNAL_RESET, "event_reset");
    task->event = handle;
    return sim_submit(sim_stream(stream), task);
}

static int check_not_captured(Event *event, const char *what) {
    if (event->capture && event->capture->capturing)
        return sim_fail(ACL_ERROR_RT_EVENT_CAPTURED,
                        "%s of an event that was recorded in a capture", what);
    return 0;
}
API aclError aclrtSynchronizeEvent(aclrtEvent handle) {
    Event *event = handle;
    if (!event->used) return 0;
    int error = check_not_captured(event, "synchronize");
    if (!error) error = sim_forbidden_in_capture("event synchronize");
    if (error) return error;
    sim_log((LogEntry){.kind = LOG_SYNC, .stream = event->stream->id}, "synchronize_event");
    if (sim_drain(event->stream, event->count) == BLOCKED) return sim_synchronize(event->stream);
    return 0;
}
API aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus *status) {
    Event *event = handle;
    int error = check_not_captured(event, "query");
    if (error) return error;
    int pending = event->used && !event->capture && event->stream->done < event->count;
    *status = pending ? ACL_EVENT_RECORDED_STATUS_NOT_READY : ACL_EVENT_RECORDED_STATUS_COMPLETE;
    if (sim_lazy && pending) sim_drain(event->stream, event->stream->done + 1);
    return 0;
}
API aclError aclrtQueryEventWaitStatus(aclrtEvent handle, aclrtEventWaitStatus *status) {
    (void)handle;
    *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
    return 0;
}
API aclError aclrtEventElapsedTime(float *milliseconds, aclrtEvent start, aclrtEvent end) {
    *milliseconds = (float)((((Event *)end)->time - ((Event *)start)->time) * 1e3);
    return 0;
}
API aclError aclrtEventGetTimestamp(aclrtEvent handle, uint64_t *microseconds) {
    *microseconds = (uint64_t)(((Event *)handle)->time * 1e6);
    return 0;
}

static int submit_value(TaskKind kind, void *at, uint64_t value, uint32_t flag,
                        aclrtStream stream) {
    Task *task = sim_task(kind, kind == TASK_VALUE_WAIT ? "value_wait" : "value_write");
    task->destination = at;
    task->bytes = value;
    task->value = flag;
    return sim_submit(sim_stream(stream), task);
}
API aclError aclrtValueWait(void *at, uint64_t value, uint32_t flag, aclrtStream stream) {
    return submit_value(TASK_VALUE_WAIT, at, value, flag, stream);
}
API aclError aclrtValueWrite(void *at, uint64_t value, uint32_t flag, aclrtStream stream) {
    return submit_value(TASK_VALUE_WRITE, at, value, flag, stream);
}

API aclError aclrtLaunchHostFunc(aclrtStream stream, void (*function)(void *), void *argument) {
    Task *task = sim_task(TASK_HOST_FUNCTION, "host_function");
    task->host_function = function;
    task->argument = argument;
    return sim_submit(sim_stream(stream), task);
}
API aclError aclrtLaunchCallback(aclrtCallback function, void *argument,
                                 aclrtCallbackBlockType type, aclrtStream stream) {
    return (void)type, aclrtLaunchHostFunc(stream, function, argument);
}
API aclError aclrtSubscribeReport(uint64_t thread, aclrtStream stream) {
    return (void)thread, (void)stream, 0;
}
API aclError aclrtUnSubscribeReport(uint64_t thread, aclrtStream stream) {
    return (void)thread, (void)stream, 0;
}
API aclError aclrtProcessReport(int32_t timeout) {
    usleep(timeout > 0 ? 1000 : 100);
    return ACL_ERROR_RT_REPORT_TIMEOUT;
}
