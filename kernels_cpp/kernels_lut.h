// Products by table lookup: the algorithm of every kernel file whose vectors shuffle bytes, written once.
//
// Four signs are an index. For four activations there are 16 sums, so one shuffle of bytes looks a sum up for as many
// rows as a vector has bytes. With v the sum of those |q_j| whose weight has the sign of q_j (or q_j >= 0 and a plus),
//
//     sum_j B_bj q_bj = 2 v - sum_j |q_bj|        exactly, and v is never negative
//
// v of four columns is at most 4 * 127 and is kept as two bytes, v = low + 16 high: sixteen lows (a block) and eight
// highs (half a block) add up in a byte, so four columns take two shuffles and two additions for 16, 32 or 64 rows.
// That is less than expanding bits to bytes takes, and no more than int8 dot products of the same vector width alone
// (four instructions for as many products), whatever the number of tokens.
//
// Beside it, the rows of a tile are transposed once for all tokens (16 x 16 bytes: 64 zips), and the tables are built
// once for all rows of a call: 192 instructions per block and token, so a call should have 128 rows or more.
//
// A kernel file defines, before it includes this one:
//
//     vec, VEC_BYTES, LUT_VECS                          vector of bytes in parts of 16; vectors to a tile
//     load(p), store(p, x)
//     load_rows(p, step)                                part i: the 16 bytes at p + i * step
//     zip_low(x, y), zip_high(x, y)                     interleave the lower, the upper 8 bytes of each part
//     low_nibbles(x), high_nibbles(x)
//     load_table(p)                                     the same 16 bytes in every part
//     zero_bytes(), lookup(table, index), add(x, y)
//     build_tables(q, tables), sum_magnitudes(q)        of a block of 64 activations
//     row_sums, zero_sums()                             one int32 per row
//     add_scaled(totals, sums, d)                       totals[r] += d * sums[r]; totals as load_totals orders them
//
// and after it add_pair, declared below.
#ifndef MOBIE_KERNELS_LUT_H
#define MOBIE_KERNELS_LUT_H

enum {
    LUT_ROWS = LUT_VECS * VEC_BYTES,  // of a tile
    // Blocks of a span, what is transposed at a time: 16 blocks are 144 bytes, a multiple of 16.
    LUT_SPAN       = 16,
    LUT_SPAN_BYTES = LUT_SPAN * (int) sizeof(mobie_block),
    // Spans times tokens whose tables exist at a time: 130 KB of work memory, in the second cache.
    LUT_BATCH = 16,
    // Bytes ahead at which memory is asked for rows, into the second cache, beyond the next tile: a tile is read
    // column by column, so that all its rows have to be there when it begins.
    LUT_FAR = 2048,
};

// Of four columns: the low and the high part of v for each of the 16 sign patterns, first column in bit 0.
typedef struct {
    uint8_t low[16], high[16];
} quad_table;

// What the products with a span need of one token.
typedef struct {
    quad_table tables[LUT_SPAN][16];
    int16_t    magnitudes[LUT_SPAN];  // sum of |q| of a block
    float      scales[LUT_SPAN / 4];
} span_tables;

static const size_t LUT_WORK = LUT_BATCH * sizeof(span_tables);

// Byte p of the rows of a tile. Byte 9 b is the scale of block b, the eight after it are its signs.
typedef struct {
    uint8_t bytes[LUT_SPAN_BYTES][LUT_VECS][VEC_BYTES];
} span_tile;

// v of a block's 64 columns, one byte per row: low + 16 * (high[0] + high[1]).
typedef struct {
    vec low, high[2];
    int magnitudes;
} block_sums;

// Adds to sums the products of two blocks, each scale * (2 v - magnitudes).
static inline void add_pair(row_sums * sums, const block_sums & block0, const block_sums & block1, vec scales0,
                            vec scales1);

static void build_span(int64_t n, const void * act, int64_t first_block, int n_blocks, span_tables * span) {
    const int8_t * q = (const int8_t *) act + first_block * MOBIE_BLOCK_LEN;
    for (int b = 0; b < n_blocks; b++, q += MOBIE_BLOCK_LEN) {
        build_tables(q, span->tables[b]);
        span->magnitudes[b] = sum_magnitudes(q);
    }
    for (int b = 0; b < n_blocks; b += 4) {
        span->scales[b / 4] = mobie_act_scale(act, n, (first_block + b) / 4);
    }
    if (n_blocks % 2) {  // add_pair takes two; see transpose_span
        memset(span->tables[n_blocks], 0, sizeof(span->tables[n_blocks]));
        span->magnitudes[n_blocks] = 0;
    }
}

// 16 bytes of 16 rows, in every part. Each round moves a bit of the byte's index to the vector's and one back.
static inline void transpose_16(vec x[16]) {
#pragma GCC        unroll 4
    for (int round = 0; round < 4; round++) {
        vec y[16];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            y[2 * i]     = zip_low(x[i], x[i + 8]);
            y[2 * i + 1] = zip_high(x[i], x[i + 8]);
        }
        memcpy(x, y, sizeof(y));
    }
}

