// Speed of the block layouts that were candidates for the type (docs/measured/format-choice.md), one thread, one token.
//
//   bench_formats [MB]
//
// Built once per instruction set, from the same text: what a layout costs shows in how its rows4() differs from the
// others. Every layout computes four rows at once against int8 activations with a float scale per 256, prefetches the
// same way, and is compared with a scalar product first. Prints "NAME BITS_PER_WEIGHT GWEIGHTS_PER_S GB_PER_S" lines.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace {

// --- what differs between the instruction sets -----------------------------------------------------------------------

#if defined(__AVX512VNNI__)
const char ISA[] = "avx512vnni";
using ivec       = __m512i;
using fvec       = __m512;

struct act_block {  // 64 activations, ready for use with several rows
    ivec plus, minus;
    explicit act_block(const int8_t * q)
        : plus(_mm512_loadu_si512(q)), minus(_mm512_sub_epi8(_mm512_setzero_si512(), plus)) {}
};

ivec zero() {
    return _mm512_setzero_si512();
}
fvec fzero() {
    return _mm512_setzero_ps();
}

// sum + scale * (signs . q), lane by lane
ivec dot(ivec sum, const uint8_t * signs, const uint8_t * scale, const act_block & q) {
    __mmask64 m;
    memcpy(&m, signs, 8);
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8((char) *scale), _mm512_mask_blend_epi8(m, q.minus, q.plus));
}
ivec dot(ivec sum, const uint8_t * signs, const act_block & q) {
    __mmask64 m;
    memcpy(&m, signs, 8);
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_mask_blend_epi8(m, q.minus, q.plus));
}
ivec add_shifted(ivec sum, ivec x, const uint32_t * shift) {
    return _mm512_add_epi32(sum, _mm512_sllv_epi32(x, _mm512_set1_epi32((int) *shift)));
}
fvec fma_half(fvec sum, ivec x, const uint8_t * half, fvec d) {
    uint16_t h;
    memcpy(&h, half, 2);
    const fvec scale = _mm512_cvtph_ps(_mm256_set1_epi16((short) h));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), _mm512_mul_ps(scale, d), sum);
}
fvec set1(float x) {
    return _mm512_set1_ps(x);
}

__m128i sum4(const ivec x[4]) {
    const auto add = [](ivec a, ivec b) {
        return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    };
    const ivec    a = add(x[0], x[1]), b = add(x[2], x[3]);
    const ivec    c = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    const __m256i d = _mm256_add_epi32(_mm512_castsi512_si256(c), _mm512_extracti64x4_epi64(c, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(d), _mm256_extracti128_si256(d, 1));
}
float sum_of(fvec x) {
    return _mm512_reduce_add_ps(x);
}

#else
const char ISA[] = "avx2";
using ivec       = __m256i;
using fvec       = __m256;

struct act_block {
    ivec q0, q1, all;
    explicit act_block(const int8_t * q)
        : q0(_mm256_loadu_si256((const ivec *) q)), q1(_mm256_loadu_si256((const ivec *) (q + 32))) {
        const ivec one = _mm256_set1_epi8(1);
        all            = _mm256_add_epi16(_mm256_maddubs_epi16(one, q0), _mm256_maddubs_epi16(one, q1));
    }
};

ivec zero() {
    return _mm256_setzero_si256();
}
fvec fzero() {
    return _mm256_setzero_ps();
}

ivec bytes_of(ivec signs, int first) {
    const ivec lane = _mm256_add_epi8(_mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303),
                                      _mm256_set1_epi8((char) first));
    const ivec bits =
        _mm256_and_si256(_mm256_shuffle_epi8(signs, lane), _mm256_set1_epi64x((long long) 0x8040201008040201));
    return _mm256_min_epu8(bits, _mm256_set1_epi8(1));
}
ivec dot_words(const uint8_t * signs, const act_block & q) {
    long long bits;
    memcpy(&bits, signs, 8);
    const ivec s = _mm256_set1_epi64x(bits);
    const ivec plus =
        _mm256_add_epi16(_mm256_maddubs_epi16(bytes_of(s, 0), q.q0), _mm256_maddubs_epi16(bytes_of(s, 4), q.q1));
    return _mm256_sub_epi16(_mm256_add_epi16(plus, plus), q.all);
}
ivec dot(ivec sum, const uint8_t * signs, const uint8_t * scale, const act_block & q) {
    short two;
    memcpy(&two, scale, 2);  // the byte behind is masked out
    const ivec s = _mm256_and_si256(_mm256_set1_epi16(two), _mm256_set1_epi16(0xff));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(dot_words(signs, q), s));
}
ivec dot(ivec sum, const uint8_t * signs, const act_block & q) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(dot_words(signs, q), _mm256_set1_epi16(1)));
}
ivec add_shifted(ivec sum, ivec x, const uint32_t * shift) {
    return _mm256_add_epi32(sum, _mm256_sllv_epi32(x, _mm256_set1_epi32((int) *shift)));
}
fvec fma_half(fvec sum, ivec x, const uint8_t * half, fvec d) {
    uint16_t h;
    memcpy(&h, half, 2);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(x), _mm256_mul_ps(_mm256_cvtph_ps(_mm_set1_epi16((short) h)), d), sum);
}
fvec set1(float x) {
    return _mm256_set1_ps(x);
}

