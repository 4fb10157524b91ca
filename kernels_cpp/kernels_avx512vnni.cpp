// AVX-512 with VNNI (Ice Lake, Zen 4 and later).
//
// One token, per 64 weights of a row: kmovq (the signs), vpblendmb (+-q), vpbroadcastb (the scale), vpdpbusd: the scale
// is the unsigned operand of the product and costs nothing. Eight rows share the loads of q; per 256 weights a tree of
// 24 instructions turns their eight accumulators into one int per row, plus three for the float sum: 4.8 instructions
// per 64 weights in all, near what memory delivers to one core (9 bytes).
//
// Two tokens and more: the lookups of kernels_lut.h, which do more products per cycle than two vpdpbusd, and need no
// VNNI.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
enum { LUT_VECS = 2 };
#include "kernels_lut_avx512.h"

// The steps of a transposing sum.
static inline __m512i add_32(__m512i x, __m512i y) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
}
static inline __m512i add_64(__m512i x, __m512i y) {
    return _mm512_add_epi32(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
}

// Lane r of the result: the sum of all lanes of x[r].
static inline __m256i sum_rows(const __m512i x[8]) {
    const __m512i a = add_64(add_32(x[0], x[1]), add_32(x[2], x[3]));  // rows 0 1 2 3 in each 128 bits
    const __m512i b = add_64(add_32(x[4], x[5]), add_32(x[6], x[7]));
    const __m512i c = _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
    return _mm512_castsi512_si256(_mm512_add_epi32(_mm512_shuffle_i32x4(c, c, 0x88), _mm512_shuffle_i32x4(c, c, 0xdd)));
}

// The products of eight rows with one group of n_blocks blocks.
static inline __m256i dot_group(const char * const row[8], int64_t offset, const char * q, const int n_blocks) {
    __m512i sum[8];
    for (int r = 0; r < 8; r++) {
        sum[r] = _mm512_setzero_si512();
    }
#pragma GCC unroll 4
    for (int b = 0; b < n_blocks; b++) {
        const __m512i plus  = _mm512_loadu_si512(q + b * MOBIE_BLOCK_LEN);
        const __m512i minus = _mm512_sub_epi8(_mm512_setzero_si512(), plus);  // q is never -128
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
            const mobie_block * block = (const mobie_block *) (row[r] + offset) + b;
            __mmask64           signs;
            memcpy(&signs, block->signs, sizeof(signs));
            sum[r] = _mm512_dpbusd_epi32(sum[r], _mm512_set1_epi8((char) block->scale),
                                         _mm512_mask_blend_epi8(signs, minus, plus));
        }
    }
    return sum_rows(sum);
}

// Fewer rows do not pay for the tables of kernels_lut.h, nor for half-empty vectors.
static const int64_t MIN_LUT_ROWS = 128;

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
        const int     n_blocks = mobie_group_blocks(n, g);
        const int64_t offset   = g * 4 * sizeof(mobie_block);
        const __m256i dot      = n_blocks == 4 ? dot_group(row, offset, q, 4) : dot_group(row, offset, q, n_blocks);
        const __m256  d        = _mm256_set1_ps(mobie_act_scale(act, n, g));
        sum                    = _mm256_add_ps(sum, _mm256_mul_ps(d, _mm256_cvtepi32_ps(dot)));
    }
    sum = _mm256_mul_ps(sum, _mm256_set1_ps(MOBIE_UNIT));
    _mm256_mask_storeu_ps(y, n_rows < 8 ? (1u << n_rows) - 1 : 0xff, sum);
}

static void matmul(int64_t n, const mobie_block * w, size_t row_bytes, int64_t n_rows, const void * const * act,
                   float * const * y, int64_t n_act) {
    if (n_act > 1 && n_rows >= MIN_LUT_ROWS) {
        lut_matmul(n, w, row_bytes, n_rows, act, y, n_act);
        return;
    }
    for (int64_t r = 0; r < n_rows; r += 8) {
        for (int64_t t = 0; t < n_act; t++) {  // eight rows stay in the first cache
            dot_8_rows(n, (const mobie_block *) ((const char *) w + r * row_bytes), row_bytes, n_rows - r, act[t],
                       y[t] + r);
        }
    }
}

extern const mobie_kernels mobie_kernels_avx512vnni = { "avx512vnni", quantize_act, matmul };
#else
extern const mobie_kernels mobie_kernels_avx512vnni = MOBIE_NO_KERNELS;
#endif
