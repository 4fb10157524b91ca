// arith.h, the arithmetic of the GPU kernels, on the CPU against the reference kernels: integers and floats bit for
// bit. The lanes of a warp are played one after the other.
//
//     check_arith [SEED]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "arith.h"
#include "kernels.h"

namespace {

std::mt19937 rng;
long         checks = 0, failures = 0;

void expect(bool ok, const char * what, long at) {
    checks++;
    if (!ok && ++failures <= 20) {
        printf("FAILED: %s, at %ld\n", what, at);
    }
}

bool same_bits(float a, float b) {
    return memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b));
}

int below(int n) {
    return (int) (rng() % n);
}

mobie_block random_block() {
    mobie_block b;
    b.scale = below(4) ? below(256) : below(2) * 255;
    for (uint8_t & s : b.signs) {
        s = (uint8_t) rng();
    }
    return b;
}

// A row of floats as models have them, now and then with what they should not have.
std::vector<float> random_row(int64_t n) {
    std::normal_distribution<float> normal(0, std::exp2((float) below(40) - 20));
    std::vector<float>              x(n);
    for (float & v : x) {
        v = normal(rng);
    }
    const int64_t at = below((int) n);
    switch (below(12)) {
        case 0:
            x[at] = NAN;
            break;
        case 1:
            x[at] = -INFINITY;
            break;
        case 2:
            x.assign(n, 0.0f);
            break;
        case 3:
            x.assign(n, 0x1p-101f);
            break;
        case 4:
            x[at] = 0x1.fffffep127f;
            break;
        case 5:
            x.assign(n, -0x1p-100f);
            break;
        default:
            break;
    }
    return x;
}

// Activations as a GPU has them, by the functions a GPU uses.
struct gpu_act {
    std::vector<int8_t> q;
    std::vector<float>  scale;
};

gpu_act quantize(const std::vector<float> & x) {
    const int64_t n = (int64_t) x.size(), n_groups = mobie_n_groups(n);
    gpu_act       act = { std::vector<int8_t>(n_groups * MOBIE_GROUP_LEN), std::vector<float>(n_groups) };
    for (int64_t g = 0; g < n_groups; g++) {
        float max    = 0;
        bool  finite = true;
        for (int64_t i = g * MOBIE_GROUP_LEN; i < n && i < (g + 1) * MOBIE_GROUP_LEN; i++) {
            max    = std::fmax(max, std::fabs(x[i]));
            finite = finite && std::fabs(x[i]) <= MOBIE_ACT_MAX;
        }
        act.scale[g] = finite ? mobie_act_scale_of(max) : mobie_nan();
        for (int64_t i = g * MOBIE_GROUP_LEN; finite && i < n && i < (g + 1) * MOBIE_GROUP_LEN; i++) {
            const int64_t at = i / MOBIE_BLOCK_LEN * MOBIE_BLOCK_LEN + mobie_act_position(i % MOBIE_BLOCK_LEN);
            act.q[at]        = (int8_t) std::rint(mobie_mul(x[i], mobie_act_inverse_of(max)));
        }
    }
    return act;
}

// A block that starts `at` bytes into aligned words, as a thread loads it.
mobie_bits take(const mobie_block & b, int at) {
    uint32_t words[3];
    for (uint32_t & w : words) {
        w = rng();  // what lies around the block must not matter
    }
    memcpy((char *) words + at, &b, sizeof(b));
    return mobie_take_block(words[0], words[1], words[2], at);
}

void check_positions() {
    bool seen[MOBIE_BLOCK_LEN] = {};
    for (int j = 0; j < MOBIE_BLOCK_LEN; j++) {
        const int at = mobie_act_position(j);
        expect(at >= 0 && at < MOBIE_BLOCK_LEN && !seen[at], "positions are a permutation", j);
        seen[at & 63] = true;
    }
}

