/* For aarch64 processors with dot products (Armv8.2: Kunpeng 920, Graviton 2, M1 and newer). */
#if defined(__aarch64__)
#include "products.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#define VECTOR_BYTES 16
#define FLIPPED 0
/* As text: compilers differ in where they declare the intrinsic without the whole file's target. */
#define DOT(sums, weights, x)                                                                      \
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(sums) : "w"(weights), "w"(x))
#define BLOCK_ROWS 12
#define DEFINE_BLOCKS                                                                              \
    DEFINE_BLOCK(1) DEFINE_BLOCK(2) DEFINE_BLOCK(4) DEFINE_BLOCK(8) DEFINE_BLOCK(12)
#define NAME_BLOCKS NAME_BLOCK(1), NAME_BLOCK(2), NAME_BLOCK(4), NAME_BLOCK(8), NAME_BLOCK(12)
#define PRODUCT_TABLE products_dotprod
#include "interleave_bytes16.h"
#include "products.inc.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int products_dotprod_is_for_aarch64;
#endif
