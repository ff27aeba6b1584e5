/* SHA-256 (FIPS 180-4) of several byte streams at once, on processors with instructions for it.
 *
 * A round needs the result of the round before, so one stream waits for the latency of the
 * instruction; a second and a third stream fill the gaps. On Zen 4 a core hashes 1.8, 3.3 and
 * 3.7 GB/s with one, two and three streams. Where the processor has no such instructions every
 * function says so, and the caller takes another implementation.
 */
#include "kernels.h"

#include <stddef.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

enum { BLOCK_BYTES = 64, LENGTH_BYTES = 8, MOST_STREAMS = 3, MOST_TOGETHER = 64 };

struct sha256 {
    uint32_t state[8];
    uint64_t nbytes;
    uint8_t pending[BLOCK_BYTES];
};

static const uint32_t first_state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

static const uint32_t round_constants[64] __attribute__((aligned(16), unused)) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__)
#define HAS_INSTRUCTIONS 1
#define TARGET __attribute__((target("sha,sse4.1,ssse3")))

/* `blocks` blocks of each stream; `streams` is a constant wherever this is inlined. The
 * instructions keep the state as (a, b, e, f) and (c, d, g, h). */
INLINE TARGET void compress(int streams, uint32_t *const *states, const uint8_t *const *data,
                            int64_t blocks)
{
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    __m128i abef[MOST_STREAMS], cdgh[MOST_STREAMS];
    for (int s = 0; s < streams; s++) {
        __m128i low = _mm_loadu_si128((const __m128i *)states[s]);
        __m128i high = _mm_loadu_si128((const __m128i *)(states[s] + 4));
        low = _mm_shuffle_epi32(low, 0xb1);
        high = _mm_shuffle_epi32(high, 0x1b);
        abef[s] = _mm_alignr_epi8(low, high, 8);
        cdgh[s] = _mm_blend_epi16(high, low, 0xf0);
    }
    for (int64_t block = 0; block < blocks; block++) {
        __m128i saved_abef[MOST_STREAMS], saved_cdgh[MOST_STREAMS], words[MOST_STREAMS][4];
        for (int s = 0; s < streams; s++) {
            saved_abef[s] = abef[s];
            saved_cdgh[s] = cdgh[s];
        }
#pragma GCC unroll 16
        for (int group = 0; group < 16; group++) {
            const void *constants = round_constants + 4 * group;
#pragma GCC unroll 3
            for (int s = 0; s < streams; s++) {
                __m128i *w = words[s];
                if (group < 4) {
                    const void *from = data[s] + block * BLOCK_BYTES + group * 16;
                    w[group] = _mm_shuffle_epi8(_mm_loadu_si128(from), big_endian);
                } else {
                    __m128i last = w[(group + 3) & 3];
                    __m128i sum = _mm_sha256msg1_epu32(w[group & 3], w[(group + 1) & 3]);
                    sum = _mm_add_epi32(sum, _mm_alignr_epi8(last, w[(group + 2) & 3], 4));
                    w[group & 3] = _mm_sha256msg2_epu32(sum, last);
                }
                __m128i keyed = _mm_add_epi32(w[group & 3], _mm_load_si128(constants));
                cdgh[s] = _mm_sha256rnds2_epu32(cdgh[s], abef[s], keyed);
                keyed = _mm_shuffle_epi32(keyed, 0x0e);
                abef[s] = _mm_sha256rnds2_epu32(abef[s], cdgh[s], keyed);
            }
        }
        for (int s = 0; s < streams; s++) {
            abef[s] = _mm_add_epi32(abef[s], saved_abef[s]);
            cdgh[s] = _mm_add_epi32(cdgh[s], saved_cdgh[s]);
        }
    }
    for (int s = 0; s < streams; s++) {
        __m128i feba = _mm_shuffle_epi32(abef[s], 0x1b);
        __m128i dchg = _mm_shuffle_epi32(cdgh[s], 0xb1);
        _mm_storeu_si128((__m128i *)states[s], _mm_blend_epi16(feba, dchg, 0xf0));
        _mm_storeu_si128((__m128i *)(states[s] + 4), _mm_alignr_epi8(dchg, feba, 8));
    }
}

/* Not every compiler's __builtin_cpu_supports knows "sha". Asked once: a hypervisor answers slowly. */
static int has_instructions(void)
{
    static _Atomic int answer = -1;
    if (answer < 0) {
        unsigned a, b = 0, c, d;
        int known = __get_cpuid_count(7, 0, &a, &b, &c, &d);
        answer = known && (b >> 29 & 1) && __builtin_cpu_supports("sse4.1");
    }
    return answer;
}

