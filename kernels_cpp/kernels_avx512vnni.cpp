// AVX-512 with VNNI (Ice Lake, Zen 4 and later).
//
// One token, per 64 weights of a row: kmovq (the signs), vpblendmb (+-q), vpbroadcastb (the scale), vpdpbusd: the scale
// is the unsigned operand of the product and costs nothing. Eight rows share the loads of q; per 256 weights a tree of
// 24 instructions turns their eight accumulators into one int per row, plus three for the float sum: 4.8 instructions
// per 64 weights in all, near what memory delivers to one core (9 bytes).
//
// Many tokens, per 64 weights and token: one vpdpbusd. Rows lie across the 16 lanes, so nothing is reduced; see tile().
// The limit is the two vpdpbusd per cycle of the best cores.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12, about its own intrinsics
#endif

static void quantize_act(const float * x, void * act, int64_t n) {
    const __m512i abs_bits = _mm512_set1_epi32(0x7fffffff);
    for (int64_t g = 0; g < mobie_n_groups(n); g++) {
        const int     n_vec = 4 * mobie_group_blocks(n, g);  // of 16 floats
        const float * xg    = x + g * MOBIE_GROUP_LEN;
        char *        q     = (char *) act + g * MOBIE_GROUP_LEN;

        // Magnitudes compared as integers: the order of floats, with infinity and then NaN on top.
        __m512i top = _mm512_setzero_si512();
        for (int i = 0; i < n_vec; i++) {
            top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_loadu_si512(xg + 16 * i), abs_bits));
        }
        const float     max   = mobie_float_of_bits(_mm512_reduce_max_epi32(top));
        mobie_act_group group = { mobie_act_scale_of(max), {} };

        const __m512    inv  = _mm512_set1_ps(mobie_act_inverse_of(max));
        const __mmask16 keep = max <= MOBIE_ACT_MAX ? 0xffff : 0;
        __m512i         sums = _mm512_setzero_si512();
        for (int i = 0; i < n_vec; i++) {
            const __m512  scaled = _mm512_maskz_mul_ps(keep, _mm512_loadu_ps(xg + 16 * i), inv);
            const __m512i values = _mm512_cvtps_epi32(scaled);
            _mm_storeu_si128((__m128i *) (q + 16 * i), _mm512_cvtsepi32_epi8(values));
            sums = i % 4 == 0 ? values : _mm512_add_epi32(sums, values);
            if (i % 4 == 3) {
                group.sums[i / 4] = (int16_t) _mm512_reduce_add_epi32(sums);
            }
        }
        mobie_set_act_group(act, n, g, group);
    }
    mobie_clear_act_padding(act, n);
}

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

// --- many tokens -----------------------------------------------------------------------------------------------------
//
// The bits of 32 rows become bytes once, 0 where the sign is minus and the block's scale where it is plus, four columns
// of a row to a lane. The product with four broadcast activations then holds 16 rows in its lanes, and
//
//     sum s_b B_bj q_bj = 2 * (sum over the pluses s_b q_bj) - sum_b s_b * (sum_j q_bj)
//
// with the last sum known from the activations.

static const int64_t TILE_ROWS     = 32;
static const int64_t TILE_ACTS     = 256;  // so many rows of activations stay in the second cache
static const int64_t MIN_TILE_ACTS = 4;    // fewer do not pay for the unpacking

typedef struct {
    __m512i plus[2][MOBIE_GROUP_LEN / 4];  // [16 rows][columns 4 i to 4 i + 3]
    __m512i scales[2][2];                  // [blocks 2 i and 2 i + 1, as int16][16 rows]
} group_tile;

