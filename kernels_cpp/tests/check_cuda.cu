// The CUDA kernels against the CPU's, bit for bit, and against a truth in double precision; and their speed.
//
//     check_cuda [--seed N]            the checks
//     check_cuda --small               a few of them, for compute-sanitizer
//     check_cuda --bench [MEGABYTES]   Gweights/s and shares of what the card can do
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../cuda/mobie-cuda.h"
#include "../mobie.h"

namespace {

std::mt19937 rng(1);
long         checks = 0, failures = 0;

void must(cudaError_t e, const char * what) {
    if (e != cudaSuccess) {
        printf("%s: %s\n", what, cudaGetErrorString(e));
        exit(2);
    }
}

void expect(bool ok, const std::string & what) {
    checks++;
    if (!ok && ++failures <= 30) {
        printf("FAILED: %s\n", what.c_str());
    }
}

bool same_bits(float a, float b) {
    return memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b));
}

template <typename T>
struct gpu {
    T *    data = nullptr;
    size_t size = 0;
    explicit gpu(size_t n) : size(n) { must(cudaMalloc(&data, std::max<size_t>(n, 1) * sizeof(T)), "cudaMalloc"); }
    explicit gpu(const std::vector<T> & x) : gpu(x.size()) { set(x); }
    gpu(const gpu &) = delete;
    ~gpu() { cudaFree(data); }
    void set(const std::vector<T> & x) {
        must(cudaMemcpy(data, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice), "copy to the card");
    }
    std::vector<T> get() const {
        std::vector<T> x(size);
        must(cudaMemcpy(x.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost), "copy from the card");
        return x;
    }
};

struct activations {
    gpu<int8_t>    q;
    gpu<float>     scale;
    mobie_cuda_act act;
    activations(int64_t rows, int64_t n)
        : q(rows * mobie_n_groups(n) * MOBIE_GROUP_LEN),
          scale(rows * mobie_n_groups(n)),
          act{ q.data, scale.data, n } {}
};

std::vector<float> random_floats(size_t n, float size = 1) {
    std::normal_distribution<float> normal(0, size);
    std::vector<float>              x(n);
    for (float & v : x) {
        v = normal(rng);
    }
    return x;
}

// `n_mats` matrices, whose first block lies `shift` bytes after an aligned address.
struct matrices {
    int64_t           n, n_rows, row_bytes, bytes;
    int               shift;
    std::vector<char> host;
    gpu<char>         card;
    matrices(int64_t n, int64_t n_rows, int64_t n_mats, int shift)
        : n(n),
          n_rows(n_rows),
          row_bytes(n / MOBIE_BLOCK_LEN * (int64_t) sizeof(mobie_block)),
          bytes(n_rows * row_bytes),
          shift(shift),
          host(n_mats * bytes + shift),
          card((host.size() + 15) / 16 * 16) {
        for (char & c : host) {
            c = (char) rng();
        }
        must(cudaMemset(card.data, 0, card.size), "cudaMemset");  // what pads the last piece is read too
        must(cudaMemcpy(card.data, host.data(), host.size(), cudaMemcpyHostToDevice), "copy to the card");
    }
    const char * row(int64_t mat, int64_t r) const { return host.data() + shift + mat * bytes + r * row_bytes; }
};

mobie_cuda_product product_of(const matrices & w, const activations & x, int64_t n_tokens, gpu<float> & y) {
    mobie_cuda_product p = {};
    p.up.w               = w.card.data + w.shift;
    p.n_rows             = w.n_rows;
    p.row_bytes          = w.row_bytes;
    p.expert_bytes       = w.bytes;
    p.n_expert           = 1;
    p.act                = x.act;
    p.n_tokens           = n_tokens;
    p.n_used             = 1;
    p.n_rows_of_act      = 1;
    p.y                  = y.data;
    p.y_stride           = w.n_rows;
    return p;
}

// The CPU's result for a row of activations, and how far a sum of floats may be from the exact one.
struct expected {
    std::vector<float>  y;
    std::vector<double> truth, slack;
};

