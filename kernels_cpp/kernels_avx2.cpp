// AVX2.
//
// Per 64 weights of a row, 16 instructions: vpbroadcastq (the signs); for each half vpshufb, vpand, vpminub (bits to
// bytes 0 or 1), vpmaddubsw with q; vpaddw, vpaddw, vpsubw (twice the sum over the pluses less the sum over all);
// vpbroadcastw, vpand (the scale), vpmaddwd, vpaddd. Per 256 weights and eight rows, 21 instructions sum the lanes.
// The scale waits for vpmaddwd: vpmaddubsw saturates at 2^15, which 2 * 255 * 127 exceeds.
// The limit is vector arithmetic, not memory.
#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>

static inline int16_t sum_words(__m128i x) {
    x = _mm_add_epi16(x, _mm_shuffle_epi32(x, 0x4e));
    x = _mm_add_epi16(x, _mm_shuffle_epi32(x, 0xb1));
    return (int16_t) (_mm_extract_epi16(x, 0) + _mm_extract_epi16(x, 1));
}

static void quantize_act(const float * x, void * act, int64_t n) {
    const __m256i abs_bits = _mm256_set1_epi32(0x7fffffff);
    for (int64_t g = 0; g < mobie_n_groups(n); g++) {
        const int     n_vec = 8 * mobie_group_blocks(n, g);  // of 8 floats
        const float * xg    = x + g * MOBIE_GROUP_LEN;
        char *        q     = (char *) act + g * MOBIE_GROUP_LEN;

        // Magnitudes compared as integers: the order of floats, with infinity and then NaN on top.
        __m256i top = _mm256_setzero_si256();
        for (int i = 0; i < n_vec; i++) {
            const __m256i bits = _mm256_loadu_si256((const __m256i *) (xg + 8 * i));
            top                = _mm256_max_epi32(top, _mm256_and_si256(bits, abs_bits));
        }
        __m128i top4          = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
        top4                  = _mm_max_epi32(top4, _mm_shuffle_epi32(top4, 0x4e));
        top4                  = _mm_max_epi32(top4, _mm_shuffle_epi32(top4, 0xb1));
        const float     max   = mobie_float_of_bits(_mm_cvtsi128_si32(top4));
        mobie_act_group group = { mobie_act_scale_of(max), {} };

        const __m256 inv  = _mm256_set1_ps(mobie_act_inverse_of(max));
        const __m256 keep = _mm256_castsi256_ps(_mm256_set1_epi32(max <= MOBIE_ACT_MAX ? -1 : 0));
        for (int i = 0; i < n_vec; i += 2) {
            __m256i v[2];
            for (int k = 0; k < 2; k++) {
                const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(xg + 8 * (i + k)), inv);
                v[k]                = _mm256_cvtps_epi32(_mm256_and_ps(scaled, keep));
            }
            const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v[0], v[1]), 0xd8);
            const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
            _mm_storeu_si128((__m128i *) (q + 8 * i), _mm_packs_epi16(low, high));
            group.sums[i / 8] += sum_words(_mm_add_epi16(low, high));
        }
        mobie_set_act_group(act, n, g, group);
    }
    mobie_clear_act_padding(act, n);
}

// The steps of a transposing sum.
static inline __m256i add_32(__m256i x, __m256i y) {
    return _mm256_add_epi32(_mm256_unpacklo_epi32(x, y), _mm256_unpackhi_epi32(x, y));
}
static inline __m256i add_64(__m256i x, __m256i y) {
    return _mm256_add_epi32(_mm256_unpacklo_epi64(x, y), _mm256_unpackhi_epi64(x, y));
}

