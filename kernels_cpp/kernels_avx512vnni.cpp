// AVX-512 with VNNI (Cascade Lake; with kernels_avx512vbmi.cpp also Ice Lake, Zen 4 and later): the dot products of
// kernels_dot.h, 16 rows at a time.
//
// Instructions per 64 weights and token, everything included, counted by single steps through calls of 256 rows of
// 2048:
//
//     tokens           1      2      4      8     16     32
//     instructions   5.6    3.6    2.6    2.1    2.3    2.1
//
// One token: 1 to isolate 64 signs, 0.4 to shift them, 1 to multiply, 1.2 to gather and transpose 9 bytes, 0.3 to
// prefetch the next rows, the rest sums and addresses. The limit is the memory where a core has its execution units
// to itself (9 bytes for 5.6 instructions), else the two load ports. From 16 tokens on signs are unpacked to bytes once
// per tile of 64 rows; what remains is vpdpbusd, 24 of them with 10 loads. The limit is its rate.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define VEC_BYTES 64
enum { DOT_TOKENS = 8, DOT_UNROLLED = 8 };
#include "kernels_dot_x86.h"

enum {
    TILE_VECS       = 4,  // of rows
    TILE_ROWS       = TILE_VECS * DOT_ROWS,
    TILE_BYTES      = TILE_ROWS * GROUP_BYTES,
    TILE_TOKENS     = 6,   // 24 sums, 4 vectors of weights, one of activations
    MIN_TILE_TOKENS = 16,  // fewer do not pay for filling it
};

// A group of TILE_ROWS rows: for four columns of 16 rows each the scales of the pluses, 0 for a minus.
typedef struct {
    vec pluses[GROUP_BLOCKS * 2 * 8][TILE_VECS];  // in the order of dot_act's quads
    vec scales[GROUP_BLOCKS / 2][TILE_VECS];      // of two blocks, int16
} group_tile;

static inline void fill_tile(const dot_signs & s, int v, group_tile * tile) {
    const vec first_byte = _mm512_broadcast_i32x4(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
#pragma GCC unroll 4
    for (int b = 0; b < GROUP_BLOCKS; b++) {
        const vec scale = _mm512_shuffle_epi8(s.scales[b].v[0], first_byte);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                const __mmask64 plus = _mm512_test_epi8_mask(s.signs[b][half].v[0], _mm512_set1_epi8((char) (1 << i)));
                tile->pluses[16 * b + 8 * half + i][v] = _mm512_maskz_mov_epi8(plus, scale);
            }
        }
    }
    for (int p = 0; p < GROUP_BLOCKS / 2; p++) {
        tile->scales[p][v] = _mm512_or_si512(s.scales[2 * p].v[0], _mm512_slli_epi32(s.scales[2 * p + 1].v[0], 16));
    }
}

// Adds the products of a tile with T tokens to totals[t].
template <int T>
static __attribute__((noinline)) void multiply_tile(const group_tile & tile, const dot_act * act,
                                                    float totals[][TILE_ROWS]) {
    vec sum[T][TILE_VECS];
#pragma GCC unroll 6
    for (int t = 0; t < T; t++) {
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECS; v++) {
            sum[t][v] = _mm512_setzero_si512();
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < MOBIE_GROUP_LEN / 4; i++) {
        vec w[TILE_VECS];
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECS; v++) {
            w[v] = tile.pluses[i][v];
        }
#pragma GCC unroll 6
        for (int t = 0; t < T; t++) {
            // in one piece, because GCC 12 moves the sums about
            vec q;
            __asm__(
                "vpbroadcastd %9, %4\n\t"
                "vpdpbusd %4, %5, %0\n\t"
                "vpdpbusd %4, %6, %1\n\t"
                "vpdpbusd %4, %7, %2\n\t"
                "vpdpbusd %4, %8, %3"
                : "+v"(sum[t][0]), "+v"(sum[t][1]), "+v"(sum[t][2]), "+v"(sum[t][3]), "=&v"(q)
                : "v"(w[0]), "v"(w[1]), "v"(w[2]), "v"(w[3]), "m"(act[t].quads[i]));
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < T; t++) {
        int32_t pairs[GROUP_BLOCKS / 2];
        memcpy(pairs, act[t].minus_sums_16, sizeof(pairs));
        const __m512 d = _mm512_set1_ps(act[t].scale);
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECS; v++) {
            vec dot = _mm512_add_epi32(sum[t][v], sum[t][v]);
            for (int p = 0; p < GROUP_BLOCKS / 2; p++) {
                dot = dot_words(dot, tile.scales[p][v], _mm512_set1_epi32(pairs[p]));
            }
            float * to = totals[t] + v * DOT_ROWS;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_mul_ps(d, _mm512_cvtepi32_ps(dot))));
        }
    }
}

