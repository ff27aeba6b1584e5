/* Collectives between processes that have a simulated device each.
 *
 * A communicator is a folder in shared memory, which its root has made. A rank that reaches a
 * collective puts what it sends into a file there and goes on when it has found the files of all
 * others: until then its stream is blocked, and the host is not, as on a card. A thread looks for
 * them, because a card would go on by itself while its host waits elsewhere for a peer.
 *
 * Whoever finds all files of a turn knows that everybody has finished the turn before, so each rank
 * then removes its own file of that one. */
#include "sim.h" /* before the others, because it asks for all of them (_GNU_SOURCE) */

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

enum { OK = 0, BAD_PARAMETER = 1, SYSTEM_CALL = 8, TIMEOUT = 9, ROOT_INFO_BYTES = 4108 }; /* HcclResult */
enum { NAME_BYTES = 128, PATH_BYTES = 256, CONFIG_NAME = 32, MAX_RANKS = 64 };
enum { SUM, PRODUCT, MAXIMUM, MINIMUM }; /* HcclReduceOp */
enum { FP16 = 3, FP32 = 4, FP64 = 10, BF16 = 11, TYPES }; /* HcclDataType */
static const int type_bytes[TYPES] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2};
enum { EXECUTION_FAILED = 507011 }; /* what waiting for a stream answers */

typedef struct Communicator {
    struct Communicator *next;
    char folder[PATH_BYTES], name[NAME_BYTES];
    uint32_t rank, ranks;
    uint64_t turns;                                 /* collectives that have begun */
    uint64_t sent[MAX_RANKS], received[MAX_RANKS]; /* by peer */
} Communicator;

typedef enum { ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST, REDUCE, SCATTER, BARRIER, SEND, RECEIVE } What;

typedef struct { /* stands before what a rank sends; all ranks have to mean the same */
    int32_t what, type, operation, root;
    uint64_t count;
} Header;

struct Collective {
    Communicator *group;
    Header header;
    const void *send;
    void *receive;
    int begun;
    uint64_t turn;
    double deadline;
};

/* ---------------------------------------------------------------- files */
static void turn_path(char *path, Communicator *group, uint64_t turn, uint32_t rank) {
    snprintf(path, PATH_BYTES + 64, "%s/turn-%llu-%u", group->folder, (unsigned long long)turn, rank);
}

static void message_path(char *path, Communicator *group, uint32_t from, uint32_t to, uint64_t n) {
    snprintf(path, PATH_BYTES + 64, "%s/message-%u-%u-%llu", group->folder, from, to,
             (unsigned long long)n);
}

static int write_whole(int file, const void *data, size_t bytes) {
    for (const char *place = data; bytes;) {
        ssize_t written = write(file, place, bytes);
        if (written <= 0) return 0;
        place += written;
        bytes -= written;
    }
    return 1;
}

/* A file appears with all that is in it, because it gets its name last. */
static int publish(const char *path, const Header *header, const void *data, size_t bytes) {
    char unfinished[PATH_BYTES + 96];
    snprintf(unfinished, sizeof unfinished, "%s.unfinished", path);
    int file = open(unfinished, O_CREAT | O_WRONLY | O_TRUNC, 0600);
    int written = file >= 0 && write_whole(file, header, sizeof *header) && write_whole(file, data, bytes);
    if (file >= 0) close(file);
    return written && !rename(unfinished, path) ? 0 : sim_fail(SYSTEM_CALL, "cannot write %s", path);
}

static int is_there(const char *path) { return access(path, F_OK) == 0; }

/* A new buffer with what follows the header; NULL when that is not `wanted` or not `bytes` long. */
static char *read_message(const char *path, const Header *wanted, size_t bytes) {
    Header header;
    struct stat status;
    char *data = NULL;
    int file = open(path, O_RDONLY);
    int fits = file >= 0 && read(file, &header, sizeof header) == sizeof header &&
               !memcmp(&header, wanted, sizeof header) && !fstat(file, &status) &&
               (size_t)status.st_size == sizeof header + bytes;
    for (size_t got = 0; fits && (data || (data = malloc(bytes + 1))) && got < bytes;) {
        ssize_t more = read(file, data + got, bytes - got);
        if (more <= 0) break;
        got += more;
    }
    if (file >= 0) close(file);
    return data;
}

/* ------------------------------------------------------------- reduction
 * In float64 or int64, over the ranks in their order, rounded once: all ranks get equal bits. */
static int is_floating(int type) {
    return type == FP16 || type == FP32 || type == FP64 || type == BF16;
}

