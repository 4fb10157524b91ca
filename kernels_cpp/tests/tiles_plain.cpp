// kernels_tile.h in plain C++, vectors and tiles: it checks the algorithm of kernels_amx.cpp on any machine.
#include "../kernels.h"

enum { DOT_ROWS = 16, DOT_TOKENS = 1, DOT_UNROLLED = 1 };

// 16 rows.
struct words {
    uint32_t of[DOT_ROWS];
};
struct floats {
    float of[DOT_ROWS];
};
struct row_addresses {
    const char * first;
    size_t       stride;
};

static row_addresses addresses_of(const char * p, size_t stride) {
    return { p, stride };
}
[[maybe_unused]] static void advance(row_addresses * a) {
    a->first += 4 * sizeof(mobie_block);
}
static void load_group(const row_addresses & a, words w[9]) {
    for (int r = 0; r < DOT_ROWS; r++) {
        for (int k = 0; k < 9; k++) {
            memcpy(&w[k].of[r], a.first + r * a.stride + 4 * k, 4);
        }
    }
}
static words mix(words x, const words & y, int b) {
    const uint32_t from_y = (uint32_t) ((uint64_t(1) << (8 * b + 8)) - 1);
    for (int r = 0; r < DOT_ROWS; r++) {
        x.of[r] = (x.of[r] & ~from_y) | (y.of[r] & from_y);
    }
    return x;
}
static words byte_of(words x, int b) {
    for (uint32_t & word : x.of) {
        word = word >> 8 * b & 0xff;
    }
    return x;
}
[[maybe_unused]] static words zero_words() {
    return {};
}
static void arrange_block(const int8_t * q, int b, int32_t * out) {
    for (int i = 0; i < 64; i++) {
        ((int8_t *) out)[i] = q[8 * ((7 - b + 4 * (i / 32) + i % 4) % 8) + i / 4 % 8];
    }
}
static floats load_floats(const float * p) {
    floats x;
    memcpy(x.of, p, sizeof(x.of));
    return x;
}
static void store_floats(float * p, const floats & x) {
    memcpy(p, x.of, sizeof(x.of));
}
[[maybe_unused]] static floats add_scaled(floats total, const words & sums, float d) {
    for (int r = 0; r < DOT_ROWS; r++) {
        total.of[r] += d * (float) (int32_t) sums.of[r];
    }
    return total;
}
static floats scale_by(floats x, float factor) {
    for (float & f : x.of) {
        f *= factor;
    }
    return x;
}

#include "../kernels_dot.h"
#include "../kernels_tile.h"
#include "played_tiles.h"

ALWAYS_INLINE void store_pluses(const words & signs, const words & scales, words out[8]) {
    for (int i = 0; i < 8; i++) {
        for (int r = 0; r < DOT_ROWS; r++) {
            out[i].of[r] = (signs.of[r] >> i & 0x01010101) * (scales.of[r] & 0xff);
        }
    }
}

ALWAYS_INLINE words pair_words(const words & low, const words & high) {
    words pairs;
    for (int r = 0; r < DOT_ROWS; r++) {
        pairs.of[r] = low.of[r] | high.of[r] << 16;
    }
    return pairs;
}

ALWAYS_INLINE void add_products(const words & sums, const words scales[2], const tile_act & act, float * results) {
    for (int r = 0; r < DOT_ROWS; r++) {
        int32_t dot = 2 * (int32_t) sums.of[r];
        for (int b = 0; b < GROUP_BLOCKS; b++) {
            dot += (int16_t) (scales[b / 2].of[r] >> 16 * (b % 2)) * act.minus_sums[b];
        }
        results[r] += act.scale * (float) dot;
    }
}

static void quantize_act(const float * x, void * act, int64_t n) {
    mobie_kernels_ref.quantize_act(x, act, n);
}

extern "C" const mobie_kernels mobie_kernels_tiles_plain = { "tiles, plain", quantize_act, tile_matmul, TILE_WORK };

// What the processor's registers would keep, for the test that a product leaves it as it was.
extern "C" void mobie_set_played_shapes(const uint8_t * c) {
    memcpy(&PLAYED.shapes, c, sizeof(PLAYED.shapes));
}
extern "C" void mobie_get_played_shapes(uint8_t * c) {
    memcpy(c, &PLAYED.shapes, sizeof(PLAYED.shapes));
}
