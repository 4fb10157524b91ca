// NEON with the dot product extension (ARMv8.2: Cortex-A55 and A75, Neoverse N1, Apple A13 and later): the dot products
// of kernels_dot.h, 8 rows at a time.
//
// Instructions per 64 weights and token, everything included, counted in an emulator over calls of 256 rows of
// 512: 18.0 for one token, 13.6 for two, 11.7 for four; ggml's Q1_0 takes 74.7 with the same extension. One token: 4 to
// isolate 64 signs, 4 to multiply, 2.7 to gather and transpose, 1.5 for scales and sums, the rest are registers that
// GCC 12 spills. The limit is vector arithmetic.
#include "kernels.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include "kernels_neon.h"

enum { DOT_VECS = 2, DOT_ROWS = 4 * DOT_VECS, DOT_TOKENS = 4, DOT_UNROLLED = 1 };

typedef struct {
    int32x4_t v[DOT_VECS];
} words;

typedef struct {
    float32x4_t v[DOT_VECS];
} floats;

typedef struct {
    const char * p;
    size_t       stride;
} row_addresses;

static inline row_addresses addresses_of(const char * p, size_t stride) {
    return { p, stride };
}

static inline void advance(row_addresses * a) {
    a->p += 4 * sizeof(mobie_block);
}

static inline uint32x4_t load_16(const char * p) {
    return vreinterpretq_u32_u8(vld1q_u8((const uint8_t *) p));
}

static inline void load_group(const row_addresses & a, words w[9]) {
#pragma GCC        unroll 2
    for (int v = 0; v < DOT_VECS; v++) {
        const char * p = a.p + 4 * v * a.stride;
#pragma GCC unroll 3
        for (int i = 0; i < 3; i++) {  // the last word from 16 bytes that end with the group
            const int        at = i < 2 ? 16 * i : 20;
            const uint32x4_t x0 = load_16(p + at), x1 = load_16(p + a.stride + at);
            const uint32x4_t x2 = load_16(p + 2 * a.stride + at), x3 = load_16(p + 3 * a.stride + at);
            const uint64x2_t lo0 = vreinterpretq_u64_u32(vzip1q_u32(x0, x1)),
                             hi0 = vreinterpretq_u64_u32(vzip2q_u32(x0, x1));
            const uint64x2_t lo1 = vreinterpretq_u64_u32(vzip1q_u32(x2, x3)),
                             hi1 = vreinterpretq_u64_u32(vzip2q_u32(x2, x3));
            if (i < 2) {
                w[4 * i].v[v]     = vreinterpretq_s32_u64(vzip1q_u64(lo0, lo1));
                w[4 * i + 1].v[v] = vreinterpretq_s32_u64(vzip2q_u64(lo0, lo1));
                w[4 * i + 2].v[v] = vreinterpretq_s32_u64(vzip1q_u64(hi0, hi1));
            }
            w[i < 2 ? 4 * i + 3 : 8].v[v] = vreinterpretq_s32_u64(vzip2q_u64(hi0, hi1));
        }
    }
}

static inline words mix(words x, words y, int b) {
    const uint32x4_t from_y = vdupq_n_u32((uint32_t) ((2ull << (8 * b + 7)) - 1));
    for (int v = 0; v < DOT_VECS; v++) {
        x.v[v] = b == 3 ? y.v[v] : vbslq_s32(from_y, y.v[v], x.v[v]);
    }
    return x;
}

static inline words byte_of(words x, int b) {
    for (int v = 0; v < DOT_VECS; v++) {
        const uint32x4_t word = vreinterpretq_u32_s32(x.v[v]);
        const uint32x4_t byte = b == 0   ? vandq_u32(word, vdupq_n_u32(255))
                                : b == 1 ? vandq_u32(vshrq_n_u32(word, 8), vdupq_n_u32(255))
                                : b == 2 ? vandq_u32(vshrq_n_u32(word, 16), vdupq_n_u32(255))
                                         : vshrq_n_u32(word, 24);
        x.v[v]                = vreinterpretq_s32_u32(byte);
    }
    return x;
}

static inline words zero_words() {
    words x;
    for (int v = 0; v < DOT_VECS; v++) {
        x.v[v] = vdupq_n_s32(0);
    }
    return x;
}

static inline void arrange_block(const int8_t * q, int b, int32_t * out) {
    for (int half = 0; half < 2; half++, out += 8) {
        int8x8x4_t x;
        for (int j = 0; j < 4; j++) {
            x.val[j] = vld1_s8(q + 8 * ((7 - b + 4 * half + j) % 8));
        }
        vst4_s8((int8_t *) out, x);
    }
}

static inline floats load_floats(const float * p) {
    floats x;
    for (int v = 0; v < DOT_VECS; v++) {
        x.v[v] = vld1q_f32(p + 4 * v);
    }
    return x;
}

static inline void store_floats(float * p, floats x) {
    for (int v = 0; v < DOT_VECS; v++) {
        vst1q_f32(p + 4 * v, x.v[v]);
    }
}

static inline floats add_scaled(floats total, words sums, float d) {
    for (int v = 0; v < DOT_VECS; v++) {
        total.v[v] = vaddq_f32(total.v[v], vmulq_n_f32(vcvtq_f32_s32(sums.v[v]), d));
    }
    return total;
}

static inline floats scale_by(floats total, float factor) {
    for (int v = 0; v < DOT_VECS; v++) {
        total.v[v] = vmulq_n_f32(total.v[v], factor);
    }
    return total;
}

#include "kernels_dot.h"

// A comparison makes -1 of a plus and 0 of a minus: less than the sum over the pluses by its sign.
template <int T>
static inline void add_block(words sums[T], const dot_signs & w, int b, const dot_act act[T]) {
    int32x4_t sum[T][DOT_VECS];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        for (int v = 0; v < DOT_VECS; v++) {
            sum[t][v] = vdupq_n_s32(0);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {  // four words of activations at a time
        int8x16_t q[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            q[t] = vreinterpretq_s8_s32(vld1q_s32(act[t].quads + 16 * b + 4 * i));
        }
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            const uint8x16_t bit = vdupq_n_u8((uint8_t) (1 << (4 * (i % 2) + k)));
            for (int v = 0; v < DOT_VECS; v++) {
                const int8x16_t x = vreinterpretq_s8_u8(vtstq_u8(vreinterpretq_u8_s32(w.signs[b][i / 2].v[v]), bit));
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    sum[t][v] = k == 0   ? vdotq_laneq_s32(sum[t][v], x, q[t], 0)
                                : k == 1 ? vdotq_laneq_s32(sum[t][v], x, q[t], 1)
                                : k == 2 ? vdotq_laneq_s32(sum[t][v], x, q[t], 2)
                                         : vdotq_laneq_s32(sum[t][v], x, q[t], 3);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        for (int v = 0; v < DOT_VECS; v++) {  // 2 * pluses - all
            const int32x4_t dot = vsubq_s32(vdupq_n_s32(act[t].minus_sums[b]), vshlq_n_s32(sum[t][v], 1));
            sums[t].v[v]        = vmlaq_s32(sums[t].v[v], dot, w.scales[b].v[v]);
        }
    }
}

extern const mobie_kernels mobie_kernels_neon_dotprod = { "neon_dotprod", quantize_act, dot_matmul<dot_act>,
                                                          DOT_WORK<dot_act> };
#else
extern const mobie_kernels mobie_kernels_neon_dotprod = MOBIE_NO_KERNELS;
#endif