// n_blocks blocks of n_vecs vectors of rows.
static __attribute__((noinline)) void transpose_span(const char * rows, size_t stride, int n_blocks, int n_vecs,
                                                     span_tile * tile) {
    const int size = n_blocks * (int) sizeof(mobie_block);
    for (int v = 0; v < n_vecs; v++, rows += VEC_BYTES * stride) {
        for (int p = 0; p < size; p += 16) {
            // Some bytes again rather than beyond the end. A single block is shorter than what is loaded, but then it
            // is a copy, see copy_span.
            const int    first = size < 16 || p + 16 <= size ? p : size - 16;
            const char * row   = rows + first;
            vec          x[16];
#pragma GCC unroll 16
            for (int r = 0; r < 16; r++, row += stride) {
                x[r] = load_rows(row, 16 * stride);
            }
            transpose_16(x);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                store(tile->bytes[first + i][v], x[i]);
            }
        }
    }
    if (n_blocks % 2) {  // a block of zeros beside an odd one
        for (int i = 0; i < (int) sizeof(mobie_block); i++) {
            memset(tile->bytes[size + i], 0, sizeof(tile->bytes[0]));
        }
    }
}

// The same of n_rows rows, fewer than the vectors hold or of a single block, by way of a copy.
static __attribute__((noinline)) void copy_span(const char * rows, size_t stride, int n_rows, int n_blocks, int n_vecs,
                                                span_tile * tile) {
    char copy[LUT_ROWS][LUT_SPAN_BYTES] = {};
    for (int r = 0; r < n_rows; r++) {
        memcpy(copy[r], rows + r * stride, n_blocks * sizeof(mobie_block));
    }
    transpose_span(copy[0], sizeof(copy[0]), n_blocks, n_vecs, tile);
}

// Block b of N vectors of rows, the first of which is v0. Not unrolled: GCC reorders long sums, and spills.
template <int N>
static inline void sum_block(const span_tile * tile, int v0, int b, const span_tables * span, block_sums sums[N]) {
    const uint8_t (*bytes)[LUT_VECS][VEC_BYTES] = tile->bytes + b * sizeof(mobie_block) + 1;
    const quad_table * table                    = span->tables[b];
    for (int v = 0; v < N; v++) {
        sums[v].low = sums[v].high[0] = sums[v].high[1] = zero_bytes();
        sums[v].magnitudes                              = span->magnitudes[b];
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
#pragma GCC unroll 1
        for (int i = 0; i < 4; i++, bytes++) {
            vec signs[N];
            for (int v = 0; v < N; v++) {
                signs[v] = load((*bytes)[v0 + v]);
            }
#pragma GCC unroll 2
            for (int k = 0; k < 2; k++, table++) {
                const vec low = load_table(table->low), high = load_table(table->high);
#pragma GCC unroll 4
                for (int v = 0; v < N; v++) {
                    const vec index    = k ? high_nibbles(signs[v]) : low_nibbles(signs[v]);
                    sums[v].low        = add(sums[v].low, lookup(low, index));
                    sums[v].high[half] = add(sums[v].high[half], lookup(high, index));
                }
            }
        }
    }
}

static inline vec get_scales(const span_tile * tile, int v, int b) {
    return load(tile->bytes[b * sizeof(mobie_block)][v]);
}

// Adds the products of the group that starts with block b to the totals of N vectors of rows. stream: what to ask
// memory for meanwhile, as much as these rows have in the span, or null. Spread over the sums, because requests beyond
// what a core can have open stall it.
template <int N>
static inline void add_group(const span_tile * tile, int v0, int b, int n_blocks, const span_tables * span,
                             float * totals, const char * stream) {
    row_sums sums[N];
    for (int v = 0; v < N; v++) {
        sums[v] = zero_sums();
    }
    for (int i = b; i < b + 4 && i < n_blocks; i += 2) {
        if (stream) {
            enum { SIZE = 2 * sizeof(mobie_block) * N * VEC_BYTES };
            for (int k = 0; k < SIZE; k += 64) {
                __builtin_prefetch(stream + i / 2 * SIZE + k, 0, 2);
            }
        }
        block_sums block[2][N];
        sum_block<N>(tile, v0, i, span, block[0]);
        sum_block<N>(tile, v0, i + 1, span, block[1]);
        for (int v = 0; v < N; v++) {
            add_pair(&sums[v], block[0][v], block[1][v], get_scales(tile, v0 + v, i), get_scales(tile, v0 + v, i + 1));
        }
    }
    for (int v = 0; v < N; v++) {
        add_scaled(totals + (v0 + v) * VEC_BYTES, sums[v], span->scales[b / 4]);
    }
}

// Sums of 16 p + 4 i + e come from lane 4 p + e of vector i.
static inline void load_totals(float * totals, const float * y) {
    for (int p = 0; p < VEC_BYTES / 16; p++) {
        for (int i = 0; i < 4; i++) {
            memcpy(totals + i * (VEC_BYTES / 4) + 4 * p, y + 16 * p + 4 * i, 4 * sizeof(float));
        }
    }
}

