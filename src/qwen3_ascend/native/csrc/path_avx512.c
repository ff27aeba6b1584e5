/* The path for x86-64 processors with AVX-512 F, BW, DQ and VL (Skylake-SP, Zen 4 and newer). */
#if defined(__x86_64__)
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define PATH_FUSES 1 /* AVX-512 F has fused multiplication */
#define PATH_FLOATS 16 /* of a register */
#define PATH_TABLE path_table_avx512
#include "path.inc.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int path_avx512_is_for_x86_64;
#endif
