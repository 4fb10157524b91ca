// What RPC servers and their clients tell each other about the type.
//
// A client takes a server's devices to run every operation, and a server that does not know the type closes the
// connection at the first tensor of it, which aborts the client. So a server says in its answer to the client's HELLO,
// in a byte that upstream leaves zero, whether the devices it offers have our kernels, and a client leaves tensors of
// the type to devices that do. All else is upstream's protocol: other models run on any peer as they do there.
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "ggml-backend-impl.h"
#include "ggml-cpp.h"
#include "ggml-impl.h"
#include "mobie-ggml-backend.h"

// The answer of a server whose devices run the type; another one where a server of this version could not compute what
// the next one's clients ask for.
constexpr uint8_t MOBIE_RPC_RUNS = 'M';

// Whether a device multiplies experts of the type, scales included.
static inline bool mobie_ggml_multiplies_experts(ggml_backend_dev_t device) {
    ggml_context_ptr ctx{ ggml_init({ 8 * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true }) };
    ggml_tensor *    w   = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_MOBIE, 256, 64, 2);
    ggml_tensor *    x   = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, 256, 1, 1);
    ggml_tensor *    ids = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 1, 1);
    ggml_tensor *    y   = ggml_mul_mat_id(ctx.get(), w, x, ids);
    y->src[3]            = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, 2);
    return ggml_backend_dev_supports_op(device, y);
}

// The server's answer: its clients do not know which of its devices is which, so all must run the type.
static inline uint8_t mobie_ggml_rpc_answer(const std::vector<ggml_backend_t> & backends) {
    for (ggml_backend_t backend : backends) {
        if (!mobie_ggml_multiplies_experts(ggml_backend_get_device(backend))) {
            return 0;
        }
    }
    return MOBIE_RPC_RUNS;
}

// The client's side: the last answer of every server, by its address.
struct mobie_ggml_rpc_answers {
    std::mutex                     mutex;
    std::map<std::string, uint8_t> of;

    static mobie_ggml_rpc_answers & all() {
        static mobie_ggml_rpc_answers it;
        return it;
    }
};

static inline void mobie_ggml_rpc_answered(const std::string & endpoint, uint8_t answer) {
    mobie_ggml_rpc_answers &    answers = mobie_ggml_rpc_answers::all();
    std::lock_guard<std::mutex> lock(answers.mutex);
    answers.of[endpoint] = answer;
}

// Whether a server may be asked for an operation.
static inline bool mobie_ggml_rpc_supports_op(const std::string & endpoint, const ggml_tensor * op) {
    if (!mobie_ggml_concerns(op)) {
        return true;
    }
    if (op->op != GGML_OP_MUL_MAT_ID && op->op != GGML_OP_NONE) {  // what the answer is about, and weights
        return false;
    }
    mobie_ggml_rpc_answers &    answers = mobie_ggml_rpc_answers::all();
    std::lock_guard<std::mutex> lock(answers.mutex);
    return answers.of[endpoint] == MOBIE_RPC_RUNS;
}
