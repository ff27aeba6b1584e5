/* Everything that happened, in order, for trace.py to read. */
#include "sim.h"

static LogEntry *entries;
static int64_t used, room;
static char last_error[512]; /* of any thread: a kernel may fail far from the call that asks */

void sim_log(LogEntry entry, const char *name) {
    snprintf(entry.name, sizeof entry.name, "%s", name ? name : "");
    pthread_mutex_lock(&sim_lock);
    if (used == room) {
        room = room ? 2 * room : 4096;
        entries = realloc(entries, room * sizeof *entries);
    }
    entries[used++] = entry;
    pthread_mutex_unlock(&sim_lock);
}

API int64_t sim_log_size(void) { return used; }
API LogEntry *sim_log_entries(void) { return entries; }
API void sim_log_clear(void) { used = 0; }

int sim_fail(int code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int prefix = snprintf(last_error, sizeof last_error, "ascend_sim: ");
    vsnprintf(last_error + prefix, sizeof last_error - prefix, format, arguments);
    va_end(arguments);
    return code;
}

API void sim_set_error(const char *message) { sim_fail(0, "%s", message); }

/* torch_npu asks once after a failed call and quotes the answer in its exception. */
API const char *aclGetRecentErrMsg(void) {
    static __thread char message[512];
    memcpy(message, last_error, sizeof message);
    last_error[0] = 0;
    return message;
}
