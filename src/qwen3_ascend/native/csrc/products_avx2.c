/* For x86-64 processors with AVX2 and without VNNI (Haswell to Zen 3).
 *
 * vpmaddubsw multiplies unsigned by signed bytes and adds two products in 16 bits, with saturation.
 * |x| is at most 128 and sign(x) * w at most 127 where no weight is -128: two products are at most
 * 32512, so nothing saturates. A strip with a weight of -128, which this project never chooses and
 * others do, is noticed on the way and multiplied as every processor can; its rows are packed in
 * the same blocks.
 */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
static inline __attribute__((always_inline)) __m256i add_products(__m256i sums, __m256i weights,
                                                                  __m256i x)
{
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(weights, x));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline __attribute__((always_inline)) __m256i least_of(__m256i least, const void *quads)
{
    const __m256i *made = quads;
    __m256i first = _mm256_min_epi8(_mm256_loadu_si256(made), _mm256_loadu_si256(made + 1));
    __m256i second = _mm256_min_epi8(_mm256_loadu_si256(made + 2), _mm256_loadu_si256(made + 3));
    return _mm256_min_epi8(least, _mm256_min_epi8(first, second));
}
#define DECLARE_LEAST __m256i least = _mm256_setzero_si256();
#define NOTE_LEAST(made) least = least_of(least, made)
#define IS_LEAST                                                                                   \
    (_mm256_movemask_epi8(_mm256_cmpeq_epi8(least, _mm256_set1_epi8(-128))) != 0)
#define VECTOR_BYTES 32
#define DOT(sums, weights, x)                                                                      \
    sums = (vector)add_products((__m256i)(sums), (__m256i)(weights), (__m256i)(x))
#define BLOCK_ROWS 4
#define DEFINE_BLOCKS DEFINE_BLOCK(1) DEFINE_BLOCK(2) DEFINE_BLOCK(4)
#define NAME_BLOCKS NAME_BLOCK(1), NAME_BLOCK(2), NAME_BLOCK(4)
#define FLIPPED 0
#define PRODUCT_TABLE products_avx2
#include "interleave_avx2.h"
#include "products.inc.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int products_avx2_is_for_x86_64;
#endif
