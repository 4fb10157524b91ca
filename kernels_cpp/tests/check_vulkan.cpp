// The Vulkan backend with our shaders against the CPU backend with our kernels, bit for bit: products by ids and
// without, of views, of every number of tokens that takes another way, several in one graph, decoded rows; and what the
// backend says that it does not run.
//
//     check_vulkan [--seed N]      compiled and run by `python -m tests.vulkan`
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

namespace {

std::mt19937 rng(1);
long         n_compared = 0, n_failed = 0;

int64_t up_to(int64_t n) {
    return (int64_t) (rng() % (uint64_t) n);
}

// A graph that is built twice, with the same inputs on both devices. What it reads is made by the methods here.
class graph {
    struct input {
        ggml_tensor *     tensor;
        std::vector<char> bytes;
    };
    ggml_backend_t             backend;
    ggml_context *             ctx;
    std::vector<input>         inputs;
    std::vector<ggml_tensor *> nodes, results;

    ggml_tensor * made(ggml_tensor * t, const std::function<void(char *, size_t)> & fill) {
        inputs.push_back({ t, std::vector<char>(ggml_nbytes(t)) });
        fill(inputs.back().bytes.data(), inputs.back().bytes.size());
        return t;
    }

  public:
    explicit graph(ggml_backend_t backend) : backend(backend), ctx(ggml_init({ 1 << 20, nullptr, true })) {}
    graph(const graph &) = delete;
    ~graph() { ggml_free(ctx); }

    operator ggml_context *() const { return ctx; }

    // Any bytes are weights.
    ggml_tensor * weights(int64_t n, int64_t rows, int64_t n2 = 1, int64_t n3 = 1) {
        return made(ggml_new_tensor_4d(ctx, GGML_TYPE_MOBIE, n, rows, n2, n3),
                    [](char * to, size_t n_bytes) { std::generate(to, to + n_bytes, [] { return (char) rng(); }); });
    }
    // Ordinary floats; from the third row on also rows with what is no number, zeros and very small ones.
    ggml_tensor * floats(int64_t n, int64_t n1, int64_t n2 = 1, int64_t n3 = 1) {
        return made(ggml_new_tensor_4d(ctx, GGML_TYPE_F32, n, n1, n2, n3), [n](char * to, size_t n_bytes) {
            std::normal_distribution<float> normal;
            std::vector<float>              x(n_bytes / sizeof(float));
            const float                     size = std::exp2f((float) up_to(40) - 20);
            std::generate(x.begin(), x.end(), [&] { return size * normal(rng); });
            for (int64_t row = 2; row < (int64_t) x.size() / n; row++) {
                float * at = x.data() + row * n;
                switch (up_to(12)) {
                    case 0:
                        at[up_to(n)] = NAN;
                        break;
                    case 1:
                        at[up_to(n)] = -INFINITY;
                        break;
                    case 2:
                        std::fill(at, at + n, -0.0f);
                        break;
                    case 3:
                        std::fill(at, at + n, 0x1p-110f);
                        break;
                    case 4:
                        at[up_to(n)] = 0x1.fffffep127f;
                        break;
                    case 5:
                        at[up_to(n)] = 0x1p-140f;
                        break;
                    case 6:
                        std::fill(at, at + n, 127.0f);
                        break;
                    default:
                        break;
                }
            }
            std::memcpy(to, x.data(), n_bytes);
        });
    }
    // Rows of numbers below `below`, each at most once in a row.
    ggml_tensor * numbers(int64_t below, int64_t n, int64_t n1, int64_t n2 = 1) {
        return made(ggml_new_tensor_3d(ctx, GGML_TYPE_I32, n, n1, n2), [=](char * to, size_t) {
            std::vector<int32_t> all(below);
            for (int32_t i = 0; i < below; i++) {
                all[i] = i;
            }
            for (int64_t row = 0; row < n1 * n2; row++) {
                std::shuffle(all.begin(), all.end(), rng);
                std::memcpy(to + row * n * sizeof(int32_t), all.data(), n * sizeof(int32_t));
            }
        });
    }
    ggml_tensor * scales(int64_t n) {
        return made(ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n), [](char * to, size_t n_bytes) {
            std::uniform_real_distribution<float> uniform(0, 3);
            for (size_t i = 0; i < n_bytes; i += sizeof(float)) {
                const float x = uniform(rng);
                std::memcpy(to + i, &x, sizeof(x));
            }
        });
    }
    ggml_tensor * computed(ggml_tensor * t) {
        nodes.push_back(t);
        return t;
    }
    ggml_tensor * compared(ggml_tensor * t) {
        results.push_back(t);
        return computed(t);
    }

