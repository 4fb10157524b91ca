// NEON as every 64-bit ARM has it: the lookups of kernels_lut.h, 16 rows at a time.
//
// Instructions per 64 weights and token, everything included, counted in an emulator over calls of 256 rows of
// 512: 17.8 for one token (5.3 of them look up and add, the rest transposes rows and builds tables), 11.8 for eight.
// ggml's Q1_0 takes 74.7 with the dot product extension. The limit is vector arithmetic.
#include "kernels.h"

#if defined(__aarch64__)
#include "kernels_neon.h"

typedef uint8x16_t vec;
enum { VEC_BYTES = 16, LUT_VECS = 4 };

static inline vec load(const uint8_t * p) {
    return vld1q_u8(p);
}
static inline void store(uint8_t * p, vec x) {
    vst1q_u8(p, x);
}
static inline vec load_rows(const char * p, size_t) {
    return vld1q_u8((const uint8_t *) p);
}
static inline vec zip_low(vec x, vec y) {
    return vzip1q_u8(x, y);
}
static inline vec zip_high(vec x, vec y) {
    return vzip2q_u8(x, y);
}
static inline vec low_nibbles(vec x) {
    return vandq_u8(x, vdupq_n_u8(15));
}
static inline vec high_nibbles(vec x) {
    return vshrq_n_u8(x, 4);
}
static inline vec zero_bytes() {
    return vdupq_n_u8(0);
}
static inline vec load_table(const uint8_t * p) {
    return vld1q_u8(p);
}
static inline vec lookup(vec table, vec index) {
    return vqtbl1q_u8(table, index);
}
static inline vec add(vec x, vec y) {
    return vaddq_u8(x, y);
}

static inline int16_t sum_magnitudes(const int8_t * q) {
    int sum = 0;
    for (int i = 0; i < 64; i += 16) {
        sum += vaddlvq_u8(vreinterpretq_u8_s8(vabsq_s8(vld1q_s8(q + i))));
    }
    return (int16_t) sum;
}

// 32 bytes per four columns: the 16 low parts, then the 16 high parts.
static inline void build_tables(const int8_t * q, void * tables) {
    // Of four columns, the sum of the negative values: v is the sum over the pluses less this.
    int16_t negative[16];
    for (int i = 0; i < 2; i++) {
        const int8x16_t zero = vdupq_n_s8(0);
        const int16x8_t a    = vpaddlq_s8(vminq_s8(vld1q_s8(q + 32 * i), zero));
        const int16x8_t b    = vpaddlq_s8(vminq_s8(vld1q_s8(q + 32 * i + 16), zero));
        vst1q_s16(negative + 8 * i, vpaddq_s16(a, b));
    }
    // Bits 0, 1 and 2 of the lane's number.
    const int16_t   bits[3][8] = { { 0, 1, 0, 1, 0, 1, 0, 1 }, { 0, 0, 1, 1, 0, 0, 1, 1 }, { 0, 0, 0, 0, 1, 1, 1, 1 } };
    const int16x8_t bit0 = vld1q_s16(bits[0]), bit1 = vld1q_s16(bits[1]), bit2 = vld1q_s16(bits[2]);
    uint8_t *       at = (uint8_t *) tables;
    for (int i = 0; i < 16; i++, at += 32) {
        int16x8_t v            = vdupq_n_s16((int16_t) -negative[i]);
        v                      = vmlaq_n_s16(v, bit0, q[4 * i]);
        v                      = vmlaq_n_s16(v, bit1, q[4 * i + 1]);
        v                      = vmlaq_n_s16(v, bit2, q[4 * i + 2]);
        const uint16x8_t first = vreinterpretq_u16_s16(v);
        const uint16x8_t last  = vreinterpretq_u16_s16(vaddq_s16(v, vdupq_n_s16(q[4 * i + 3])));
        vst1q_u8(at, vandq_u8(vcombine_u8(vmovn_u16(first), vmovn_u16(last)), vdupq_n_u8(15)));
        vst1q_u8(at + 16, vcombine_u8(vshrn_n_u16(first, 4), vshrn_n_u16(last, 4)));
    }
}

typedef struct {
    int32x4_t rows[4];
} row_sums;

static inline row_sums zero_sums() {
    const int32x4_t zero = vdupq_n_s32(0);
    return { { zero, zero, zero, zero } };
}

static inline void add_scaled(float * totals, row_sums sums, float d) {
    for (int i = 0; i < 4; i++) {
        const float32x4_t product = vmulq_n_f32(vcvtq_f32_s32(sums.rows[i]), d);
        vst1q_f32(totals + 4 * i, vaddq_f32(vld1q_f32(totals + 4 * i), product));
    }
}

#include "kernels_lut.h"

// Two lanes of rows: 2 v less the sum of the magnitudes.
static inline int16x8_t block_words(uint8x8_t low, uint8x8_t high0, uint8x8_t high1, int magnitudes) {
    const uint16x8_t v = vaddw_u8(vshlq_n_u16(vaddl_u8(high0, high1), 4), low);
    return vsubq_s16(vreinterpretq_s16_u16(vshlq_n_u16(v, 1)), vdupq_n_s16((int16_t) magnitudes));
}

static inline void add_block(row_sums * sums, const block_sums & b, vec scales) {
    const int16x8_t dot0 =
        block_words(vget_low_u8(b.low), vget_low_u8(b.high[0]), vget_low_u8(b.high[1]), b.magnitudes);
    const int16x8_t dot1 =
        block_words(vget_high_u8(b.low), vget_high_u8(b.high[0]), vget_high_u8(b.high[1]), b.magnitudes);
    const int16x8_t scale0 = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(scales)));
    const int16x8_t scale1 = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(scales)));
    sums->rows[0]          = vmlal_s16(sums->rows[0], vget_low_s16(dot0), vget_low_s16(scale0));
    sums->rows[1]          = vmlal_high_s16(sums->rows[1], dot0, scale0);
    sums->rows[2]          = vmlal_s16(sums->rows[2], vget_low_s16(dot1), vget_low_s16(scale1));
    sums->rows[3]          = vmlal_high_s16(sums->rows[3], dot1, scale1);
}

static inline void add_pair(row_sums * sums, const block_sums & block0, const block_sums & block1, vec scales0,
                            vec scales1) {
    add_block(sums, block0, scales0);
    add_block(sums, block1, scales1);
}

extern const mobie_kernels mobie_kernels_neon = { "neon", quantize_act, lut_matmul, LUT_WORK };
#else
extern const mobie_kernels mobie_kernels_neon = MOBIE_NO_KERNELS;
#endif
