/* For x86-64 processors with AVX-512 VNNI (Cascade Lake, Zen 4 and newer). */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#endif
#define VECTOR_BYTES 64
/* As text: for the intrinsic GCC 12 copies every sum twice, which takes half of the speed. */
#define DOT(sums, weights, x) __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(x))
#define BLOCK_ROWS 12
#define DEFINE_BLOCKS                                                                              \
    DEFINE_BLOCK(1) DEFINE_BLOCK(2) DEFINE_BLOCK(4) DEFINE_BLOCK(8) DEFINE_BLOCK(12)
#define NAME_BLOCKS NAME_BLOCK(1), NAME_BLOCK(2), NAME_BLOCK(4), NAME_BLOCK(8), NAME_BLOCK(12)
#define FLIPPED 1
#define PRODUCT_TABLE products_avx512_vnni
#include "interleave_avx2.h"
#include "products.inc.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int products_avx512_vnni_is_for_x86_64;
#endif
