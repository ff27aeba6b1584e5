/* For x86-64 processors with AVX-512 and its products of bfloat16 (Cooper Lake, Sapphire Rapids,
 * Zen 4 and newer). */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,prefer-vector-width=512")
#endif
#define VECTOR_BYTES 64
#define NARROW_BYTES 32
#define ADD_PRODUCT(sum, a, b) sum = _mm512_fmadd_ps(a, b, sum)
#define ADD_NARROW(sum, a, b) sum = _mm256_fmadd_ps(a, b, sum)
/* As text: see products_avx512_vnni.c. */
#define ADD_PAIRS(sums, a, b) __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b))
#define ROUND_PAIRS(even, odd) round_pairs((__m512)(even), (__m512)(odd))
static inline __attribute__((always_inline)) __m512 round_pairs(__m512 even, __m512 odd)
{
    const __m512i places = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
                                            24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
                                            16, 0);
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(places, both));
}
#define ROUND_TO_BF16(values)                                                                      \
    (vector)_mm512_slli_epi32(                                                                     \
        _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)(values))), 16)
#include "codes_avx512.h"
#define BLOCK_ROWS 12
#define DEFINE_BLOCKS                                                                              \
    DEFINE_BLOCK(1) DEFINE_BLOCK(2) DEFINE_BLOCK(4) DEFINE_BLOCK(8) DEFINE_BLOCK(12)
#define NAME_BLOCKS NAME_BLOCK(1), NAME_BLOCK(2), NAME_BLOCK(4), NAME_BLOCK(8), NAME_BLOCK(12)
#define FLOAT_TABLE floats_avx512_bf16
#include "floats.inc.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int floats_avx512_bf16_is_for_x86_64;
#endif