static inline void unpack_block(const char * const row[16], int64_t offset, __m512i plus[16]) {
    __m512i a[16], b[16];
    for (int r = 0; r < 16; r++) {
        const mobie_block * block = (const mobie_block *) (row[r] + offset);
        __mmask64           signs;
        memcpy(&signs, block->signs, sizeof(signs));
        a[r] = _mm512_maskz_set1_epi8(signs, (char) block->scale);
    }
    // A transposition of 16 x 16 lanes: pairs, fours, then quarters of vectors.
    for (int r = 0; r < 16; r += 2) {
        b[r]     = _mm512_unpacklo_epi32(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
    }
    for (int r = 0; r < 16; r += 4) {
        a[r]     = _mm512_unpacklo_epi64(b[r], b[r + 2]);
        a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
        a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
        a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
    }
    for (int i = 0; i < 4; i++) {
        const __m512i even_low  = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        const __m512i odd_low   = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        const __m512i odd_high  = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
        plus[i]                 = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        plus[i + 4]             = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        plus[i + 8]             = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        plus[i + 12]            = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

static void unpack_group(const char * const row[TILE_ROWS], int64_t offset, int n_blocks, group_tile * tile) {
    uint16_t scales[2][TILE_ROWS][2] = {};
    for (int b = 0; b < n_blocks; b++, offset += sizeof(mobie_block)) {
        unpack_block(row, offset, tile->plus[0] + 16 * b);
        unpack_block(row + 16, offset, tile->plus[1] + 16 * b);
        for (int r = 0; r < TILE_ROWS; r++) {
            scales[b / 2][r][b % 2] = ((const mobie_block *) (row[r] + offset))->scale;
        }
    }
    memcpy(tile->scales, scales, sizeof(scales));
}

// Adds the products of a tile with group g of T tokens to y[t][0 .. 31], of which only n_act tokens and the rows in
// mask are stored; the others may repeat the last.
template <int T>
static inline void add_group(int64_t n, int64_t g, const group_tile * tile, const void * const * act, float * const * y,
                             int64_t n_act, const __mmask16 mask[2]) {
    const char * q[T];
    __m512i      sum[T][2];
    for (int t = 0; t < T; t++) {
        q[t]      = (const char *) act[t < n_act ? t : n_act - 1] + g * MOBIE_GROUP_LEN;
        sum[t][0] = sum[t][1] = _mm512_setzero_si512();
    }
    const int n_quads = 16 * mobie_group_blocks(n, g);
    for (int i = 0; i < n_quads; i++) {
        const __m512i plus0 = tile->plus[0][i], plus1 = tile->plus[1][i];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            int four;
            memcpy(&four, q[t] + 4 * i, sizeof(four));
            const __m512i q4 = _mm512_set1_epi32(four);
            sum[t][0]        = _mm512_dpbusd_epi32(sum[t][0], plus0, q4);
            sum[t][1]        = _mm512_dpbusd_epi32(sum[t][1], plus1, q4);
        }
    }
    const bool first = g == 0, last = g == mobie_n_groups(n) - 1;
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        if (t >= n_act) {
            break;
        }
        const mobie_act_group group = mobie_get_act_group(act[t], n, g);
        int                   pair[2];
        memcpy(pair, group.sums, sizeof(pair));
        const __m512 d = _mm512_set1_ps(group.scale);
        for (int h = 0; h < 2; h++) {
            const __m512i all   = _mm512_dpwssd_epi32(_mm512_madd_epi16(tile->scales[0][h], _mm512_set1_epi32(pair[0])),
                                                      tile->scales[1][h], _mm512_set1_epi32(pair[1]));
            const __m512i dot   = _mm512_sub_epi32(_mm512_slli_epi32(sum[t][h], 1), all);
            float *       yt    = y[t] + 16 * h;
            __m512        total = first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask[h], yt);
            total               = _mm512_add_ps(total, _mm512_mul_ps(d, _mm512_cvtepi32_ps(dot)));
            total               = last ? _mm512_mul_ps(total, _mm512_set1_ps(MOBIE_UNIT)) : total;
            _mm512_mask_storeu_ps(yt, mask[h], total);
        }
    }
}

// Up to 32 rows times up to TILE_ACTS tokens.
static void dot_tile(int64_t n, const mobie_block * w, size_t row_bytes, int64_t n_rows, const void * const * act,
                     float * const * y, int64_t first_row, int64_t n_act) {
    const char * row[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++) {
        row[r] = (const char *) w + (first_row + (r < n_rows ? r : n_rows - 1)) * row_bytes;
    }
    const uint32_t  rows    = n_rows < TILE_ROWS ? (1u << n_rows) - 1 : ~0u;
    const __mmask16 mask[2] = { (__mmask16) rows, (__mmask16) (rows >> 16) };
    group_tile      tile;
    for (int64_t g = 0; g < mobie_n_groups(n); g++) {
        unpack_group(row, g * 4 * sizeof(mobie_block), mobie_group_blocks(n, g), &tile);
        for (int64_t t = 0; t < n_act; t += 8) {
            float * yt[8];
            for (int i = 0; i < 8 && t + i < n_act; i++) {
                yt[i] = y[t + i] + first_row;
            }
            if (n_act - t > 4) {
                add_group<8>(n, g, &tile, act + t, yt, n_act - t, mask);
            } else {
                add_group<4>(n, g, &tile, act + t, yt, n_act - t, mask);
            }
        }
    }
}

static void matmul(int64_t n, const mobie_block * w, size_t row_bytes, int64_t n_rows, const void * const * act,
                   float * const * y, int64_t n_act) {
    if (n_act >= MIN_TILE_ACTS) {
        for (int64_t t = 0; t < n_act; t += TILE_ACTS) {
            for (int64_t r = 0; r < n_rows; r += TILE_ROWS) {
                dot_tile(n, w, row_bytes, n_rows - r, act + t, y + t, r, n_act - t < TILE_ACTS ? n_act - t : TILE_ACTS);
            }
        }
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
