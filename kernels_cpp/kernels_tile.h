// Products by tiles: the algorithm of kernels_amx.cpp. The tests compile it twice more with tiles that are played in
// C++ (tests/played_tiles.h), so that machines without such registers check its arithmetic and the layout of operands.
//
// A tile is a register of up to 16 rows of 64 bytes. One instruction multiplies a tile of activations with one of
// weights and adds the products to a tile of sums:
//
//     activations    [token][64 columns]                      s8
//     weights        [16 times 4 columns][row][4 columns]     u8: the scale where the weight is a plus, else 0
//     sums           [token][row]                             s32
//
// A block's 64 columns are such a pair, and the four blocks of a group are summed up before anything becomes float:
// C = sum_b s_b * (sum of q over the pluses), so the integer of FORMAT.md is I = 2 C - sum_b s_b * (sum of all q),
// where |C| <= 256 * 255 * 127. Signs are taken as in kernels_dot.h, so columns have its order.
//
// Two tiles of tokens and two of rows are multiplied together, four products for four loads. Meanwhile the sums of the
// four products before go through vector registers to the results: tiles have an execution unit of their own. Weights
// are unpacked once for all tokens of a part. All but the activations stays in the first cache, so a part is at most
// PART_TOKENS tokens times PART_ROWS rows, 16 KB of results.
//
// A kernel file defines what kernels_dot.h asks for before it includes this one, and after it what is declared below.
#ifndef MOBIE_KERNELS_TILE_H
#define MOBIE_KERNELS_TILE_H

enum {
    TILE_TOKENS = 16,
    TILE_PAIR   = 2,  // tiles of rows that are multiplied together
    TILE_ROWS   = TILE_PAIR * DOT_ROWS,
    TILE_BYTES  = TILE_ROWS * GROUP_BYTES,
    TILE_STEPS  = 4 * GROUP_BLOCKS,  // in which four tiles of products are made
    ACT_BYTES   = MOBIE_GROUP_LEN,   // of a token in a group
    ACT_QUADS   = MOBIE_GROUP_LEN / 4,
    PART_TOKENS = 64,
    PART_ROWS   = 64,
    // Groups of activations that are prepared at a time, all tokens together: 268 KB of work memory.
    TILE_CAPACITY = 1024,
    LAST_STEPS    = 6,  // of a part of the rows, in which the memory of its results is asked for
};

#define ALWAYS_INLINE static inline __attribute__((always_inline))

// What belongs to a group of activations besides its values.
typedef struct {
    int16_t minus_sums[GROUP_BLOCKS];
    float   scale;
} tile_act;

static const size_t TILE_WORK = TILE_CAPACITY * (ACT_BYTES + sizeof(tile_act));

// --- what a kernel file defines --------------------------------------------------------------------------------------

// The shapes of the registers, as the processor reads them; none are in use where the palette is 0.
typedef struct {
    alignas(64) uint8_t palette;
    uint8_t  start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t  rows[16];
} tile_config;

static_assert(sizeof(tile_config) == 64, "ldtilecfg reads 64 bytes");

static inline void load_tile_config(const tile_config & c);
static inline void store_tile_config(tile_config * c);
static inline void release_tiles();

template <int T>
ALWAYS_INLINE void zero_tile();
template <int T>
ALWAYS_INLINE void load_tile(const void * p, int64_t stride);
template <int T>
ALWAYS_INLINE void store_tile(void * p, int64_t stride);
template <int SUMS, int ACT, int WEIGHTS>
ALWAYS_INLINE void multiply_tiles();

// out[i], i = 0 .. 7: in every byte the low byte of the word of scales where the byte of signs has bit i, else 0.
ALWAYS_INLINE void store_pluses(const words & signs, const words & scales, words out[8]);

// Words of two int16.
ALWAYS_INLINE words pair_words(const words & low, const words & high);

// results[r] += act.scale * (2 sums[r] + scales[0][r] . act.minus_sums[0, 1] + scales[1][r] . act.minus_sums[2, 3]),
// where the dots are products of pairs of int16.
ALWAYS_INLINE void add_products(const words & sums, const words scales[2], const tile_act & act, float * results);

