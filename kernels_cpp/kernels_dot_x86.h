// The vectors of kernels_dot.h in AVX-VNNI and AVX-512 VNNI, in one spelling: 16 rows, DOT_VECS vectors. A kernel file
// defines VEC_BYTES, 32 or 64, and DOT_TOKENS before it includes this one.
#ifndef MOBIE_KERNELS_DOT_X86_H
#define MOBIE_KERNELS_DOT_X86_H

#include "kernels_x86.h"

enum { VEC_ROWS = VEC_BYTES / 4, DOT_ROWS = 16, DOT_VECS = DOT_ROWS / VEC_ROWS };

typedef struct {
    vec v[DOT_VECS];
} words;

typedef struct {
    vec_ps v[DOT_VECS];
} floats;

#if VEC_BYTES == 64 || defined(MOBIE_EVEX)
#define VNNI(name) #name
#else
#define VNNI(name) "%{vex%} " #name
#endif

// sum[i] + the products of four unsigned bytes x[4 i] ... with the four signed ones of q. Not the compiler's own
// function: GCC 12 spends an instruction on the broadcast from memory and copies the sums about.
static inline vec dot_bytes(vec sum, vec x, const int32_t * q) {
#if VEC_BYTES == 64
    __asm__(VNNI(vpdpbusd) " %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(x), "m"(*q));
#else
    __asm__(VNNI(vpdpbusd) " %2, %1, %0" : "+x"(sum) : "x"(x), "x"(_mm256_set1_epi32(*q)));
#endif
    return sum;
}

// sum[i] + the products of two int16 each.
static inline vec dot_words(vec sum, vec x, vec y) {
#if VEC_BYTES == 64
    __asm__(VNNI(vpdpwssd) " %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
#else
    __asm__(VNNI(vpdpwssd) " %2, %1, %0" : "+x"(sum) : "x"(x), "xm"(y));
#endif
    return sum;
}

// Four rows of each part: row 4 i + r starts at part[i] + step[r]. Hidden from the compiler, which would keep sixteen
// addresses, more than there are registers.
typedef struct {
    const char * part[DOT_ROWS / 4];
    size_t       step[4];
} row_addresses;

static inline row_addresses addresses_of(const char * p, size_t stride) {
    row_addresses a;
#pragma GCC unroll 4
    for (int i = 0; i < DOT_ROWS / 4; i++) {
        a.part[i] = p + 4 * i * stride;
        __asm__("" : "+r"(a.part[i]));
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        a.step[r] = r * stride;
        if (r % 2) {
            __asm__("" : "+r"(a.step[r]));
        }
    }
    return a;
}

static inline void advance(row_addresses * a) {
#pragma GCC        unroll 4
    for (int i = 0; i < DOT_ROWS / 4; i++) {
        a->part[i] += 4 * sizeof(mobie_block);
    }
}

// Word k of the 16 bytes at offset of the rows of vector v: w[k].
static inline void load_words(const row_addresses & a, int v, int offset, vec w[4]) {
    vec x[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        __m128i part[VEC_ROWS / 4];
#pragma GCC unroll 4
        for (int i = 0; i < VEC_ROWS / 4; i++) {
            part[i] = load_16(a.part[v * (VEC_ROWS / 4) + i] + a.step[r] + offset);
        }
        x[r] = join_parts(part);
    }
    const vec lo0 = MM(unpacklo_epi32)(x[0], x[1]), hi0 = MM(unpackhi_epi32)(x[0], x[1]);
    const vec lo1 = MM(unpacklo_epi32)(x[2], x[3]), hi1 = MM(unpackhi_epi32)(x[2], x[3]);
    w[0] = MM(unpacklo_epi64)(lo0, lo1);
    w[1] = MM(unpackhi_epi64)(lo0, lo1);
    w[2] = MM(unpacklo_epi64)(hi0, hi1);
    w[3] = MM(unpackhi_epi64)(hi0, hi1);
}

// The last word of the 16 bytes at offset of the rows of vector v.
static inline vec load_last_word(const row_addresses & a, int v, int offset) {
    __m128i part[VEC_ROWS / 4];
#pragma GCC unroll 4
    for (int i = 0; i < VEC_ROWS / 4; i++) {
        const char * rows = a.part[v * (VEC_ROWS / 4) + i] + offset;
        part[i] = _mm_unpackhi_epi64(_mm_unpackhi_epi32(load_16(rows + a.step[0]), load_16(rows + a.step[1])),
                                     _mm_unpackhi_epi32(load_16(rows + a.step[2]), load_16(rows + a.step[3])));
    }
    return join_parts(part);
}

static inline void load_group(const row_addresses & a, words w[9]) {
#pragma GCC        unroll 2
    for (int v = 0; v < DOT_VECS; v++) {
        vec y[8];
        load_words(a, v, 0, y);
        load_words(a, v, 16, y + 4);
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) {
            w[k].v[v] = y[k];
        }
        w[8].v[v] = load_last_word(a, v, 20);  // of bytes that end with the group
    }
}

static inline words mix(words x, words y, int b) {
#pragma GCC         unroll 2
    for (int v = 0; v < DOT_VECS; v++) {
#if VEC_BYTES == 64
        x.v[v] = _mm512_mask_mov_epi8(x.v[v], 0x1111111111111111u * ((2u << b) - 1), y.v[v]);
#else
        const vec from_y = _mm256_set1_epi32((int) ((2ull << (8 * b + 7)) - 1));
        x.v[v]           = b == 3   ? y.v[v]
                           : b == 1 ? _mm256_blend_epi16(x.v[v], y.v[v], 0x55)
                                    : _mm256_blendv_epi8(x.v[v], y.v[v], from_y);
#endif
    }
    return x;
}

static inline words byte_of(words x, int b) {
#pragma GCC         unroll 2
    for (int v = 0; v < DOT_VECS; v++) {
        x.v[v] = SI (and)(MM(srli_epi32)(x.v[v], 8 * b), MM(set1_epi32)(255));
    }
    return x;
}

static inline words zero_words() {
    words x;
    for (int v = 0; v < DOT_VECS; v++) {
        x.v[v] = SI(setzero)();
    }
    return x;
}

static inline void arrange_block(const int8_t * q, int b, int32_t * out) {
#if VEC_BYTES == 64
    // The order of the 8 bytes at a time, then words of two columns, then the words of both interleaved.
    const __m512i order = _mm512_add_epi64(_mm512_set1_epi64(7 - b), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    const __m512i pairs = _mm512_shuffle_epi8(
        _mm512_permutexvar_epi64(order, _mm512_loadu_si512(q)),
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15)));
    const __m512i first = _mm512_shuffle_i64x2(pairs, pairs, 0xa0), second = _mm512_shuffle_i64x2(pairs, pairs, 0xf5);
    _mm512_store_si512(
        out, _mm512_mask_blend_epi64(0xcc, _mm512_unpacklo_epi16(first, second), _mm512_unpackhi_epi16(first, second)));
#else
    for (int half = 0; half < 2; half++, out += 8) {
        __m128i x[4];
        for (int j = 0; j < 4; j++) {
            x[j] = _mm_loadl_epi64((const __m128i *) (q + 8 * ((7 - b + 4 * half + j) % 8)));
        }
        const __m128i first = _mm_unpacklo_epi8(x[0], x[1]), second = _mm_unpacklo_epi8(x[2], x[3]);
        _mm_store_si128((__m128i *) out, _mm_unpacklo_epi16(first, second));
        _mm_store_si128((__m128i *) out + 1, _mm_unpackhi_epi16(first, second));
    }
#endif
}