expected on_cpu(const matrices & w, int64_t mat, const float * x) {
    const mobie_kernels * kernels = mobie_kernels_best();
    std::vector<char>     act(mobie_act_size(w.n));
    kernels->quantize_act(x, act.data(), w.n);
    expected     e      = { std::vector<float>(w.n_rows), {}, {} };
    const void * acts[] = { act.data() };
    float *      ys[]   = { e.y.data() };
    static std::vector<char> work(kernels->work_size + 64);
    kernels->matmul(w.n, (const mobie_block *) w.row(mat, 0), w.row_bytes, w.n_rows, acts, ys, 1,
                    work.data() + (64 - (uintptr_t) work.data() % 64) % 64);

    const int8_t * q = (const int8_t *) act.data();
    for (int64_t r = 0; r < w.n_rows; r++) {
        const mobie_block * b   = (const mobie_block *) w.row(mat, r);
        double              sum = 0, magnitude = 0;
        for (int64_t g = 0; g < mobie_n_groups(w.n); g++) {
            mobie_act_group group;
            memcpy(&group, act.data() + w.n + g * sizeof(group), sizeof(group));
            double part = 0;
            for (int64_t j = g * MOBIE_GROUP_LEN; j < w.n && j < (g + 1) * MOBIE_GROUP_LEN; j++) {
                const mobie_block & block = b[j / MOBIE_BLOCK_LEN];
                const bool          plus  = block.signs[j % 64 / 8] >> (j % 8) & 1;
                part += (plus ? 1.0 : -1.0) * block.scale * q[j];
            }
            sum += part * group.scale;
            magnitude += std::fabs(part * group.scale);
        }
        e.truth.push_back(sum / 128);
        e.slack.push_back(magnitude / 128 * mobie_n_groups(w.n) * 0x1p-22 + 1e-300);
    }
    return e;
}

std::vector<float> test_rows(int64_t rows, int64_t n) {
    std::vector<float> x = random_floats(rows * n);
    if (rows > 2) {  // not the first, so that single rows stay ordinary
        x[1 * n + rng() % n] = NAN;
        std::fill(x.begin() + 2 * n, x.begin() + 3 * n, 0.0f);
    }
    if (rows > 4) {
        x[3 * n + rng() % n] = INFINITY;
        std::fill(x.begin() + 4 * n, x.begin() + 5 * n, 0x1p-110f);
    }
    return x;
}

void poison(gpu<float> & y) {
    must(cudaMemset(y.data, 0x5a, y.size * sizeof(float)), "cudaMemset");
}

using launch = std::function<cudaError_t(const mobie_cuda_product &)>;

void check_dense(int64_t n, int64_t n_rows, int64_t n_tokens, int shift) {
    const matrices           w(n, n_rows, 1, shift);
    const std::vector<float> x = test_rows(n_tokens, n);
    gpu<float>               x_card(x), y(n_tokens * n_rows);
    activations              act(n_tokens, n);
    const int64_t            ne[4] = { n, n_tokens, 1, 1 }, stride[4] = { 1, n, 0, 0 };
    must(cudaMemset(act.q.data, 0x7f, act.q.size), "cudaMemset");
    must(mobie_cuda_quantize(x_card.data, ne, stride, act.act, 0), "quantize");

    std::vector<expected> e;
    for (int64_t t = 0; t < n_tokens; t++) {
        e.push_back(on_cpu(w, 0, &x[t * n]));
    }
    std::vector<std::pair<std::string, launch>> kernels = {
        { "naive", [](const auto & p) { return mobie_cuda_naive(&p, 0); } },
        { "vec", [](const auto & p) { return mobie_cuda_mul_vec(&p, 0); } },
    };
    for (const int tile : { 0, 8, 16, 32, 64 }) {
        kernels.push_back({ "mat " + std::to_string(tile),
                            [tile](const auto & p) { return mobie_cuda_mul_mat(&p, nullptr, tile, 0); } });
    }
    for (const auto & [name, run] : kernels) {
        poison(y);
        must(run(product_of(w, act, n_tokens, y)), name.c_str());
        must(cudaDeviceSynchronize(), name.c_str());
        const std::vector<float> got = y.get();
        const std::string at = name + ", n " + std::to_string(n) + ", rows " + std::to_string(n_rows) + ", tokens " +
                               std::to_string(n_tokens) + ", shift " + std::to_string(shift);
        for (int64_t t = 0; t < n_tokens; t++) {
            for (int64_t r = 0; r < n_rows; r++) {
                const float  v     = got[t * n_rows + r];
                const double truth = e[t].truth[r];
                expect(same_bits(v, e[t].y[r]), "bits, " + at);
                expect(std::isnan(truth) ? std::isnan(v) : std::fabs(v - truth) <= e[t].slack[r], "truth, " + at);
            }
        }
    }
}

