/* How rows of activations are divided into blocks whose sums fit into a processor's registers. */
#ifndef QWEN3_ASCEND_ROWS_H
#define QWEN3_ASCEND_ROWS_H

#include <stdint.h>

/* Rows of the next block, of which the last may be padding: the largest there is, or the smallest
 * that holds what is left. */
static inline int64_t block_of(int64_t left, int64_t most)
{
    if (left >= most) return most;
    int64_t rows = 1;
    while (rows < left) rows *= 2;
    return rows < most ? rows : most;
}

#define EACH_1(DO) DO(0)
#define EACH_2(DO) EACH_1(DO) DO(1)
#define EACH_3(DO) EACH_2(DO) DO(2)
#define EACH_4(DO) EACH_3(DO) DO(3)
#define EACH_6(DO) EACH_4(DO) DO(4) DO(5)
#define EACH_8(DO) EACH_6(DO) DO(6) DO(7)
#define EACH_12(DO) EACH_8(DO) DO(8) DO(9) DO(10) DO(11)

#endif
