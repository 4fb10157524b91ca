// AVX-VNNI (Alder Lake, Zen 5 and later): the dot products of kernels_dot.h for up to three tokens, 16 rows at a time;
// for more the lookups of kernels_lut.h, 32 rows at a time.
//
// Instructions per 64 weights and token, everything included, counted by single steps through calls of 256 rows of
// 2048: 10.0 for one token, 7.6 for two, 7.2 for three, for one token and 32 rows 11.6, as there are no tables; counted
// before rows were prefetched twice, which adds 9 per 16 rows of 256. With more tokens as in kernels_avx2.cpp. One
// token: 2 to isolate 64 signs, 0.8 to shift them, 2 to multiply, 1 to load activations, 1.8 to gather and transpose.
// With many tokens lookups need fewer instructions because vpdpbusd does 32 products where two shuffles do 128. The
// limit is vector arithmetic, not memory.
#include "kernels.h"

#if defined(__AVXVNNI__) || defined(MOBIE_EVEX)
#define VEC_BYTES 32
enum { DOT_TOKENS = 3, DOT_UNROLLED = 1, LUT_VECS = 2 };
#include "kernels_dot_x86.h"
#include "kernels_lut_x86.h"

static const int64_t MIN_LUT_ROWS = 128;  // fewer do not pay for the tables

static void matmul(int64_t n, const mobie_block * w, size_t row_bytes, int64_t n_rows, const void * const * act,
                   float * const * y, int64_t n_act, void * work) {
    if (n_act <= DOT_TOKENS || n_rows < MIN_LUT_ROWS) {
        dot_matmul<dot_act>(n, w, row_bytes, n_rows, act, y, n_act, work);
    } else {
        lut_matmul(n, w, row_bytes, n_rows, act, y, n_act, work);
    }
}

extern const mobie_kernels mobie_kernels_avxvnni = { "avxvnni", quantize_act, matmul,
                                                     DOT_WORK<dot_act> > LUT_WORK ? DOT_WORK<dot_act> : LUT_WORK };
#else
extern const mobie_kernels mobie_kernels_avxvnni = MOBIE_NO_KERNELS;
#endif
