// Sapphire Rapids and later, Linux: products by tiles (AMX) for several tokens, kernels_avx512vbmi.cpp for fewer.
#include "kernels.h"

// clang's names first, then those of GCC and of newer clangs
#if ((defined(__AMXTILE__) && defined(__AMXINT8__)) || (defined(__AMX_TILE__) && defined(__AMX_INT8__))) && \
    defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__) &&    \
    defined(__AVX512VBMI__) && defined(__linux__)
#define VEC_BYTES 64
enum { DOT_TOKENS = 1, DOT_UNROLLED = 1 };
#include "kernels_dot_x86.h"
#include "kernels_tile.h"

enum { MIN_TILE_TOKENS = 5 };  // fewer do not pay for filling the tiles

#if defined(MOBIE_PLAYED_TILES)
#include "tests/played_tiles.h"
#define NAME "amx, played"
#else
#define NAME "amx"
// Not the compiler's own functions: those of GCC 12 hide from it what the instructions read and write. Of the 64 bytes
// of a configuration it is told 8, of the rows of a tile nothing, so that it may drop or move the stores to them.
static inline void load_tile_config(const tile_config & c) {
    __asm__ volatile("ldtilecfg %0" : : "m"(c));
}
static inline void store_tile_config(tile_config * c) {
    __asm__ volatile("sttilecfg %0" : "=m"(*c));
}
static inline void release_tiles() {
    __asm__ volatile("tilerelease");
}
template <int T>
ALWAYS_INLINE void zero_tile() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
ALWAYS_INLINE void load_tile(const void * p, int64_t stride) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(T), "r"(p), "r"(stride) : "memory");
}
template <int T>
ALWAYS_INLINE void store_tile(void * p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(T), "r"(p), "r"(stride) : "memory");
}
template <int SUMS, int ACT, int WEIGHTS>
ALWAYS_INLINE void multiply_tiles() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(ACT), "i"(WEIGHTS));
}
#endif

ALWAYS_INLINE void store_pluses(const words & signs, const words & scales, words out[8]) {
    // from memory, because GCC 12 would make each from a number, one instruction more
    static const struct all_bits {
        alignas(64) uint8_t bytes[8][64];
        constexpr all_bits() : bytes() {
            for (int i = 0; i < 8 * 64; i++) {
                bytes[i / 64][i % 64] = (uint8_t) (1 << i / 64);
            }
        }
    } ALL;
    const all_bits * bits = &ALL;
    __asm__("" : "+r"(bits));
    const vec first_byte = _mm512_broadcast_i32x4(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
    const vec scale      = _mm512_shuffle_epi8(scales.v[0], first_byte);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const __mmask64 plus = _mm512_test_epi8_mask(signs.v[0], load(bits->bytes[i]));
        out[i].v[0]          = _mm512_maskz_mov_epi8(plus, scale);
    }
}

ALWAYS_INLINE words pair_words(const words & low, const words & high) {
    return { _mm512_or_si512(low.v[0], _mm512_slli_epi32(high.v[0], 16)) };
}

ALWAYS_INLINE void add_products(const words & sums, const words scales[2], const tile_act & act, float * results) {
    typedef int32_t __attribute__((may_alias)) pair;
    vec                                        dot = _mm512_add_epi32(sums.v[0], sums.v[0]);
    __m512                                     product;
    // in one piece, so that the factors are read where they are needed
    __asm__(
        "vpdpwssd %4%{1to16%}, %2, %0\n\t"
        "vpdpwssd %5%{1to16%}, %3, %0\n\t"
        "vcvtdq2ps %0, %1\n\t"
        "vmulps %6%{1to16%}, %1, %1"
        : "+&v"(dot), "=v"(product)
        : "v"(scales[0].v[0]), "v"(scales[1].v[0]), "m"(*(const pair *) act.minus_sums),
          "m"(*(const pair *) (act.minus_sums + 2)), "m"(act.scale));
    _mm512_store_ps(results, _mm512_add_ps(_mm512_load_ps(results), product));
}

static void matmul(int64_t n, const mobie_block * w, size_t row_bytes, int64_t n_rows, const void * const * act,
                   float * const * y, int64_t n_act, void * work) {
    if (n_act < MIN_TILE_TOKENS) {
        mobie_kernels_avx512vbmi.matmul(n, w, row_bytes, n_rows, act, y, n_act, work);
    } else {
        tile_matmul(n, w, row_bytes, n_rows, act, y, n_act, work);
    }
}

extern const mobie_kernels mobie_kernels_amx = { NAME, quantize_act, matmul,
                                                 TILE_WORK };  // kernels_avx512vbmi.cpp takes less
#else
extern const mobie_kernels mobie_kernels_amx = MOBIE_NO_KERNELS;
#endif
