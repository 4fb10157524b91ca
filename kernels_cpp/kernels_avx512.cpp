// AVX-512 without VNNI (Skylake-X): the lookups of kernels_lut.h, 64 rows at a time.
//
// Instructions per 64 weights and token, everything included, counted by single steps through calls of 256 rows of
// 2048: 7.9 for one token, 6.1 for two, 4.7 for eight. Of them 1.75 look up and add (7 per 4 columns of 64 rows), 0.4
// join the two bytes of a sum and multiply by the scale; per call 1.1 transpose; the tables are 192 per block and
// token, 0.8 for 256 rows. The limit is the two shuffles per four columns, which have one port on Intel's cores, then
// the loads.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define VEC_BYTES 64
enum { LUT_VECS = 1 };  // two are faster for many tokens, but for one the tile evicts the prefetched rows
#include "kernels_lut_x86.h"

extern const mobie_kernels mobie_kernels_avx512 = { "avx512", quantize_act, lut_matmul, LUT_WORK };
#else
extern const mobie_kernels mobie_kernels_avx512 = MOBIE_NO_KERNELS;
#endif
