// AVX2: the lookups of kernels_lut.h, 32 rows at a time.
//
// One token, per 64 weights of a row: 3 instructions to look up and add (12 per 4 columns of 64 rows), 3 to transpose
// and split the signs, 0.8 to join the two bytes of a sum and multiply by the scale; the tables, 200 per block and
// call, are 0.8 for 256 rows: 7.6. The limit is vector arithmetic, not memory. Every further token has the 3 and 0.8
// and its own tables: as many products per cycle as two vpdpbusd of 256 bits, so AVX-VNNI has no file of its own.
#include "kernels.h"

#if defined(__AVX2__)
#include "kernels_x86.h"

typedef __m256i vec;
enum { VEC_BYTES = 32, LUT_VECS = 2 };

static inline vec load(const void * p) {
    return _mm256_load_si256((const __m256i *) p);
}
static inline void store(void * p, vec x) {
    _mm256_store_si256((__m256i *) p, x);
}
static inline vec zero_bytes() {
    return _mm256_setzero_si256();
}
static inline vec load_rows(const char * const * row, int64_t offset) {
    const __m128i low = _mm_loadu_si128((const __m128i *) (row[0] + offset));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128((const __m128i *) (row[16] + offset)),
                                   1);
}
static inline vec zip_low(vec x, vec y) {
    return _mm256_unpacklo_epi8(x, y);
}
static inline vec zip_high(vec x, vec y) {
    return _mm256_unpackhi_epi8(x, y);
}
static inline vec low_nibbles(vec x) {
    return _mm256_and_si256(x, _mm256_set1_epi8(15));
}
static inline vec high_nibbles(vec x) {
    return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15));
}
static inline vec join_nibbles(vec low, vec high) {
    return _mm256_or_si256(low, _mm256_slli_epi16(high, 4));
}
static inline vec load_table(const uint8_t * p) {
    return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *) p));
}
static inline vec lookup(vec table, vec index) {
    return _mm256_shuffle_epi8(table, index);
}
static inline vec add(vec x, vec y) {
    return _mm256_add_epi8(x, y);
}

typedef struct {
    __m256i rows[4];  // [4 rows in each half]
} row_sums;

static inline row_sums zero_sums() {
    const __m256i zero = _mm256_setzero_si256();
    return { { zero, zero, zero, zero } };
}

static inline void add_scaled(float * totals, row_sums sums, float d) {
    for (int i = 0; i < 4; i++) {
        const __m256 product = _mm256_mul_ps(_mm256_set1_ps(d), _mm256_cvtepi32_ps(sums.rows[i]));
        _mm256_store_ps(totals + 8 * i, _mm256_add_ps(_mm256_load_ps(totals + 8 * i), product));
    }
}

#include "kernels_lut.h"

// Sums over signs times values, int16, from the sums of kernels_lut.h: 2 v less the sum of the magnitudes.
static inline __m256i block_words(__m256i lows, __m256i highs, int magnitudes) {
    const __m256i high = _mm256_maddubs_epi16(highs, _mm256_set1_epi8(32));
    return _mm256_sub_epi16(_mm256_add_epi16(high, _mm256_add_epi16(lows, lows)),
                            _mm256_set1_epi16((short) magnitudes));
}

static inline void add_pair(row_sums * sums, const block_sums & b0, const block_sums & b1, vec scales0, vec scales1) {
    const __m256i zero = _mm256_setzero_si256();
    // Rows 0 to 7 and 8 to 15 of each half.
    const __m256i dot0_low   = block_words(zip_low(b0.low, zero), zip_low(b0.high[0], b0.high[1]), b0.magnitudes);
    const __m256i dot1_low   = block_words(zip_low(b1.low, zero), zip_low(b1.high[0], b1.high[1]), b1.magnitudes);
    const __m256i dot0_high  = block_words(zip_high(b0.low, zero), zip_high(b0.high[0], b0.high[1]), b0.magnitudes);
    const __m256i dot1_high  = block_words(zip_high(b1.low, zero), zip_high(b1.high[0], b1.high[1]), b1.magnitudes);
    const __m256i scales_low = zip_low(scales0, scales1), scales_high = zip_high(scales0, scales1);
    // The two blocks side by side for vpmaddwd.
    const __m256i dots[4]   = { _mm256_unpacklo_epi16(dot0_low, dot1_low), _mm256_unpackhi_epi16(dot0_low, dot1_low),
                                _mm256_unpacklo_epi16(dot0_high, dot1_high),
                                _mm256_unpackhi_epi16(dot0_high, dot1_high) };
    const __m256i scales[4] = { zip_low(scales_low, zero), zip_high(scales_low, zero), zip_low(scales_high, zero),
                                zip_high(scales_high, zero) };
    for (int i = 0; i < 4; i++) {
        sums->rows[i] = _mm256_add_epi32(sums->rows[i], _mm256_madd_epi16(dots[i], scales[i]));
    }
}

extern const mobie_kernels mobie_kernels_avx2 = { "avx2", quantize_act, lut_matmul };
#else
extern const mobie_kernels mobie_kernels_avx2 = MOBIE_NO_KERNELS;
#endif
