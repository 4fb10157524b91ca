// Speed of expert products, of plain reading and of int8 multiplication, measured in turns. Compiled by speed.py
// against the headers and libraries of the installed runtime.
//
//     bench_ops kernels MEGABYTES ROUNDS TYPE,...
//     bench_ops ops     MEGABYTES ROUNDS TYPE,... TOKENS,... THREADS,...
//
// Prints one JSON object per line and subject: its names, the time of every call in seconds, and what one call does:
// `macs` products of a weight with an activation, `bytes` read from memory (for products: of weights).
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "mobie.h"

#include "common.h"

namespace {

using clock_type = std::chrono::steady_clock;

// --- subjects --------------------------------------------------------------------------------------------------------

// Something to be timed. `prepare` runs before every call and is not timed.
struct subject {
    std::string           label;  // JSON members
    double                macs;
    double                bytes;
    std::function<void()> run;
    std::function<void()> prepare = [] {};
    int                   calls   = 1;  // per round
    std::vector<double>   seconds = {};
};

double time_once(subject & s) {
    s.prepare();
    const auto start = clock_type::now();
    s.run();
    return std::chrono::duration<double>(clock_type::now() - start).count();
}

// All subjects in turns, every round beginning with another one, so that a change of the machine's speed meets all.
void measure(std::vector<subject> & subjects, int rounds) {
    for (subject & s : subjects) {
        time_once(s);  // warm up
    }
    for (int round = 0; round < rounds; ++round) {
        for (size_t i = 0; i < subjects.size(); ++i) {
            subject & s = subjects[(i + round) % subjects.size()];
            for (int call = 0; call < s.calls; ++call) {
                s.seconds.push_back(time_once(s));
            }
        }
    }
}

void print(const std::vector<subject> & subjects) {
    for (const subject & s : subjects) {
        printf("{%s, \"macs\": %.0f, \"bytes\": %.0f, \"seconds\": [", s.label.c_str(), s.macs, s.bytes);
        for (size_t i = 0; i < s.seconds.size(); ++i) {
            printf("%s%.9g", i ? ", " : "", s.seconds[i]);
        }
        printf("]}\n");
    }
    fflush(stdout);
}

void on_threads(int n, const std::function<void(int)> & work) {
    std::vector<std::thread> others;
    for (int i = 1; i < n; ++i) {
        others.emplace_back(work, i);
    }
    work(0);
    for (std::thread & t : others) {
        t.join();
    }
}

// --- what the machine can do -----------------------------------------------------------------------------------------

volatile uint64_t sink;

uint64_t read_all(const uint64_t * x, size_t n) {
    uint64_t sums[32] = {};
    for (size_t i = 0; i + 32 <= n; i += 32) {
        for (int j = 0; j < 32; ++j) {
            sums[j] += x[i + j];
        }
    }
    return std::accumulate(sums, sums + 32, (uint64_t) 0);
}

subject read_subject(const std::vector<uint64_t> & memory, int threads) {
    const auto run = [&memory, threads] {
        const size_t share = memory.size() / threads;
        on_threads(threads, [&](int i) { sink = read_all(memory.data() + i * share, share); });
    };
    return { "\"what\": \"read\", \"threads\": " + std::to_string(threads), 0, memory.size() * 8.0, run };
}

// The best rate at which 8-bit integers can be multiplied and added up: many independent sums, nothing but registers.
struct int8_unit {
    const char * name;
    bool (*runs)();
    int macs;  // of one iteration
    void (*loop)(int iterations);
};

#if defined(__x86_64__)

// One iteration adds products to twelve registers, enough for the latency of two units. Written out, because a compiler
// keeps sums in memory or drops products whose operands never change. What the registers hold does not matter.
constexpr int SUMS = 12;
#define TWELVE(f) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11) f(12) f(13)
#define CLOBBERS \
    "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14"
#define LOOP(name, step)                               \
    void name(int iterations) {                        \
        for (int i = 0; i < iterations; ++i) {         \
            asm volatile(TWELVE(step) : : : CLOBBERS); \
        }                                              \
        asm volatile("vzeroupper" : : : CLOBBERS);     \
    }
#define STEP_AVX512VNNI(n) "vpdpbusd %%zmm0, %%zmm1, %%zmm" #n "\n\t"
#define STEP_AVXVNNI(n) "%{vex%} vpdpbusd %%ymm0, %%ymm1, %%ymm" #n "\n\t"
#define STEP_AVX2(n)                         \
    "vpmaddubsw %%ymm0, %%ymm1, %%ymm14\n\t" \
    "vpmaddwd %%ymm0, %%ymm14, %%ymm14\n\t"  \
    "vpaddd %%ymm14, %%ymm" #n ", %%ymm" #n "\n\t"

LOOP(loop_avx512vnni, STEP_AVX512VNNI)
LOOP(loop_avxvnni, STEP_AVXVNNI)
LOOP(loop_avx2, STEP_AVX2)

bool runs_avx512vnni() {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni");
}
bool runs_avx2() {
    return __builtin_cpu_supports("avx2");
}
bool runs_avxvnni() {
    unsigned eax = 7, ebx, ecx = 1, edx;  // GCC 12 has no name for the feature
    asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    return runs_avx2() && (eax >> 4 & 1);
}

#endif

const int8_unit INT8_UNITS[] = {
#if defined(__x86_64__)
    { "avx512vnni", runs_avx512vnni, SUMS * 64, loop_avx512vnni },
    { "avxvnni", runs_avxvnni, SUMS * 32, loop_avxvnni },
    { "avx2", runs_avx2, SUMS * 32, loop_avx2 },
#endif
    { nullptr, nullptr, 0, nullptr },
};

void add_machine(std::vector<subject> & subjects, const std::vector<uint64_t> & memory, int threads) {
    subjects.push_back(read_subject(memory, threads));
    for (const int8_unit & unit : INT8_UNITS) {
        if (!unit.name || !unit.runs()) {
            continue;
        }
        constexpr int iterations = 1 << 20;
        const auto    run        = [unit, threads] { on_threads(threads, [&](int) { unit.loop(iterations); }); };
        subjects.push_back({ std::string("\"what\": \"int8\", \"isa\": \"") + unit.name +
                                 "\", \"threads\": " + std::to_string(threads),
                             (double) threads * iterations * unit.macs, 0, run });
    }
}

// --- kernels alone ---------------------------------------------------------------------------------------------------

constexpr int64_t COLUMNS = 2048;

std::string label(const char * what, ggml_type type, const char * isa) {
    return std::string("\"what\": \"") + what + "\", \"type\": \"" + ggml_type_name(type) + "\", \"isa\": \"" + isa +
           "\"";
}

// One activation row, rounded as the type's kernel wants it.
std::vector<char> activation(ggml_type type, int64_t n) {
    const ggml_type          as = ggml_get_type_traits_cpu(type)->vec_dot_type;
    const std::vector<float> x  = normal(n);
    std::vector<char>        y(ggml_row_size(as, n));
    ggml_get_type_traits_cpu(as)->from_float(x.data(), y.data(), n);
    return y;
}

void bench_kernels(size_t megabytes, int rounds, const std::vector<std::string> & names) {
    const size_t                   size = megabytes << 20;
    std::vector<uint64_t>          memory(size / 8, 1);
    std::vector<std::vector<char>> weights, activations;
    std::vector<float>             y(size / (COLUMNS / MOBIE_BLOCK_LEN * sizeof(mobie_block)));
    std::vector<subject>           subjects;
    for (const std::string & name : names) {
        const ggml_type type      = type_of(name);
        const size_t    row_bytes = ggml_row_size(type, COLUMNS);
        const int64_t   n_rows    = std::min(size / row_bytes, y.size());
        weights.emplace_back(n_rows * row_bytes);
        fill(type, weights.back().data(), COLUMNS, n_rows);
        const char * w    = weights.back().data();
        const double macs = (double) n_rows * COLUMNS, bytes = (double) n_rows * row_bytes;

        if (type != GGML_TYPE_MOBIE) {
            activations.push_back(activation(type, COLUMNS));
            const char * x       = activations.back().data();
            const auto   vec_dot = ggml_get_type_traits_cpu(type)->vec_dot;
            const auto   run     = [=, &y] {
                for (int64_t r = 0; r < n_rows; ++r) {
                    vec_dot(COLUMNS, &y[r], 0, w + r * row_bytes, 0, x, 0, 1);
                }
            };
            subjects.push_back({ label("kernel", type, "ggml"), macs, bytes, run });
            continue;
        }
        int          n_kernels;
        const auto * kernels = mobie_kernels_all(&n_kernels);
        for (int k = 0; k < n_kernels; ++k) {
            const mobie_kernels * kernel = kernels[k];
            // rows start at multiples of 64 where the memory does
            activations.emplace_back(mobie_act_size(COLUMNS) + 64);
            char * x = activations.back().data();
            x += (64 - (uintptr_t) x % 64) % 64;
            kernel->quantize_act(normal(COLUMNS).data(), x, COLUMNS);
            activations.emplace_back(kernel->work_size + 64);
            char * work = activations.back().data();
            work += (64 - (uintptr_t) work % 64) % 64;
            const double  part = strcmp(kernel->name, "ref") == 0 ? 1.0 / 64 : 1;  // it is slow
            const int64_t rows = (int64_t) (n_rows * part);
            const auto    run  = [=, &y] {
                const void * act[] = { x };
                float *      out[] = { y.data() };
                kernel->matmul(COLUMNS, (const mobie_block *) w, row_bytes, rows, act, out, 1, work);
            };
            subjects.push_back({ label("kernel", type, kernel->name), macs * part, bytes * part, run });
        }
    }
    add_machine(subjects, memory, 1);
    if (std::thread::hardware_concurrency() > 1) {
        add_machine(subjects, memory, 2);
    }
    measure(subjects, rounds);
    print(subjects);
}

// --- MUL_MAT_ID in ggml's CPU backend --------------------------------------------------------------------------------

// Qwen3-30B-A3B
constexpr int64_t N_EMBD = 2048, N_FF = 768, N_EXPERT = 128, N_USED = 8;
constexpr double  LAYER_WEIGHTS = 3.0 * N_EMBD * N_FF;  // of one expert

// The expert matrices of some layers, in the memory where llama.cpp would have them.
struct expert_weights {
    ggml_type                  type;
    ggml_context *             ctx;
    std::vector<ggml_tensor *> gate, up, down;  // of every layer
    std::string                where;
};

ggml_backend_dev_t cpu() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

ggml_context * new_context(size_t n_tensors) {
    return ggml_init({ n_tensors * ggml_tensor_overhead() + 4 * ggml_graph_overhead(), nullptr, true });
}

// As llama.cpp chooses: the first of the CPU's other buffer types (those that rearrange weights) that has the product.
ggml_backend_buffer_type_t buffer_type(ggml_type type) {
    using get_types                = ggml_backend_buffer_type_t * (*)(ggml_backend_dev_t);
    const auto                 get = (get_types) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu()),
                                                                                   "ggml_backend_dev_get_extra_bufts");
    ggml_backend_buffer_type_t found = ggml_backend_dev_buffer_type(cpu());
    for (auto * t = get ? get(cpu()) : nullptr; t && *t; ++t) {
        ggml_context * ctx = new_context(8);
        ggml_tensor *  w   = ggml_new_tensor_3d(ctx, type, N_EMBD, N_FF, N_EXPERT);
        ggml_tensor *  x   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, N_EMBD, N_USED, 512);
        ggml_tensor *  ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, N_USED, 512);
        w->buffer          = ggml_backend_buft_alloc_buffer(*t, 0);
        const bool ok      = ggml_backend_dev_supports_op(cpu(), ggml_mul_mat_id(ctx, w, x, ids));
        ggml_backend_buffer_free(w->buffer);
        ggml_free(ctx);
        if (ok) {
            found = *t;
            break;
        }
    }
    return found;
}

