/* Quads of a strip by vectors of 16 bytes, which every processor has. */
typedef uint8_t bytes16 __attribute__((vector_size(16), may_alias));
typedef uint16_t pairs16 __attribute__((vector_size(16), may_alias));
typedef uint8_t unaligned16 __attribute__((vector_size(16), may_alias, aligned(1)));

#define NARROW_BYTES 16
#define NARROW_DOT DOT

#if defined(__clang__)
#define SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif
#define LOW_BYTES(a, b) SHUFFLE(bytes16, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH_BYTES(a, b)                                                                           \
    SHUFFLE(bytes16, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define LOW_PAIRS(a, b) SHUFFLE(pairs16, a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH_PAIRS(a, b) SHUFFLE(pairs16, a, b, 4, 12, 5, 13, 6, 14, 7, 15)

/* Four rows of 32 outputs to [32 outputs][4 rows]. */
static inline __attribute__((always_inline)) void interleave(const int8_t *strip, void *quads)
{
    const unaligned16 *rows = (const unaligned16 *)strip; /* as a file may be mapped */
    pairs16 *out = quads;
    for (int half = 0; half < 2; half++, out += 4) {
        bytes16 a = rows[half], b = rows[half + 2], c = rows[half + 4], d = rows[half + 6];
        pairs16 ab_low = (pairs16)LOW_BYTES(a, b), ab_high = (pairs16)HIGH_BYTES(a, b);
        pairs16 cd_low = (pairs16)LOW_BYTES(c, d), cd_high = (pairs16)HIGH_BYTES(c, d);
        out[0] = LOW_PAIRS(ab_low, cd_low), out[1] = HIGH_PAIRS(ab_low, cd_low);
        out[2] = LOW_PAIRS(ab_high, cd_high), out[3] = HIGH_PAIRS(ab_high, cd_high);
    }
}