/* Clang declares these intrinsics only if the whole file is compiled for them. */
#elif defined(__aarch64__) && (!defined(__clang__) || defined(__ARM_FEATURE_CRYPTO))
#define HAS_INSTRUCTIONS 1
#if defined(__clang__)
#define TARGET
#else
#define TARGET __attribute__((target("+crypto")))
#endif

INLINE TARGET void compress(int streams, uint32_t *const *states, const uint8_t *const *data,
                            int64_t blocks)
{
    uint32x4_t abcd[MOST_STREAMS], efgh[MOST_STREAMS];
    for (int s = 0; s < streams; s++) {
        abcd[s] = vld1q_u32(states[s]);
        efgh[s] = vld1q_u32(states[s] + 4);
    }
    for (int64_t block = 0; block < blocks; block++) {
        uint32x4_t saved_abcd[MOST_STREAMS], saved_efgh[MOST_STREAMS], words[MOST_STREAMS][4];
        for (int s = 0; s < streams; s++) {
            saved_abcd[s] = abcd[s];
            saved_efgh[s] = efgh[s];
        }
#pragma GCC unroll 16
        for (int group = 0; group < 16; group++) {
            uint32x4_t constants = vld1q_u32(round_constants + 4 * group);
#pragma GCC unroll 3
            for (int s = 0; s < streams; s++) {
                uint32x4_t *w = words[s];
                if (group < 4) {
                    uint8x16_t bytes = vld1q_u8(data[s] + block * BLOCK_BYTES + group * 16);
                    w[group] = vreinterpretq_u32_u8(vrev32q_u8(bytes));
                } else {
                    uint32x4_t sum = vsha256su0q_u32(w[group & 3], w[(group + 1) & 3]);
                    w[group & 3] = vsha256su1q_u32(sum, w[(group + 2) & 3], w[(group + 3) & 3]);
                }
                uint32x4_t keyed = vaddq_u32(w[group & 3], constants), before = abcd[s];
                abcd[s] = vsha256hq_u32(before, efgh[s], keyed);
                efgh[s] = vsha256h2q_u32(efgh[s], before, keyed);
            }
        }
        for (int s = 0; s < streams; s++) {
            abcd[s] = vaddq_u32(abcd[s], saved_abcd[s]);
            efgh[s] = vaddq_u32(efgh[s], saved_efgh[s]);
        }
    }
    for (int s = 0; s < streams; s++) {
        vst1q_u32(states[s], abcd[s]);
        vst1q_u32(states[s] + 4, efgh[s]);
    }
}

static int has_instructions(void)
{
#if defined(__linux__)
    return (getauxval(AT_HWCAP) >> 6 & 1) != 0; /* HWCAP_SHA2 */
#else
    return defined(__APPLE__);
#endif
}
#endif

#if defined(HAS_INSTRUCTIONS)
typedef void compress_function(uint32_t *const *states, const uint8_t *const *data, int64_t blocks);

#define DEFINE_COMPRESS(streams)                                                          \
    static TARGET __attribute__((noinline)) void compress_##streams(                      \
        uint32_t *const *states, const uint8_t *const *data, int64_t blocks)              \
    {                                                                                     \
        compress(streams, states, data, blocks);                                          \
    }

DEFINE_COMPRESS(1)
DEFINE_COMPRESS(2)
DEFINE_COMPRESS(3)

static compress_function *const compress_functions[] = {NULL, compress_1, compress_2, compress_3};
#else
static int has_instructions(void) { return 0; }
#endif

QWEN3_ASCEND_API int qwen3_ascend_has_sha256(void) { return has_instructions(); }

QWEN3_ASCEND_API int qwen3_ascend_sha256_start(struct sha256 *digest)
{
    memset(digest, 0, sizeof *digest);
    memcpy(digest->state, first_state, sizeof first_state);
    return STATUS_OK;
}

/* What is left of the bytes for one digest. */
struct stream {
    struct sha256 *digest;
    const uint8_t *data;
    int64_t nbytes;
};

#if defined(HAS_INSTRUCTIONS)
/* Completes the block that an earlier update has left, as far as there are bytes for it. */
static void fill_pending(struct stream *stream)
{
    struct sha256 *digest = stream->digest;
    size_t held = digest->nbytes % BLOCK_BYTES, count = BLOCK_BYTES - held;
    if (held == 0 || stream->nbytes == 0) return;
    if ((int64_t)count > stream->nbytes) count = (size_t)stream->nbytes;
    memcpy(digest->pending + held, stream->data, count);
    digest->nbytes += count;
    stream->data += count;
    stream->nbytes -= (int64_t)count;
    if (held + count < BLOCK_BYTES) return;
    uint32_t *state = digest->state;
    const uint8_t *data = digest->pending;
    compress_1(&state, &data, 1);
}

