/* Memory blocks, copies between them, and the account of both.
 *
 * Fresh device memory is filled with a pattern that is NaN in bf16, fp16, fp32 and fp64 and a huge
 * number in int32 and int64, so that a read of memory nobody wrote shows up in the result. */
#include "sim.h"

typedef struct Block {
    struct Block *next;
    char *start;
    size_t bytes;
    int on_device;
} Block;

static Block *blocks;
static size_t device_bytes, device_peak;
static uint64_t frees;     /* Python drops its cached views when this changes */
static int copies_to_fail; /* planted fault */

API size_t sim_device_bytes(void) { return device_bytes; }
API size_t sim_device_peak(void) { return device_peak; }
API void sim_reset_device_peak(void) { device_peak = device_bytes; }
API uint64_t *sim_free_counter(void) { return &frees; }
API void sim_fail_copies(int count) { copies_to_fail = count; }

static size_t hbm_bytes(void) {
    return (size_t)(atof(sim_setting("ASCEND_SIM_HBM_GB", "64")) * (1ull << 30));
}

/* A copy of the block, because another thread may free it; all zeros when there is none. */
static Block find(const void *pointer) {
    Block found = {0};
    pthread_mutex_lock(&sim_lock);
    for (Block *block = blocks; block && !found.start; block = block->next)
        if ((char *)pointer >= block->start && (char *)pointer < block->start + block->bytes)
            found = *block;
    pthread_mutex_unlock(&sim_lock);
    return found;
}

API int sim_is_device(const void *pointer, size_t bytes) {
    Block block = find(pointer);
    return block.on_device && (char *)pointer + bytes <= block.start + block.bytes;
}

enum { POISON = 0x7FFD };

void sim_poison(void *start, size_t bytes) {
    uint16_t *words = start;
    for (size_t i = 0; i < bytes / 2; i++) words[i] = POISON;
}

static int allocate(void **out, size_t bytes, int on_device) {
    if (on_device && device_bytes + bytes > hbm_bytes())
        return sim_fail(ACL_ERROR_RT_MEMORY_ALLOCATION,
                        "out of device memory: %zu in use, %zu more asked for", device_bytes,
                        bytes);
    void *start;
    if (posix_memalign(&start, on_device ? 2 << 20 : 4096, bytes ? bytes : 1))
        return sim_fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host has no memory left");
    if (on_device) sim_poison(start, bytes);
    Block *block = malloc(sizeof *block);
    pthread_mutex_lock(&sim_lock);
    *block = (Block){blocks, start, bytes, on_device};
    blocks = block;
    if (on_device) device_bytes += bytes;
    if (device_bytes > device_peak) device_peak = device_bytes;
    pthread_mutex_unlock(&sim_lock);
    *out = start;
    return 0;
}

static int release(void *start) {
    sim_settle(); /* queued tasks may still name this block */
    pthread_mutex_lock(&sim_lock);
    for (Block **link = &blocks; *link; link = &(*link)->next) {
        if ((*link)->start != start) continue;
        Block *block = *link;
        *link = block->next;
        if (block->on_device) device_bytes -= block->bytes;
        frees++;
        pthread_mutex_unlock(&sim_lock);
        free(start);
        free(block);
        return 0;
    }
    pthread_mutex_unlock(&sim_lock);
    return sim_fail(ACL_ERROR_INVALID_PARAM, "free of an unknown pointer %p", start);
}

