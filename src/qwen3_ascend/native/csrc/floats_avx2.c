/* For x86-64 processors with AVX2 and FMA (Haswell, Zen and newer). */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define VECTOR_BYTES 32
#define NARROW_BYTES 32
#define ADD_PRODUCT(sum, a, b) sum = _mm256_fmadd_ps(a, b, sum)
#define ADD_NARROW ADD_PRODUCT
static inline __attribute__((always_inline)) __m128 fold(__m256 lanes)
{
    return _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
}
#define FOLD(lanes) ((floats4)fold((__m256)(lanes)))
#define READ_INT8(from)                                                                            \
    (integers_of_lanes)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(from)))
#define READ_INT4(from)                                                                            \
    (integers_of_lanes)_mm256_srai_epi32(                                                          \
        _mm256_sllv_epi32(_mm256_set1_epi32(read_word(from)),                                      \
                          _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0)),                         \
        28)
#define BLOCK_ROWS 6
#define DEFINE_BLOCKS DEFINE_BLOCK(1) DEFINE_BLOCK(2) DEFINE_BLOCK(4) DEFINE_BLOCK(6)
#define NAME_BLOCKS NAME_BLOCK(1), NAME_BLOCK(2), NAME_BLOCK(4), NAME_BLOCK(6)
#define FLOAT_TABLE floats_avx2
#define LAYER_TABLE layer_avx2
#include "floats.inc.h"
#include "layer.inc.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int floats_avx2_is_for_x86_64;
#endif