static double get_float(const void *data, int type, uint64_t i) {
    if (type == FP64) return ((const double *)data)[i];
    if (type == FP32) return ((const float *)data)[i];
    if (type == FP16) return (double)((const _Float16 *)data)[i];
    union { uint32_t bits; float value; } widened = {(uint32_t)((const uint16_t *)data)[i] << 16};
    return widened.value;
}

static void put_float(void *data, int type, uint64_t i, double value) {
    union { float value; uint32_t bits; } narrowed = {(float)value};
    uint32_t rounding = 0x7FFF + ((narrowed.bits >> 16) & 1); /* half to even */
    if (type == FP64)
        ((double *)data)[i] = value;
    else if (type == FP32)
        ((float *)data)[i] = (float)value;
    else if (type == FP16)
        ((_Float16 *)data)[i] = (_Float16)value;
    else
        ((uint16_t *)data)[i] = value != value ? 0x7FC0 : (narrowed.bits + rounding) >> 16;
}

static int64_t get_integer(const void *data, int type, uint64_t i) {
    switch (type) {
    case 0: return ((const int8_t *)data)[i];
    case 1: return ((const int16_t *)data)[i];
    case 2: return ((const int32_t *)data)[i];
    case 7: return ((const uint8_t *)data)[i];
    case 8: return ((const uint16_t *)data)[i];
    case 9: return ((const uint32_t *)data)[i];
    default: return ((const int64_t *)data)[i];
    }
}

/* The lowest bytes of an integer are its value modulo the width: the machines are little-endian. */
static void put_integer(void *data, int type, uint64_t i, int64_t value) {
    memcpy((char *)data + i * type_bytes[type], &value, type_bytes[type]);
}

#define COMBINE(operation, a, b)           \
    ((operation) == SUM         ? (a) + (b) \
     : (operation) == PRODUCT   ? (a) * (b) \
     : (operation) == MAXIMUM   ? ((a) > (b) ? (a) : (b)) \
                                : ((a) < (b) ? (a) : (b)))

/* `out[i]` from element `first + i` of each rank's data. */
static void reduce(void *out, const Header *header, char **data, uint32_t ranks, uint64_t first) {
    int type = header->type, operation = header->operation;
    for (uint64_t i = 0; i < header->count; i++) {
        if (is_floating(type)) {
            double value = get_float(data[0], type, first + i);
            for (uint32_t rank = 1; rank < ranks; rank++)
                value = COMBINE(operation, value, get_float(data[rank], type, first + i));
            put_float(out, type, i, value);
        } else {
            int64_t value = get_integer(data[0], type, first + i);
            for (uint32_t rank = 1; rank < ranks; rank++)
                value = COMBINE(operation, value, get_integer(data[rank], type, first + i));
            put_integer(out, type, i, value);
        }
    }
}

/* ---------------------------------------------------------- a collective */
/* What fails here fails everything that waits for it, on whichever stream. */
static int fail(const char *format, Communicator *group, uint32_t peer) {
    static char reason[NAME_BYTES + 128];
    snprintf(reason, sizeof reason, format, group->rank, group->name, peer);
    sim_lose(EXECUTION_FAILED, reason);
    return sim_lost();
}

static size_t bytes_sent(const Collective *task, uint32_t rank) {
    const Header *header = &task->header;
    size_t one = header->count * type_bytes[header->type];
    switch (header->what) {
    case REDUCE_SCATTER: return one * task->group->ranks;
    case SCATTER: return rank == (uint32_t)header->root ? one * task->group->ranks : 0;
    case BROADCAST: return rank == (uint32_t)header->root ? one : 0;
    case BARRIER:
    case RECEIVE: return 0;
    default: return one;
    }
}

static void deliver(Collective *task, char **data) {
    Header *header = &task->header;
    uint32_t rank = task->group->rank, ranks = task->group->ranks;
    size_t one = header->count * type_bytes[header->type];
    int is_root = rank == (uint32_t)header->root;
    char *out = task->receive;
    switch (header->what) {
    case ALL_REDUCE: reduce(out, header, data, ranks, 0); break;
    case REDUCE_SCATTER: reduce(out, header, data, ranks, rank * header->count); break;
    case REDUCE:
        if (is_root) reduce(out, header, data, ranks, 0);
        break;
    case ALL_GATHER:
        for (uint32_t from = 0; from < ranks; from++) memcpy(out + from * one, data[from], one);
        break;
    case BROADCAST:
        if (!is_root) memcpy(out, data[header->root], one);
        break;
    case SCATTER: memcpy(out, data[header->root] + rank * one, one); break;
    default: break;
    }
}