__m128i sum4(const ivec x[4]) {
    const auto add = [](ivec a, ivec b) {
        return _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    };
    const ivec a = add(x[0], x[1]), b = add(x[2], x[3]);
    const ivec c = _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    return _mm_add_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
}
float sum_of(fvec x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s        = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
#endif

// --- the layouts -----------------------------------------------------------------------------------------------------
//
// BYTES: of 256 weights. scale_of, signs_of: of block b of 64 in a group of 256 at p. rows4: four rows, `stride` apart.

float half_at(const uint8_t * p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return _cvtsh_ss(h);
}

// Scales that enter the integer sum: one float operation per 256 columns, four rows in one vector.
template <typename F>
struct integer_scales {
    static void rows4(const uint8_t * w, size_t stride, int64_t n, const int8_t * q, const float * d, float * y) {
        __m128 total = _mm_setzero_ps();
        for (int64_t g = 0; g < n / 256; g++, w += F::BYTES, q += 256) {
            for (size_t i = 0; i < 4 * F::BYTES; i += 64) {
                _mm_prefetch((const char *) w + 3 * g * F::BYTES + 8192 + i, _MM_HINT_T0);
            }
            ivec sum[4] = { zero(), zero(), zero(), zero() };
#pragma GCC unroll 4
            for (int b = 0; b < 4; b++) {
                const act_block act(q + 64 * b);
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) {
                    sum[r] = F::add(sum[r], w + r * stride, b, act);
                }
            }
            total = _mm_add_ps(total, _mm_mul_ps(_mm_set1_ps(d[g]), _mm_cvtepi32_ps(sum4(sum))));
        }
        _mm_storeu_ps(y, total);
    }
};

// Scales that are floats: an operation per scale and row on a vector of lanes, summed at the end of the row.
template <typename F>
struct float_scales {
    static void rows4(const uint8_t * w, size_t stride, int64_t n, const int8_t * q, const float * d, float * y) {
        fvec total[4] = { fzero(), fzero(), fzero(), fzero() };
        for (int64_t g = 0; g < n / 256; g++, w += F::BYTES, q += 256) {
            for (size_t i = 0; i < 4 * F::BYTES; i += 64) {
                _mm_prefetch((const char *) w + 3 * g * F::BYTES + 8192 + i, _MM_HINT_T0);
            }
            const fvec dg = set1(d[g]);
#pragma GCC unroll 4
            for (int b = 0; b < 4; b += F::BLOCKS) {
                const act_block first(q + 64 * b), last(q + 64 * (b + F::BLOCKS - 1));
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) {
                    const uint8_t * row = w + r * stride;
                    ivec            sum = dot(zero(), F::signs_of(row, b), first);
                    if (F::BLOCKS == 2) {
                        sum = dot(sum, F::signs_of(row, b + 1), last);
                    }
                    total[r] = fma_half(total[r], sum, F::half_of(row, b), dg);
                }
            }
        }
        for (int r = 0; r < 4; r++) {
            y[r] = sum_of(total[r]);
        }
    }
};

struct u8_64 : integer_scales<u8_64> {
    static constexpr const char * NAME  = "u8 per 64, 9 bytes";
    static constexpr size_t       BYTES = 36;
    static const uint8_t *        signs_of(const uint8_t * p, int b) { return p + 9 * b + 1; }
    static double                 scale_of(const uint8_t * p, int b) { return p[9 * b]; }
    static ivec                   add(ivec sum, const uint8_t * p, int b, const act_block & q) {
        return dot(sum, p + 9 * b + 1, p + 9 * b, q);
    }
};

