// AVX2: the lookups of kernels_lut.h, 32 rows at a time.
//
// Instructions per 64 weights and token, everything included, counted by single steps through calls of 256 rows of
// 2048: 11.6 for one token, 9.4 for two, 7.7 for eight; 10.8 for one token and 768 rows. Of them 3.5 look up and add
// (14 per 4 columns of 64 rows), 0.8 split bytes of signs, 0.8 join the two bytes of a sum and multiply by the scale;
// per call 2.2 transpose; the tables are 192 per block and token, 0.8 for 256 rows. The limit is vector arithmetic, not
// memory.
#include "kernels.h"

#if defined(__AVX2__)
#define VEC_BYTES 32
enum { LUT_VECS = 2 };
#include "kernels_lut_x86.h"

extern const mobie_kernels mobie_kernels_avx2 = { "avx2", quantize_act, lut_matmul, LUT_WORK };
#else
extern const mobie_kernels mobie_kernels_avx2 = MOBIE_NO_KERNELS;
#endif
