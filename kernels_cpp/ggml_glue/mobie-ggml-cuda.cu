// Translates ggml's tensors into calls of the CUDA kernels.
#include "mobie-ggml-cuda.cuh"

#include "../../ggml-cuda/mmid.cuh"
#include "../cuda/mobie-cuda.h"

namespace {

bool is_ours(const ggml_tensor * dst) {
    return dst->src[0]->type == GGML_TYPE_MOBIE && dst->src[1]->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32 &&
           dst->src[0]->nb[0] == sizeof(mobie_block) && dst->src[1]->nb[0] == sizeof(float) &&
           dst->nb[0] == sizeof(float);
}

// All rows of src1, quantized, in memory of the pool.
struct quantized {
    ggml_cuda_pool_alloc<int8_t> q;
    ggml_cuda_pool_alloc<float>  scale;
    mobie_cuda_act               act;

    quantized(ggml_backend_cuda_context & ctx, const ggml_tensor * src1)
        : q(ctx.pool(), ggml_nrows(src1) * mobie_n_groups(src1->ne[0]) * MOBIE_GROUP_LEN),
          scale(ctx.pool(), ggml_nrows(src1) * mobie_n_groups(src1->ne[0])),
          act{ q.get(), scale.get(), src1->ne[0] } {
        int64_t stride[4];
        for (int i = 0; i < 4; i++) {
            stride[i] = src1->nb[i] / sizeof(float);
        }
        CUDA_CHECK(mobie_cuda_quantize((const float *) src1->data, src1->ne, stride, act, ctx.stream()));
    }
};

mobie_cuda_matrix matrix_of(const ggml_tensor * product, const ggml_tensor * bias = nullptr) {
    const ggml_tensor * scale = product->op == GGML_OP_MUL_MAT_ID ? product->src[3] : nullptr;
    GGML_ASSERT(!scale || (scale->type == GGML_TYPE_F32 && ggml_nelements(scale) == product->src[0]->ne[2]));
    return { product->src[0]->data, scale ? (const float *) scale->data : nullptr,
             bias ? (const float *) bias->data : nullptr };
}

mobie_cuda_product product_of(const ggml_tensor * dst, const mobie_cuda_act & act) {
    const ggml_tensor * src0 = dst->src[0];
    // the kernels count the bytes of a matrix, and those of all activations, in 32 bits
    GGML_ASSERT(src0->ne[1] * src0->nb[1] < (int64_t) 1 << 32);
    GGML_ASSERT(ggml_nrows(dst->src[1]) * mobie_n_groups(act.n) * MOBIE_GROUP_LEN < (int64_t) 1 << 32);
    mobie_cuda_product p = {};
    p.up                 = matrix_of(dst);
    p.n_rows             = src0->ne[1];
    p.row_bytes          = src0->nb[1];
    p.expert_bytes       = src0->nb[2];
    p.n_expert           = 1;
    p.act                = act;
    p.n_used             = 1;
    p.n_rows_of_act      = 1;
    return p;
}

void mul_mat(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src0     = dst->src[0];
    const int64_t       n_tokens = dst->ne[1];
    const quantized     x(ctx, dst->src[1]);
    mobie_cuda_product  p        = product_of(dst, x.act);
    const int64_t       n_groups = mobie_n_groups(x.act.n);
    p.n_tokens                   = n_tokens;
    p.y_stride                   = dst->nb[1] / sizeof(float);
    for (int64_t i3 = 0; i3 < dst->ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < dst->ne[2]; i2++) {
            const int64_t first = (i3 * dst->ne[2] + i2) * n_tokens;  // row of activations
            p.up.w              = (const char *) src0->data + i2 / (dst->ne[2] / src0->ne[2]) * src0->nb[2] +
                                  i3 / (dst->ne[3] / src0->ne[3]) * src0->nb[3];
            p.act.q             = x.act.q + first * n_groups * MOBIE_GROUP_LEN;
            p.act.scale         = x.act.scale + first * n_groups;
            p.y                 = (float *) ((char *) dst->data + i2 * dst->nb[2] + i3 * dst->nb[3]);
            CUDA_CHECK(n_tokens <= MOBIE_CUDA_VEC_TOKENS ? mobie_cuda_mul_vec(&p, ctx.stream())
                                                         : mobie_cuda_mul_mat(&p, nullptr, 0, ctx.stream()));
        }
    }
}

