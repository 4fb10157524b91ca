// Loading GGUF files with MoBiE tensors, and for some of those that load a few tokens (tools/fuzz.py builds and runs
// it).
//
// The input is a list of edits, 8 bytes each, of one of four valid files: metadata, names, types, shapes and data of
// the tensors; what depends on them (offsets, sizes) is kept right, so that edits come through to the code behind the
// reader of GGUF. What ggml refuses by aborting is caught: upstream does so for many files. Aborts in our own code
// count as errors, the others are printed once each.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "ggml.h"
#include "gguf.h"
#include "llama.h"

namespace {

constexpr int64_t N_EMBD = 128, N_FF = 64, N_EXPERT = 4, N_USED = 2, N_VOCAB = 32, HEAD = 64, ALIGNMENT = 32;

struct kv {
    std::string          key;
    uint32_t             type;
    std::vector<uint8_t> value;
};

struct tensor {
    std::string          name;
    std::vector<int64_t> shape;
    uint32_t             type;
    std::vector<uint8_t> data;
};

struct file {
    std::vector<kv>     kvs;
    std::vector<tensor> tensors;
};

template <typename T>
void put(std::vector<uint8_t> & to, const T & value) {
    to.insert(to.end(), (const uint8_t *) &value, (const uint8_t *) (&value + 1));
}

void put_string(std::vector<uint8_t> & to, const std::string & s) {
    put<uint64_t>(to, s.size());
    to.insert(to.end(), s.begin(), s.end());
}

// Bytes of a tensor, as far as its type is known and the size in reason.
size_t size_of(const tensor & t) {
    if (t.type >= GGML_TYPE_COUNT || ggml_blck_size((ggml_type) t.type) == 0) {
        return t.data.size();
    }
    double n = 1;
    for (const int64_t ne : t.shape) {
        n *= (double) ne;
    }
    n *= (double) ggml_type_size((ggml_type) t.type) / ggml_blck_size((ggml_type) t.type);
    return n > 0 && n < 4e6 ? (size_t) n : t.data.size();
}

file make_file(int which) {
    std::mt19937 rng(which);
    file         f;
    const auto   text = [&](const char * key, const char * value) {
        f.kvs.push_back({ key, GGUF_TYPE_STRING, {} });
        put_string(f.kvs.back().value, value);
    };
    const auto number = [&](const std::string & key, uint32_t value) {
        f.kvs.push_back({ "qwen3moe." + key, GGUF_TYPE_UINT32, {} });
        put(f.kvs.back().value, value);
    };
    text("general.architecture", "qwen3moe");
    text("tokenizer.ggml.model", "none");
    number("vocab_size", N_VOCAB);
    number("context_length", 64);
    number("embedding_length", N_EMBD);
    number("block_count", 1);
    number("feed_forward_length", N_FF);
    number("expert_feed_forward_length", N_FF);
    number("expert_count", N_EXPERT);
    number("expert_used_count", N_USED);
    number("attention.head_count", 2);
    number("attention.head_count_kv", 1);
    number("attention.key_length", HEAD);
    number("attention.value_length", HEAD);
    f.kvs.push_back({ "qwen3moe.attention.layer_norm_rms_epsilon", GGUF_TYPE_FLOAT32, {} });
    put(f.kvs.back().value, 1e-6f);

    const auto add = [&](const std::string & name, std::vector<int64_t> shape, ggml_type type) {
        tensor t = { name, std::move(shape), (uint32_t) type, {} };
        t.data.resize(size_of(t));
        if (type == GGML_TYPE_F32) {
            for (size_t i = 0; i < t.data.size(); i += sizeof(float)) {
                const float x = (float) (rng() % 1000 + 1) / 5000;
                memcpy(&t.data[i], &x, sizeof(x));
            }
        } else if (type == GGML_TYPE_I32) {
            for (size_t i = 0; i < t.data.size(); i += sizeof(int32_t)) {
                const int32_t x = (int32_t) (N_EMBD - 1 - i / sizeof(int32_t));
                memcpy(&t.data[i], &x, sizeof(x));
            }
        } else if (type == GGML_TYPE_MOBIE) {
            for (uint8_t & b : t.data) {
                b = (uint8_t) rng();
            }
        } else {
            std::vector<float> x(t.data.size() / ggml_type_size(type) * ggml_blck_size(type));
            for (float & v : x) {
                v = ((float) (rng() % 2001) - 1000) / 5000;
            }
            ggml_quantize_chunk(type, x.data(), t.data.data(), 0, (int64_t) x.size() / t.shape[0], t.shape[0], nullptr);
        }
        f.tensors.push_back(std::move(t));
    };
    add("token_embd.weight", { N_EMBD, N_VOCAB }, GGML_TYPE_Q4_0);
    add("output_norm.weight", { N_EMBD }, GGML_TYPE_F32);
    add("output.weight", { N_EMBD, N_VOCAB }, GGML_TYPE_Q4_0);
    const std::string blk = "blk.0.";
    add(blk + "attn_norm.weight", { N_EMBD }, GGML_TYPE_F32);
    add(blk + "attn_q.weight", { N_EMBD, 2 * HEAD }, GGML_TYPE_Q4_0);
    add(blk + "attn_k.weight", { N_EMBD, HEAD }, GGML_TYPE_Q4_0);
    add(blk + "attn_v.weight", { N_EMBD, HEAD }, GGML_TYPE_Q4_0);
    add(blk + "attn_output.weight", { 2 * HEAD, N_EMBD }, GGML_TYPE_Q4_0);
    add(blk + "attn_q_norm.weight", { HEAD }, GGML_TYPE_F32);
    add(blk + "attn_k_norm.weight", { HEAD }, GGML_TYPE_F32);
    add(blk + "ffn_norm.weight", { N_EMBD }, GGML_TYPE_F32);
    add(blk + "ffn_gate_inp.weight", { N_EMBD, N_EXPERT }, GGML_TYPE_F32);

    const bool second = which % 2;
    for (const std::string part : { "gate", "up", "down" }) {
        const bool        down = part == "down";
        const int64_t     rows = down ? N_EMBD : N_FF;
        const std::string name = blk + "ffn_" + part + "_exps.";
        add(name + "weight", { down ? N_FF : N_EMBD, rows, N_EXPERT }, GGML_TYPE_MOBIE);
        add(name + "scale", { N_EXPERT }, GGML_TYPE_F32);
        if (second) {
            add(name + "residual", { 64, rows, N_EXPERT }, GGML_TYPE_MOBIE);
        }
    }
    if (second) {
        add(blk + "ffn_exps.columns", { 64 }, GGML_TYPE_I32);
    }
    if (which >= 2) {
        add(blk + "ffn_moe_in.weight", { N_EMBD, N_EMBD }, GGML_TYPE_Q8_0);
        add(blk + "ffn_moe_out.weight", { N_EMBD, N_EMBD }, GGML_TYPE_Q8_0);
    }
    return f;
}

std::vector<uint8_t> bytes_of(const file & f) {
    std::vector<uint8_t> to;
    const char           magic[] = { 'G', 'G', 'U', 'F' };
    to.insert(to.end(), magic, magic + 4);
    put<uint32_t>(to, 3);
    put<uint64_t>(to, f.tensors.size());
    put<uint64_t>(to, f.kvs.size());
    for (const kv & k : f.kvs) {
        put_string(to, k.key);
        put(to, k.type);
        to.insert(to.end(), k.value.begin(), k.value.end());
    }
    uint64_t offset = 0;
    for (const tensor & t : f.tensors) {
        put_string(to, t.name);
        put<uint32_t>(to, (uint32_t) t.shape.size());
        for (const int64_t ne : t.shape) {
            put(to, ne);
        }
        put(to, t.type);
        put(to, offset);
        offset += (size_of(t) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }
    to.resize((to.size() + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    for (const tensor & t : f.tensors) {
        std::vector<uint8_t> data = t.data;
        data.resize(size_of(t));
        to.insert(to.end(), data.begin(), data.end());
        to.resize((to.size() + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    }
    return to;
}

struct edit {
    uint8_t  what, where, which, how;
    uint32_t value;
};

int64_t changed(int64_t old, const edit & e) {
    static const int64_t SPECIAL[] = { 0, 1, -1, 2, 32, 63, 64, 65, 128, 192, 256, INT32_MAX, INT64_MAX, INT64_MIN };
    switch (e.how % 4) {
        case 0:
            return SPECIAL[e.value % (sizeof(SPECIAL) / sizeof(*SPECIAL))];
        case 1:
            return (int64_t) ((uint64_t) old + (uint64_t) (int8_t) e.value);
        case 2:
            return 64 * (e.value % 9);
        default:
            return e.value % 512;
    }
}

void apply(file & f, const edit & e) {
    if (f.tensors.empty()) {
        return;
    }
    // our tensors, which come last, four times in five
    const size_t ours = f.tensors.size() > 12 ? 12 : 0, n = f.tensors.size();
    tensor &     t = f.tensors[e.where % 5 ? ours + e.where % (n - ours) : e.where % n];
    switch (e.what % 10) {
        case 0:
        case 1: {  // one dimension, alone or of all tensors of this size
            if (t.shape.empty()) {
                return;
            }
            const int64_t old = t.shape[e.which % t.shape.size()], now = changed(old, e);
            if (e.what % 10 == 1) {
                for (tensor & other : f.tensors) {
                    for (int64_t & ne : other.shape) {
                        ne = ne == old && now > 0 ? now : ne;
                    }
                }
            } else {
                t.shape[e.which % t.shape.size()] = now;
            }
            return;
        }
        case 2:
            t.shape.resize(e.value % 5, 1);
            return;
        case 3: {
            static const uint32_t TYPES[] = {
                GGML_TYPE_F32,   GGML_TYPE_F16,  GGML_TYPE_I32,  GGML_TYPE_Q8_0, GGML_TYPE_I8, GGML_TYPE_F64,
                GGML_TYPE_MOBIE, GGML_TYPE_BF16, GGML_TYPE_Q1_0, GGML_TYPE_I64,  199,          201
            };
            t.type = TYPES[e.value % (sizeof(TYPES) / sizeof(*TYPES))];
            return;
        }
        case 4: {  // data, as integers or floats of 32 bits
            if (t.data.size() < 4) {
                return;
            }
            int32_t      old;
            const size_t at = e.which % (t.data.size() / 4) * 4;
            memcpy(&old, &t.data[at], 4);
            const float   special[] = { NAN, INFINITY, -1.0f, 0.0f, 1e-40f, 3e38f };
            const int32_t now       = (int32_t) changed(old, e);
            memcpy(&t.data[at], e.value & 0x100 ? (const void *) &special[e.value % 6] : &now, 4);
            return;
        }
        case 5: {  // a number of the metadata
            kv & k = f.kvs[e.where % f.kvs.size()];
            if (k.type == GGUF_TYPE_UINT32 && k.value.size() == 4) {
                uint32_t old;
                memcpy(&old, k.value.data(), 4);
                const uint32_t now = (uint32_t) changed(old, e) % 1024;  // larger ones only make upstream allocate
                memcpy(k.value.data(), &now, 4);
            }
            return;
        }
        case 6:
            f.tensors.erase(f.tensors.begin() + (&t - f.tensors.data()));
            return;
        case 7: {  // another tensor's name or its ending
            const tensor & other = f.tensors[e.which % n];
            const size_t   dot = t.name.rfind('.'), end = other.name.rfind('.');
            if (e.how % 2 && dot != std::string::npos && end != std::string::npos) {
                t.name = t.name.substr(0, dot) + other.name.substr(end);
            } else {
                t.name = other.name;
            }
            return;
        }
        case 8: {  // a further tensor like this one
            static const char * const NAMES[] = { "ffn_gate_exps.residual",   "ffn_up_exps.residual",
                                                  "ffn_down_exps.residual",   "ffn_gate_up_exps.residual",
                                                  "ffn_exps.columns",         "ffn_moe_in.weight",
                                                  "ffn_moe_out.weight",       "ffn_gate_up_exps.weight",
                                                  "ffn_gate_up_exps.scale",   "ffn_gate_chexps.weight",
                                                  "ffn_down_chexps.residual", "ffn_up_chexps.scale" };
            tensor                    more    = t;
            more.name =
                (e.how % 8 ? "blk.0." : "blk.1.") + std::string(NAMES[e.value % (sizeof(NAMES) / sizeof(*NAMES))]);
            if (n < 60) {
                f.tensors.push_back(std::move(more));
            }
            return;
        }
        default:  // two tensors change places
            std::swap(t, f.tensors[e.which % n]);
            return;
    }
}

// Upstream multiplies by weights of any type it can read, and calls a null pointer where they are integers. That is not
// ours to find again and again: only tensors that upstream does not know may be integers.
void tame(file & f) {
    for (tensor & t : f.tensors) {
        const bool weight  = t.name.size() > 7 && t.name.compare(t.name.size() - 7, 7, ".weight") == 0;
        const bool integer = (t.type >= GGML_TYPE_I8 && t.type <= GGML_TYPE_I64) || t.type == GGML_TYPE_F64;
        if (weight && integer && t.name.find("ffn_moe_") == std::string::npos) {
            t.type = GGML_TYPE_F32;
        }
    }
}

// What ggml says before it aborts, thrown out of it.
struct aborted : std::runtime_error {
    using runtime_error::runtime_error;
};

void on_abort(const char * message) {
    if (strstr(message, "mobie")) {
        fprintf(stderr, "WRONG: our code aborts: %s\n", message);
        abort();
    }
    throw aborted(message);
}

// How far inputs came.
int64_t n_inputs, n_loaded, n_scored;

void run(const std::string & path, bool mapped, bool check, bool score) {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers       = 0;
    params.load_mode          = mapped ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
    params.check_tensors      = check;
    llama_model * model       = llama_model_load_from_file(path.c_str(), params);
    if (!model) {
        return;
    }
    n_loaded++;
    if (!score) {
        llama_model_free(model);
        return;
    }
    struct guard {
        llama_model *   model;
        llama_context * context = nullptr;
        ~guard() {
            llama_free(context);
            llama_model_free(model);
        }
    } g{ model };
    llama_context_params cp = llama_context_default_params();
    cp.n_ctx = cp.n_batch = cp.n_ubatch = 32;
    cp.n_threads = cp.n_threads_batch = 1;
    g.context                         = llama_init_from_model(model, cp);
    if (!g.context) {
        return;
    }
    llama_token tokens[] = { 1, 2, 3, 4, 5 };
    if (llama_decode(g.context, llama_batch_get_one(tokens, 5)) == 0 &&
        llama_decode(g.context, llama_batch_get_one(tokens, 1)) == 0) {
        n_scored++;
    }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_set_abort_callback(on_abort);
    llama_backend_init();
    atexit([] {
        fprintf(stderr, "%lld inputs, %lld loaded, %lld scored\n", (long long) n_inputs, (long long) n_loaded,
                (long long) n_scored);
    });
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size < 1) {
        return 0;
    }
    static const std::vector<file> FILES = { make_file(0), make_file(1), make_file(2), make_file(3) };
    file                           f     = FILES[data[0] % 4];
    for (size_t i = 1; i + sizeof(edit) <= size && i < 1 + 12 * sizeof(edit); i += sizeof(edit)) {
        edit e;
        memcpy(&e, data + i, sizeof(e));
        apply(f, e);
    }
    tame(f);
    n_inputs++;
    const std::vector<uint8_t> bytes = bytes_of(f);
    static const int           fd    = memfd_create("fuzz.gguf", 0);
    if (ftruncate(fd, 0) != 0 || pwrite(fd, bytes.data(), bytes.size(), 0) != (ssize_t) bytes.size()) {
        perror("fuzz.gguf");
        exit(2);
    }
    try {
        run("/proc/self/fd/" + std::to_string(fd), data[0] & 4, data[0] & 8, data[0] < 64);
    } catch (const aborted & e) {
        static std::set<std::string> known;
        if (known.insert(e.what()).second) {
            fprintf(stderr, "UPSTREAM: %s\n", e.what());
        }
    }
    return 0;
}