// --- the algorithm ---------------------------------------------------------------------------------------------------

// A group of 32 rows.
typedef struct {
    words pluses[GROUP_BLOCKS][TILE_PAIR][16];
} group_tile;

typedef struct {
    words pairs[TILE_PAIR][GROUP_BLOCKS / 2];  // of two blocks, int16
} group_scales;

// Sums of a pair of tiles of tokens, one behind the other. The second may be stored to TILE_TOKENS rows from any of the
// first one's on.
typedef struct {
    words sums[2 * TILE_TOKENS][TILE_PAIR];
} pair_sums;

// Sums that are to be added to results.
typedef struct {
    const pair_sums *    sums;
    const group_scales * scales;
    const tile_act *     act;      // of the first token
    float *              results;  // of the first token, PART_ROWS before those of the next
    int64_t              n_tokens;
} open_sums;

// Adds the sums of tokens 2 i and 2 i + 1.
ALWAYS_INLINE void add_tokens(const open_sums & open, const group_scales & scales, int i) {
#pragma GCC        unroll 2
    for (int t = 2 * i; t < 2 * i + 2; t++) {
        if (__builtin_expect(t < open.n_tokens, 1)) {
#pragma GCC unroll 2
            for (int v = 0; v < TILE_PAIR; v++) {
                add_products(open.sums->sums[t][v], scales.pairs[v], open.act[t],
                             open.results + t * PART_ROWS + v * DOT_ROWS);
            }
        }
    }
}

// The products of a group of 32 rows with one or two tiles of tokens, which begin at act0 and act1, replace the sums of
// `last`, which are added on the way. stream: memory that will be needed, asked for at an even rate, because requests
// beyond what a core can have open stall it.
template <bool TWO>
static __attribute__((noinline)) void multiply_pair(const group_tile & tile, const int32_t * act0, const int32_t * act1,
                                                    const open_sums & last, pair_sums * out, const char * stream) {
    const open_sums    open   = last;  // copies, which stay in registers
    const group_scales scales = *last.scales;
    zero_tile<0>();
    zero_tile<1>();
    if (TWO) {
        zero_tile<2>();
        zero_tile<3>();
    }
#pragma GCC unroll 16
    for (int step = 0; step < TILE_STEPS; step++) {
        const int b = step / 4;
        if (step % 4 == 0) {
            load_tile<4>(act0 + 16 * b, ACT_BYTES);
            load_tile<6>(tile.pluses[b][0], sizeof(words));
            multiply_tiles<0, 4, 6>();
        } else if (step % 4 == 1) {
            load_tile<7>(tile.pluses[b][1], sizeof(words));
            multiply_tiles<1, 4, 7>();
        } else if (step % 4 == 2 && TWO) {
            load_tile<5>(act1 + 16 * b, ACT_BYTES);
            multiply_tiles<2, 5, 6>();
        } else if (TWO) {
            multiply_tiles<3, 5, 7>();
        }
        __builtin_prefetch(stream + 64 * step, 0, 2);
        add_tokens(open, scales, step);
    }
    store_tile<0>(out->sums[0], sizeof(out->sums[0]));
    store_tile<1>(out->sums[0] + 1, sizeof(out->sums[0]));
    if (TWO) {
        words * second = out->sums[(act1 - act0) / ACT_QUADS];
        store_tile<2>(second, sizeof(out->sums[0]));
        store_tile<3>(second + 1, sizeof(out->sums[0]));
    }
}

// Unpacks group g of 32 rows, of which n_rows exist.
static __attribute__((noinline)) void fill_tile(const dot_matrix & m, const char * rows, int64_t n_rows, int64_t g,
                                                group_tile * tile, group_scales * scales) {
#pragma GCC                           unroll 1
    for (int v = 0; v < TILE_PAIR; v++) {
        const dot_signs s = get_signs(m, rows + v * DOT_ROWS * m.row_bytes, n_rows - v * DOT_ROWS, g);
#pragma GCC unroll 4
        for (int b = 0; b < GROUP_BLOCKS; b++) {
            store_pluses(s.signs[b][0], s.scales[b], tile->pluses[b][v]);
            store_pluses(s.signs[b][1], s.scales[b], tile->pluses[b][v] + 8);
        }
#pragma GCC unroll 2
        for (int p = 0; p < GROUP_BLOCKS / 2; p++) {
            scales->pairs[v][p] = pair_words(s.scales[2 * p], s.scales[2 * p + 1]);
        }
    }
}