/* Allocating inside a capture is allowed: the allocator grows the graph's private pool. */
API aclError aclrtMalloc(void **out, size_t bytes, aclrtMemMallocPolicy policy) {
    (void)policy;
    return allocate(out, bytes, 1);
}
API aclError aclrtMallocAlign32(void **out, size_t bytes, aclrtMemMallocPolicy policy) {
    return aclrtMalloc(out, bytes, policy);
}
API aclError aclrtFree(void *start) { return release(start); }
API aclError aclrtMallocHost(void **out, size_t bytes) { return allocate(out, bytes, 0); }
API aclError aclrtFreeHost(void *start) { return release(start); }
API aclError aclrtGetMemInfo(aclrtMemAttr which, size_t *unused, size_t *total) {
    (void)which;
    *total = hbm_bytes();
    *unused = *total - device_bytes;
    return 0;
}
API aclError aclrtPointerGetAttributes(const void *pointer, aclrtPtrAttributes *attributes) {
    Block block = find(pointer);
    memset(attributes, 0, sizeof *attributes);
    attributes->location.type = !block.start      ? ACL_MEM_LOCATION_TYPE_UNREGISTERED
                                : block.on_device ? ACL_MEM_LOCATION_TYPE_DEVICE
                                                  : ACL_MEM_LOCATION_TYPE_HOST;
    return 0;
}

/* torch_npu's allocator keeps freed memory and hands it out again, with the old values in it. Its
 * object has one virtual function for that, c10::Allocator::allocate, which is called through ours.
 * Only while nothing is queued: a stream that runs late may still read the old values, rightly. */
typedef struct { /* c10::DataPtr, returned in memory by the C++ convention and by C's */
    void *data, *context, *deleter;
    int64_t device;
} DataPtr;

enum { SLOT_OF_ALLOCATE = 2, VIRTUAL_FUNCTIONS = 96 }; /* behind the two destructors */
static DataPtr (*allocate_of_torch)(void *self, size_t bytes);

static DataPtr allocate_poisoned(void *self, size_t bytes) {
    DataPtr memory = allocate_of_torch(self, bytes);
    if (memory.data && sim_nothing_is_queued() && sim_is_device(memory.data, bytes))
        sim_poison(memory.data, bytes);
    return memory;
}

API void sim_poison_reused(void *allocator) {
    static void *table[2 + VIRTUAL_FUNCTIONS]; /* with what stands before it: offset, type */
    void ***virtual = allocator;
    memcpy(table, *virtual - 2, sizeof table);
    memcpy(&allocate_of_torch, &table[2 + SLOT_OF_ALLOCATE], sizeof allocate_of_torch);
    void *ours = allocate_poisoned;
    table[2 + SLOT_OF_ALLOCATE] = ours;
    *virtual = table + 2;
}

/* ---------------------------------------------------------------- copies */
static const char *copy_name(aclrtMemcpyKind kind) {
    return kind == ACL_MEMCPY_HOST_TO_DEVICE     ? "copy_host_to_device"
           : kind == ACL_MEMCPY_DEVICE_TO_HOST   ? "copy_device_to_host"
           : kind == ACL_MEMCPY_DEVICE_TO_DEVICE ? "copy_device_to_device"
                                                 : "copy_host_to_host";
}

static int check_copy(void *destination, size_t room, const void *source, size_t bytes,
                      aclrtMemcpyKind kind) {
    if (sim_lost()) return sim_lost();
    if (copies_to_fail > 0) {
        copies_to_fail--;
        return sim_fail(ACL_ERROR_RT_INTERNAL_ERROR, "planted fault: this copy fails");
    }
    if (bytes > room)
        return sim_fail(ACL_ERROR_INVALID_PARAM, "copy of %zu bytes into %zu", bytes, room);
    int to_device = find(destination).on_device, from_device = find(source).on_device;
    int wrong = kind == ACL_MEMCPY_HOST_TO_DEVICE     ? !to_device || from_device
                : kind == ACL_MEMCPY_DEVICE_TO_HOST   ? to_device || !from_device
                : kind == ACL_MEMCPY_DEVICE_TO_DEVICE ? !to_device || !from_device
                                                      : 0;
    if (wrong)
        return sim_fail(ACL_ERROR_INVALID_PARAM, "%s from %s memory to %s memory", copy_name(kind),
                        from_device ? "device" : "host", to_device ? "device" : "host");
    if (to_device && !sim_is_device(destination, bytes))
        return sim_fail(ACL_ERROR_INVALID_PARAM, "%s writes past its device block",
                        copy_name(kind));
    if (from_device && !sim_is_device(source, bytes))
        return sim_fail(ACL_ERROR_INVALID_PARAM, "%s reads past its device block", copy_name(kind));
    return 0;
}

