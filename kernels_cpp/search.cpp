// What every CPU runs, and the list of all.
#define VEC_BYTES 16
#define ROW_VECS 2
#include "search_rows.h"

static const mobie_search search_plain = MOBIE_SEARCH("plain");

const mobie_search * const * mobie_search_all(int * n) {
    static const struct choice {
        const mobie_search * all[3] = { &search_plain };
        int                  n      = 1;

        choice() {
#if defined(__x86_64__)
            if (mobie_search_avx2.name && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
                all[n++] = &mobie_search_avx2;
            }
            if (mobie_search_avx512.name && __builtin_cpu_supports("avx512f")) {
                all[n++] = &mobie_search_avx512;
            }
#endif
        }
    } found;  // C++11: initialized once, whatever thread comes first
    *n = found.n;
    return found.all;
}
