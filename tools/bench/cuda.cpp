// Speed of products on a GPU, beside llama.cpp's other low-bit types; ggml's CUDA backend runs them all.
//
//     bench_cuda TYPE,... [MEGABYTES [ROUNDS]]       MEGABYTES: of the largest type's dense matrix
//
// Prints two tables in Markdown: a dense product of the same number of weights in every type, and the experts of
// Qwen3-30B-A3B (gate, up, activation, down; experts drawn anew for every call). Types take turns; medians. `make
// bench-cuda` compiles it against the installed runtime, which must have been built with --cuda.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include "common.h"

namespace {

constexpr int64_t N_EMBD = 2048, N_FF = 768, N_EXPERT = 128, N_USED = 8;  // Qwen3-30B-A3B

void fill(ggml_tensor * t) {
    std::vector<char> data(ggml_nbytes(t));
    fill(t->type, data.data(), t->ne[0], ggml_nrows(t));
    ggml_backend_tensor_set(t, data.data(), 0, data.size());
}

// Tensors and graphs of one type and one number of tokens.
struct work {
    ggml_context *             ctx;
    ggml_cgraph *              graph;
    std::vector<ggml_tensor *> ids;
    ggml_gallocr_t             memory;
    std::vector<double>        seconds = {};
};

ggml_context * new_context(size_t n_tensors) {
    return ggml_init({ n_tensors * ggml_tensor_overhead() + ggml_graph_overhead_custom(4096, false), nullptr, true });
}

ggml_tensor * input(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2) {
    ggml_tensor * t = ggml_new_tensor_3d(ctx, type, ne0, ne1, ne2);
    ggml_set_input(t);
    return t;
}

struct expert_layer {
    ggml_tensor *gate, *up, *down, *scale;
};

ggml_tensor * product(ggml_context * ctx, ggml_tensor * w, ggml_tensor * x, ggml_tensor * ids, ggml_tensor * scale) {
    ggml_tensor * y = ggml_mul_mat_id(ctx, w, x, ids);
    if (w->type == GGML_TYPE_MOBIE) {
        y->src[3] = scale;  // as llama.cpp does
    }
    return y;
}

void finish(work & w, ggml_backend_t backend, ggml_tensor * x) {
    w.memory = ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend));
    if (!ggml_gallocr_alloc_graph(w.memory, w.graph)) {
        fail("no memory for the results");
    }
    const std::vector<float> values = normal(ggml_nelements(x));
    ggml_backend_tensor_set(x, values.data(), 0, ggml_nbytes(x));
}

work experts(const std::vector<expert_layer> & layers, int64_t n_tokens, ggml_backend_t backend) {
    work          w = { new_context(8 * layers.size() + 8), nullptr, {}, nullptr };
    ggml_tensor * x = input(w.ctx, GGML_TYPE_F32, N_EMBD, 1, n_tokens);
    w.graph         = ggml_new_graph_custom(w.ctx, 4096, false);
    for (const expert_layer & l : layers) {
        ggml_tensor * ids = input(w.ctx, GGML_TYPE_I32, N_USED, n_tokens, 1);
        w.ids.push_back(ids);
        ggml_tensor * up   = product(w.ctx, l.up, x, ids, l.scale);
        ggml_tensor * gate = product(w.ctx, l.gate, x, ids, l.scale);
        ggml_tensor * h    = ggml_swiglu_split(w.ctx, gate, up);
        ggml_build_forward_expand(w.graph, product(w.ctx, l.down, h, ids, l.scale));
    }
    finish(w, backend, x);
    return w;
}

work dense(ggml_tensor * weights, int64_t n_tokens, ggml_backend_t backend) {
    work          w = { new_context(8), nullptr, {}, nullptr };
    ggml_tensor * x = input(w.ctx, GGML_TYPE_F32, N_EMBD, n_tokens, 1);
    w.graph         = ggml_new_graph_custom(w.ctx, 64, false);
    ggml_build_forward_expand(w.graph, ggml_mul_mat(w.ctx, weights, x));
    finish(w, backend, x);
    return w;
}

void draw(ggml_tensor * ids) {
    std::vector<int32_t> all(N_EXPERT), chosen;
    std::iota(all.begin(), all.end(), 0);
    for (int64_t token = 0; token < ids->ne[1]; ++token) {
        for (int64_t k = 0; k < N_USED; ++k) {
            std::swap(all[k], all[k + rng() % (N_EXPERT - k)]);
            chosen.push_back(all[k]);
        }
    }
    ggml_backend_tensor_set(ids, chosen.data(), 0, ggml_nbytes(ids));
}

void run_in_turns(std::vector<work> & all, ggml_backend_t backend, int rounds) {
    for (int round = -3; round < rounds; ++round) {  // the first ones warm up, and let the backend record its graphs
        for (work & w : all) {
            for (ggml_tensor * ids : w.ids) {
                draw(ids);
            }
            ggml_backend_synchronize(backend);
            const auto start = std::chrono::steady_clock::now();
            ggml_backend_graph_compute(backend, w.graph);
            ggml_backend_synchronize(backend);
            const double t = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
            if (round >= 0) {
                w.seconds.push_back(t);
            }
        }
    }
}

double median(std::vector<double> v) {
    std::nth_element(v.begin(), v.begin() + v.size() / 2, v.end());
    return v[v.size() / 2];
}