struct u8_64_super : integer_scales<u8_64_super> {
    static constexpr const char * NAME  = "u8 per 64, 36 bytes per 256";
    static constexpr size_t       BYTES = 36;
    static const uint8_t *        signs_of(const uint8_t * p, int b) { return p + 4 + 8 * b; }
    static double                 scale_of(const uint8_t * p, int b) { return p[b]; }
    static ivec                   add(ivec sum, const uint8_t * p, int b, const act_block & q) {
        return dot(sum, p + 4 + 8 * b, p + b, q);
    }
};

struct u8_128 : integer_scales<u8_128> {
    static constexpr const char * NAME  = "u8 per 128, 17 bytes";
    static constexpr size_t       BYTES = 34;
    static const uint8_t *        signs_of(const uint8_t * p, int b) { return p + 17 * (b / 2) + 1 + 8 * (b % 2); }
    static double                 scale_of(const uint8_t * p, int b) { return p[17 * (b / 2)]; }
    static ivec                   add(ivec sum, const uint8_t * p, int b, const act_block & q) {
        return dot(sum, signs_of(p, b), p + 17 * (b / 2), q);
    }
};

// Exponent in the upper 3 bits: e = 0: m; else (32 + m) * 2^(e - 1). Both parts come from tables.
struct e3m5_tables {
    uint8_t  mantissa[257];  // two bytes are read
    uint32_t shift[256];
    e3m5_tables() : mantissa() {
        for (int c = 0; c < 256; c++) {
            mantissa[c] = (uint8_t) (c < 32 ? c : 32 + c % 32);
            shift[c]    = c < 32 ? 0 : c / 32 - 1;
        }
    }
};
const e3m5_tables E3M5;

struct e3m5_64 : integer_scales<e3m5_64> {
    static constexpr const char * NAME  = "e3m5 per 64, 9 bytes";
    static constexpr size_t       BYTES = 36;
    static const uint8_t *        signs_of(const uint8_t * p, int b) { return p + 9 * b + 1; }
    static double scale_of(const uint8_t * p, int b) { return E3M5.mantissa[p[9 * b]] << E3M5.shift[p[9 * b]]; }
    static ivec   add(ivec sum, const uint8_t * p, int b, const act_block & q) {
        const uint8_t code = p[9 * b];
        return add_shifted(sum, dot(zero(), p + 9 * b + 1, &E3M5.mantissa[code], q), &E3M5.shift[code]);
    }
};

struct f16_64 : float_scales<f16_64> {
    static constexpr const char * NAME   = "f16 per 64, 10 bytes";
    static constexpr size_t       BYTES  = 40;
    static constexpr int          BLOCKS = 1;
    static const uint8_t *        signs_of(const uint8_t * p, int b) { return p + 10 * b + 2; }
    static const uint8_t *        half_of(const uint8_t * p, int b) { return p + 10 * b; }
    static double                 scale_of(const uint8_t * p, int b) { return half_at(half_of(p, b)); }
};

struct f16_128 : float_scales<f16_128> {
    static constexpr const char * NAME   = "f16 per 128, 18 bytes";
    static constexpr size_t       BYTES  = 36;
    static constexpr int          BLOCKS = 2;
    static const uint8_t *        signs_of(const uint8_t * p, int b) { return p + 18 * (b / 2) + 2 + 8 * (b % 2); }
    static const uint8_t *        half_of(const uint8_t * p, int b) { return p + 18 * (b / 2); }
    static double                 scale_of(const uint8_t * p, int b) { return half_at(half_of(p, b)); }
};

// --- checking and timing ---------------------------------------------------------------------------------------------

const int64_t N = 2048;

struct layout {
    const char * name;
    size_t       bytes;  // of 256 weights
    void (*rows4)(const uint8_t *, size_t, int64_t, const int8_t *, const float *, float *);
    double (*scale_of)(const uint8_t *, int);
    const uint8_t * (*signs_of)(const uint8_t *, int);
};

template <typename F>
constexpr layout layout_of() {
    return { F::NAME, F::BYTES, F::rows4, F::scale_of, F::signs_of };
}

const layout LAYOUTS[] = { layout_of<u8_64>(),   layout_of<u8_64_super>(), layout_of<e3m5_64>(),
                           layout_of<f16_128>(), layout_of<f16_64>(),      layout_of<u8_128>() };