static void keep_pending(struct stream *stream)
{
    struct sha256 *digest = stream->digest;
    if (stream->nbytes == 0) return;
    memcpy(digest->pending, stream->data, (size_t)stream->nbytes);
    digest->nbytes += (uint64_t)stream->nbytes;
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t blocks_left(const struct stream *stream) { return stream->nbytes / BLOCK_BYTES; }

static void longest_first(struct stream *streams, int count)
{
    for (int i = 1; i < count; i++)
        for (int j = i; j > 0 && streams[j].nbytes > streams[j - 1].nbytes; j--) {
            struct stream other = streams[j];
            streams[j] = streams[j - 1];
            streams[j - 1] = other;
        }
}

/* Hashes `blocks` blocks of each of the first `count` streams. */
static void hash_together(struct stream *streams, int count, int64_t blocks)
{
    uint32_t *states[MOST_STREAMS];
    const uint8_t *data[MOST_STREAMS];
    for (int s = 0; s < count; s++) {
        states[s] = streams[s].digest->state;
        data[s] = streams[s].data;
        streams[s].digest->nbytes += (uint64_t)blocks * BLOCK_BYTES;
        streams[s].data += blocks * BLOCK_BYTES;
        streams[s].nbytes -= blocks * BLOCK_BYTES;
    }
    compress_functions[count](states, data, blocks);
}

/* Hashes some of the streams, longest first; whether there were blocks to hash. The longest must
 * not end up alone: three at a time only as long as two at a time will still occupy the rest. */
static int hash_some(struct stream *streams, int count)
{
    int64_t others = 0, longest = count > 0 ? blocks_left(&streams[0]) : 0;
    for (int i = 1; i < count; i++) others += blocks_left(&streams[i]);
    int64_t three = count > 2 ? smaller(blocks_left(&streams[2]), others - longest) : 0;
    if (three > 0)
        hash_together(streams, 3, three);
    else if (others > 0)
        hash_together(streams, 2, blocks_left(&streams[1]));
    else if (longest > 0)
        hash_together(streams, 1, longest);
    return longest > 0;
}
#endif

/* Appends nbytes[i] bytes at data[i] to digests[i]; no digest may occur twice. */
QWEN3_ASCEND_API int qwen3_ascend_sha256_update(int count, struct sha256 *const *digests,
                                                const uint8_t *const *data, const int64_t *nbytes)
{
    if (count < 0 || count > MOST_TOGETHER) return STATUS_BAD_ARGUMENT;
    if (!has_instructions()) return STATUS_NO_PATH;
#if defined(HAS_INSTRUCTIONS)
    struct stream streams[MOST_TOGETHER];
    for (int i = 0; i < count; i++) {
        if (nbytes[i] < 0) return STATUS_BAD_ARGUMENT;
        streams[i] = (struct stream){digests[i], data[i], nbytes[i]};
    }
    for (int i = 0; i < count; i++) fill_pending(&streams[i]);
    do
        longest_first(streams, count);
    while (hash_some(streams, count));
    for (int i = 0; i < count; i++) keep_pending(&streams[i]);
#else
    (void)digests, (void)data, (void)nbytes;
#endif
    return STATUS_OK;
}

/* The hash of what a digest has seen, 32 bytes; the digest itself stays as it is. */
QWEN3_ASCEND_API int qwen3_ascend_sha256_finish(const struct sha256 *digest, uint8_t *hash)
{
    struct sha256 copy = *digest, *last = &copy;
    uint8_t padding[2 * BLOCK_BYTES] = {0x80};
    int64_t held = (int64_t)(copy.nbytes % BLOCK_BYTES);
    int64_t nbytes = (held < BLOCK_BYTES - LENGTH_BYTES ? 1 : 2) * BLOCK_BYTES - held;
    uint64_t bits = digest->nbytes * 8;
    for (int i = 0; i < LENGTH_BYTES; i++)
        padding[nbytes - 1 - i] = (uint8_t)(bits >> 8 * i);
    const uint8_t *from = padding;
    int status = qwen3_ascend_sha256_update(1, &last, &from, &nbytes);
    for (int i = 0; i < 32; i++) hash[i] = (uint8_t)(copy.state[i / 4] >> (24 - i % 4 * 8));
    return status;
}