/* Every rank reads every file, and only then anything is written. */
static int finish_turn(Collective *task) {
    Communicator *group = task->group;
    char path[PATH_BYTES + 64], *data[MAX_RANKS] = {0};
    int error = 0;
    for (uint32_t rank = 0; rank < group->ranks; rank++) {
        turn_path(path, group, task->turn, rank);
        data[rank] = read_message(path, &task->header, bytes_sent(task, rank));
        if (!data[rank])
            error = fail("rank %u of %s does another collective than rank %u", group, rank);
    }
    if (!error) deliver(task, data);
    for (uint32_t rank = 0; rank < group->ranks; rank++) free(data[rank]);
    turn_path(path, group, task->turn - 1, group->rank);
    unlink(path); /* there is none before the first turn */
    return error;
}

static int everybody_is_there(Collective *task) {
    char path[PATH_BYTES + 64];
    for (uint32_t rank = 0; rank < task->group->ranks; rank++) {
        turn_path(path, task->group, task->turn, rank);
        if (!is_there(path)) return 0;
    }
    return 1;
}

static double patience(const char *name) { return atof(sim_setting(name, "120")); }

static int begin(Collective *task, const char *path) {
    task->begun = 1;
    task->deadline = sim_now() + patience("HCCL_EXEC_TIMEOUT");
    if (task->header.what == RECEIVE) return 0;
    return publish(path, &task->header, task->send, bytes_sent(task, task->group->rank));
}

static int still_waiting(Collective *task) {
    if (sim_now() < task->deadline) return BLOCKED;
    task->begun = 0;
    return fail("rank %u of %s waited for its peers until HCCL_EXEC_TIMEOUT", task->group, 0);
}

static int run_turn(Collective *task) {
    char path[PATH_BYTES + 64];
    if (!task->begun) {
        task->turn = task->group->turns++;
        turn_path(path, task->group, task->turn, task->group->rank);
        int error = begin(task, path);
        if (error) return error;
    }
    if (!everybody_is_there(task)) return still_waiting(task);
    task->begun = 0;
    return finish_turn(task);
}

/* A send is done when the peer has taken it. */
static int run_send(Collective *task) {
    Communicator *group = task->group;
    uint32_t peer = task->header.root;
    char path[PATH_BYTES + 64];
    if (!task->begun) task->turn = group->sent[peer]++;
    message_path(path, group, group->rank, peer, task->turn);
    if (!task->begun) {
        Header header = task->header;
        header.root = group->rank;
        header.what = RECEIVE;
        task->begun = 1;
        task->deadline = sim_now() + patience("HCCL_EXEC_TIMEOUT");
        int error = publish(path, &header, task->send, bytes_sent(task, group->rank));
        return error ? error : BLOCKED;
    }
    if (is_there(path)) return still_waiting(task);
    task->begun = 0;
    return 0;
}

static int run_receive(Collective *task) {
    Communicator *group = task->group;
    uint32_t peer = task->header.root;
    size_t bytes = task->header.count * type_bytes[task->header.type];
    char path[PATH_BYTES + 64];
    if (!task->begun) task->turn = group->received[peer]++;
    message_path(path, group, peer, group->rank, task->turn);
    if (!task->begun) begin(task, path);
    if (!is_there(path)) return still_waiting(task);
    task->begun = 0;
    char *data = read_message(path, &task->header, bytes);
    if (!data)
        return fail("rank %u of %s takes another type or size than rank %u sends", group, peer);
    memcpy(task->receive, data, bytes);
    free(data);
    unlink(path);
    return 0;
}

int sim_run_collective(Task *task) {
    Collective *collective = task->collective;
    if (collective->header.what == SEND) return run_send(collective);
    if (collective->header.what == RECEIVE) return run_receive(collective);
    return run_turn(collective);
}

/* --------------------------------------------------- going on by itself */
int sim_waits_for_peers(void) {
    for (Stream *stream = sim_streams; stream; stream = stream->next)
        if (stream->done < stream->awaited_by_peers) return 1;
    return 0;
}

void sim_peers_await(Stream *stream) { stream->awaited_by_peers = stream->issued; }

/* With lazy streams only what peers wait for runs by itself, unless something else stops it: the
 * update of a graph that is replayed, say. */
static void go_on(void) {
    int stopped = 0;
    for (Stream *stream = sim_streams; stream; stream = stream->next)
        if (stream->done < stream->awaited_by_peers)
            stopped |= sim_drain(stream, stream->awaited_by_peers) == BLOCKED;
    if (stopped || !sim_lazy) sim_run_everything();
}