void check_ids(int64_t n, int64_t n_rows, int64_t n_expert, int64_t n_used, int64_t n_tokens, bool one_row_a_token,
               bool bias) {
    const matrices           up(n, n_rows, n_expert, 0), gate(n, n_rows, n_expert, 0);
    const int64_t            act_rows = one_row_a_token ? 1 : n_used;
    const std::vector<float> x = random_floats(n_tokens * act_rows * n), s_up = random_floats(n_expert, 0.1f),
                             s_gate = random_floats(n_expert, 0.1f), b_up = random_floats(n_expert * n_rows),
                             b_gate = random_floats(n_expert * n_rows);
    std::vector<int32_t>     ids(n_tokens * n_used), bounds = { 0 }, rows_in, rows_out;
    for (int64_t t = 0; t < n_tokens; t++) {
        std::vector<int32_t> all(n_expert);
        for (int64_t i = 0; i < n_expert; i++) {
            all[i] = (int32_t) i;
        }
        std::shuffle(all.begin(), all.end(), rng);
        std::copy_n(all.begin(), n_used, ids.begin() + t * n_used);
    }
    for (int64_t e = 0; e < n_expert; e++) {
        for (int64_t pair = 0; pair < n_tokens * n_used; pair++) {
            if (ids[pair] == e) {
                rows_in.push_back((int32_t) (pair / n_used * act_rows + pair % n_used % act_rows));
                rows_out.push_back((int32_t) pair);
            }
        }
        bounds.push_back((int32_t) rows_in.size());
    }
    gpu<float>    x_card(x), y(n_tokens * n_used * n_rows), su(s_up), sg(s_gate), bu(b_up), bg(b_gate);
    gpu<int32_t>  ids_card(ids), bounds_card(bounds), in_card(rows_in), out_card(rows_out);
    gpu<char>     tiles(mobie_cuda_tiles_size(n_tokens * n_used, n_expert));
    activations   act(n_tokens * act_rows, n);
    const int64_t ne[4] = { n, act_rows, n_tokens, 1 }, stride[4] = { 1, n, n * act_rows, 0 };
    must(mobie_cuda_quantize(x_card.data, ne, stride, act.act, 0), "quantize");

    mobie_cuda_product p             = product_of(up, act, n_tokens, y);
    p.n_expert                       = n_expert;
    p.n_used                         = n_used;
    p.n_rows_of_act                  = act_rows;
    p.ids                            = ids_card.data;
    p.ids_stride                     = n_used;
    p.up.scale                       = su.data;
    p.up.bias                        = bias ? bu.data : nullptr;
    const mobie_cuda_routing routing = { bounds_card.data, in_card.data, out_card.data, tiles.data };

    mobie_cuda_product both = p;
    both.gate               = { gate.card.data, sg.data, bias ? bg.data : nullptr };

    std::vector<std::vector<float>> ups, gates;
    for (int64_t pair = 0; pair < n_tokens * n_used; pair++) {
        const float * row = &x[(pair / n_used * act_rows + pair % n_used % act_rows) * n];
        const auto    one = [&](const matrices & w, const std::vector<float> & s, const std::vector<float> & b) {
            std::vector<float> v = on_cpu(w, ids[pair], row).y;
            for (int64_t r = 0; r < n_rows; r++) {
                volatile float scaled = v[r] * s[ids[pair]];  // rounded before the bias is added
                v[r]                  = bias ? scaled + b[ids[pair] * n_rows + r] : scaled;
            }
            return v;
        };
        ups.push_back(one(up, s_up, b_up));
        gates.push_back(one(gate, s_gate, b_gate));
    }
    const std::string at  = ", n " + std::to_string(n) + ", rows " + std::to_string(n_rows) + ", tokens " +
                            std::to_string(n_tokens) + (bias ? ", bias" : "");
    const auto        run = [&](const std::string & name, cudaError_t error) {
        must(error, name.c_str());
        must(cudaDeviceSynchronize(), name.c_str());
        return y.get();
    };
    const auto plain = [&](const std::string & name, const launch & f) {
        poison(y);
        const std::vector<float> got = run(name, f(p));
        for (size_t i = 0; i < got.size(); i++) {
            expect(same_bits(got[i], ups[i / n_rows][i % n_rows]), name + " with ids" + at);
        }
    };
    plain("naive", [](const auto & p) { return mobie_cuda_naive(&p, 0); });
    plain("vec", [](const auto & p) { return mobie_cuda_mul_vec(&p, 0); });
    for (const int tile : { 0, 8, 16, 32, 64 }) {
        plain("mat " + std::to_string(tile), [&](const auto & p) { return mobie_cuda_mul_mat(&p, &routing, tile, 0); });
    }
    both.glu_limit = 0.7f;
    for (const mobie_glu glu : { MOBIE_GLU_SWIGLU, MOBIE_GLU_GEGLU, MOBIE_GLU_SWIGLU_OAI, MOBIE_GLU_SWIGLU_CLAMP }) {
        both.glu = glu;
        for (const bool naive : { true, false }) {
            poison(y);
            const std::vector<float> got =
                run("glu", naive ? mobie_cuda_naive(&both, 0) : mobie_cuda_mul_vec(&both, 0));
            for (size_t i = 0; i < got.size(); i++) {
                double g = gates[i / n_rows][i % n_rows], u = ups[i / n_rows][i % n_rows], limit = both.glu_limit, want;
                if (glu == MOBIE_GLU_GEGLU) {
                    want = 0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * g * (1 + 0.044715 * g * g))) * u;
                } else {
                    const bool oai = glu == MOBIE_GLU_SWIGLU_OAI;
                    if (glu != MOBIE_GLU_SWIGLU) {
                        g = std::min(g, limit), u = std::max(std::min(u, limit), -limit);
                    }
                    want = g / (1 + std::exp(-g * (oai ? 1.702f : 1.0f))) * (oai ? 1 + u : u);
                }
                // tanh and exp of the card: a few units in the last place of terms of the size of gate and up
                const double bound = 1e-5 * (std::fabs(g) + 1e-3) * (std::fabs(u) + 1);
                expect(std::fabs(got[i] - want) <= bound, "glu " + std::to_string(glu) + at);
            }
        }
    }
}