expert_weights make_weights(ggml_type type, size_t megabytes) {
    const double   layer_bytes = 3.0 * N_EXPERT * N_FF * ggml_row_size(type, N_EMBD);
    const int      n_layers    = std::max(1, (int) (megabytes * 1048576.0 / layer_bytes + 0.999));
    expert_weights w           = { type, new_context(3 * n_layers), {}, {}, {}, "" };
    for (int i = 0; i < n_layers; ++i) {
        w.gate.push_back(ggml_new_tensor_3d(w.ctx, type, N_EMBD, N_FF, N_EXPERT));
        w.up.push_back(ggml_new_tensor_3d(w.ctx, type, N_EMBD, N_FF, N_EXPERT));
        w.down.push_back(ggml_new_tensor_3d(w.ctx, type, N_FF, N_EMBD, N_EXPERT));
    }
    const auto buft = buffer_type(type);
    w.where         = ggml_backend_buft_name(buft);
    if (!ggml_backend_alloc_ctx_tensors_from_buft(w.ctx, buft)) {
        fail("no memory for the weights");
    }
    std::vector<char> data(ggml_nbytes(w.gate[0]));
    for (const auto * tensors : { &w.gate, &w.up, &w.down }) {
        fill(type, data.data(), (*tensors)[0]->ne[0], (*tensors)[0]->ne[1] * N_EXPERT);
        for (ggml_tensor * t : *tensors) {
            ggml_backend_tensor_set(t, data.data(), 0, data.size());
        }
    }
    return w;
}