void check_rows(int64_t n) {
    const std::vector<float> x   = random_row(n);
    const gpu_act            act = quantize(x);
    std::vector<char>        ref(mobie_act_size(n));
    mobie_kernels_ref.quantize_act(x.data(), ref.data(), n);
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = i / MOBIE_BLOCK_LEN * MOBIE_BLOCK_LEN + mobie_act_position(i % MOBIE_BLOCK_LEN);
        expect(act.q[at] == ((const int8_t *) ref.data())[i], "quantized activation", i);
    }
    for (int64_t g = 0; g < mobie_n_groups(n); g++) {
        expect(same_bits(act.scale[g], mobie_act_scale(ref.data(), n, g)), "activation scale", g);
    }

    std::vector<mobie_block> w(n / MOBIE_BLOCK_LEN);
    for (mobie_block & b : w) {
        b = random_block();
    }
    float     y  = 0;
    const int at = below(4);
    for (int64_t g = 0; g < mobie_n_groups(n); g++) {
        int32_t sum = 0;
        for (int64_t i = 4 * g; i < 4 * g + mobie_group_blocks(n, g); i++) {
            uint32_t q[16];
            memcpy(q, &act.q[i * MOBIE_BLOCK_LEN], sizeof(q));
            sum += mobie_dot_block(take(w[i], (int) (at + i * sizeof(mobie_block)) % 4), q, 0);
        }
        y = mobie_add(y, mobie_mul(act.scale[g], (float) sum));
    }
    float        expected = -1;
    const void * acts[]   = { ref.data() };
    float *      ys[]     = { &expected };
    mobie_kernels_ref.matmul(n, w.data(), w.size() * sizeof(mobie_block), 1, acts, ys, 1, nullptr);
    expect(same_bits(mobie_mul(y, MOBIE_UNIT), expected), "product of a row", n);
}

// Two m16n8k32 of a block of 16 rows and 8 tokens. The instruction's layout, from its documentation: lane l holds of A
// (16 x 32) in register r the bytes of row l / 4 + 8 (r % 2) at columns 16 (r / 2) + 4 (l % 4) + i, of B (32 x 8) in
// register r those of token l / 4 at columns 16 r + 4 (l % 4) + i, i = 0..3.
void check_fragments() {
    mobie_block w[16];
    int8_t      q[8][MOBIE_BLOCK_LEN], permuted[8][MOBIE_BLOCK_LEN];
    for (mobie_block & b : w) {
        b = random_block();
    }
    for (int token = 0; token < 8; token++) {
        for (int j = 0; j < MOBIE_BLOCK_LEN; j++) {
            q[token][j]                            = (int8_t) (below(255) - 127);
            permuted[token][mobie_act_position(j)] = q[token][j];
        }
    }
    int32_t c[16][8] = {};
    for (int word = 0; word < 2; word++) {
        int8_t a[16][32], b[32][8];
        for (int lane = 0; lane < 32; lane++) {
            const int k = lane % 4;
            uint32_t  ra[4], rb[4];
            for (int r = 0; r < 2; r++) {
                const mobie_bits bits = take(w[lane / 4 + 8 * r], below(4));
                mobie_expand(bits.signs[word], mobie_signs_of(k), &ra[r], &ra[r + 2]);
            }
            memcpy(rb, permuted[lane / 4] + 16 * k, sizeof(rb));
            for (int i = 0; i < 4; i++) {
                for (int r = 0; r < 4; r++) {
                    a[lane / 4 + 8 * (r % 2)][16 * (r / 2) + 4 * k + i] = (int8_t) (ra[r] >> 8 * i);
                }
                for (int r = 0; r < 2; r++) {
                    b[16 * r + 4 * k + i][lane / 4] = (int8_t) (rb[2 * word + r] >> 8 * i);
                }
            }
        }
        for (int row = 0; row < 16; row++) {
            for (int token = 0; token < 8; token++) {
                for (int j = 0; j < 32; j++) {
                    c[row][token] += a[row][j] * b[j][token];
                }
            }
        }
    }
    for (int row = 0; row < 16; row++) {
        for (int token = 0; token < 8; token++) {
            int32_t expected = 0;
            for (int j = 0; j < MOBIE_BLOCK_LEN; j++) {
                expected += w[row].signs[j / 8] >> (j % 8) & 1 ? q[token][j] : -q[token][j];
            }
            expect(c[row][token] == expected, "tensor core fragment", row * 8 + token);
        }
    }
}

}  // namespace

int main(int argc, char ** argv) {
    const unsigned seed = argc > 1 ? (unsigned) atoi(argv[1]) : std::random_device()();
    printf("seed %u\n", seed);
    rng.seed(seed);
    check_positions();
    for (int i = 0; i < 200; i++) {
        for (const int64_t n : { 64, 128, 192, 256, 320, 768, 1408, 2048, 2880 }) {
            check_rows(n);
        }
        check_fragments();
    }
    printf("%ld checks, %ld failures\n", checks, failures);
    return failures != 0 || checks == 0;
}