static void *keep_going(void *unused) {
    for (;;) {
        usleep(200);
        if (sim_waits_for_peers()) go_on();
    }
    return unused;
}

static void start_thread(void) {
    pthread_t thread;
    if (!pthread_create(&thread, NULL, keep_going, NULL)) pthread_detach(thread);
}

/* --------------------------------------------------------- communicators */
static Communicator *communicators;

static int remove_entry(const char *path, const struct stat *status, int flag, struct FTW *place) {
    (void)status, (void)flag, (void)place;
    return remove(path);
}
static void remove_folder(const char *folder) { nftw(folder, remove_entry, 8, FTW_DEPTH | FTW_PHYS); }

/* The last one to leave puts out the light. */
static void leave(Communicator *group) {
    char path[PATH_BYTES + 64];
    Header none = {0};
    int gone = 0;
    snprintf(path, sizeof path, "%s/left-%u", group->folder, group->rank);
    publish(path, &none, "", 0);
    for (uint32_t rank = 0; rank < group->ranks; rank++) {
        snprintf(path, sizeof path, "%s/left-%u", group->folder, rank);
        gone += is_there(path);
    }
    if (gone == (int)group->ranks) remove_folder(group->folder);
}

__attribute__((destructor)) static void leave_all(void) {
    for (Communicator *group = communicators; group; group = group->next) leave(group);
}

static const char *shared_memory(void) { return sim_setting("ASCEND_SIM_SHARED", "/dev/shm"); }

/* Processes that were killed have left their folders behind. */
static int remove_stale(const char *path, const struct stat *status, int flag, struct FTW *place) {
    (void)status;
    int maker;
    if (place->level != 1 || flag != FTW_DP) return 0;
    if (sscanf(path + place->base, "ascend_sim-%d-", &maker) == 1 && kill(maker, 0) && errno == ESRCH)
        remove_folder(path);
    return 0;
}

API int HcclGetRootInfo(char *info) {
    static int made;
    nftw(shared_memory(), remove_stale, 8, FTW_DEPTH | FTW_PHYS);
    memset(info, 0, ROOT_INFO_BYTES);
    snprintf(info, PATH_BYTES, "%s/ascend_sim-%d-%d", shared_memory(), getpid(), made++);
    return mkdir(info, 0700) ? sim_fail(SYSTEM_CALL, "cannot make %s", info) : OK;
}

static int await_everybody(Communicator *group) {
    char path[PATH_BYTES + 64];
    double deadline = sim_now() + patience("HCCL_CONNECT_TIMEOUT");
    for (uint32_t rank = 0; rank < group->ranks; rank++) {
        snprintf(path, sizeof path, "%s/joined-%u", group->folder, rank);
        while (!is_there(path)) {
            if (sim_now() > deadline)
                return sim_fail(TIMEOUT, "rank %u of %s did not come until HCCL_CONNECT_TIMEOUT", rank,
                                group->name);
            usleep(500);
        }
    }
    return OK;
}

static int join(uint32_t ranks, const char *info, uint32_t rank, const char *name, void **out) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    char path[PATH_BYTES + 64];
    Header none = {0};
    if (!ranks || ranks > MAX_RANKS || rank >= ranks)
        return sim_fail(BAD_PARAMETER, "rank %u of a communicator of %u", rank, ranks);
    Communicator *group = calloc(1, sizeof *group);
    group->rank = rank;
    group->ranks = ranks;
    snprintf(group->folder, sizeof group->folder, "%s", info);
    snprintf(group->name, sizeof group->name, "%s", name && *name ? name : strrchr(info, '/') + 1);
    snprintf(path, sizeof path, "%s/joined-%u", group->folder, rank);
    int error = publish(path, &none, "", 0);
    if (!error) error = await_everybody(group);
    if (error) return error;
    pthread_mutex_lock(&sim_lock);
    group->next = communicators;
    communicators = group;
    pthread_mutex_unlock(&sim_lock);
    pthread_once(&once, start_thread);
    *out = group;
    return OK;
}