void check_all(bool small) {
    int round = 0;
    if (small) {
        check_dense(2880, 130, 33, 1);
        check_dense(192, 7, 1, 3);
        check_dense(256, 257, 9, 0);
        check_ids(768, 131, 9, 4, 3, true, true);
        check_ids(448, 64, 40, 2, 50, false, false);
        return;
    }
    for (const int64_t n : { 64, 192, 256, 448, 768, 1408, 2048, 2880, 4160 }) {
        for (const int64_t rows : { 1, 7, 64, 130, 257 }) {
            for (const int64_t tokens : { 1, 2, 5, 9, 33, 130 }) {
                if (rows * tokens * n < 20'000'000) {
                    check_dense(n, rows, tokens, round++ % 4);
                }
            }
        }
        printf("n %ld: %ld checks, %ld failures\n", (long) n, checks, failures);
    }
    check_dense(64, 2, 70000, 0);  // more than a grid has in y
    for (const int64_t n : { 192, 256, 768, 2048 }) {
        for (const int64_t tokens : { 1, 3, 8, 50 }) {
            check_ids(n, 131, 9, 4, tokens, round % 2, round % 3 == 0);
            check_ids(n, 64, 40, 2, tokens, (round + 1) % 2, round % 3 == 1);
            round++;
        }
    }
}

// --- speed -----------------------------------------------------------------------------------------------------------

double median_seconds(const std::function<void()> & run, int rounds = 15) {
    cudaEvent_t begin, end;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    std::vector<float> ms;
    for (int i = 0; i < rounds + 2; i++) {
        cudaEventRecord(begin);
        run();
        cudaEventRecord(end);
        must(cudaEventSynchronize(end), "timed work");
        float t;
        cudaEventElapsedTime(&t, begin, end);
        if (i >= 2) {
            ms.push_back(t);
        }
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    std::nth_element(ms.begin(), ms.begin() + ms.size() / 2, ms.end());
    return ms[ms.size() / 2] * 1e-3;
}

__global__ void read_all(const uint4 * x, size_t n, uint32_t * sink) {
    uint32_t sum = 0;
    for (size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t) gridDim.x * blockDim.x) {
        const uint4 v = __ldg(x + i);
        sum += v.x ^ v.y ^ v.z ^ v.w;
    }
    if (sum == 0x12345678) {
        *sink = sum;
    }
}

// Tensor cores with nothing but registers: what kernel 3 could reach at most.
__global__ void multiply_only(int iterations, int * sink) {
#if __CUDA_ARCH__ >= 800
    int c[8][4] = {};
    for (int i = 0; i < iterations; i++) {
        for (int j = 0; j < 8; j++) {
            asm volatile(
                "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %4, %4, %4}, {%4, %4}, {%0, "
                "%1, "
                "%2, %3};"
                : "+r"(c[j][0]), "+r"(c[j][1]), "+r"(c[j][2]), "+r"(c[j][3])
                : "r"(threadIdx.x));
        }
    }
    if (c[0][0] + c[1][1] + c[2][2] + c[3][3] + c[4][0] + c[5][0] + c[6][0] + c[7][0] == 1) {
        *sink = 1;
    }
#endif
}

