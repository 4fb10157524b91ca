// The search for signs and magnitudes, of which an export spends most of its time: what goes column by column, for the
// columns of one span. The products with all other columns are the caller's (mobie_export/methods/calibrated/signs.py,
// which has the same in PyTorch and says what is computed).
//
// Matrices are [columns, rows], rows contiguous. Rows do not depend on each other: threads may take some each.
#ifndef MOBIE_SEARCH_H
#define MOBIE_SEARCH_H

#include "mobie.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MOBIE_SEARCH_MOST_BLOCK = 128 };  // columns of a block

// An installed runtime may be older than the Python that calls it: another layout needs another name of
// mobie_search_all.
typedef struct {
    int64_t         n_cols;       // of the span, whole blocks
    int64_t         block_len;    // columns that share a magnitude, up to MOBIE_SEARCH_MOST_BLOCK
    int64_t         first, end;   // the rows to work on
    int64_t         stride;       // floats from a column to the next, of all but square
    const float *   w;            // [n_cols, rows], what is searched for (propagate)
    float *         signs;        // [n_cols, rows], +-1
    float *         magnitudes;   // [n_cols / block_len, rows]
    float *         left;         // [n_cols, rows], w without the binary weights
    const int64_t * places;       // [n_cols]: which column of the second plane it is, -1 for none
    float *         signs2;       // [columns of the second plane, rows]
    const float *   magnitudes2;  // [blocks of the second plane, rows]
    const float *   square;       // [n_cols, n_cols] of the factor R (propagate) or of H (descend)
    float *         sums;         // [n_cols, rows]: R^T left of the columns before the span, or H left; changed
    float           most;         // that a magnitude may be
} mobie_span;

typedef struct {
    const char * name;  // "plain", "avx2", "avx512"
    void (*propagate)(const mobie_span *);
    void (*descend)(const mobie_span *);
} mobie_search;

// All that this CPU runs, slowest first; *n receives their number. They differ in how they round.
MOBIE_API const mobie_search * const * mobie_search_all(int * n);

#ifdef __cplusplus
}
#endif

#endif