// Lane r of the result: the sum of all lanes of x[r].
static inline __m256i sum_rows(const __m256i x[8]) {
    const __m256i a = add_64(add_32(x[0], x[1]), add_32(x[2], x[3]));  // rows 0 1 2 3 in each 128 bits
    const __m256i b = add_64(add_32(x[4], x[5]), add_32(x[6], x[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

// Bytes first .. first + 3 of the signs as 32 bytes of 0 or 1.
static inline __m256i bits_to_bytes(__m256i signs, int first) {
    const __m256i byte_of_lane =
        _mm256_add_epi8(_mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303),
                        _mm256_set1_epi8((char) first));
    const __m256i bit_of_lane = _mm256_set1_epi64x((long long) 0x8040201008040201);
    const __m256i bits        = _mm256_and_si256(_mm256_shuffle_epi8(signs, byte_of_lane), bit_of_lane);
    return _mm256_min_epu8(bits, _mm256_set1_epi8(1));
}

// The products of eight rows with one group of n_blocks blocks.
static inline __m256i dot_group(const char * const row[8], int64_t offset, const char * q, const int n_blocks) {
    __m256i sum[8];
    for (int r = 0; r < 8; r++) {
        sum[r] = _mm256_setzero_si256();
    }
    for (int b = 0; b < n_blocks; b++, q += MOBIE_BLOCK_LEN, offset += sizeof(mobie_block)) {
        const __m256i q0  = _mm256_loadu_si256((const __m256i *) q);
        const __m256i q1  = _mm256_loadu_si256((const __m256i *) (q + 32));
        const __m256i one = _mm256_set1_epi8(1);
        const __m256i all = _mm256_add_epi16(_mm256_maddubs_epi16(one, q0), _mm256_maddubs_epi16(one, q1));
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
            const mobie_block * block = (const mobie_block *) (row[r] + offset);
            long long           bits;
            short               scale_and_signs;
            memcpy(&bits, block->signs, sizeof(bits));
            memcpy(&scale_and_signs, block, sizeof(scale_and_signs));
            const __m256i signs = _mm256_set1_epi64x(bits);
            const __m256i scale = _mm256_and_si256(_mm256_set1_epi16(scale_and_signs), _mm256_set1_epi16(0xff));
            const __m256i plus  = _mm256_add_epi16(_mm256_maddubs_epi16(bits_to_bytes(signs, 0), q0),
                                                   _mm256_maddubs_epi16(bits_to_bytes(signs, 4), q1));
            const __m256i dot   = _mm256_sub_epi16(_mm256_add_epi16(plus, plus), all);
            sum[r]              = _mm256_add_epi32(sum[r], _mm256_madd_epi16(dot, scale));
        }
    }
    return sum_rows(sum);
}

// Eight rows times one token. Rows beyond n_rows are the last one again, and not stored.
static void dot_8_rows(int64_t n, const mobie_block * w, size_t row_bytes, int64_t n_rows, const void * act,
                       float * y) {
    const char * row[8];
    for (int r = 0; r < 8; r++) {
        row[r] = (const char *) w + (r < n_rows ? r : n_rows - 1) * row_bytes;
    }
    const char * q      = (const char *) act;
    __m256       sum    = _mm256_setzero_ps();
    const char * stream = row[0];
    const char * end    = row[0] + n_rows * row_bytes;
    for (int64_t g = 0; g < mobie_n_groups(n); g++, q += MOBIE_GROUP_LEN, stream += 8 * 4 * sizeof(mobie_block)) {
        mobie_prefetch_group(stream, end);
        const __m256i dot = dot_group(row, g * 4 * sizeof(mobie_block), q, mobie_group_blocks(n, g));
        const __m256  d   = _mm256_set1_ps(mobie_act_scale(act, n, g));
        sum               = _mm256_add_ps(sum, _mm256_mul_ps(d, _mm256_cvtepi32_ps(dot)));
    }
    float result[8];
    _mm256_storeu_ps(result, _mm256_mul_ps(sum, _mm256_set1_ps(MOBIE_UNIT)));
    memcpy(y, result, (n_rows < 8 ? n_rows : 8) * sizeof(float));
}

static void matmul(int64_t n, const mobie_block * w, size_t row_bytes, int64_t n_rows, const void * const * act,
                   float * const * y, int64_t n_act) {
    for (int64_t r = 0; r < n_rows; r += 8) {
        for (int64_t t = 0; t < n_act; t++) {  // eight rows stay in the first cache
            dot_8_rows(n, (const mobie_block *) ((const char *) w + r * row_bytes), row_bytes, n_rows - r, act[t],
                       y[t] + r);
        }
    }
}

extern const mobie_kernels mobie_kernels_avx2 = { "avx2", quantize_act, matmul };
#else
extern const mobie_kernels mobie_kernels_avx2 = MOBIE_NO_KERNELS;
#endif