    std::vector<std::vector<float>> run() {
        ggml_cgraph * g = ggml_new_graph(ctx);
        for (ggml_tensor * t : nodes) {
            ggml_set_output(t);
            ggml_build_forward_expand(g, t);
            if (!ggml_backend_supports_op(backend, t)) {
                printf("%s does not run %s of %s\n", ggml_backend_name(backend), ggml_op_name(t->op), t->name);
                exit(1);
            }
        }
        ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
        for (const input & i : inputs) {
            ggml_backend_tensor_set(i.tensor, i.bytes.data(), 0, i.bytes.size());
        }
        if (ggml_backend_graph_compute(backend, g) != GGML_STATUS_SUCCESS) {
            printf("%s failed\n", ggml_backend_name(backend));
            exit(1);
        }
        std::vector<std::vector<float>> found;
        for (ggml_tensor * t : results) {
            found.emplace_back(ggml_nelements(t));
            ggml_backend_tensor_get(t, found.back().data(), 0, ggml_nbytes(t));
        }
        ggml_backend_buffer_free(buffer);
        return found;
    }
};

// A backend of its own for every graph: what one leaves behind, as stale descriptors, must not be what another runs on.
using backend = std::unique_ptr<ggml_backend, decltype(&ggml_backend_free)>;

backend cpu() {
    return { ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr), ggml_backend_free };
}

backend gpu() {
    return { ggml_backend_init_by_name("Vulkan0", nullptr), ggml_backend_free };
}

using build = std::function<void(graph &)>;

std::vector<std::vector<float>> run(const backend & on, unsigned seed, const build & f) {
    rng.seed(seed);
    graph g(on.get());
    f(g);
    return g.run();
}

void check(const std::string & what, const build & f) {
    const unsigned seed   = rng();
    const auto     wanted = run(cpu(), seed, f), found = run(gpu(), seed, f);
    for (size_t i = 0; i < wanted.size(); i++) {
        long wrong = 0;
        for (size_t j = 0; j < wanted[i].size(); j++) {
            const float a = wanted[i][j], b = found[i][j];
            const bool  same = std::isnan(a) ? std::isnan(b) : a == b;
            if (!same && wrong++ == 0) {
                printf("%s, result %zu: %zu is %.9g, not %.9g\n", what.c_str(), i, j, b, a);
            }
        }
        n_compared += (long) wanted[i].size();
        n_failed += wrong;
    }
    rng.seed(seed + 1);
}

ggml_tensor * product(graph & g, ggml_tensor * w, ggml_tensor * x, ggml_tensor * ids, ggml_tensor * scale) {
    ggml_tensor * y = ggml_mul_mat_id(g, w, x, ids);
    y->src[3]       = scale;
    return g.compared(y);
}

struct shape {
    int64_t     n, rows, n_expert, n_used, n_tokens;
    bool        own_rows;  // of activations for every expert used
    bool        scaled;
    std::string text() const {
        return std::to_string(n) + " columns, " + std::to_string(rows) + " rows, " + std::to_string(n_used) + " of " +
               std::to_string(n_expert) + " experts, " + std::to_string(n_tokens) + " tokens" +
               (own_rows ? ", own rows" : "") + (scaled ? ", scaled" : "");
    }
};

