// AVX-512 with VBMI and VNNI (Ice Lake, Sapphire Rapids, Zen 4 and later): table lookups for one token, the products of
// kernels_avx512vnni.cpp for more.
//
// Instructions per 64 weights, everything included, counted by single steps through a call of 256 rows of 2048: 4.9
// (kernels_avx512vnni.cpp: 5.6). Of the 3.9 in the loop 1.25 look up and add, 0.35 isolate the four signs of an index,
// 1.2 gather and transpose 9 bytes, 0.3 prefetch the next rows; the tables are 80 per block, 0.3 for 256 rows.
// The limit is the memory: 9 bytes for 4.9 instructions.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__) && \
    defined(__AVX512VBMI__)
#define VEC_BYTES 64
enum { DOT_TOKENS = 1, DOT_UNROLLED = 1 };
#include "kernels_dot_x86.h"

// A group of activations as tables: for four columns, the sums for their 16 patterns of signs, kept in two bytes as in
// kernels_lut.h, v = low + 32 high. The words of kernels_dot.h stay as they are, four bytes of each row: vpermb looks
// up in 64 bytes, which are the tables of the four, and the index is a nibble under the number of its byte in the word.
typedef struct {
    enum { CAPACITY = 64 };                                 // 135 KB of work memory
    alignas(64) uint8_t tables[GROUP_BLOCKS][2][2][2][64];  // [block, mixed or own word, nibble, low or high]
    int32_t minus_magnitudes[GROUP_BLOCKS];                 // - sum of |q| of a block
    float   scale;
} group_tables;

static inline void arrange_group(int64_t n, const void * act, int64_t g, group_tables * out) {
    const mobie_act_group group    = mobie_get_act_group(act, n, g);
    const int             n_blocks = mobie_group_blocks(n, g);
    const int8_t *        q        = (const int8_t *) act + g * MOBIE_GROUP_LEN;
    const vec             zero     = _mm512_setzero_si512();
    // Part j, word e: bytes 0 and 1, or 2 and 3, of the four columns of byte j; their bits in e. Bit 3 is added later.
    const vec column = _mm512_add_epi64(
        _mm512_set1_epi16(0x0100), _mm512_setr_epi64(0, 0, 0x0808080808080808, 0x0808080808080808, 0x1010101010101010,
                                                     0x1010101010101010, 0x1818181818181818, 0x1818181818181818));
    const vec bits01 = _mm512_set1_epi64(0x0101010000010000);
    const vec bit2   = _mm512_broadcast_i32x4(_mm_set_epi64x(0x0001000100010001, 0));
    const vec bit3   = _mm512_set1_epi16(0x0100);
    const vec mask   = _mm512_set1_epi16(31);
    for (int b = 0; b < GROUP_BLOCKS; b++) {
        if (b >= n_blocks) {  // their scales are garbage, their products must be 0
            memset(out->tables[b], 0, sizeof(out->tables[b]));
            out->minus_magnitudes[b] = 0;
            continue;
        }
        const vec order =
            _mm512_and_si512(_mm512_add_epi64(_mm512_set1_epi64(7 - b), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)),
                             _mm512_set1_epi64(7));
        const vec bytes    = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(q + b * MOBIE_BLOCK_LEN));
        const vec negative = _mm512_maddubs_epi16(_mm512_set1_epi8(1), _mm512_min_epi8(bytes, zero));
        // The sum of the negative ones of four columns: what a pattern must add to have v.
        const vec fours          = _mm512_madd_epi16(negative, _mm512_set1_epi16(1));
        out->minus_magnitudes[b] = 2 * _mm512_reduce_add_epi32(fours) - group.sums[b];
        for (int i = 0; i < 4; i++) {  // half, nibble
            const int at    = i / 2 * 32 + i % 2 * 4;
            const vec first = _mm512_add_epi8(column, _mm512_set1_epi8((char) at));
            const vec q01   = _mm512_permutexvar_epi8(first, bytes);
            const vec q23   = _mm512_permutexvar_epi8(_mm512_add_epi8(first, _mm512_set1_epi8(2)), bytes);
            // the low words of dword at / 4 + 2 j
            const vec less =
                _mm512_permutexvar_epi16(_mm512_srli_epi16(_mm512_and_si512(first, _mm512_set1_epi16(0x3f)), 1), fours);
            const vec v0 = _mm512_sub_epi16(
                _mm512_add_epi16(_mm512_maddubs_epi16(bits01, q01), _mm512_maddubs_epi16(bit2, q23)), less);
            const vec v1         = _mm512_add_epi16(v0, _mm512_maddubs_epi16(bit3, q23));
            uint8_t (*table)[64] = out->tables[b][i / 2][i % 2];
            store(table[0], _mm512_packus_epi16(_mm512_and_si512(v0, mask), _mm512_and_si512(v1, mask)));
            store(table[1], _mm512_packus_epi16(_mm512_srli_epi16(v0, 5), _mm512_srli_epi16(v1, 5)));
        }
    }
    out->scale = group.scale;
}

template <int T>
static inline void add_block(words sums[T], const dot_signs & w, int b, const group_tables act[T]) {
    static_assert(T == 1, "two tokens and more are faster with dot products");
    const vec nibble = _mm512_set1_epi8(15), place = _mm512_set1_epi32(0x30201000);
    vec       low, high;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const vec signs   = w.signs[b][i / 2].v[0];
        const vec nibbles = i % 2 ? _mm512_srli_epi32(signs, 4) : signs;
        const vec index   = _mm512_ternarylogic_epi32(nibbles, nibble, place, 0xea);  // (nibbles & nibble) | place
        const uint8_t (*table)[64] = act->tables[b][i / 2][i % 2];
        const vec low_i            = _mm512_permutexvar_epi8(index, load(table[0]));
        const vec high_i           = _mm512_permutexvar_epi8(index, load(table[1]));
        low                        = i ? _mm512_add_epi8(low, low_i) : low_i;
        high                       = i ? _mm512_add_epi8(high, high_i) : high_i;
    }
    vec dot      = _mm512_set1_epi32(act->minus_magnitudes[b]);
    dot          = _mm512_dpbusd_epi32(dot, low, _mm512_set1_epi8(2));
    dot          = _mm512_dpbusd_epi32(dot, high, _mm512_set1_epi8(2 * 32));
    sums[0].v[0] = dot_words(sums[0].v[0], dot, w.scales[b].v[0]);
}

static void matmul(int64_t n, const mobie_block * w, size_t row_bytes, int64_t n_rows, const void * const * act,
                   float * const * y, int64_t n_act, void * work) {
    if (n_act <= DOT_TOKENS) {
        dot_matmul<group_tables>(n, w, row_bytes, n_rows, act, y, n_act, work);
    } else {
        mobie_kernels_avx512vnni.matmul(n, w, row_bytes, n_rows, act, y, n_act, work);
    }
}

extern const mobie_kernels mobie_kernels_avx512vbmi = {
    "avx512vbmi", quantize_act, matmul,
    DOT_WORK<group_tables> > DOT_WORK<dot_act> ? DOT_WORK<group_tables> : DOT_WORK<dot_act>
};
#else
extern const mobie_kernels mobie_kernels_avx512vbmi = MOBIE_NO_KERNELS;
#endif