static inline floats load_floats(const float * p) {
    floats x;
    for (int v = 0; v < DOT_VECS; v++) {
        x.v[v] = MM(loadu_ps)(p + v * VEC_ROWS);
    }
    return x;
}

static inline void store_floats(float * p, floats x) {
    for (int v = 0; v < DOT_VECS; v++) {
        MM(storeu_ps)(p + v * VEC_ROWS, x.v[v]);
    }
}

static inline floats add_scaled(floats total, words sums, float d) {
    for (int v = 0; v < DOT_VECS; v++) {
        total.v[v] = MM(add_ps)(total.v[v], MM(mul_ps)(MM(set1_ps)(d), MM(cvtepi32_ps)(sums.v[v])));
    }
    return total;
}

static inline floats scale_by(floats total, float factor) {
    for (int v = 0; v < DOT_VECS; v++) {
        total.v[v] = MM(mul_ps)(total.v[v], MM(set1_ps)(factor));
    }
    return total;
}

#include "kernels_dot.h"

// The signs are multiplied as they lie, bit 0 or bit 1 of each byte: sums over odd bits are twice what they should be,
// and so are the results. Shifts by 2, 4 and 6 bring the other bits there.
template <int T>
static inline void add_block(words sums[T], const dot_signs & w, int b, const dot_act act[T]) {
    const vec bit[2] = { MM(set1_epi8)(1), MM(set1_epi8)(2) };
    vec       sum[2][T][DOT_VECS];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
#pragma GCC unroll 2
        for (int v = 0; v < DOT_VECS; v++) {
            sum[0][t][v] = SI(setzero)();
            sum[1][t][v] = MM(set1_epi32)(act[t].minus_sums[b]);
        }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
#pragma GCC unroll 8
        for (int s = 0; s < 8; s++) {
            vec x[DOT_VECS];
#pragma GCC unroll 2
            for (int v = 0; v < DOT_VECS; v++) {
                const vec signs = w.signs[b][half].v[v];
                x[v]            = SI (and)(s < 2 ? signs : MM(srli_epi32)(signs, s / 2 * 2), bit[s % 2]);
            }
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
#pragma GCC unroll 2
                for (int v = 0; v < DOT_VECS; v++) {
                    sum[s % 2][t][v] = dot_bytes(sum[s % 2][t][v], x[v], act[t].quads + 16 * b + 8 * half + s);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
#pragma GCC unroll 2
        for (int v = 0; v < DOT_VECS; v++) {
            const vec dot = MM(add_epi32)(MM(add_epi32)(sum[0][t][v], sum[0][t][v]), sum[1][t][v]);
            sums[t].v[v]  = dot_words(sums[t].v[v], dot, w.scales[b].v[v]);
        }
    }
}

#endif
