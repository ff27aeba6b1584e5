/* Reads memory as fast as one core can, for read_bandwidth.py. Several sums, so that none waits for
   another; the compiler makes vectors of them. Their total is returned so that none is left out. */

#include <stddef.h>
#include <stdint.h>

#define SUMS 32 /* 64-bit words of four cache lines */

uint64_t read_words(const uint64_t *words, size_t count) {
    uint64_t sums[SUMS] = {0}, total = 0;
    for (size_t at = 0; at + SUMS <= count; at += SUMS)
        for (size_t lane = 0; lane < SUMS; lane++) sums[lane] += words[at + lane];
    for (size_t lane = 0; lane < SUMS; lane++) total += sums[lane];
    return total;
}