// Activations of a part of the tokens and of groups g0 to g1, prepared: [group][token].
typedef struct {
    const int32_t *  quads;
    const tile_act * rest;
    int64_t          n_tokens, g0, g1;
} tile_part;

static inline int64_t count_tiles(int64_t n_tokens) {
    return (n_tokens + TILE_TOKENS - 1) / TILE_TOKENS;
}

// Results of PART_ROWS rows, of which n_rows exist, at y[t] + first_row.
static __attribute__((noinline)) void multiply_rows(const dot_matrix & m, const char * rows, int64_t n_rows,
                                                    const tile_part & part, float * const * y, int64_t first_row) {
    alignas(64) float results[PART_TOKENS * PART_ROWS];
    group_tile        tile;
    group_scales      scales[2] = {};  // of what is multiplied, and of what is added
    pair_sums         sums;
    for (int64_t t = 0; t < part.n_tokens; t++) {
        memset(results + t * PART_ROWS, 0, PART_ROWS * sizeof(float));
        if (part.g0) {
            memcpy(results + t * PART_ROWS, y[t] + first_row, n_rows * sizeof(float));
        }
    }
    const int64_t n_tiles = count_tiles(part.n_tokens);
    const int64_t n_steps = (part.g1 - part.g0) * ((n_rows + TILE_ROWS - 1) / TILE_ROWS);
    const char *  stream  = rows + PART_ROWS * m.row_bytes;  // the next rows
    open_sums     open    = { &sums, &scales[1], nullptr, nullptr, 0 };
    int64_t       step = 0, asked = 0;
    for (int64_t g = part.g0; g < part.g1; g++) {
        const int64_t at = (g - part.g0) * part.n_tokens;
        for (int64_t r = 0; r < n_rows; r += TILE_ROWS, step++) {
            const group_scales * own = &scales[step % 2];
            fill_tile(m, rows + r * m.row_bytes, n_rows - r, g, &tile, &scales[step % 2]);
            mobie_ask_memory(stream + 64 * TILE_STEPS, TILE_BYTES - 64 * TILE_STEPS, m.end);
            const char * ask = stream + 64 * TILE_STEPS < m.end ? stream : rows;
            stream += TILE_BYTES;
            // Where the results go is asked for in the last steps, not before, or the first cache would lose others.
            for (; asked < part.n_tokens && asked * LAST_STEPS < (step + 1 - n_steps + LAST_STEPS) * part.n_tokens;
                 asked++) {
                for (int64_t i = 0; i < n_rows; i += 16) {
                    __builtin_prefetch(y[asked] + first_row + i, 1, 3);
                }
            }
            for (int64_t i = 0; i < n_tiles; i += 2) {  // tiles of about as many tokens each
                const int64_t   t0   = part.n_tokens * i / n_tiles;
                const int64_t   t1   = part.n_tokens * (i + 1) / n_tiles;
                const bool      two  = i + 1 < n_tiles;
                const int64_t   end  = two ? part.n_tokens * (i + 2) / n_tiles : t1;
                const int32_t * act0 = part.quads + (at + t0) * ACT_QUADS;
                const int32_t * act1 = part.quads + (at + t1) * ACT_QUADS;
                (two ? multiply_pair<true> : multiply_pair<false>) (tile, act0, act1, open, &sums, ask);
                open = { &sums, own, part.rest + at + t0, results + t0 * PART_ROWS + r, end - t0 };
            }
        }
    }
    for (int i = 0; i < TILE_STEPS; i++) {
        add_tokens(open, *open.scales, i);
    }
    const float unit = part.g1 == mobie_n_groups(m.n) ? MOBIE_UNIT : 1;
    for (int64_t t = 0; t < part.n_tokens; t++) {
        for (int64_t r = 0; r < n_rows; r += DOT_ROWS) {
            store_results(y[t] + first_row + r, n_rows - r, scale_by(load_floats(results + t * PART_ROWS + r), unit));
        }
    }
}

