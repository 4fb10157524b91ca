// The tile registers of AMX and what kernels_tile.h needs of them, in C++: as Intel's manual describes TILELOADD,
// TILESTORED, TILEZERO and TDPBSUD, shapes included. A shape that does not fit ends the program.
#include <stdio.h>
#include <stdlib.h>

typedef struct {
    tile_config shapes;
    uint8_t     rows[8][16][64];
} played_registers;

static thread_local played_registers PLAYED;

static void must_fit(bool ok, const char * what) {
    if (!ok) {
        fprintf(stderr, "FAIL played tiles: %s\n", what);
        abort();
    }
}

static inline void load_tile_config(const tile_config & c) {
    bool ok = c.palette <= 1 && c.start_row == 0;
    for (const uint8_t byte : c.reserved) {
        ok = ok && byte == 0;
    }
    for (int i = 0; i < 16; i++) {
        ok = ok && (i < 8 ? c.rows[i] <= 16 && c.row_bytes[i] <= 64 : c.rows[i] == 0 && c.row_bytes[i] == 0);
    }
    must_fit(ok, "a configuration that the processor refuses");
    PLAYED        = {};
    PLAYED.shapes = c;
}

static inline void store_tile_config(tile_config * c) {
    *c = PLAYED.shapes;
}

static inline void release_tiles() {
    PLAYED = {};
}

static int rows_of(int tile) {
    must_fit(PLAYED.shapes.palette == 1 && PLAYED.shapes.rows[tile] > 0, "a register without a shape");
    return PLAYED.shapes.rows[tile];
}

template <int T>
ALWAYS_INLINE void zero_tile() {
    rows_of(T);
    memset(PLAYED.rows[T], 0, sizeof(PLAYED.rows[T]));
}

template <int T>
ALWAYS_INLINE void load_tile(const void * p, int64_t stride) {
    zero_tile<T>();
    for (int r = 0; r < rows_of(T); r++) {
        memcpy(PLAYED.rows[T][r], (const char *) p + r * stride, PLAYED.shapes.row_bytes[T]);
    }
}

template <int T>
ALWAYS_INLINE void store_tile(void * p, int64_t stride) {
    for (int r = 0; r < rows_of(T); r++) {
        memcpy((char *) p + r * stride, PLAYED.rows[T][r], PLAYED.shapes.row_bytes[T]);
    }
}

static void multiply_played(int sums, int act, int weights) {
    const uint16_t * row_bytes = PLAYED.shapes.row_bytes;
    must_fit(rows_of(act) == rows_of(sums) && row_bytes[weights] == row_bytes[sums] &&
                 row_bytes[act] == 4 * rows_of(weights) && row_bytes[sums] % 4 == 0,
             "shapes of a product that do not fit each other");
    for (int m = 0; m < rows_of(sums); m++) {
        for (int n = 0; n < row_bytes[sums] / 4; n++) {
            uint32_t sum;  // without saturation
            memcpy(&sum, PLAYED.rows[sums][m] + 4 * n, sizeof(sum));
            for (int k = 0; k < row_bytes[act]; k++) {
                sum += (uint32_t) ((int8_t) PLAYED.rows[act][m][k] * PLAYED.rows[weights][k / 4][4 * n + k % 4]);
            }
            memcpy(PLAYED.rows[sums][m] + 4 * n, &sum, sizeof(sum));
        }
    }
}

template <int SUMS, int ACT, int WEIGHTS>
ALWAYS_INLINE void multiply_tiles() {
    multiply_played(SUMS, ACT, WEIGHTS);
}