static inline void store_totals(const float * totals, float * y) {
    for (int p = 0; p < VEC_BYTES / 16; p++) {
        for (int i = 0; i < 4; i++) {
            memcpy(y + 16 * p + 4 * i, totals + i * (VEC_BYTES / 4) + 4 * p, 4 * sizeof(float));
        }
    }
}

// Adds the products of a span with n_tokens tokens to y[t][first_row .. first_row + n_rows - 1]. tables: one token's
// are stride apart from the next one's. stream: see add_group.
static __attribute__((noinline)) void add_span(const span_tile * tile, int n_rows, int n_blocks,
                                               const span_tables * tables, int64_t stride, float * const * y,
                                               int64_t first_row, int64_t n_tokens, bool first, bool last,
                                               const char * stream) {
    alignas(64) float totals[LUT_BATCH][LUT_ROWS];
    float             rows[LUT_ROWS] = {};
    const int         n_vecs         = (n_rows + VEC_BYTES - 1) / VEC_BYTES;
    for (int64_t t = 0; t < n_tokens; t++) {
        if (!first) {
            memcpy(rows, y[t] + first_row, n_rows * sizeof(float));
        }
        for (int v = 0; v < n_vecs; v++) {
            load_totals(totals[t] + v * VEC_BYTES, rows + v * VEC_BYTES);
        }
    }
    for (int b = 0; b < n_blocks; b += 4) {  // a group of the tile stays in the first cache for all tokens
        for (int64_t t = 0; t < n_tokens; t++) {
            if (n_vecs == LUT_VECS) {
                add_group<LUT_VECS>(tile, 0, b, n_blocks, tables + t * stride, totals[t], t == 0 ? stream : nullptr);
            } else {
                for (int v = 0; v < n_vecs; v++) {
                    add_group<1>(tile, v, b, n_blocks, tables + t * stride, totals[t], nullptr);
                }
            }
        }
    }
    for (int64_t t = 0; t < n_tokens; t++) {
        for (int v = 0; v < n_vecs; v++) {
            store_totals(totals[t] + v * VEC_BYTES, rows + v * VEC_BYTES);
        }
        for (int r = 0; r < LUT_ROWS; r++) {
            rows[r] *= last ? MOBIE_UNIT : 1;
        }
        memcpy(y[t] + first_row, rows, n_rows * sizeof(float));
    }
}

static void lut_matmul(int64_t n, const mobie_block * w, size_t row_bytes, int64_t n_rows, const void * const * act,
                       float * const * y, int64_t n_act, void * work) {
    const int64_t n_spans   = (n / MOBIE_BLOCK_LEN + LUT_SPAN - 1) / LUT_SPAN;
    const int64_t n_batches = (n_act + LUT_BATCH - 1) / LUT_BATCH;
    const int64_t batch     = n_batches ? (n_act + n_batches - 1) / n_batches : 1;  // tokens, evenly
    const int64_t chunk     = LUT_BATCH / batch;                                    // spans
    const auto    blocks_of = [n](int64_t span) {
        const int64_t left = n / MOBIE_BLOCK_LEN - span * LUT_SPAN;
        return left < LUT_SPAN ? (int) left : (int) LUT_SPAN;
    };
    span_tables *         tables = (span_tables *) work;
    alignas(64) span_tile tile;
    const char *          end   = (const char *) w + n_rows * row_bytes;
    const size_t          ahead = LUT_ROWS * row_bytes + LUT_FAR;
    mobie_ask_memory((const char *) w, ahead, end);
    for (int64_t t0 = 0; t0 < n_act; t0 += batch) {
        const int64_t n_tokens = n_act - t0 < batch ? n_act - t0 : batch;
        for (int64_t s0 = 0; s0 < n_spans; s0 += chunk) {
            const int64_t s1 = s0 + chunk < n_spans ? s0 + chunk : n_spans;
            for (int64_t t = 0; t < n_tokens; t++) {
                for (int64_t s = s0; s < s1; s++) {
                    build_span(n, act[t0 + t], s * LUT_SPAN, blocks_of(s), &tables[t * chunk + s - s0]);
                }
            }
            for (int64_t r0 = 0; r0 < n_rows; r0 += LUT_ROWS) {
                const int    rows   = n_rows - r0 < LUT_ROWS ? (int) (n_rows - r0) : (int) LUT_ROWS;
                const int    n_vecs = (rows + VEC_BYTES - 1) / VEC_BYTES;
                const char * row    = (const char *) w + r0 * row_bytes;
                for (int64_t s = s0; s < s1; s++) {
                    const char * span   = row + s * LUT_SPAN_BYTES;
                    const char * stream = row + ahead + (s - s0) * LUT_ROWS * LUT_SPAN_BYTES;
                    if (rows < n_vecs * VEC_BYTES || blocks_of(s) == 1) {
                        copy_span(span, row_bytes, rows, blocks_of(s), n_vecs, &tile);
                    } else {
                        transpose_span(span, row_bytes, blocks_of(s), n_vecs, &tile);
                    }
                    add_span(&tile, rows, blocks_of(s), &tables[s - s0], chunk, y + t0, r0, n_tokens, s == 0,
                             s == n_spans - 1, stream < end ? stream : nullptr);
                }
            }
        }
    }
}

#endif