void check_ids(const shape & s) {
    const int64_t n_rows_of_act = s.own_rows ? s.n_used : 1;
    check(s.text(), [&](graph & g) {
        product(g, g.weights(s.n, s.rows, s.n_expert), g.floats(s.n, n_rows_of_act, s.n_tokens),
                g.numbers(s.n_expert, s.n_used, s.n_tokens), s.scaled ? g.scales(s.n_expert) : nullptr);
    });
    // everything a part of something larger, at addresses that nobody chose
    check(s.text() + ", views", [&](graph & g) {
        ggml_tensor * w = g.weights(s.n + 64, s.rows + 3, s.n_expert + 2);
        ggml_tensor * x = g.floats(s.n + 5, n_rows_of_act + 1, s.n_tokens + 1);
        ggml_tensor * i = g.numbers(s.n_expert, s.n_expert, s.n_tokens + 1);
        ggml_tensor * f = g.scales(s.n_expert + 3);
        w = ggml_view_3d(g, w, s.n, s.rows, s.n_expert, w->nb[1], w->nb[2], w->nb[2] + 2 * w->nb[1] + w->nb[0]);
        x = ggml_view_3d(g, x, s.n, n_rows_of_act, s.n_tokens, x->nb[1], x->nb[2], x->nb[2] + 3 * sizeof(float));
        i = ggml_view_2d(g, i, s.n_used, s.n_tokens, i->nb[1], i->nb[1]);
        f = ggml_view_1d(g, f, s.n_expert, 3 * sizeof(float));
        product(g, w, x, i, s.scaled ? f : nullptr);
    });
}

void check_products() {
    // widths with whole groups of 256 and without, fewer and more than a workgroup takes at a time; rows likewise
    for (const int64_t n : { 64, 128, 192, 256, 320, 768, 1408, 2048, 2880, 4160, 7168 }) {
        for (const int64_t n_tokens : { 1, 2, 8, 9, 40 }) {
            const int64_t rows = std::vector<int64_t>{ 1, 31, 32, 33, 64, 65, 100 }[up_to(7)];
            check_ids({ n, rows, 4, 2, n_tokens, n % 128 == 0, n % 192 != 0 });
        }
    }
    for (const int64_t n_expert : { 1, 3, 128 }) {
        for (const int64_t n_tokens : { 1, 8, 9, 33, 150 }) {
            const int64_t n_used = std::min<int64_t>(n_expert, 1 + up_to(8));
            check_ids({ 192, 37, n_expert, n_used, n_tokens, false, true });
            check_ids({ 448, 70, n_expert, n_used, n_tokens, true, true });
        }
    }
    for (const int64_t n_tokens : { 1, 2, 33, 70 }) {
        for (const int64_t n : { 64, 2880 }) {
            check("dense, " + std::to_string(n_tokens) + " tokens", [&](graph & g) {
                g.compared(ggml_mul_mat(g, g.weights(n, 67), g.floats(n, n_tokens)));
                g.compared(ggml_mul_mat(g, g.weights(n, 5, 2, 3), g.floats(n, n_tokens, 4, 3)));
                ggml_tensor * x = ggml_permute(g, g.floats(n, 3, n_tokens), 0, 2, 1, 3);  // rows that do not follow
                g.compared(ggml_mul_mat(g, g.weights(n, 5), x));
            });
        }
    }
    check("more rows than a dimension of workgroups", [&](graph & g) {
        product(g, g.weights(64, 3, 2), g.floats(64, 2, 33000), g.numbers(2, 2, 33000), g.scales(2));
    });
}

// What is kept between operations: activations that two of them read, and memory that others of the backend use.
void check_graphs() {
    for (const int64_t n_tokens : { 1, 8, 9, 70 }) {
        check("several in a graph, " + std::to_string(n_tokens) + " tokens", [&](graph & g) {
            ggml_tensor * x    = g.floats(256, 1, n_tokens);
            ggml_tensor * y    = g.floats(256, 1, n_tokens);
            ggml_tensor * ids  = g.numbers(6, 3, n_tokens);
            ggml_tensor * gate = product(g, g.weights(256, 192, 6), x, ids, g.scales(6));
            ggml_tensor * up   = product(g, g.weights(256, 192, 6), x, ids, g.scales(6));
            product(g, g.weights(256, 40, 6), y, ids, nullptr);
            product(g, g.weights(256, 40, 6), x, g.numbers(6, 2, n_tokens), nullptr);
            // results of ours as operands, elementwise operations that are exact on both devices between them
            ggml_tensor * sum = g.compared(ggml_add(g, gate, up));
            product(g, g.weights(192, 256, 6), sum, ids, g.scales(6));
            // a product of the backend's own, which rounds otherwise; it converts its second operand in the same memory
            ggml_tensor * more = ggml_permute(g, g.floats(256, 3, n_tokens), 0, 2, 1, 3);
            g.computed(ggml_mul_mat(g, g.floats(256, 64), more));
            product(g, g.weights(256, 40, 6), x, ids, nullptr);
        });
    }
}

