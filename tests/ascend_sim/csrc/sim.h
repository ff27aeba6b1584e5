/* The simulated Ascend runtime: types that its C files share.
 *
 * Device memory is host memory.  A stream is a first-in-first-out list of tasks.  Nothing runs on
 * its own: tasks run inside the call that submits them (eager) or inside the call that waits for
 * them (lazy), so a run is repeatable and a missing synchronisation shows as wrong data.
 *
 * Where each part lives: memory.c (blocks, copies), streams.c (streams, execution), events.c,
 * graphs.c (capture, replay, updates), tensors.c (aclTensor and the two-phase operators),
 * aclop.c (the older operator door), hccl.c (collectives), device.c (start-up, properties), log.c
 * (what happened).
 */
#ifndef ASCEND_SIM_H
#define ASCEND_SIM_H
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"
#include "acl/acl_rt.h"

#define API __attribute__((visibility("default")))
#define BLOCKED (-1)

typedef struct Stream Stream;
typedef struct Event Event;
typedef struct Model Model;
typedef struct Group Group;
typedef struct Replay Replay;
typedef struct Collective Collective;

/* ---------------------------------------------------------------- tasks */
typedef enum {
    TASK_KERNEL,        /* a stand-in kernel: calls back into Python */
    TASK_HOST_FUNCTION, /* aclrtLaunchHostFunc */
    TASK_COPY,
    TASK_SET,
    TASK_NOTHING, /* has a place in the stream but no effect (prefetch) */
    TASK_RECORD,
    TASK_WAIT,          /* wait for an ordinary event */
    TASK_EXTERNAL_WAIT, /* wait until somebody records an external event */
    TASK_EXTERNAL_RESET,
    TASK_VALUE_WAIT,
    TASK_VALUE_WRITE,
    TASK_REPLAY, /* run a captured model */
    TASK_GROUP,  /* inside a model: run an updatable group of tasks */
    TASK_UPDATE, /* replace the tasks of such a group */
    TASK_COLLECTIVE, /* meet other processes */
} TaskKind;

typedef struct Task {
    struct Task *next;
    TaskKind kind;
    int captured; /* owned by a model: survives its execution */
    const char *name;
    int64_t kernel; /* TASK_KERNEL: the number Python knows the kernel by */
    int64_t hidden_copies; /* kernels that a card launches besides, to copy strided arguments */
    char *workspace;       /* scratch memory of the kernel, which it overwrites */
    size_t workspace_bytes;
    void (*host_function)(void *);
    void *argument;
    void *destination;
    const void *source;
    size_t bytes;
    uint64_t value;
    Event *event;
    Stream *awaited; /* TASK_WAIT: the recording stream and how far it must be */
    uint64_t awaited_count;
    Group *group;
    struct Task *replacement; /* TASK_UPDATE: the new tasks of the group */
    Replay *replay;
    Collective *collective;
} Task;

typedef struct {
    Task *head, *tail;
    int64_t count;
} TaskList;

struct Stream {
    Stream *next;
    int id;
    TaskList pending;
    uint64_t issued, done;
    uint64_t awaited_by_peers; /* the last task that is a collective or a replay with one, as a count */
    int running;
    pthread_t runner;
    int error;
    Model *capture;       /* the model this stream is being captured into */
    Group *group;         /* the task group that is open in that capture */
    Group *update;        /* the update that is open on this stream */
    uint64_t capture_ops; /* work in the capture that nobody has joined yet; 0 = joined */
};

struct Event {
    int id;
    int external; /* may be recorded after it is waited for */
    int recorded; /* external events only */
    int used;
    Stream *stream;
    uint64_t count; /* tasks issued on `stream` when the event was recorded */
    double time;
    Model *capture;       /* recorded inside this capture ... */
    uint64_t capture_ops; /* ... at this point of its stream */
};

struct Group {
    Model *model;
    Group *updates; /* when this group is an update: the captured group it replaces */
    TaskList tasks;
};

struct Model {
    uint32_t id;
    TaskList tasks;
    int64_t kernels, hidden_copies, copies, prefetches, groups, collectives;
    int streams; /* of the device, taken until the model is destroyed */
    Stream *origin;
    int capturing;
};

struct Replay { /* the position inside a model that is being replayed */
    Model *model;
    Task *position;
    Task *group_position;
    int in_group;
};

/* ------------------------------------------------------------------ log */
typedef enum {
    LOG_LAUNCH,
    LOG_COPY,
    LOG_SET,
    LOG_PREFETCH,
    LOG_REPLAY,
    LOG_UPDATE,
    LOG_SYNC,
    LOG_COLLECTIVE
} LogKind;

typedef struct { /* read by trace.py with the struct format "=8q2Q64s" */
    int64_t kind, kernel, stream, captured, update, bytes, graph, flag;
    uint64_t source, destination;
    char name[64];
} LogEntry;

void sim_log(LogEntry entry, const char *name);

/* --------------------------------------------------------------- shared */
extern pthread_mutex_t sim_lock;
extern Stream *sim_streams;
extern Stream sim_default_stream;
extern int sim_lazy;
extern int sim_capturing;                /* how many captures are open */
extern __thread int sim_relaxed_capture; /* aclmdlRICaptureThreadExchangeMode */
extern int (*sim_run_kernel)(int64_t kernel, int keep);
extern void (*sim_drop_kernel)(int64_t kernel);

int sim_fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
const char *sim_setting(const char *name, const char *otherwise);
double sim_now(void);
Stream *sim_stream(aclrtStream handle);
Task *sim_task(TaskKind kind, const char *name);
void sim_append(TaskList *list, Task *task);
void sim_free_tasks(Task *first);
int sim_submit(Stream *stream, Task *task);
int sim_drain(Stream *stream, uint64_t until);
int sim_synchronize(Stream *stream);
void sim_run_everything(void);
void sim_settle(void); /* runs everything and waits for the peers that it needs */
int sim_waits_for_peers(void);
int sim_run_collective(Task *task);
void sim_peers_await(Stream *stream); /* the last task of the stream needs or serves other processes */
int sim_nothing_is_queued(void);
int sim_lost(void); /* the error of a device that hung, for every call after it; 0 = it works */
void sim_lose(int error, const char *since); /* `since` is not copied */
void sim_poison(void *start, size_t bytes);
API int sim_is_device(const void *pointer, size_t bytes);
int sim_take_stream(Model *model);
void sim_give_streams(int count);
int sim_forbidden_in_capture(const char *what);
int sim_advance_replay(Task *task, int (*run)(Stream *, Task *), Stream *stream);
int sim_capture_task(Stream *stream, Task *task); /* 1 = the task went into a capture */
API int sim_launch(void *stream, const char *name, int64_t kernel, int64_t hidden_copies);

/* What Python says of a kernel besides its number, before it is launched. */
typedef struct {
    int64_t kernel, hidden_copies, workspace;
} Plan;
int sim_launch_plan(void *stream, const char *name, Plan plan, void *workspace);

#endif
