/* The path for x86-64 processors with AVX2 (Haswell, Zen and newer). */
#if defined(__x86_64__)
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define PATH_FLOATS 8 /* of a register */
#define PATH_TABLE path_table_avx2
#include "path.inc.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int path_avx2_is_for_x86_64;
#endif
