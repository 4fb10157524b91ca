// Products by dot product instructions: the algorithm of the kernel files whose CPUs multiply int8 in groups of four.
//
// A lane of 32 bits is a row. The signs of four blocks are 36 bytes with their scales, nine words; the words of as many
// rows as a vector has lanes are transposed, so that one vector holds the same four bytes of all rows. Bit s of its
// bytes are the signs of four columns, eight apart: one instruction isolates them, and they are an operand of the dot
// product with four activations that are the same for all rows. No sum across lanes, no tables, no least number of
// rows.
//
//     bytes   0      1 .. 8    9      10 .. 17   18     19 .. 26   27     28 .. 35
//             scale  signs 0   scale  signs 1    scale  signs 2    scale  signs 3
//     words   0 0 0 0  1 1 1 1  2 2 2 2  3 3 3 3  4 4 4 4  5 5 5 5  6 6 6 6  7 7 7 7  8 8 8 8
//
// Word 2 b + 1 belongs to block b alone. The other four bytes of its signs are the upper bytes of word 2 b and the
// lower ones of word 2 b + 2, each in its place: one blend. So the bytes of signs of block b come in the order 7 - b,
// then the seven after it (modulo 8), and the activations are brought into that order once per call.
//
// A kernel file defines, before it includes this one:
//
//     words, DOT_ROWS                    int32 of so many rows, one vector or several
//     DOT_TOKENS, DOT_UNROLLED           most tokens of a pass over the rows, and of one whose blocks are written out
//     row_addresses, addresses_of(p, stride)  of DOT_ROWS rows
//     advance(addresses)                 by a group
//     load_group(addresses, w)           word k of lane r: bytes 4 k to 4 k + 3 of row r
//     mix(x, y, b)                       bytes 0 to b of each word from y, the others from x
//     byte_of(x, b)                      byte b of each word
//     zero_words()
//     arrange_block(q, b, out)           word 8 h + s of out: columns 8 ((7 - b + 4 h + j) % 8) + s, j = 0 .. 3
//     floats, load_floats(p), store_floats(p, x)  one float per row
//     add_scaled(total, sums, d)         total + d * sums
//     scale_by(total, factor)
//
// and after it add_block, declared below. A file may bring activations in a form of its own, Act: with CAPACITY and
// scale, an arrange_group and an add_block.
#ifndef MOBIE_KERNELS_DOT_H
#define MOBIE_KERNELS_DOT_H

enum {
    GROUP_BLOCKS = MOBIE_GROUP_LEN / MOBIE_BLOCK_LEN,
    GROUP_BYTES  = GROUP_BLOCKS * (int) sizeof(mobie_block),
    DOT_PART     = 64,  // most tokens that are prepared at a time
    // Bytes ahead of the products at which memory is asked for rows, into the second cache, and the second cache into
    // the first.
    DOT_FAR  = 8192,
    DOT_NEAR = 4608,
};

// A group of activations in the order of the words.
typedef struct {
    enum { CAPACITY = 512 };  // groups that exist at a time, all tokens together: 160 KB of work memory
    alignas(64) int32_t quads[GROUP_BLOCKS * 2 * 8];  // [block, mixed or own word, bit]: four int8
    int32_t minus_sums[GROUP_BLOCKS];                 // of the values of a block
    int16_t minus_sums_16[GROUP_BLOCKS];              // the same
    float   scale;
} dot_act;

// Signs and scales of a group of DOT_ROWS rows.
typedef struct {
    words signs[GROUP_BLOCKS][2];
    words scales[GROUP_BLOCKS];
} dot_signs;

// Adds to sums[t] the products of block b with T tokens, each scale * (2 * sum over the pluses - sum of all).
template <int T>
static inline void add_block(words sums[T], const dot_signs & w, int b, const dot_act act[T]);

static inline void arrange_group(int64_t n, const void * act, int64_t g, dot_act * out) {
    const mobie_act_group group    = mobie_get_act_group(act, n, g);
    const int             n_blocks = mobie_group_blocks(n, g);
    const int8_t *        q        = (const int8_t *) act + g * MOBIE_GROUP_LEN;
#pragma GCC unroll 4
    for (int b = 0; b < GROUP_BLOCKS; b++) {
        out->minus_sums[b]    = -group.sums[b];
        out->minus_sums_16[b] = (int16_t) -group.sums[b];
        if (b < n_blocks) {
            arrange_block(q + b * MOBIE_BLOCK_LEN, b, out->quads + 16 * b);
        } else {  // their scales are garbage, their products must be 0
            memset(out->quads + 16 * b, 0, 16 * sizeof(int32_t));
        }
    }
    out->scale = group.scale;
}

