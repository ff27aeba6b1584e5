/* The older operator door: one call with descriptions of inputs and outputs.  The wheel uses it
 * for format casts on 910B (TransData, Identity). */
#include "sim.h"

enum { MAX_DIMS = 8 };

typedef struct { /* read by tensors.py as 21 int64 */
    int64_t dtype, dims, format, storage_dims, storage_format;
    int64_t shape[MAX_DIMS], storage[MAX_DIMS];
} Description;

typedef struct {
    void *data;
    size_t bytes;
} Buffer;

static int64_t (*plan_aclop)(const char *name, int inputs, const void *const *input_descriptions,
                             const void *const *input_buffers, int outputs,
                             const void *const *output_descriptions,
                             const void *const *output_buffers);
API void sim_set_aclop_callback(void *callback) { plan_aclop = callback; }

API aclTensorDesc *aclCreateTensorDesc(aclDataType dtype, int dims, const int64_t *shape,
                                       aclFormat format) {
    Description *description = calloc(1, sizeof *description);
    *description = (Description){.dtype = dtype,
                                 .dims = dims,
                                 .format = format,
                                 .storage_dims = dims,
                                 .storage_format = format};
    for (int i = 0; i < dims && i < MAX_DIMS; i++)
        description->shape[i] = description->storage[i] = shape[i];
    return (aclTensorDesc *)description;
}
API void aclDestroyTensorDesc(const aclTensorDesc *description) { free((void *)description); }
API aclError aclSetTensorFormat(aclTensorDesc *description, aclFormat format) {
    ((Description *)description)->storage_format = format;
    return 0;
}
API aclError aclSetTensorShape(aclTensorDesc *handle, int dims, const int64_t *shape) {
    Description *description = (Description *)handle;
    description->storage_dims = dims;
    for (int i = 0; i < dims && i < MAX_DIMS; i++) description->storage[i] = shape[i];
    return 0;
}
API aclError aclSetTensorPlaceMent(aclTensorDesc *description, aclMemType type) {
    return (void)description, (void)type, 0;
}
API void aclSetTensorDescName(aclTensorDesc *description, const char *name) {
    (void)description, (void)name;
}
API aclDataType aclGetTensorDescType(const aclTensorDesc *description) {
    return ((Description *)description)->dtype;
}
API aclFormat aclGetTensorDescFormat(const aclTensorDesc *description) {
    return ((Description *)description)->format;
}
API size_t aclGetTensorDescNumDims(const aclTensorDesc *description) {
    return ((Description *)description)->dims;
}
API aclError aclGetTensorDescDimV2(const aclTensorDesc *description, size_t index, int64_t *size) {
    *size = ((Description *)description)->shape[index];
    return 0;
}
API aclDataBuffer *aclCreateDataBuffer(void *data, size_t bytes) {
    Buffer *buffer = malloc(sizeof *buffer);
    *buffer = (Buffer){data, bytes};
    return (aclDataBuffer *)buffer;
}
API aclError aclDestroyDataBuffer(const aclDataBuffer *buffer) { return free((void *)buffer), 0; }
API aclopAttr *aclopCreateAttr(void) { return malloc(8); }
API void aclopDestroyAttr(const aclopAttr *attribute) { free((void *)attribute); }

API aclError aclopCompileAndExecute(const char *name, int inputs,
                                    const aclTensorDesc *const input_descriptions[],
                                    const aclDataBuffer *const input_buffers[], int outputs,
                                    const aclTensorDesc *const output_descriptions[],
                                    aclDataBuffer *const output_buffers[],
                                    const aclopAttr *attribute, aclopEngineType engine,
                                    aclopCompileType compile, const char *path,
                                    aclrtStream stream) {
    (void)attribute, (void)engine, (void)compile, (void)path;
    int64_t kernel = plan_aclop ? plan_aclop(name, inputs, (const void *const *)input_descriptions,
                                             (const void *const *)input_buffers, outputs,
                                             (const void *const *)output_descriptions,
                                             (const void *const *)output_buffers)
                                : 0;
    if (kernel <= 0)
        return sim_fail(ACL_ERROR_OP_NOT_FOUND, "aclop %s has no stand-in kernel in the simulator",
                        name);
    return sim_launch(stream, name, kernel, 0);
}
API aclError aclopCompileAndExecuteV2(const char *name, int inputs,
                                      aclTensorDesc *input_descriptions[],
                                      aclDataBuffer *input_buffers[], int outputs,
                                      aclTensorDesc *output_descriptions[],
                                      aclDataBuffer *output_buffers[], aclopAttr *attribute,
                                      aclopEngineType engine, aclopCompileType compile,
                                      const char *path, aclrtStream stream) {
    return aclopCompileAndExecute(name, inputs, (const aclTensorDesc *const *)input_descriptions,
                                  (const aclDataBuffer *const *)input_buffers, outputs,
                                  (const aclTensorDesc *const *)output_descriptions,
                                  (aclDataBuffer *const *)output_buffers, attribute, engine,
                                  compile, path, stream);
}
