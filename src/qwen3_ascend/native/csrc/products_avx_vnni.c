/* For x86-64 processors with AVX-VNNI and without AVX-512 (Alder Lake and newer). */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,avxvnni")
#endif
#define VECTOR_BYTES 32
/* See products_avx512_vnni.c. */
#define DOT(sums, weights, x)                                                                      \
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(weights), "x"(x))
#define BLOCK_ROWS 6
#define DEFINE_BLOCKS DEFINE_BLOCK(1) DEFINE_BLOCK(2) DEFINE_BLOCK(4) DEFINE_BLOCK(6)
#define NAME_BLOCKS NAME_BLOCK(1), NAME_BLOCK(2), NAME_BLOCK(4), NAME_BLOCK(6)
#define FLIPPED 1
#define PRODUCT_TABLE products_avx_vnni
#include "interleave_avx2.h"
#include "products.inc.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int products_avx_vnni_is_for_x86_64;
#endif
