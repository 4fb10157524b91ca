// search.h for one instruction set: included once by each search*.cpp, which sets VEC_BYTES and ROW_VECS.
//
// A tile of rows goes through all columns of the span, so that what a block needs stays in the cache. Sums look back
// over the columns before, in registers and for four columns at once: a load is shared by four multiply-adds, and
// nothing is stored. What bounds a call are these products, inside the block and with the blocks behind it in the span:
// about 2.5 * block_len + span / 2 multiply-adds for each weight.
#include <string.h>

#include "search.h"

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors as arguments: nothing here is called from another file
#endif

// One per search_*.cpp; those of instruction sets that the compiler lacks have no name.
extern "C" const mobie_search mobie_search_avx2, mobie_search_avx512;

namespace {

typedef float   vec __attribute__((vector_size(VEC_BYTES)));
typedef int32_t ivec __attribute__((vector_size(VEC_BYTES)));

constexpr int64_t TILE    = VEC_BYTES / sizeof(float) * ROW_VECS;
constexpr int     AT_ONCE = 4;

struct tile {
    vec v[ROW_VECS];
};

#define EACH for (int i = 0; i < ROW_VECS; i++)

inline tile operator+(tile a, const tile & b) {
    EACH a.v[i] += b.v[i];
    return a;
}
inline tile operator-(tile a, const tile & b) {
    EACH a.v[i] -= b.v[i];
    return a;
}
inline tile operator*(tile a, const tile & b) {
    EACH a.v[i] *= b.v[i];
    return a;
}
inline tile operator/(tile a, const tile & b) {
    EACH a.v[i] /= b.v[i];
    return a;
}
inline tile all(float x) {
    tile t;
    EACH t.v[i] = vec{} + x;
    return t;
}
inline tile smaller(tile a, const tile & b) {
    EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return a;
}
inline tile larger(tile a, const tile & b) {
    EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
inline tile size_of(tile x) {
    EACH x.v[i] = (vec) ((ivec) x.v[i] & INT32_MAX);
    return x;
}
inline tile sign_of(tile x) {  // +-1, of 0 as well
    EACH x.v[i] = (vec) (((ivec) x.v[i] & INT32_MIN) | (ivec) (vec{} + 1.0f));
    return x;
}

// `rows` of TILE; the others are 0.
inline tile load(const float * p, int64_t rows) {
    tile t;
    if (rows == TILE) {
        memcpy(&t, p, sizeof(t));
    } else {
        t = all(0);
        memcpy(&t, p, rows * sizeof(float));
    }
    return t;
}
inline void store(float * p, const tile & t, int64_t rows) {
    memcpy(p, &t, rows == TILE ? sizeof(t) : rows * sizeof(float));
}

// sum[c] += sum over k < n of m[k * stride + c] x[k], for C columns side by side
template <int C>
inline void add(tile * sum, const float * m, int64_t stride, const tile * x, int64_t n) {
    tile sums[C];  // in registers
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
        EACH sums[c].v[i] = sum[c].v[i];
    }
    for (int64_t k = 0; k < n; k++, m += stride) {
        const tile now = x[k];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            EACH sums[c].v[i] += m[c] * now.v[i];
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
        EACH sum[c].v[i] = sums[c].v[i];
    }
}

// Column by column, as each sees what became of those before it: calls decide(j, sum), which sets x[j], with
// sum = at_first(j) + sum over k < j of m[k * stride + j] x[k].
template <class AtFirst, class Decide>
inline void look_back(const float * m, int64_t stride, const tile * x, int64_t n, AtFirst at_first, Decide decide) {
    for (int64_t j = 0; j < n; j += AT_ONCE) {
        tile sum[AT_ONCE];
        for (int c = 0; c < AT_ONCE; c++) {
            sum[c] = at_first(j + c);
        }
        add<AT_ONCE>(sum, m + j, stride, x, j);
        for (int c = 0; c < AT_ONCE; c++) {
            add<1>(sum + c, m + j * (stride + 1) + c, stride, x + j, c);
            decide(j + c, sum[c]);
        }
    }
}

// What `changed` of the block's columns from `start` adds to the sums of the columns behind them.
inline void add_behind(const mobie_span & s, int64_t start, int64_t row, int64_t rows, const tile * changed) {
    for (int64_t j = start + s.block_len; j < s.n_cols; j += AT_ONCE) {
        tile    sum[AT_ONCE];
        float * to = s.sums + j * s.stride + row;
        for (int c = 0; c < AT_ONCE; c++) {
            sum[c] = load(to + c * s.stride, rows);
        }
        add<AT_ONCE>(sum, s.square + start * s.n_cols + j, s.n_cols, changed, s.block_len);
        for (int c = 0; c < AT_ONCE; c++) {
            store(to + c * s.stride, sum[c], rows);
        }
    }
}

// Of a column j with a second sign: its sign there and the magnitude.
struct second {
    float * sign;
    tile    magnitude;

