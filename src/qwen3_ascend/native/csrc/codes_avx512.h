/* Codes of 16 outputs by AVX-512, for every path that has it; see codes.inc.h. */
#define READ_INT8(from)                                                                            \
    (integers_of_lanes)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(from)))
#define READ_INT4(from)                                                                            \
    (integers_of_lanes)_mm512_srai_epi32(                                                          \
        _mm512_sllv_epi32(                                                                         \
            _mm512_permutexvar_epi32(                                                              \
                _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),                 \
                _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i *)(from)))),                 \
            _mm512_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0)),          \
        28)