void check_rows() {
    for (const int64_t n : { 64, 192, 2880 }) {
        check("rows", [&](graph & g) {
            ggml_tensor * w = g.weights(n, 37);
            g.compared(ggml_get_rows(g, w, g.numbers(37, 11, 1)));
            g.compared(ggml_get_rows(g, g.weights(n, 9, 3, 2), g.numbers(9, 5, 3, 2)));
            ggml_tensor * view = ggml_view_2d(g, w, n, 30, w->nb[1], 7 * w->nb[1]);
            g.compared(ggml_get_rows(g, view, g.numbers(30, 30, 1)));
        });
    }
}

// What is refused goes to the CPU; what is not refused was run above.
void check_refused() {
    ggml_context * ctx = ggml_init({ 1 << 20, nullptr, true });
    const auto   f32 = [&](int64_t a, int64_t b, int64_t c) { return ggml_new_tensor_3d(ctx, GGML_TYPE_F32, a, b, c); };
    const auto   of  = [&](ggml_type type) { return ggml_new_tensor_3d(ctx, type, 64, 64, 4); };
    ggml_tensor *w = of(GGML_TYPE_MOBIE), *ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, 5);
    const auto   scaled = [&](ggml_tensor * scale) {
        ggml_tensor * y = ggml_mul_mat_id(ctx, w, f32(64, 1, 5), ids);
        y->src[3]       = scale;
        return y;
    };
    const struct {
        const char *  what;
        ggml_tensor * op;
        bool          runs;
    } cases[] = {
        { "weights", w, true },
        { "a view", ggml_view_2d(ctx, w, 64, 3, w->nb[1], w->nb[1]), true },
        { "a product", ggml_mul_mat(ctx, w, f32(64, 3, 4)), true },
        { "a product by ids", scaled(nullptr), true },
        { "a product with scales", scaled(ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 4)), true },
        { "scales of fewer experts", scaled(ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 3)), false },
        { "scales in F16", scaled(ggml_new_tensor_1d(ctx, GGML_TYPE_F16, 4)), false },
        { "rows", ggml_get_rows(ctx, w, ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 3, 4)), true },
        { "activations in F16", ggml_mul_mat(ctx, w, of(GGML_TYPE_F16)), false },
        { "a copy to F32", ggml_cpy(ctx, w, of(GGML_TYPE_F32)), false },
        { "a copy from F32", ggml_cpy(ctx, of(GGML_TYPE_F32), w), false },
        { "a copy", ggml_cpy(ctx, w, of(GGML_TYPE_MOBIE)), false },
        { "a duplicate", ggml_dup(ctx, w), false },
        { "contiguous", ggml_cont(ctx, w), false },
        { "written rows", ggml_set_rows(ctx, w, f32(64, 3, 4), ggml_new_tensor_2d(ctx, GGML_TYPE_I64, 3, 4)), false },
        { "joined", ggml_concat(ctx, w, of(GGML_TYPE_MOBIE), 1), false },
        { "repeated", ggml_repeat(ctx, w, ggml_new_tensor_3d(ctx, GGML_TYPE_MOBIE, 64, 64, 8)), false },
        { "added", ggml_add(ctx, w, of(GGML_TYPE_F32)), false },
        { "an outer product", ggml_out_prod(ctx, w, of(GGML_TYPE_F32)), false },
    };
    const backend on = gpu();
    for (const auto & c : cases) {
        n_compared++;
        if (ggml_backend_supports_op(on.get(), c.op) != c.runs) {
            n_failed++;
            printf("%s: the backend says that it %s\n", c.what, c.runs ? "does not run it" : "runs it");
        }
    }
    ggml_free(ctx);
}

}  // namespace

int main(int argc, char ** argv) {
    if (argc == 3 && strcmp(argv[1], "--seed") == 0) {
        rng.seed((unsigned) atol(argv[2]));
    }
    if (!ggml_backend_dev_by_name("Vulkan0")) {
        printf("no Vulkan device: nothing checked\n");
        return 3;
    }
    printf("%s\n", ggml_backend_dev_description(ggml_backend_dev_by_name("Vulkan0")));
    check_refused();
    check_rows();
    check_products();
    check_graphs();
    printf("%ld comparisons, %ld failed\n", n_compared, n_failed);
    return n_failed != 0;
}