const int    N_LAYOUTS = sizeof(LAYOUTS) / sizeof(LAYOUTS[0]);

void run(const layout & l, const uint8_t * w, int64_t rows, const int8_t * q, const float * d, float * y) {
    const size_t stride = N / 256 * l.bytes;
    for (int64_t r = 0; r < rows; r += 4) {
        l.rows4(w + r * stride, stride, N, q, d, y + r);
    }
}

bool right(const layout & l, const uint8_t * w, const int8_t * q, const float * d) {
    float y[64];
    run(l, w, 64, q, d, y);
    for (int64_t r = 0; r < 64; r++) {
        double want = 0, magnitude = 0;
        for (int64_t i = 0; i < N; i++) {
            const uint8_t * p = w + (r * N / 256 + i / 256) * l.bytes;
            const int       b = i % 256 / 64, j = i % 64;
            const double    x = l.scale_of(p, b) * q[i] * d[i / 256];
            want += l.signs_of(p, b)[j / 8] >> (j % 8) & 1 ? x : -x;
            magnitude += fabs(x);
        }
        if (!(fabs(y[r] - want) <= 1e-6 * magnitude)) {
            fprintf(stderr, "%s: row %d is %g, wanted %g\n", l.name, (int) r, y[r], want);
            return false;
        }
    }
    return true;
}

uint64_t read_all(const uint8_t * data, size_t size) {
    uint64_t sum[32] = {};
    for (size_t i = 0; i + sizeof(sum) <= size; i += sizeof(sum)) {
        uint64_t v[32];
        memcpy(v, data + i, sizeof(v));
        for (int k = 0; k < 32; k++) {
            sum[k] += v[k];
        }
    }
    uint64_t total = 0;
    for (const uint64_t s : sum) {
        total += s;
    }
    return total;
}

}  // namespace

int main(int argc, char ** argv) {
    const size_t size = (argc > 1 ? strtoull(argv[1], nullptr, 0) : 256) << 20;
    if (size < 1 << 20) {
        fprintf(stderr, "usage: bench_formats [MB]\n");
        return 2;
    }
    std::mt19937_64      rng(1);
    std::vector<uint8_t> w(size);
    for (size_t i = 0; i + 8 <= size; i += 8) {
        // No byte above 0x7b, so that every half is finite; signs remain mixed enough.
        const uint64_t bits = rng() & 0x7b7b7b7b7b7b7b7b;
        memcpy(&w[i], &bits, 8);
    }
    std::vector<int8_t> q(N);
    for (int8_t & v : q) {
        v = (int8_t) (rng() % 255 - 127);
    }
    std::vector<float> d(N / 256), y(size / (N / 256 * 34) + 4);
    for (float & v : d) {
        v = 0.01f + rng() % 100 * 1e-4f;
    }
    for (const layout & l : LAYOUTS) {
        if (!right(l, w.data(), q.data(), d.data())) {
            return 1;
        }
    }

    const int                        rounds = 15;
    std::vector<std::vector<double>> seconds(N_LAYOUTS + 1);
    volatile uint64_t                sink = 0;
    for (int round = 0; round < rounds + 1; round++) {  // in alternation; the first warms up
        for (int k = 0; k <= N_LAYOUTS; k++) {
            const auto start = std::chrono::steady_clock::now();
            if (k == N_LAYOUTS) {
                sink = read_all(w.data(), size);
            } else {
                const int64_t rows = size / (N / 256 * LAYOUTS[k].bytes) / 4 * 4;
                run(LAYOUTS[k], w.data(), rows, q.data(), d.data(), y.data());
            }
            if (round > 0) {
                seconds[k].push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
            }
        }
    }
    (void) sink;
    for (int k = 0; k <= N_LAYOUTS; k++) {
        std::sort(seconds[k].begin(), seconds[k].end());
        const double gb_per_s = size / seconds[k][rounds / 2] * 1e-9;
        if (k < N_LAYOUTS) {
            const double bits = LAYOUTS[k].bytes * 8 / 256.0;
            printf("%s\t%s\t%.4f\t%.2f\t%.2f\n", ISA, LAYOUTS[k].name, bits, gb_per_s * 8 / bits, gb_per_s);
        } else {
            printf("%s\tplain read\t\t\t%.2f\n", ISA, gb_per_s);
        }
    }
    return 0;
}
