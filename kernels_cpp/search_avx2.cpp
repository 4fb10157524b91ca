// AVX2 with FMA: two vectors of rows and four columns, eight sums in registers.
#define VEC_BYTES 32
#define ROW_VECS 2
#include "search_rows.h"

#if defined(__AVX2__) && defined(__FMA__)
const mobie_search mobie_search_avx2 = MOBIE_SEARCH("avx2");
#else
const mobie_search mobie_search_avx2 = {};
#endif