void bench(size_t megabytes) {
    cudaDeviceProp prop;
    must(cudaGetDeviceProperties(&prop, 0), "device");
    const size_t          bytes = megabytes << 20;
    gpu<uint32_t>         memory(bytes / 4), other(bytes / 4), sink(1);
    std::vector<uint32_t> random(bytes / 4);
    for (uint32_t & r : random) {
        r = rng();
    }
    memory.set(random);
    const double read =
        bytes / median_seconds([&] {
            read_all<<<prop.multiProcessorCount * 16, 512>>>((const uint4 *) memory.data, bytes / 16, sink.data);
        });
    const double copy   = 2.0 * bytes / median_seconds([&] {
                            cudaMemcpyAsync(other.data, memory.data, bytes, cudaMemcpyDeviceToDevice);
                          });
    const int    blocks = prop.multiProcessorCount * 8, iterations = 4000;
    const double int8 = (double) blocks * 8 * iterations * 8 * 4096 /
                        median_seconds([&] { multiply_only<<<blocks, 256>>>(iterations, (int *) sink.data); });
    printf("%s, %d SMs; %zu MB: read %.0f GB/s, copy %.0f GB/s (read and written); int8 %.0f TMAC/s\n", prop.name,
           prop.multiProcessorCount, megabytes, read * 1e-9, copy * 1e-9, int8 * 1e-12);

    const int64_t most_tokens = 2048;
    printf("%6s %7s %-8s %12s %8s %10s %9s\n", "n", "tokens", "kernel", "Gweights/s", "GB/s", "of reading", "of int8");
    for (const int64_t n : { 2048, 768 }) {
        const int64_t row_bytes = n / MOBIE_BLOCK_LEN * (int64_t) sizeof(mobie_block);
        activations   act(most_tokens, n);
        gpu<float>    x(random_floats(most_tokens * n));
        const int64_t ne[4] = { n, most_tokens, 1, 1 }, stride[4] = { 1, n, 0, 0 };
        must(mobie_cuda_quantize(x.data, ne, stride, act.act, 0), "quantize");
        for (const int64_t tokens : { 1, 2, 4, 8, 16, 32, 64, 128, 512, 2048 }) {
            // many tokens: fewer rows, for the results need room too
            const int64_t rows = (int64_t) std::min(bytes / row_bytes, (size_t) (1l << 30) / (4 * tokens)) / 128 * 128;
            gpu<float>    y(tokens * rows);
            mobie_cuda_product p = {};
            p.up.w               = memory.data;
            p.n_rows             = rows;
            p.row_bytes          = row_bytes;
            p.expert_bytes       = rows * row_bytes;
            p.n_expert           = 1;
            p.act                = act.act;
            p.n_tokens           = tokens;
            p.n_used = p.n_rows_of_act = 1;
            p.y                        = y.data;
            p.y_stride                 = rows;
            std::vector<std::pair<std::string, std::function<void()>>> kernels;
            if (tokens == 1) {
                kernels.push_back({ "naive", [&] { mobie_cuda_naive(&p, 0); } });
            }
            if (tokens <= 4) {
                kernels.push_back({ "vec", [&] { mobie_cuda_mul_vec(&p, 0); } });
            }
            for (const int tile : { 8, 16, 32, 64 }) {
                if (tile < 4 * tokens || tile == 8) {
                    kernels.push_back(
                        { "mat " + std::to_string(tile), [&, tile] { mobie_cuda_mul_mat(&p, nullptr, tile, 0); } });
                }
            }
            for (const auto & [name, run] : kernels) {
                const double t = median_seconds(run, name == "naive" ? 1 : 9);
                must(cudaGetLastError(), name.c_str());
                const double w = (double) rows * n;
                printf("%6ld %7ld %-8s %12.0f %8.0f %9.0f %% %7.0f %%\n", (long) n, (long) tokens, name.c_str(),
                       w / t * 1e-9, rows * row_bytes / t * 1e-9, 100 * rows * row_bytes / t / read,
                       100 * w * tokens / t / int8);
            }
        }
    }
}

}  // namespace

int main(int argc, char ** argv) {
    setvbuf(stdout, nullptr, _IOLBF, 0);
    int n_devices = 0;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
        printf("no CUDA device: nothing checked\n");
        return 3;
    }
    if (argc > 1 && strcmp(argv[1], "--bench") == 0) {
        bench(argc > 2 ? atoi(argv[2]) : 1024);
        return 0;
    }
    const bool     small = argc > 1 && strcmp(argv[1], "--small") == 0;
    const unsigned seed  = argc > 2 ? (unsigned) atoi(argv[2]) : std::random_device()();
    printf("seed %u\n", seed);
    rng.seed(seed);
    check_all(small);
    printf("%ld checks, %ld failures\n", checks, failures);
    return failures != 0 || checks == 0;
}