typedef void (*multiply_function)(const group_tile &, const dot_act *, float[][TILE_ROWS]);

static const multiply_function MULTIPLY_TILE[] = { nullptr,          multiply_tile<1>, multiply_tile<2>,
                                                   multiply_tile<3>, multiply_tile<4>, multiply_tile<5>,
                                                   multiply_tile<6> };

// Groups g0 to g1 of TILE_ROWS rows, of which n_rows count.
static void tile_rows(const dot_matrix & m, const char * row, int64_t n_rows, int64_t g0, int64_t g1,
                      const dot_act * act, float * const * y, int64_t n_tokens) {
    alignas(64) group_tile tile;
    alignas(64) float      totals[DOT_PART][TILE_ROWS];
    const int64_t          n_passes = (n_tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    for (int64_t t = 0; t < n_tokens; t++) {
        if (g0) {
            memcpy(totals[t], y[t], n_rows * sizeof(float));
        } else {
            memset(totals[t], 0, sizeof(totals[t]));
        }
    }
    for (int64_t g = g0; g < g1; g++, act += n_tokens) {
        for (int v = 0; v < TILE_VECS && v * DOT_ROWS < n_rows; v++) {
            fill_tile(get_signs(m, row + v * DOT_ROWS * m.row_bytes, n_rows - v * DOT_ROWS, g), v, &tile);
        }
        // Of the next rows as much as these have in the group, spread over the passes.
        const char * stream = row + TILE_ROWS * m.row_bytes + (g - g0) * TILE_BYTES;
        for (int64_t pass = 0, t = 0; pass < n_passes; pass++) {
            const int64_t next = n_tokens * (pass + 1) / n_passes;
            mobie_ask_memory(stream, TILE_BYTES / n_passes, m.end);
            stream += TILE_BYTES / n_passes;
            MULTIPLY_TILE[next - t](tile, act + t, totals + t);
            t = next;
        }
    }
    const float unit = g1 == mobie_n_groups(m.n) ? MOBIE_UNIT : 1;
    for (int64_t t = 0; t < n_tokens; t++) {
        for (int64_t r = 0; r < n_rows; r++) {
            y[t][r] = totals[t][r] * unit;
        }
    }
}

static void matmul(int64_t n, const mobie_block * w, size_t row_bytes, int64_t n_rows, const void * const * act,
                   float * const * y, int64_t n_act, void * work) {
    if (n_act < MIN_TILE_TOKENS || n_rows < TILE_ROWS) {
        dot_matmul<dot_act>(n, w, row_bytes, n_rows, act, y, n_act, work);
        return;
    }
    const dot_matrix m = matrix_of(n, w, row_bytes, n_rows);
    mobie_ask_memory((const char *) w, TILE_ROWS * row_bytes, m.end);
    for_parts<dot_act>(
        n, act, n_act, work, [&](int64_t t0, int64_t n_tokens, int64_t g0, int64_t g1, const dot_act * arranged) {
            float * at[DOT_PART];
            for (int64_t r = 0; r < n_rows; r += TILE_ROWS) {
                for (int64_t t = 0; t < n_tokens; t++) {
                    at[t] = y[t0 + t] + r;
                }
                tile_rows(m, (const char *) w + r * row_bytes,
                          n_rows - r < TILE_ROWS ? n_rows - r : (int64_t) TILE_ROWS, g0, g1, arranged, at, n_tokens);
            }
        });
}

extern const mobie_kernels mobie_kernels_avx512vnni = { "avx512vnni", quantize_act, matmul, DOT_WORK<dot_act> };
#else
extern const mobie_kernels mobie_kernels_avx512vnni = MOBIE_NO_KERNELS;
#endif