static void prepare_act(int64_t n, const void * act, int64_t g, int32_t * quads, tile_act * rest) {
    const mobie_act_group group    = mobie_get_act_group(act, n, g);
    const int             n_blocks = mobie_group_blocks(n, g);
    const int8_t *        q        = (const int8_t *) act + g * MOBIE_GROUP_LEN;
    for (int b = 0; b < GROUP_BLOCKS; b++) {
        rest->minus_sums[b] = (int16_t) -group.sums[b];
        if (b < n_blocks) {
            arrange_block(q + b * MOBIE_BLOCK_LEN, b, quads + 16 * b);
        } else {  // their scales are garbage, their products must be 0
            memset(quads + 16 * b, 0, 16 * sizeof(int32_t));
        }
    }
    rest->scale = group.scale;
}

// Registers 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights. A tile of tokens has `tokens` rows: one instruction
// takes a cycle for each.
static inline tile_config shapes_for(int64_t tokens) {
    tile_config c = {};
    c.palette     = 1;
    for (int i = 0; i < 8; i++) {
        c.rows[i]      = i < 6 ? (uint8_t) tokens : 16;
        c.row_bytes[i] = 64;
    }
    return c;
}

// n_act is not 0.
static void tile_matmul(int64_t n, const mobie_block * w, size_t row_bytes, int64_t n_rows, const void * const * act,
                        float * const * y, int64_t n_act, void * work) {
    const dot_matrix m        = matrix_of(n, w, row_bytes, n_rows);
    const int64_t    n_groups = mobie_n_groups(n);
    const int64_t    room     = TILE_CAPACITY / n_groups;
    const int64_t    least = TILE_TOKENS, largest = PART_TOKENS;
    const int64_t    most    = room < least ? least : room < largest ? room : largest;
    const int64_t    n_parts = (n_act + most - 1) / most;
    const int64_t    tokens  = (n_act + n_parts - 1) / n_parts;  // evenly
    const int64_t    span    = TILE_CAPACITY / tokens < n_groups ? TILE_CAPACITY / tokens : n_groups;
    const int64_t    rows    = PART_ROWS;
    int32_t *        quads   = (int32_t *) work;
    tile_act *       rest    = (tile_act *) (quads + TILE_CAPACITY * ACT_QUADS);
    mobie_ask_memory((const char *) w, rows * row_bytes, m.end);

    // Others in the process have shapes of their own, and set them once: what is found is left behind.
    tile_config found;
    store_tile_config(&found);
    int64_t shape = 0;
    for (int64_t t0 = 0; t0 < n_act; t0 += tokens) {
        tile_part     part    = { quads, rest, n_act - t0 < tokens ? n_act - t0 : tokens, 0, 0 };
        const int64_t n_tiles = count_tiles(part.n_tokens);
        const int64_t of_tile = (part.n_tokens + n_tiles - 1) / n_tiles;
        if (of_tile != shape) {
            shape = of_tile;
            load_tile_config(shapes_for(shape));
        }
        for (part.g0 = 0; part.g0 < n_groups; part.g0 += span) {
            part.g1 = part.g0 + span < n_groups ? part.g0 + span : n_groups;
            for (int64_t t = 0; t < part.n_tokens; t++) {
                for (int64_t g = part.g0; g < part.g1; g++) {
                    const int64_t at = (g - part.g0) * part.n_tokens + t;
                    prepare_act(n, act[t0 + t], g, quads + at * ACT_QUADS, rest + at);
                }
            }
            for (int64_t r = 0; r < n_rows; r += rows) {
                multiply_rows(m, (const char *) w + r * row_bytes, n_rows - r < rows ? n_rows - r : rows, part, y + t0,
                              r);
            }
        }
    }
    if (found.palette) {
        load_tile_config(found);
    } else {
        release_tiles();
    }
}

#endif