API int HcclCommInitRootInfo(uint32_t ranks, const char *info, uint32_t rank, void **out) {
    return join(ranks, info, rank, NULL, out);
}
/* The config begins with its own size; of what follows only the name means anything here. */
API int HcclCommInitRootInfoConfig(uint32_t ranks, const char *info, uint32_t rank, const char *config,
                                   void **out) {
    size_t size;
    memcpy(&size, config, sizeof size);
    return join(ranks, info, rank, size >= CONFIG_NAME + NAME_BYTES ? config + CONFIG_NAME : NULL, out);
}
API int HcclCommDestroy(void *handle) {
    sim_settle();
    pthread_mutex_lock(&sim_lock);
    for (Communicator **link = &communicators; *link; link = &(*link)->next)
        if (*link == handle) {
            *link = (*link)->next;
            break;
        }
    pthread_mutex_unlock(&sim_lock);
    leave(handle); /* itself it stays: captured collectives may still name it */
    return OK;
}
API int HcclGetCommName(void *handle, char *name) {
    return strcpy(name, ((Communicator *)handle)->name), OK;
}
API int HcclGetRankSize(void *handle, uint32_t *ranks) {
    return *ranks = ((Communicator *)handle)->ranks, OK;
}
API int HcclGetRankId(void *handle, uint32_t *rank) {
    return *rank = ((Communicator *)handle)->rank, OK;
}
API int HcclGetCommAsyncError(void *handle, int *error) { return (void)handle, *error = OK, OK; }
API int HcclSetConfig(int config, int value) { return (void)config, (void)value, OK; }
API const char *HcclGetErrorString(int error) {
    return error == OK              ? "success"
           : error == BAD_PARAMETER ? "parameter error"
           : error == TIMEOUT       ? "timeout"
                                    : "call system interface error";
}

/* ----------------------------------------------------------------- calls */
static int submit(const char *name, void *handle, Header header, const void *send, void *receive,
                  aclrtStream on) {
    Stream *stream = sim_stream(on);
    Communicator *group = handle;
    if (header.type < 0 || header.type >= TYPES)
        return sim_fail(BAD_PARAMETER, "%s does not know the data type %d", name, header.type);
    if (header.root < 0 || (uint32_t)header.root >= group->ranks)
        return sim_fail(BAD_PARAMETER, "%s names rank %d of %u", name, header.root, group->ranks);
    Task *task = sim_task(TASK_COLLECTIVE, name);
    task->collective = calloc(1, sizeof *task->collective);
    *task->collective =
        (Collective){.group = group, .header = header, .send = send, .receive = receive};
    sim_log((LogEntry){.kind = LOG_COLLECTIVE,
                       .bytes = bytes_sent(task->collective, group->rank),
                       .stream = stream->id,
                       .captured = stream->capture != NULL},
            name);
    int captured = stream->capture || stream->update;
    int error = sim_submit(stream, task);
    if (!error && !captured) sim_peers_await(stream);
    return error;
}

API int HcclAllReduce(void *send, void *receive, uint64_t count, int type, int operation, void *group,
                      aclrtStream stream) {
    Header header = {ALL_REDUCE, type, operation, 0, count};
    return submit("HcclAllReduce", group, header, send, receive, stream);
}
API int HcclReduce(void *send, void *receive, uint64_t count, int type, int operation, uint32_t root,
                   void *group, aclrtStream stream) {
    Header header = {REDUCE, type, operation, root, count};
    return submit("HcclReduce", group, header, send, receive, stream);
}
API int HcclReduceScatter(void *send, void *receive, uint64_t count, int type, int operation,
                          void *group, aclrtStream stream) {
    Header header = {REDUCE_SCATTER, type, operation, 0, count};
    return submit("HcclReduceScatter", group, header, send, receive, stream);
}
API int HcclAllGather(void *send, void *receive, uint64_t count, int type, void *group,
                      aclrtStream stream) {
    Header header = {ALL_GATHER, type, 0, 0, count};
    return submit("HcclAllGather", group, header, send, receive, stream);
}
API int HcclBroadcast(void *buffer, uint64_t count, int type, uint32_t root, void *group,
                      aclrtStream stream) {
    Header header = {BROADCAST, type, 0, root, count};
    return submit("HcclBroadcast", group, header, buffer, buffer, stream);
}
API int HcclScatter(void *send, void *receive, uint64_t count, int type, uint32_t root, void *group,
                    aclrtStream stream) {
    Header header = {SCATTER, type, 0, root, count};
    return submit("HcclScatter", group, header, send, receive, stream);
}
API int HcclBarrier(void *group, aclrtStream stream) {
    Header header = {BARRIER, 0, 0, 0, 0};
    return submit("HcclBarrier", group, header, NULL, NULL, stream);
}
API int HcclSend(void *send, uint64_t count, int type, uint32_t to, void *group, aclrtStream stream) {
    Header header = {SEND, type, 0, to, count};
    return submit("HcclSend", group, header, send, NULL, stream);
}
API int HcclRecv(void *receive, uint64_t count, int type, uint32_t from, void *group,
                 aclrtStream stream) {
    Header header = {RECEIVE, type, 0, from, count};
    return submit("HcclRecv", group, header, NULL, receive, stream);
}
