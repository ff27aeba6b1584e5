/* Start-up, devices and their properties. */
#include <time.h>

#include "sim.h"

static int initialized;
static int any_device = -1;
static __thread int current_device = -1;

const char *sim_setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

double sim_now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

/* A process sees the devices that ASCEND_RT_VISIBLE_DEVICES lists, numbered from 0. */
static uint32_t device_count(void) {
    uint32_t present = atoi(sim_setting("ASCEND_SIM_DEVICES", "1")), listed = 1;
    const char *visible = getenv("ASCEND_RT_VISIBLE_DEVICES");
    if (!visible || !*visible) return present;
    for (const char *place = visible; (place = strchr(place, ',')); place++) listed++;
    return listed < present ? listed : present;
}
static int64_t l2_bytes(void) {
    return (int64_t)(atof(sim_setting("ASCEND_SIM_L2_MB", "192")) * (1 << 20));
}
static int64_t hbm_bytes(void) {
    return (int64_t)(atof(sim_setting("ASCEND_SIM_HBM_GB", "64")) * (1ll << 30));
}

API aclError aclInit(const char *config) {
    (void)config;
    if (initialized) return ACL_ERROR_REPEAT_INITIALIZE;
    initialized = 1;
    return 0;
}
API aclError aclFinalize(void) {
    sim_run_everything();
    initialized = 0;
    return 0;
}

API aclError aclrtGetDeviceCount(uint32_t *count) {
    *count = device_count();
    return 0;
}
API aclError aclrtSetDevice(int32_t device) {
    if (device < 0 || (uint32_t)device >= device_count())
        return sim_fail(ACL_ERROR_INVALID_PARAM, "there is no device %d", device);
    current_device = any_device = device;
    return 0;
}
API aclError aclrtGetDevice(int32_t *device) {
    if (current_device < 0) return ACL_ERROR_RT_CONTEXT_NULL;
    *device = current_device;
    return 0;
}
API aclError aclrtResetDevice(int32_t device) {
    (void)device;
    return 0;
}
API aclError aclrtGetCurrentContext(aclrtContext *context) {
    *context = (void *)(intptr_t)(current_device + 1);
    return 0;
}
API aclError aclrtSetCurrentContext(aclrtContext context) {
    current_device = (int)(intptr_t)context - 1;
    return 0;
}
API aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    if (flags) *flags = 0;
    *active = device == any_device;
    return 0;
}
API aclError aclrtGetLogicDevIdByUserDevId(const int32_t user, int32_t *const logical) {
    *logical = user;
    return 0;
}
API aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) {
    (void)device, (void)peer;
    *can = 0;
    return 0;
}

/* ----------------------------------------------------------- properties */
API const char *aclrtGetSocName(void) { return sim_setting("ASCEND_SIM_SOC", "Ascend910B3"); }

/* cann.py knows the releases; only this one was published as a candidate. */
static const char *cann_version(void) {
    static __thread char version[32];
    const char *name = sim_setting("ASCEND_SIM_CANN", "9.1");
    snprintf(version, sizeof version, "%s.%s", name, strcmp(name, "8.3") ? "0" : "RC1");
    return version;
}
API aclError aclsysGetVersionStr(char *package, char *version) {
    (void)package;
    strcpy(version, cann_version());
    return 0;
}
API aclError aclsysGetCANNVersion(aclCANNPackageName package, aclCANNPackageVersion *version) {
    (void)package;
    memset(version, 0, sizeof *version);
    snprintf(version->version, sizeof version->version, "%s", cann_version());
    return 0;
}

enum { CUBE_CORES = 20, VECTOR_CORES = 40 };

API aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo what, int64_t *value) {
    (void)device;
    *value = what == ACL_DEVICE_INFO_L2_SIZE           ? l2_bytes()
             : what == ACL_DEVICE_INFO_VECTOR_CORE_NUM ? VECTOR_CORES
                                                       : CUBE_CORES;
    return 0;
}
enum { TOTAL_GLOBAL_MEMORY = 301, L2_CACHE = 302 }; /* of aclrtDevAttr; 2.8 has no names for them */

API aclError aclrtGetDeviceInfo(uint32_t device, aclrtDevAttr what, int64_t *value) {
    (void)device;
    *value = (int)what == TOTAL_GLOBAL_MEMORY         ? hbm_bytes()
             : (int)what == L2_CACHE                 ? l2_bytes()
             : what == ACL_DEV_ATTR_VECTOR_CORE_NUM ? VECTOR_CORES
             : what < 300                           ? CUBE_CORES
                                                    : 0;
    return 0;
}
API aclError aclrtGetDeviceResLimit(int32_t device, aclrtDevResLimitType type, uint32_t *value) {
    (void)device;
    *value = type ? VECTOR_CORES : CUBE_CORES;
    return 0;
}
API aclError aclrtGetStreamResLimit(aclrtStream stream, aclrtDevResLimitType type,
                                    uint32_t *value) {
    (void)stream;
    *value = type ? VECTOR_CORES : CUBE_CORES;
    return 0;
}

/* The wheel reads these options back; "disable" for jit is what a card answers by default on A2. */
API size_t aclGetCompileoptSize(aclCompileOpt option) {
    return option == ACL_OP_JIT_COMPILE ? sizeof "disable" : sizeof "0";
}
API aclError aclGetCompileopt(aclCompileOpt option, char *value, size_t size) {
    snprintf(value, size, "%s", option == ACL_OP_JIT_COMPILE ? "disable" : "0");
    return 0;
}
API aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value) {
    (void)option;
    *value = 0;
    return 0;
}
API aclError aclrtGetLastError(aclrtLastErrLevel level) {
    (void)level;
    return 0;
}
API aclError aclrtPeekAtLastError(aclrtLastErrLevel level) {
    (void)level;
    return 0;
}