// Bytes of work memory.
template <typename Act>
static constexpr size_t DOT_WORK = Act::CAPACITY * sizeof(Act);

// Prepares activations, as many as there is room for, and calls f(first token, tokens, first group, end of groups,
// activations [group][token]) for each such part.
template <typename Act, typename F>
static inline void for_parts(int64_t n, const void * const * act, int64_t n_act, void * work, const F & f) {
    Act *         arranged = (Act *) work;
    const int64_t n_groups = mobie_n_groups(n);
    const int64_t room     = Act::CAPACITY / n_groups;
    const int64_t most     = room < DOT_TOKENS ? (int64_t) DOT_TOKENS : room < DOT_PART ? room : (int64_t) DOT_PART;
    const int64_t n_parts  = (n_act + most - 1) / most;
    const int64_t tokens   = n_parts ? (n_act + n_parts - 1) / n_parts : 1;  // evenly
    const int64_t span     = Act::CAPACITY / tokens < n_groups ? Act::CAPACITY / tokens : n_groups;
    for (int64_t t0 = 0; t0 < n_act; t0 += tokens) {
        const int64_t n_tokens = n_act - t0 < tokens ? n_act - t0 : tokens;
        for (int64_t g0 = 0; g0 < n_groups; g0 += span) {
            const int64_t g1 = g0 + span < n_groups ? g0 + span : n_groups;
            for (int64_t t = 0; t < n_tokens; t++) {
                for (int64_t g = g0; g < g1; g++) {
                    arrange_group(n, act[t0 + t], g, &arranged[(g - g0) * n_tokens + t]);
                }
            }
            f(t0, n_tokens, g0, g1, arranged);
        }
    }
}

// Rows of a matrix.
typedef struct {
    int64_t      n;
    size_t       row_bytes;
    const char * end;  // of the last row
} dot_matrix;

static inline dot_signs load_signs(const row_addresses & at) {
    words w[9];
    load_group(at, w);
    dot_signs s;
#pragma GCC unroll 4
    for (int b = 0; b < GROUP_BLOCKS; b++) {
        s.signs[b][0] = mix(w[2 * b], w[2 * b + 2], b);
        s.signs[b][1] = w[2 * b + 1];
        s.scales[b]   = byte_of(w[2 * b], b);
    }
    return s;
}

// Group g of the rows at `row`, of which n_rows exist, from a copy: for the end of the matrix, where there are fewer
// rows or the last group is shorter than what is loaded.
static __attribute__((noinline)) dot_signs copy_signs(const dot_matrix & m, const char * row, int64_t n_rows,
                                                      int64_t g) {
    char rows[DOT_ROWS][GROUP_BYTES] = {};
    for (int r = 0; r < n_rows && r < DOT_ROWS; r++) {
        memcpy(rows[r], row + r * m.row_bytes + g * GROUP_BYTES, mobie_group_blocks(m.n, g) * sizeof(mobie_block));
    }
    return load_signs(addresses_of(rows[0], GROUP_BYTES));
}

static inline dot_matrix matrix_of(int64_t n, const mobie_block * w, size_t row_bytes, int64_t n_rows) {
    const char * last = (const char *) w + (n_rows - 1) * row_bytes;
    return { n, row_bytes, last + n / MOBIE_BLOCK_LEN * sizeof(mobie_block) };
}

static inline bool inside(const dot_matrix & m, const char * row, int64_t g) {
    return row + (DOT_ROWS - 1) * m.row_bytes + (g + 1) * GROUP_BYTES <= m.end;
}

static inline dot_signs get_signs(const dot_matrix & m, const char * row, int64_t n_rows, int64_t g) {
    if (inside(m, row, g)) {
        return load_signs(addresses_of(row + g * GROUP_BYTES, m.row_bytes));
    }
    return copy_signs(m, row, n_rows, g);
}

