/* For x86-64 processors with AVX-512 F, BW, DQ and VL (Skylake-SP, Zen 4 and newer). */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))),     \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define VECTOR_BYTES 64
#define NARROW_BYTES 32
#define ADD_PRODUCT(sum, a, b) sum = _mm512_fmadd_ps(a, b, sum)
#define ADD_NARROW(sum, a, b) sum = _mm256_fmadd_ps(a, b, sum)
static inline __attribute__((always_inline)) __m128 fold(__m512 lanes)
{
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#define FOLD(lanes) ((floats4)fold((__m512)(lanes)))
#include "codes_avx512.h"
#define BLOCK_ROWS 12
#define DEFINE_BLOCKS                                                                              \
    DEFINE_BLOCK(1) DEFINE_BLOCK(2) DEFINE_BLOCK(4) DEFINE_BLOCK(8) DEFINE_BLOCK(12)
#define NAME_BLOCKS NAME_BLOCK(1), NAME_BLOCK(2), NAME_BLOCK(4), NAME_BLOCK(8), NAME_BLOCK(12)
#define FLOAT_TABLE floats_avx512
#define LAYER_TABLE layer_avx512
#include "floats.inc.h"
#include "layer.inc.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int floats_avx512_is_for_x86_64;
#endif
