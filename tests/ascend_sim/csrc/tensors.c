/* aclTensor and its relatives, and the two-phase operators built on them.
 *
 * aclnnXxxGetWorkspaceSize(arguments..., &workspace, &executor) plans a call, aclnnXxx(workspace,
 * size, executor, stream) launches it.  build.py generates both for every operator the wheel can
 * ask for; they end in sim_plan and sim_launch_planned.  The executor is a Plan.
 */
#include "sim.h"

enum { MAX_DIMS = 8 };

typedef struct { /* read by tensors.py as 30 int64 */
    int64_t data, dims, storage_dims, dtype, format, offset;
    int64_t view[MAX_DIMS], stride[MAX_DIMS], storage[MAX_DIMS];
} Tensor;

typedef struct { /* arrays and lists: read by tensors.py as 2 int64 */
    int64_t data, count;
    int owns_elements;
} List;

typedef struct { /* read by tensors.py: dtype, then the raw value */
    int64_t dtype;
    char raw[16];
} Scalar;

API void *aclCreateTensor(const int64_t *view, uint64_t dims, aclDataType dtype,
                          const int64_t *stride, int64_t offset, aclFormat format,
                          const int64_t *storage, uint64_t storage_dims, void *data) {
    if (dims > MAX_DIMS || storage_dims > MAX_DIMS) return NULL;
    Tensor *tensor = calloc(1, sizeof *tensor);
    *tensor = (Tensor){.data = (intptr_t)data,
                       .dims = dims,
                       .storage_dims = storage_dims,
                       .dtype = dtype,
                       .format = format,
                       .offset = offset};
    memcpy(tensor->view, view, dims * sizeof *view);
    memcpy(tensor->stride, stride, dims * sizeof *stride);
    memcpy(tensor->storage, storage, storage_dims * sizeof *storage);
    return tensor;
}

static size_t scalar_bytes(aclDataType dtype) {
    switch (dtype) {
    case ACL_BOOL:
    case ACL_INT8:
    case ACL_UINT8: return 1;
    case ACL_FLOAT16:
    case ACL_BF16:
    case ACL_INT16: return 2;
    case ACL_FLOAT:
    case ACL_INT32: return 4;
    case ACL_COMPLEX128: return 16;
    default: return 8;
    }
}
API void *aclCreateScalar(void *value, aclDataType dtype) {
    Scalar *scalar = calloc(1, sizeof *scalar);
    scalar->dtype = dtype;
    memcpy(scalar->raw, value, scalar_bytes(dtype));
    return scalar;
}

static void *make_list(const void *elements, uint64_t count, size_t size, int owns_elements) {
    List *list = calloc(1, sizeof *list);
    void *copy = malloc(count * size + 1);
    memcpy(copy, elements, count * size);
    *list = (List){(intptr_t)copy, count, owns_elements};
    return list;
}
API void *aclCreateIntArray(const int64_t *values, uint64_t count) {
    return make_list(values, count, 8, 0);
}
API void *aclCreateFloatArray(const float *values, uint64_t count) {
    return make_list(values, count, 4, 0);
}
API void *aclCreateBoolArray(const _Bool *values, uint64_t count) {
    return make_list(values, count, 1, 0);
}
API void *aclCreateTensorList(void *const *values, uint64_t count) {
    return make_list(values, count, 8, 1);
}
API void *aclCreateScalarList(void *const *values, uint64_t count) {
    return make_list(values, count, 8, 1);
}

static int free_list(List *list) {
    if (!list) return 0;
    void **elements = (void **)(intptr_t)list->data;
    for (int64_t i = 0; list->owns_elements && i < list->count; i++) free(elements[i]);
    free(elements);
    free(list);
    return 0;
}
API int aclDestroyTensor(void *tensor) { return free(tensor), 0; }
API int aclDestroyScalar(void *scalar) { return free(scalar), 0; }
API int aclDestroyIntArray(void *list) { return free_list(list); }
API int aclDestroyFloatArray(void *list) { return free_list(list); }
API int aclDestroyBoolArray(void *list) { return free_list(list); }
API int aclDestroyTensorList(void *list) { return free_list(list); }
API int aclDestroyScalarList(void *list) { return free_list(list); }
API int aclDestroyAclOpExecutor(void *executor) { return (void)executor, 0; }

API int aclGetViewShape(const void *handle, int64_t **dims, uint64_t *count) {
    const Tensor *tensor = handle;
    *count = tensor->dims;
    *dims = malloc((tensor->dims + 1) * sizeof **dims);
    memcpy(*dims, tensor->view, tensor->dims * sizeof **dims);
    return 0;
}

/* ------------------------------------------------- the two-phase operators */
enum { NO_STAND_IN = 561003, MAX_OPERATORS = 4096 };

typedef struct {
    int integers; /* how many integer and pointer arguments come before (&workspace, &executor) */
    int has_workspace;
} Operator;

static Operator operators[MAX_OPERATORS];
static int64_t (*plan_call)(int index, int only_workspace, const int64_t *integers,
                            const double *floats);
static __thread Plan plan; /* of the call that Python plans at this moment */
static __thread const char *missing;

API void sim_set_plan_callback(int64_t (*callback)(int, int, const int64_t *, const double *)) {
    plan_call = callback;
}
API void sim_register_operator(int index, int integers, int has_workspace) {
    operators[index] = (Operator){integers, has_workspace};
}
API void sim_plan_needs(int64_t workspace, int64_t hidden_copies) {
    plan.workspace = workspace;
    plan.hidden_copies = hidden_copies;
}
/* The last operator this thread asked for that has no stand-in; asking clears it. */
API const char *sim_take_missing(void) {
    const char *name = missing;
    missing = NULL;
    return name;
}
API void sim_set_missing(const char *name) { missing = strdup(name); }

API int sim_plan(int index, const char *name, int only_workspace, const int64_t *integers,
                 const double *floats) {
    Operator *planned = &operators[index];
    if (!planned->integers) {
        missing = name;
        return sim_fail(NO_STAND_IN, "%s has no stand-in kernel in the simulator", name);
    }
    uint64_t *workspace = (uint64_t *)integers[planned->integers];
    int64_t *executor = (int64_t *)integers[planned->integers + 1];
    *workspace = 0;
    *executor = 0;
    if (only_workspace && !planned->has_workspace) return 0;
    plan = (Plan){0};
    plan.kernel = plan_call ? plan_call(index, only_workspace, integers, floats) : 0;
    if (plan.kernel <= 0)
        return ACL_ERROR_INVALID_PARAM; /* Python has left the reason with sim_set_error */
    *workspace = plan.workspace;
    if (only_workspace) return 0;
    Plan *kept = malloc(sizeof *kept);
    *kept = plan;
    *executor = (intptr_t)kept;
    return 0;
}
API int sim_launch_planned(void *stream, const char *name, Plan *kept, void *workspace,
                           uint64_t bytes) {
    Plan launched = *kept;
    free(kept);
    if (bytes < (uint64_t)launched.workspace)
        return sim_fail(ACL_ERROR_INVALID_PARAM, "%s needs a workspace of %lld bytes, not %llu",
                        name, (long long)launched.workspace, (unsigned long long)bytes);
    return sim_launch_plan(stream, name, launched, workspace);
}