// The first n of DOT_ROWS results.
static inline floats load_results(const float * y, int64_t n) {
    float part[DOT_ROWS] = {};
    memcpy(part, y, n * sizeof(float));
    return load_floats(part);
}

static inline void store_results(float * y, int64_t n, floats x) {
    if (n >= DOT_ROWS) {
        store_floats(y, x);
        return;
    }
    float part[DOT_ROWS];
    store_floats(part, x);
    memcpy(y, part, n * sizeof(float));
}

// Groups g0 to g1 of DOT_ROWS rows, of which n_rows count, times T tokens of n_tokens. y: where their results go.
template <int T, typename Act>
static __attribute__((noinline)) void dot_rows(const dot_matrix & m, const char * row, int64_t n_rows, int64_t g0,
                                               int64_t g1, const Act * act, int64_t n_tokens, float * const * y,
                                               int64_t first_row) {
    floats total[T];
    for (int t = 0; t < T; t++) {
        total[t] = g0 ? load_results(y[t] + first_row, n_rows) : load_results(y[t], 0);
    }
    const char *  stream = row + g0 * DOT_ROWS * GROUP_BYTES;  // the rows, as far as these have come
    row_addresses at     = addresses_of(row + g0 * GROUP_BYTES, m.row_bytes);
    for (int64_t g = g0; g < g1; g++, advance(&at), act += n_tokens) {
        for (int i = 0; i < DOT_ROWS * GROUP_BYTES; i += 64) {
            __builtin_prefetch(stream + DOT_NEAR + i, 0, 3);
        }
        const dot_signs w = inside(m, row, g) ? load_signs(at) : copy_signs(m, row, n_rows, g);
        for (int i = 0; i < DOT_ROWS * GROUP_BYTES; i += 64) {  // not all requests at once
            __builtin_prefetch(stream + DOT_FAR + i, 0, 2);
        }
        stream += DOT_ROWS * GROUP_BYTES;
        words sums[T];
        for (int t = 0; t < T; t++) {
            sums[t] = zero_words();
        }
        if constexpr (T <= DOT_UNROLLED) {
#pragma GCC unroll 4
            for (int b = 0; b < GROUP_BLOCKS; b++) {
                add_block<T>(sums, w, b, act);
            }
        } else {
#pragma GCC unroll 1
            for (int b = 0; b < GROUP_BLOCKS; b++) {
                add_block<T>(sums, w, b, act);
            }
        }
        for (int t = 0; t < T; t++) {
            total[t] = add_scaled(total[t], sums[t], act[t].scale);
        }
    }
    const float unit = g1 == mobie_n_groups(m.n) ? MOBIE_UNIT : 1;
    for (int t = 0; t < T; t++) {
        store_results(y[t] + first_row, n_rows, scale_by(total[t], unit));
    }
}

// The same for 1 to T tokens.
template <int T, typename... Args>
static inline void dot_rows_of(int64_t n_tokens, const Args &... args) {
    if (n_tokens == T) {
        dot_rows<T>(args...);
    } else if constexpr (T > 1) {
        dot_rows_of<T - 1>(n_tokens, args...);
    }
}

template <typename Act>
static void dot_matmul(int64_t n, const mobie_block * w, size_t row_bytes, int64_t n_rows, const void * const * act,
                       float * const * y, int64_t n_act, void * work) {
    const dot_matrix m = matrix_of(n, w, row_bytes, n_rows);
    mobie_ask_memory((const char *) w, DOT_FAR, m.end);
    for_parts<Act>(
        n, act, n_act, work, [&](int64_t t0, int64_t n_tokens, int64_t g0, int64_t g1, const Act * arranged) {
            const int64_t n_passes = (n_tokens + DOT_TOKENS - 1) / DOT_TOKENS;
            for (int64_t r = 0; r < n_rows; r += DOT_ROWS) {
                const char * row = (const char *) w + r * row_bytes;
                for (int64_t pass = 0, t = 0; pass < n_passes; pass++) {  // the rows stay in the first cache
                    const int64_t next = n_tokens * (pass + 1) / n_passes;
                    dot_rows_of<DOT_TOKENS>(next - t, m, row, n_rows - r < DOT_ROWS ? n_rows - r : (int64_t) DOT_ROWS,
                                            g0, g1, arranged + t, n_tokens, y + t0 + t, r);
                    t = next;
                }
            }
        });
}

#endif
