// The vectors of kernels_lut.h in AVX2 and AVX-512, in one spelling. A kernel file defines VEC_BYTES, 32 or 64, and
// LUT_VECS before it includes this one.
#ifndef MOBIE_KERNELS_LUT_X86_H
#define MOBIE_KERNELS_LUT_X86_H

#include "kernels_x86.h"

static inline vec zip_low(vec x, vec y) {
    return MM(unpacklo_epi8)(x, y);
}
static inline vec zip_high(vec x, vec y) {
    return MM(unpackhi_epi8)(x, y);
}
static inline vec low_nibbles(vec x) {
    return SI (and)(x, MM(set1_epi8)(15));
}
static inline vec high_nibbles(vec x) {
    return SI (and)(MM(srli_epi16)(x, 4), MM(set1_epi8)(15));
}
static inline vec zero_bytes() {
    return SI(setzero)();
}
static inline vec load_table(const uint8_t * p) {
    return broadcast_16(_mm_load_si128((const __m128i *) p));
}
static inline vec lookup(vec table, vec index) {
    return MM(shuffle_epi8)(table, index);
}
static inline vec add(vec x, vec y) {
    return MM(add_epi8)(x, y);
}
static inline vec load_rows(const char * p, size_t step) {
    __m128i part[VEC_BYTES / 16];
    for (int i = 0; i < VEC_BYTES / 16; i++) {
        part[i] = load_16(p + i * step);
    }
    return join_parts(part);
}

typedef struct {
    vec rows[4];  // [4 rows in each part of 16 bytes]
} row_sums;

static inline row_sums zero_sums() {
    return { { zero_bytes(), zero_bytes(), zero_bytes(), zero_bytes() } };
}

static inline void add_scaled(float * totals, row_sums sums, float d) {
    for (int i = 0; i < 4; i++, totals += VEC_BYTES / 4) {
        const vec_ps product = MM(mul_ps)(MM(set1_ps)(d), MM(cvtepi32_ps)(sums.rows[i]));
        MM(store_ps)(totals, MM(add_ps)(MM(load_ps)(totals), product));
    }
}

#include "kernels_lut.h"

// Sums over signs times values, int16, from the sums of kernels_lut.h: 2 v less the sum of the magnitudes.
static inline vec block_words(vec lows, vec highs, int magnitudes) {
    const vec high = MM(maddubs_epi16)(highs, MM(set1_epi8)(32));
    return MM(sub_epi16)(MM(add_epi16)(high, MM(add_epi16)(lows, lows)), MM(set1_epi16)((short) magnitudes));
}

static inline void add_pair(row_sums * sums, const block_sums & b0, const block_sums & b1, vec scales0, vec scales1) {
    const vec zero = zero_bytes();
    // Rows 0 to 7 and 8 to 15 of each part.
    const vec dot0_low   = block_words(zip_low(b0.low, zero), zip_low(b0.high[0], b0.high[1]), b0.magnitudes);
    const vec dot1_low   = block_words(zip_low(b1.low, zero), zip_low(b1.high[0], b1.high[1]), b1.magnitudes);
    const vec dot0_high  = block_words(zip_high(b0.low, zero), zip_high(b0.high[0], b0.high[1]), b0.magnitudes);
    const vec dot1_high  = block_words(zip_high(b1.low, zero), zip_high(b1.high[0], b1.high[1]), b1.magnitudes);
    const vec scales_low = zip_low(scales0, scales1), scales_high = zip_high(scales0, scales1);
    // The two blocks side by side for vpmaddwd.
    const vec dots[4]   = { MM(unpacklo_epi16)(dot0_low, dot1_low), MM(unpackhi_epi16)(dot0_low, dot1_low),
                            MM(unpacklo_epi16)(dot0_high, dot1_high), MM(unpackhi_epi16)(dot0_high, dot1_high) };
    const vec scales[4] = { zip_low(scales_low, zero), zip_high(scales_low, zero), zip_low(scales_high, zero),
                            zip_high(scales_high, zero) };
    for (int i = 0; i < 4; i++) {
        sums->rows[i] = MM(add_epi32)(sums->rows[i], MM(madd_epi16)(dots[i], scales[i]));
    }
}

#endif
