/* For every processor: SSE2 on x86-64, NEON on aarch64. */
#include "floats.h"

#define VECTOR_BYTES 16
#define NARROW_BYTES 16
#if defined(__aarch64__)
#include <arm_neon.h>
#define ADD_PRODUCT(sum, a, b) sum = (vector)vfmaq_f32((float32x4_t)(sum), (float32x4_t)(a), (float32x4_t)(b))
#define BLOCK_ROWS 12 /* of 32 registers */
#define DEFINE_BLOCKS                                                                              \
    DEFINE_BLOCK(1) DEFINE_BLOCK(2) DEFINE_BLOCK(4) DEFINE_BLOCK(8) DEFINE_BLOCK(12)
#define NAME_BLOCKS NAME_BLOCK(1), NAME_BLOCK(2), NAME_BLOCK(4), NAME_BLOCK(8), NAME_BLOCK(12)
#else
#define ADD_PRODUCT(sum, a, b) sum += (a) * (b)
#define BLOCK_ROWS 6
#define DEFINE_BLOCKS DEFINE_BLOCK(1) DEFINE_BLOCK(2) DEFINE_BLOCK(4) DEFINE_BLOCK(6)
#define NAME_BLOCKS NAME_BLOCK(1), NAME_BLOCK(2), NAME_BLOCK(4), NAME_BLOCK(6)
#endif
#define FOLD(lanes) ((floats4)(lanes))
#define ADD_NARROW ADD_PRODUCT
#define READ_INT8(from)                                                                            \
    {(int8_t)(from)[0], (int8_t)(from)[1], (int8_t)(from)[2], (int8_t)(from)[3]}
#define READ_INT4(from)                                                                            \
    {low_half((from)[0]), high_half((from)[0]), low_half((from)[1]), high_half((from)[1])}
#define FLOAT_TABLE floats_baseline
#define LAYER_TABLE layer_baseline
#include "floats.inc.h"
#include "layer.inc.h"