// Gate, up and down of `n_layers` layers for `n_tokens` tokens. All graphs share one piece of memory for activations.
struct products {
    ggml_context *             ctx;
    ggml_cgraph *              graph;
    std::vector<ggml_tensor *> ids;  // int32 [used, tokens] of every layer
};

constexpr size_t ALIGN = 64;

// Activations are random where the memory is filled once; results go elsewhere, so that inputs stay what they are.
struct scratch {
    ggml_backend_buffer_t buffer;
    char *                base;
    size_t                at = 0;

    static size_t padded(size_t n) { return (n + ALIGN - 1) / ALIGN * ALIGN; }

    scratch(size_t inputs, size_t size) {
        buffer                     = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
        base                       = (char *) ggml_backend_buffer_get_base(buffer);
        const std::vector<float> x = normal(inputs);
        memset(base, 0, size);
        memcpy(base, x.data(), inputs * sizeof(float));
    }
    void place(ggml_tensor * t, size_t offset) { ggml_backend_tensor_alloc(buffer, t, base + offset); }
    void place_next(ggml_tensor * t) {
        place(t, at);
        at += padded(ggml_nbytes(t));
    }
};

products make_products(const expert_weights & w, int first, int n_layers, int64_t n_tokens, scratch & memory) {
    products p      = { new_context(8 * n_layers + 8), nullptr, {} };
    p.graph         = ggml_new_graph(p.ctx);
    ggml_tensor * x = ggml_new_tensor_3d(p.ctx, GGML_TYPE_F32, N_EMBD, 1, n_tokens);
    ggml_tensor * h = ggml_new_tensor_3d(p.ctx, GGML_TYPE_F32, N_FF, N_USED, n_tokens);
    memory.place(x, 0);
    memory.place(h, 0);
    memory.at = scratch::padded(ggml_nbytes(h) > ggml_nbytes(x) ? ggml_nbytes(h) : ggml_nbytes(x));
    for (int i = first; i < first + n_layers; ++i) {
        ggml_tensor * ids = ggml_new_tensor_2d(p.ctx, GGML_TYPE_I32, N_USED, n_tokens);
        memory.place_next(ids);
        p.ids.push_back(ids);
        for (ggml_tensor * t : { ggml_mul_mat_id(p.ctx, w.gate[i], x, ids), ggml_mul_mat_id(p.ctx, w.up[i], x, ids),
                                 ggml_mul_mat_id(p.ctx, w.down[i], h, ids) }) {
            memory.place_next(t);
            ggml_build_forward_expand(p.graph, t);
        }
    }
    return p;
}

