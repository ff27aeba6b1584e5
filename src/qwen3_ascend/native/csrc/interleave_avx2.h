/* Quads of a strip by AVX2, for every path that has it. */
#define NARROW_BYTES 32
#define NARROW_DOT DOT

/* Four rows of 32 outputs to [32 outputs][4 rows], less a bit's meaning if FLIPPED. */
static inline __attribute__((always_inline)) void interleave(const int8_t *strip, void *quads)
{
    const __m256i *rows = (const __m256i *)strip;
    const __m256i flip = _mm256_set1_epi8(FLIPPED ? -128 : 0);
    __m256i a = _mm256_loadu_si256(rows), b = _mm256_loadu_si256(rows + 1);
    __m256i c = _mm256_loadu_si256(rows + 2), d = _mm256_loadu_si256(rows + 3);
    __m256i ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
    __m256i cd_low = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
    /* Instructions work within halves of 16 outputs: outputs 0 to 3 and 16 to 19, and so on. */
    __m256i first = _mm256_unpacklo_epi16(ab_low, cd_low);
    __m256i second = _mm256_unpackhi_epi16(ab_low, cd_low);
    __m256i third = _mm256_unpacklo_epi16(ab_high, cd_high);
    __m256i fourth = _mm256_unpackhi_epi16(ab_high, cd_high);
    __m256i *out = quads;
    out[0] = _mm256_xor_si256(flip, _mm256_permute2x128_si256(first, second, 0x20));
    out[1] = _mm256_xor_si256(flip, _mm256_permute2x128_si256(third, fourth, 0x20));
    out[2] = _mm256_xor_si256(flip, _mm256_permute2x128_si256(first, second, 0x31));
    out[3] = _mm256_xor_si256(flip, _mm256_permute2x128_si256(third, fourth, 0x31));
}
