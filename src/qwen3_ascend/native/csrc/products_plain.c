/* For every processor: SSE2 on x86-64, NEON on aarch64, with weights of -128 as well. */
#include "products.h"

#define VECTOR_BYTES 16
#define FLIPPED 0
typedef int16_t words16 __attribute__((vector_size(16), may_alias));
typedef int32_t sums16 __attribute__((vector_size(16), may_alias));

/* A product of two bytes is at most 2^14: it fits into 16 bits. */
static inline __attribute__((always_inline)) sums16 add_products(sums16 sums, words16 weights,
                                                                 words16 x)
{
    sums16 even = (sums16)((weights << 8 >> 8) * (x << 8 >> 8));
    sums16 odd = (sums16)((weights >> 8) * (x >> 8));
    return sums + (even << 16 >> 16) + (even >> 16) + (odd << 16 >> 16) + (odd >> 16);
}
#define DOT(sums, weights, x)                                                                      \
    sums = (vector)add_products((sums16)(sums), (words16)(weights), (words16)(x))
#define BLOCK_ROWS 4
#define DEFINE_BLOCKS DEFINE_BLOCK(1) DEFINE_BLOCK(2) DEFINE_BLOCK(4)
#define NAME_BLOCKS NAME_BLOCK(1), NAME_BLOCK(2), NAME_BLOCK(4)
#define PRODUCT_TABLE products_plain
#include "interleave_bytes16.h"
#include "products.inc.h"
