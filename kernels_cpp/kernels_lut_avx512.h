// The vectors of kernels_lut.h in AVX-512, 64 rows each, for kernels_avx512.cpp and kernels_avx512vnni.cpp. They define
// LUT_VECS.
#ifndef MOBIE_KERNELS_LUT_AVX512_H
#define MOBIE_KERNELS_LUT_AVX512_H

#include "kernels_x86.h"

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12, about its own intrinsics
#endif

typedef __m512i vec;
enum { VEC_BYTES = 64 };

static inline vec load(const void * p) {
    return _mm512_load_si512(p);
}
static inline void store(void * p, vec x) {
    _mm512_store_si512(p, x);
}
static inline __m128i load_16(const char * p) {
    return _mm_loadu_si128((const __m128i *) p);
}
static inline vec load_rows(const char * const * row, int64_t offset) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(load_16(row[0] + offset)),  //
                                                load_16(row[16] + offset), 1);
    const __m256i high =
        _mm256_inserti128_si256(_mm256_castsi128_si256(load_16(row[32] + offset)), load_16(row[48] + offset), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
static inline vec zip_low(vec x, vec y) {
    return _mm512_unpacklo_epi8(x, y);
}
static inline vec zip_high(vec x, vec y) {
    return _mm512_unpackhi_epi8(x, y);
}
static inline vec low_nibbles(vec x) {
    return _mm512_and_si512(x, _mm512_set1_epi8(15));
}
static inline vec high_nibbles(vec x) {
    return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15));
}
static inline vec join_nibbles(vec low, vec high) {
    return _mm512_or_si512(low, _mm512_slli_epi16(high, 4));
}
static inline vec zero_bytes() {
    return _mm512_setzero_si512();
}
static inline vec load_table(const uint8_t * p) {
    return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *) p));
}
static inline vec lookup(vec table, vec index) {
    return _mm512_shuffle_epi8(table, index);
}
static inline vec add(vec x, vec y) {
    return _mm512_add_epi8(x, y);
}

typedef struct {
    __m512i rows[4];  // [4 rows in each quarter]
} row_sums;

static inline row_sums zero_sums() {
    const __m512i zero = _mm512_setzero_si512();
    return { { zero, zero, zero, zero } };
}

static inline void add_scaled(float * totals, row_sums sums, float d) {
    for (int i = 0; i < 4; i++) {
        const __m512 product = _mm512_mul_ps(_mm512_set1_ps(d), _mm512_cvtepi32_ps(sums.rows[i]));
        _mm512_store_ps(totals + 16 * i, _mm512_add_ps(_mm512_load_ps(totals + 16 * i), product));
    }
}

#include "kernels_lut.h"

// Sums over signs times values, int16, from the sums of kernels_lut.h: 2 v less the sum of the magnitudes.
static inline __m512i block_words(__m512i lows, __m512i highs, int magnitudes) {
    const __m512i high = _mm512_maddubs_epi16(highs, _mm512_set1_epi8(32));
    return _mm512_sub_epi16(_mm512_add_epi16(high, _mm512_add_epi16(lows, lows)),
                            _mm512_set1_epi16((short) magnitudes));
}

static inline void add_pair(row_sums * sums, const block_sums & b0, const block_sums & b1, vec scales0, vec scales1) {
    const __m512i zero = _mm512_setzero_si512();
    // Rows 0 to 7 and 8 to 15 of each quarter.
    const __m512i dot0_low   = block_words(zip_low(b0.low, zero), zip_low(b0.high[0], b0.high[1]), b0.magnitudes);
    const __m512i dot1_low   = block_words(zip_low(b1.low, zero), zip_low(b1.high[0], b1.high[1]), b1.magnitudes);
    const __m512i dot0_high  = block_words(zip_high(b0.low, zero), zip_high(b0.high[0], b0.high[1]), b0.magnitudes);
    const __m512i dot1_high  = block_words(zip_high(b1.low, zero), zip_high(b1.high[0], b1.high[1]), b1.magnitudes);
    const __m512i scales_low = zip_low(scales0, scales1), scales_high = zip_high(scales0, scales1);
    // The two blocks side by side for vpmaddwd.
    const __m512i dots[4]   = { _mm512_unpacklo_epi16(dot0_low, dot1_low), _mm512_unpackhi_epi16(dot0_low, dot1_low),
                                _mm512_unpacklo_epi16(dot0_high, dot1_high),
                                _mm512_unpackhi_epi16(dot0_high, dot1_high) };
    const __m512i scales[4] = { zip_low(scales_low, zero), zip_high(scales_low, zero), zip_low(scales_high, zero),
                                zip_high(scales_high, zero) };
    for (int i = 0; i < 4; i++) {
        sums->rows[i] = _mm512_add_epi32(sums->rows[i], _mm512_madd_epi16(dots[i], scales[i]));
    }
}

#endif