    second(const mobie_span & s, int64_t j, int64_t row, int64_t rows)
        : sign(s.signs2 + s.places[j] * s.stride + row),
          magnitude(load(s.magnitudes2 + s.places[j] / s.block_len * s.stride + row, rows)) {}
};

void propagate_rows(const mobie_span & s, int64_t row, int64_t rows) {
    tile b[MOBIE_SEARCH_MOST_BLOCK], left[MOBIE_SEARCH_MOST_BLOCK];
    for (int64_t start = 0; start < s.n_cols; start += s.block_len) {
        const float * R        = s.square + start * (s.n_cols + 1);
        const float * sums     = s.sums + start * s.stride + row;
        const float * w        = s.w + start * s.stride + row;
        const auto    diagonal = [&](int64_t j) { return all(R[j * (s.n_cols + 1)]); };
        const auto    before   = [&](int64_t j) { return load(sums + j * s.stride, rows); };
        const auto    own      = [&](int64_t j) { return load(w + j * s.stride, rows); };
        const auto    nothing  = [](int64_t) { return all(0); };

        // the magnitude before anything is decided; `left` is what the columns before would have these take over
        tile a = all(0), weights = all(0);
        look_back(R, s.n_cols, left, s.block_len, nothing, [&](int64_t j, const tile & sum) {
            const tile d = diagonal(j);
            left[j]      = (before(j) - sum) / d;
            a            = a + d * d * size_of(own(j) + left[j]);
            weights      = weights + d * d;
        });
        a = smaller(a / weights, all(s.most));

        look_back(R, s.n_cols, left, s.block_len, before, [&](int64_t j, const tile & sum) {
            const tile best = own(j) + sum / diagonal(j);
            b[j]            = sign_of(best);
            left[j]         = own(j) - a * b[j];
            if (s.places[start + j] >= 0) {
                const second two(s, start + j, row, rows);
                const tile   b2 = sign_of(best - a * b[j]);
                left[j]         = left[j] - two.magnitude * b2;
                store(two.sign, b2, rows);
            }
        });

        // the best magnitude for these signs
        for (int64_t j = 0; j < s.block_len; j++) {
            left[j] = left[j] + a * b[j];
        }
        tile with = all(0), square = all(0);
        for (int64_t j = 0; j < s.block_len; j += AT_ONCE) {
            tile vb[AT_ONCE], v[AT_ONCE];
            for (int c = 0; c < AT_ONCE; c++) {
                vb[c] = all(0);
                v[c]  = before(j + c);
            }
            add<AT_ONCE>(vb, R + j, s.n_cols, b, j);
            add<AT_ONCE>(v, R + j, s.n_cols, left, j);
            for (int c = 0; c < AT_ONCE; c++) {
                add<1>(vb + c, R + j * (s.n_cols + 1) + c, s.n_cols, b + j, c + 1);
                add<1>(v + c, R + j * (s.n_cols + 1) + c, s.n_cols, left + j, c + 1);
                with   = with + v[c] * vb[c];
                square = square + vb[c] * vb[c];
            }
        }
        a = smaller(larger(with / square, all(0)), all(s.most));
        store(s.magnitudes + start / s.block_len * s.stride + row, a, rows);
        for (int64_t j = 0; j < s.block_len; j++) {
            left[j] = left[j] - a * b[j];
            store(s.signs + (start + j) * s.stride + row, b[j], rows);
            store(s.left + (start + j) * s.stride + row, left[j], rows);
        }
        add_behind(s, start, row, rows, left);
    }
}

void descend_rows(const mobie_span & s, int64_t row, int64_t rows) {
    tile b[MOBIE_SEARCH_MOST_BLOCK], changed[MOBIE_SEARCH_MOST_BLOCK];
    for (int64_t start = 0; start < s.n_cols; start += s.block_len) {
        const float * h         = s.square + start * (s.n_cols + 1);
        const float * sums      = s.sums + start * s.stride + row;
        float *       magnitude = s.magnitudes + start / s.block_len * s.stride + row;
        tile          a         = load(magnitude, rows);
        const auto    before    = [&](int64_t j) { return load(sums + j * s.stride, rows); };

        // turns a sign of column j where it pays, and adds to what the column's error changes by
        const auto turn = [&](int64_t j, const tile & sum, tile & sign, const tile & size) {
            const float d = h[j * (s.n_cols + 1)];
            EACH {
                const vec  step = sign.v[i] * size.v[i];
                const ivec pays = step * step * d + step * sum.v[i] < 0;
                changed[j].v[i] += pays ? 2 * step : vec{};
                sign.v[i] = pays ? -sign.v[i] : sign.v[i];
            }
        };
        bool any_second = false;
        look_back(h, s.n_cols, changed, s.block_len, before, [&](int64_t j, const tile & sum) {
            b[j]       = load(s.signs + (start + j) * s.stride + row, rows);
            changed[j] = all(0);
            turn(j, sum, b[j], a);
            any_second |= s.places[start + j] >= 0;
        });
        for (int64_t j = 0; any_second && j < s.block_len; j++) {
            if (s.places[start + j] >= 0) {
                const second two(s, start + j, row, rows);
                tile         b2 = load(two.sign, rows), sum = before(j);
                add<1>(&sum, h + j, s.n_cols, changed, s.block_len);
                turn(j, sum, b2, two.magnitude);
                store(two.sign, b2, rows);
            }
        }

        // the best magnitude with all else as it is
        tile with = all(0), square = all(0);
        for (int64_t j = 0; j < s.block_len; j += AT_ONCE) {
            tile g[AT_ONCE], hb[AT_ONCE];
            for (int c = 0; c < AT_ONCE; c++) {
                g[c]  = before(j + c);
                hb[c] = all(0);
            }
            add<AT_ONCE>(g, h + j, s.n_cols, changed, s.block_len);
            add<AT_ONCE>(hb, h + j, s.n_cols, b, s.block_len);
            for (int c = 0; c < AT_ONCE; c++) {
                with   = with + b[j + c] * g[c];
                square = square + b[j + c] * hb[c];
            }
        }
        const tile more = smaller(larger(with / larger(square, all(1e-30f)), all(0) - a), all(s.most) - a);
        store(magnitude, a + more, rows);
        for (int64_t j = 0; j < s.block_len; j++) {
            float * left = s.left + (start + j) * s.stride + row;
            changed[j]   = changed[j] - b[j] * more;
            store(left, load(left, rows) + changed[j], rows);
            store(s.signs + (start + j) * s.stride + row, b[j], rows);
        }
        add_behind(s, start, row, rows, changed);
    }
}

template <void (*of_rows)(const mobie_span &, int64_t, int64_t)>
void of_span(const mobie_span * s) {
    for (int64_t row = s->first; row < s->end; row += TILE) {
        of_rows(*s, row, s->end - row < TILE ? s->end - row : TILE);
    }
}

}  // namespace

#define MOBIE_SEARCH(name) { name, of_span<propagate_rows>, of_span<descend_rows> }
