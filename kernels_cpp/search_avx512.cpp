// AVX-512: four vectors of rows and four columns, sixteen sums in registers.
#define VEC_BYTES 64
#define ROW_VECS 4
#include "search_rows.h"

#if defined(__AVX512F__)
const mobie_search mobie_search_avx512 = MOBIE_SEARCH("avx512");
#else
const mobie_search mobie_search_avx512 = {};
#endif