// One row per number of tokens: the time of every type, and how many times as fast the first type is.
void table(const char * title, const std::vector<std::string> & names, const std::vector<int64_t> & tokens,
           ggml_backend_t backend, int rounds, const std::function<work(size_t, int64_t)> & make, double per) {
    printf("\n%s\n\n| tokens |", title);
    for (const std::string & name : names) {
        printf(" %s |", name.c_str());
    }
    for (size_t i = 1; i < names.size(); ++i) {
        printf(" over %s |", names[i].c_str());
    }
    printf("\n|---|");
    for (size_t i = 0; i + 1 < 2 * names.size(); ++i) {
        printf("---|");
    }
    printf("\n");
    for (const int64_t n : tokens) {
        std::vector<work> all;
        for (size_t i = 0; i < names.size(); ++i) {
            all.push_back(make(i, n));
        }
        run_in_turns(all, backend, rounds);
        printf("| %lld |", (long long) n);
        for (const work & w : all) {
            printf(" %.4g |", median(w.seconds) * per);
        }
        for (size_t i = 1; i < all.size(); ++i) {
            printf(" %.2f |", median(all[i].seconds) / median(all[0].seconds));
        }
        printf("\n");
        fflush(stdout);
        for (work & w : all) {
            ggml_gallocr_free(w.memory);
            ggml_free(w.ctx);
        }
    }
}

void allocate(ggml_context * ctx, ggml_backend_t backend) {
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    if (!buffer) {
        fail("no memory for the weights");
    }
    ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
}

}  // namespace

int main(int argc, char ** argv) {
    if (argc < 2) {
        fail("usage: bench_cuda TYPE,... [MEGABYTES [ROUNDS]]");
    }
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_backend_load_all();
    ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU);
    if (!device) {
        fail("no GPU: a runtime built with --cuda and a card are needed");
    }
    ggml_backend_t                 backend = ggml_backend_dev_init(device, nullptr);
    const size_t                   bytes   = (size_t) (argc > 2 ? atoi(argv[2]) : 1200) << 20;
    const int                      rounds  = argc > 3 ? atoi(argv[3]) : 15;
    const std::vector<std::string> names   = split(argv[1]);
    printf("%s\n", ggml_backend_dev_description(device));

    std::vector<std::vector<expert_layer>> layers(names.size());
    std::vector<ggml_tensor *>             matrices(names.size());
    for (size_t i = 0; i < names.size(); ++i) {
        const ggml_type type  = type_of(names[i]);
        const size_t    layer = 3 * N_EXPERT * N_FF * ggml_row_size(type, N_EMBD);
        const int       n     = (int) std::max<size_t>(4, (bytes + layer - 1) / layer);
        ggml_context *  ctx   = new_context(4 * n + 1);
        for (int l = 0; l < n; ++l) {
            layers[i].push_back({ ggml_new_tensor_3d(ctx, type, N_EMBD, N_FF, N_EXPERT),
                                  ggml_new_tensor_3d(ctx, type, N_EMBD, N_FF, N_EXPERT),
                                  ggml_new_tensor_3d(ctx, type, N_FF, N_EMBD, N_EXPERT),
                                  ggml_new_tensor_1d(ctx, GGML_TYPE_F32, N_EXPERT) });
        }
        matrices[i] = ggml_new_tensor_2d(ctx, type, N_EMBD, bytes / ggml_row_size(type, N_EMBD) / 128 * 128);
        allocate(ctx, backend);
        for (const expert_layer & l : layers[i]) {
            fill(l.gate), fill(l.up), fill(l.down);
            const std::vector<float> ones(N_EXPERT, 0.01f);
            ggml_backend_tensor_set(l.scale, ones.data(), 0, ggml_nbytes(l.scale));
        }
        fill(matrices[i]);
    }
    const auto make_experts = [&](size_t i, int64_t n) {
        // the same number of layers for every type, at least four
        std::vector<expert_layer> some(layers[i].begin(), layers[i].begin() + 4);
        return experts(some, n, backend);
    };
    // the same number of weights for every type: what the largest one has room for
    int64_t rows = matrices[0]->ne[1];
    for (const ggml_tensor * m : matrices) {
        rows = std::min(rows, m->ne[1]);
    }
    table("Experts of 4 layers of Qwen3-30B-A3B, microseconds", names, { 1, 2, 4, 8, 16, 32, 64, 128, 512, 2048 },
          backend, rounds, make_experts, 1e6);
    ggml_context *             views = new_context(names.size());
    std::vector<ggml_tensor *> some;
    for (ggml_tensor * m : matrices) {
        some.push_back(ggml_view_2d(views, m, N_EMBD, rows, m->nb[1], 0));
        ggml_backend_view_init(some.back());
    }
    table(
        "Dense product, picoseconds per weight", names, { 1, 2, 4, 8, 16, 32, 128, 512, 2048 }, backend, rounds,
        [&](size_t i, int64_t n) { return dense(some[i], n, backend); }, 1e12 / ((double) rows * N_EMBD));
    printf("\n%lld rows of %lld weights in every type; %.0f MB of the first\n", (long long) rows, (long long) N_EMBD,
           rows * ggml_row_size(type_of(names[0]), N_EMBD) / 1e6);
    ggml_backend_free(backend);
}