void set_ids(mobie_cuda_product & p, const ggml_tensor * product, const ggml_tensor * result) {
    const ggml_tensor * ids = product->src[2];
    GGML_ASSERT(ids->nb[0] == sizeof(int32_t) && result->nb[2] == result->ne[1] * result->nb[1]);
    p.n_expert      = product->src[0]->ne[2];
    p.ids           = (const int32_t *) ids->data;
    p.ids_stride    = ids->nb[1] / sizeof(int32_t);
    p.n_tokens      = ids->ne[1];
    p.n_used        = ids->ne[0];
    p.n_rows_of_act = product->src[1]->ne[1];
    p.y             = (float *) result->data;
    p.y_stride      = result->nb[1] / sizeof(float);
}

void mul_mat_id(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const quantized    x(ctx, dst->src[1]);
    mobie_cuda_product p = product_of(dst, x.act);
    set_ids(p, dst, dst);
    if (p.n_tokens <= MOBIE_CUDA_VEC_TOKENS_IDS) {
        CUDA_CHECK(mobie_cuda_mul_vec(&p, ctx.stream()));
        return;
    }
    const int64_t                 n_pairs = p.n_tokens * p.n_used;
    ggml_cuda_pool_alloc<int32_t> rows_in(ctx.pool(), n_pairs), rows_out(ctx.pool(), n_pairs);
    ggml_cuda_pool_alloc<int32_t> bounds(ctx.pool(), p.n_expert + 1);
    ggml_cuda_pool_alloc<char>    tiles(ctx.pool(), mobie_cuda_tiles_size(n_pairs, p.n_expert));
    ggml_cuda_launch_mm_ids_helper(p.ids, rows_in.get(), rows_out.get(), bounds.get(), p.n_expert, p.n_tokens, p.n_used,
                                   p.n_rows_of_act, p.ids_stride, p.n_rows_of_act, /*write_inverse =*/false,
                                   ctx.stream());
    CUDA_CHECK(cudaGetLastError());
    const mobie_cuda_routing routing = { bounds.get(), rows_in.get(), rows_out.get(), tiles.get() };
    CUDA_CHECK(mobie_cuda_mul_mat(&p, &routing, 0, ctx.stream()));
}

// false where ggml's function has a parameter that the kernel does not take
bool glu_of(const ggml_tensor * t, mobie_glu * glu) {
    switch (ggml_get_glu_op(t)) {
        case GGML_GLU_OP_SWIGLU:
            *glu = MOBIE_GLU_SWIGLU;
            return true;
        case GGML_GLU_OP_GEGLU:
            *glu = MOBIE_GLU_GEGLU;
            return true;
        case GGML_GLU_OP_SWIGLU_OAI:
            *glu = MOBIE_GLU_SWIGLU_OAI;
            return ggml_get_op_params_f32(t, 2) == 1.702f;
        case GGML_GLU_OP_SWIGLU_CLAMP:
            *glu = MOBIE_GLU_SWIGLU_CLAMP;
            return true;
        default:
            return false;
    }
}

}  // namespace

bool mobie_ggml_cuda_mul_mat(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (!is_ours(dst)) {
        return false;
    }
    if (dst->op == GGML_OP_MUL_MAT_ID) {
        mul_mat_id(ctx, dst);
    } else {
        mul_mat(ctx, dst);
    }
    return true;
}

bool mobie_ggml_cuda_mul_mat_glu(ggml_backend_cuda_context & ctx, const ggml_tensor * up, const ggml_tensor * gate,
                                 ggml_tensor * glu, const ggml_tensor * up_bias, const ggml_tensor * gate_bias) {
    mobie_glu function;
    if (up->op != GGML_OP_MUL_MAT_ID || !is_ours(up) || !is_ours(gate) || up->ne[2] > MOBIE_CUDA_VEC_TOKENS_IDS ||
        !glu_of(glu, &function)) {
        return false;
    }
    const quantized    x(ctx, up->src[1]);
    mobie_cuda_product p = product_of(up, x.act);
    p.up                 = matrix_of(up, up_bias);
    p.gate               = matrix_of(gate, gate_bias);
    p.glu                = function;
    p.glu_limit          = ggml_get_op_params_f32(glu, 3);
    set_ids(p, up, glu);
    CUDA_CHECK(mobie_cuda_mul_vec(&p, ctx.stream()));
    return true;
}