// Every token's experts, without repetition. Returns how many different ones there are.
int draw(ggml_tensor * ids) {
    std::vector<int32_t> experts(N_EXPERT), chosen;
    std::vector<bool>    seen(N_EXPERT);
    std::iota(experts.begin(), experts.end(), 0);
    for (int64_t token = 0; token < ids->ne[1]; ++token) {
        for (int64_t k = 0; k < N_USED; ++k) {
            std::swap(experts[k], experts[k + rng() % (N_EXPERT - k)]);
            chosen.push_back(experts[k]);
            seen[experts[k]] = true;
        }
    }
    memcpy(ids->data, chosen.data(), chosen.size() * sizeof(int32_t));
    return (int) std::count(seen.begin(), seen.end(), true);
}

// The products of one type; `which` goes through the graphs, so that every call meets other weights.
struct turn {
    std::vector<products> graphs;
    size_t                which = 0;
};

subject product_subject(const expert_weights & w, turn & t, int64_t n_tokens, int threads, ggml_backend_t backend) {
    const double per_layer = LAYER_WEIGHTS * N_USED * n_tokens * t.graphs[0].ids.size();
    const auto   prepare   = [&t] {
        t.which = (t.which + 1) % t.graphs.size();
        for (ggml_tensor * ids : t.graphs[t.which].ids) {
            draw(ids);
        }
    };
    const auto run = [&t, backend] { ggml_backend_graph_compute(backend, t.graphs[t.which].graph); };
    // expected number of different experts of a layer
    double used = N_EXPERT;
    for (int64_t i = 0; i < n_tokens; ++i) {
        used *= 1 - (double) N_USED / N_EXPERT;
    }
    used               = N_EXPERT - used;
    const double bytes = used * 3 * N_FF * ggml_row_size(w.type, N_EMBD) * t.graphs[0].ids.size();
    std::string  name  = label("mul_mat_id", w.type, w.where.c_str());
    name += ", \"tokens\": " + std::to_string(n_tokens) + ", \"threads\": " + std::to_string(threads);
    return { name, per_layer, bytes, run, prepare, n_tokens < 32 ? 8 : 1 };
}

