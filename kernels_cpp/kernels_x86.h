// What the kernel files for x86 share: vectors of VEC_BYTES, 32 or 64, in one spelling, and the work per token, 256
// bits wide everywhere.
#ifndef MOBIE_KERNELS_X86_H
#define MOBIE_KERNELS_X86_H

#include <immintrin.h>

#include "kernels.h"

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12, about its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if VEC_BYTES == 64
typedef __m512i vec;
typedef __m512  vec_ps;
#define MM(name) _mm512_##name
#define SI(name) _mm512_##name##_si512
#else
typedef __m256i vec;
typedef __m256  vec_ps;
#define MM(name) _mm256_##name
#define SI(name) _mm256_##name##_si256
#endif

static inline vec load(const void * p) {
    return SI(load)((const vec *) p);
}
static inline void store(void * p, vec x) {
    SI(store)((vec *) p, x);
}

static inline __m128i load_16(const char * p) {
    return _mm_loadu_si128((const __m128i *) p);
}

// The same 16 bytes in every part.
static inline vec broadcast_16(__m128i x) {
#if VEC_BYTES == 64
    return _mm512_broadcast_i32x4(x);
#else
    return _mm256_broadcastsi128_si256(x);
#endif
}

static inline vec join_parts(const __m128i part[VEC_BYTES / 16]) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(part[0]), part[1], 1);
#if VEC_BYTES == 64
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(part[2]), part[3], 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#else
    return low;
#endif
}

static inline int sum_lanes(__m256i x) {  // of int32
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    sum         = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    sum         = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
    return _mm_cvtsi128_si32(sum);
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
        for (int b = 0; b < n_vec / 8; b++) {
            __m256i sums = _mm256_setzero_si256();
            for (int i = 8 * b; i < 8 * b + 8; i += 2) {
                __m256i v[2];
                for (int k = 0; k < 2; k++) {
                    const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(xg + 8 * (i + k)), inv);
                    v[k]                = _mm256_cvtps_epi32(_mm256_and_ps(scaled, keep));
                    sums                = _mm256_add_epi32(sums, v[k]);
                }
                const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v[0], v[1]), 0xd8);
                const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
                _mm_storeu_si128((__m128i *) (q + 8 * i), _mm_packs_epi16(low, high));
            }
            group.sums[b] = (int16_t) sum_lanes(sums);
        }
        mobie_set_act_group(act, n, g, group);
    }
    mobie_clear_act_padding(act, n);
}

// --- tables of activations, see kernels_lut.h ------------------------------------------------------------------------

static inline int16_t sum_magnitudes(const int8_t * q) {
    const __m256i q0   = _mm256_loadu_si256((const __m256i *) q);
    const __m256i q1   = _mm256_loadu_si256((const __m256i *) (q + 32));
    const __m256i zero = _mm256_setzero_si256();
    return (int16_t) sum_lanes(_mm256_add_epi64(_mm256_sad_epu8(_mm256_abs_epi8(q0), zero),  //
                                                _mm256_sad_epu8(_mm256_abs_epi8(q1), zero)));
}

static inline __m256i broadcast_word(const void * p) {
    short word;
    memcpy(&word, p, sizeof(word));
    return _mm256_set1_epi16(word);
}

// 32 bytes per four columns: the 16 low parts, then the 16 high parts.
static inline void build_tables(const int8_t * q, void * tables) {
    // Of four columns, the sum of the negative values, in the lower half of an int32. It is what the all-agreeing
    // pattern of the negative columns (all minus) must add to make v from the sum over the pluses.
    const __m256i ones = _mm256_set1_epi8(1), word_ones = _mm256_set1_epi16(1), zero = _mm256_setzero_si256();
    int32_t       negative[16];
    for (int i = 0; i < 2; i++) {
        const __m256i part = _mm256_min_epi8(_mm256_loadu_si256((const __m256i *) (q + 32 * i)), zero);
        _mm256_storeu_si256((__m256i *) (negative + 8 * i),
                            _mm256_madd_epi16(_mm256_maddubs_epi16(ones, part), word_ones));
    }
    // Lane i: bits 0 and 1 of i, bits 2 and 3 of i.
    const __m256i bits01 = _mm256_set1_epi64x(0x0101010000010000);
    const __m256i bits23 = _mm256_setr_epi64x(0, 0x0001000100010001, 0x0100010001000100, 0x0101010101010101);
    for (int i = 0; i < 16; i++) {
        __m256i v = _mm256_add_epi16(_mm256_maddubs_epi16(bits01, broadcast_word(q + 4 * i)),
                                     _mm256_maddubs_epi16(bits23, broadcast_word(q + 4 * i + 2)));
        v         = _mm256_sub_epi16(v, broadcast_word(negative + i));
        // The packing works in halves: lanes 0 to 7 in the lower one, 8 to 15 in the upper one.
        const __m256i bytes = _mm256_packus_epi16(_mm256_and_si256(v, _mm256_set1_epi16(15)), _mm256_srli_epi16(v, 4));
        _mm256_storeu_si256((__m256i *) tables + i, _mm256_permute4x64_epi64(bytes, 0xd8));
    }
}

#endif