static void log_copy(void *destination, const void *source, size_t bytes, aclrtMemcpyKind kind,
                     Stream *stream) {
    sim_log((LogEntry){.kind = LOG_COPY,
                       .bytes = bytes,
                       .flag = stream != NULL,
                       .stream = stream ? stream->id : -1,
                       .captured = stream && stream->capture,
                       .source = (uintptr_t)source,
                       .destination = (uintptr_t)destination},
            copy_name(kind));
}

API aclError aclrtMemcpy(void *destination, size_t room, const void *source, size_t bytes,
                         aclrtMemcpyKind kind) {
    int error = sim_forbidden_in_capture("aclrtMemcpy");
    if (!error) error = check_copy(destination, room, source, bytes, kind);
    if (error) return error;
    log_copy(destination, source, bytes, kind, NULL);
    memmove(destination, source, bytes);
    return 0;
}

API aclError aclrtMemcpyAsync(void *destination, size_t room, const void *source, size_t bytes,
                              aclrtMemcpyKind kind, aclrtStream handle) {
    int error = check_copy(destination, room, source, bytes, kind);
    if (error) return error;
    Stream *stream = sim_stream(handle);
    const void *host = kind == ACL_MEMCPY_HOST_TO_DEVICE ? source : destination;
    int pageable = kind != ACL_MEMCPY_DEVICE_TO_DEVICE && !find(host).start;
    if (stream->capture && pageable)
        return sim_fail(ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT,
                        "copy from or to pageable host memory in a capture");
    Task *task = sim_task(TASK_COPY, copy_name(kind));
    task->destination = destination;
    task->source = source;
    task->bytes = bytes;
    log_copy(destination, source, bytes, kind, stream);
    error = sim_submit(stream, task);
    /* a pageable buffer may be reused as soon as the call returns: the runtime waits */
    if (!error && pageable && !stream->capture) error = sim_synchronize(stream);
    return error;
}
API aclError aclrtMemcpyAsyncWithCondition(void *destination, size_t room, const void *source,
                                           size_t bytes, aclrtMemcpyKind kind, aclrtStream stream) {
    return aclrtMemcpyAsync(destination, room, source, bytes, kind, stream);
}

API aclError aclrtMemset(void *start, size_t room, int32_t value, size_t bytes) {
    if (bytes > room)
        return sim_fail(ACL_ERROR_INVALID_PARAM, "memset of %zu bytes in %zu", bytes, room);
    int error = sim_forbidden_in_capture("aclrtMemset");
    if (error) return error;
    memset(start, value, bytes);
    return 0;
}
API aclError aclrtMemsetAsync(void *start, size_t room, int32_t value, size_t bytes,
                              aclrtStream stream) {
    if (bytes > room)
        return sim_fail(ACL_ERROR_INVALID_PARAM, "memset of %zu bytes in %zu", bytes, room);
    Task *task = sim_task(TASK_SET, "memset");
    task->destination = start;
    task->value = value;
    task->bytes = bytes;
    sim_log((LogEntry){.kind = LOG_SET, .bytes = bytes, .stream = sim_stream(stream)->id},
            task->name);
    return sim_submit(sim_stream(stream), task);
}

/* npu_prefetch ends here: a hint that moves nothing, but has a stream and a byte count. */
API aclError aclrtCmoAsync(void *start, size_t bytes, aclrtCmoType type, aclrtStream handle) {
    Stream *stream = sim_stream(handle);
    if (type == ACL_RT_CMO_TYPE_PREFETCH && !sim_is_device(start, bytes))
        return sim_fail(ACL_ERROR_INVALID_PARAM, "prefetch past a device block");
    sim_log((LogEntry){.kind = LOG_PREFETCH,
                       .bytes = bytes,
                       .stream = stream->id,
                       .captured = stream->capture != NULL,
                       .source = (uintptr_t)start},
            "prefetch");
    return sim_submit(stream, sim_task(TASK_NOTHING, "prefetch"));
}