void bench_threads(const std::vector<expert_weights> & weights, const std::vector<int64_t> & tokens, int threads,
                   int rounds, const std::vector<uint64_t> & memory, scratch & activations) {
    ggml_backend_t         backend = ggml_backend_dev_init(cpu(), nullptr);
    ggml_threadpool_params params  = ggml_threadpool_params_default(threads);
    ggml_threadpool *      pool    = ggml_threadpool_new(&params);
    ggml_backend_cpu_set_n_threads(backend, threads);
    ggml_backend_cpu_set_threadpool(backend, pool);
    for (const int64_t n_tokens : tokens) {
        std::vector<subject> subjects;
        std::vector<turn>    turns(weights.size());
        for (size_t i = 0; i < weights.size(); ++i) {
            // few tokens: all layers in one graph, as in a model; many: one layer, which is work enough
            const int n = (int) weights[i].gate.size(), step = n_tokens < 32 ? n : 1;
            for (int layer = 0; layer < n; layer += step) {
                turns[i].graphs.push_back(make_products(weights[i], layer, step, n_tokens, activations));
            }
            subjects.push_back(product_subject(weights[i], turns[i], n_tokens, threads, backend));
        }
        add_machine(subjects, memory, threads);
        measure(subjects, rounds);
        print(subjects);
        for (turn & t : turns) {
            for (products & p : t.graphs) {
                ggml_free(p.ctx);
            }
        }
    }
    ggml_backend_free(backend);
    ggml_threadpool_free(pool);
}

void bench_ops(size_t megabytes, int rounds, const std::vector<std::string> & names,
               const std::vector<std::string> & tokens, const std::vector<std::string> & threads) {
    std::vector<int64_t> n_tokens;
    for (const std::string & t : tokens) {
        n_tokens.push_back(std::max(1, atoi(t.c_str())));
    }
    std::vector<expert_weights> weights;
    size_t                      most_layers = 1;
    for (const std::string & name : names) {
        weights.push_back(make_weights(type_of(name), megabytes));
        most_layers = std::max(most_layers, weights.back().gate.size());
    }
    const int64_t most   = *std::max_element(n_tokens.begin(), n_tokens.end());
    const size_t  inputs = std::max(N_EMBD, N_FF * N_USED) * most;
    const size_t  layer  = (2 * N_FF + N_EMBD + 8) * N_USED * sizeof(float) + 4 * ALIGN;
    scratch       activations(inputs, inputs * 4 + layer * std::max<int64_t>(most, 32 * (int64_t) most_layers) + 4096);
    const std::vector<uint64_t> memory((megabytes << 20) / 8, 1);
    for (const std::string & t : threads) {
        bench_threads(weights, n_tokens, std::max(1, atoi(t.c_str())), rounds, memory, activations);
    }
}

}  // namespace

int main(int argc, char ** argv) {
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_cpu_init();
    if (argc == 5 && strcmp(argv[1], "kernels") == 0) {
        bench_kernels(atoi(argv[2]), atoi(argv[3]), split(argv[4]));
    } else if (argc == 7 && strcmp(argv[1], "ops") == 0) {
        bench_ops(atoi(argv[2]), atoi(argv[3]), split(argv[4]), split(argv[5]), split(argv[6]));
    } else {
        fail("wrong arguments, see the top of ops.cpp");
    }
}
