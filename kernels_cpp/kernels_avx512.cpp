// AVX-512 without VNNI (Skylake-X and later): the lookups of kernels_lut.h, 64 rows at a time.
//
// One token, per 64 weights of a row (7 instructions per 4 columns of 64 rows, for 16 of them): 1.75 instructions to
// look up and add; 1.8 to transpose; 0.4 to join the two bytes of a sum and multiply by the scale; the tables, 200 per
// block and call, are 0.8 for 256 rows. The limit is the two shuffles per four columns, then the loads of tables and
// indices.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
enum { LUT_VECS = 1 };  // two are faster for many tokens, but for one the tile pushes the prefetched rows out
#include "kernels_lut_avx512.h"

extern const mobie_kernels mobie_kernels_avx512 = { "avx512", quantize_act, lut_matmul };
#else
extern const mobie_kernels mobie_kernels_avx512 = MOBIE_NO_KERNELS;
#endif
