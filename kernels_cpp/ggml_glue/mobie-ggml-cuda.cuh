// Where ggml's CUDA backend meets the kernels of cuda/.
#pragma once

#include "../../ggml-cuda/common.cuh"
#include "../mobie.h"

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
// ggml's CUDA backend compiled for other cards: our kernels are not in it, and it is not asked for the type (see
// mobie-ggml-backend.h).
static inline bool mobie_ggml_cuda_mul_mat(ggml_backend_cuda_context &, ggml_tensor *) {
    return false;
}
static inline bool mobie_ggml_cuda_mul_mat_glu(ggml_backend_cuda_context &, const ggml_tensor *, const ggml_tensor *,
                                               ggml_tensor *, const ggml_tensor * = nullptr,
                                               const ggml_tensor * = nullptr) {
    return false;
}
#else
// MUL_MAT and MUL_MAT_ID with MOBIE weights; a fourth source of MUL_MAT_ID, F32 [n_expert], holds the scales of the
// experts. Nothing is synchronized with the host, so the operations can be captured in a CUDA graph.
// false: not ours, ggml goes on as usual.
bool mobie_ggml_cuda_mul_mat(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// glu = act(gate x + gate_bias) * (up x + up_bias) in one kernel. false: not ours, or too many tokens for it; nothing
// has happened then.
bool mobie_ggml_cuda_mul_mat_glu(ggml_backend_cuda_context & ctx, const ggml_tensor * up, const ggml_tensor * gate,
                                 ggml_tensor * glu, const ggml_tensor * up_bias = nullptr,
                                 const ggml_tensor * gate_bias = nullptr);
#endif

// ggml's form of a decoder: weights `at` and `at` + 1 of a block.
static __device__ __forceinline__ void dequantize_mobie(const void * blocks, const int64_t block, const int at,
                                                        float2 & v) {
    const mobie_block * b    = (const mobie_block *) blocks + block;
    const int           bits = b->signs[at / 8] >> (at % 8);
    // from the integer, so that a zero is never a negative zero
    v.x = (float) (bits & 1 ? b->scale : -(int) b->scale) * 0x1p-7f;
    v.y = (float) (bits & 2 ? b->scale : -(int) b->scale) * 0x1p-7f;
}
