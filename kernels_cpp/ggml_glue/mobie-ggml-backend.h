// Which backends have kernels for the type.
#pragma once

#include <string.h>

#include "ggml-backend-impl.h"

// Whether an operation reads or writes MOBIE tensors. The scales of experts, a fourth source of MUL_MAT_ID, come with
// weights of the type alone.
static inline bool mobie_ggml_concerns(const struct ggml_tensor * op) {
    bool ours = op->type == GGML_TYPE_MOBIE;
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        ours = ours || (op->src[i] && op->src[i]->type == GGML_TYPE_MOBIE);
    }
    return ours;
}

// Whether a device may be asked for an operation: for one on MOBIE tensors, whether its backend has our kernels.
// Backends answer for the types they know, and many say yes to all others: Metal, SYCL, BLAS. A list of those that can
// rather than of those that cannot, so that a new backend needs nothing. RPC answers for its servers
// (mobie-ggml-rpc.h).
static inline bool mobie_ggml_device_runs(ggml_backend_dev_t device, const struct ggml_tensor * op) {
    if (!mobie_ggml_concerns(op)) {
        return true;
    }
    const char * name = device->reg ? ggml_backend_reg_name(device->reg) : "";  // several devices as one have none
    return strcmp(name, "CPU") == 0 || strcmp(name, "CUDA") == 0 || strcmp(name, "RPC") == 0 ||
           strcmp(name, "Vulkan") == 0;
}
