// Translates ggml's tensors into dispatches of the Vulkan shaders.
#include <algorithm>

#include "../../ggml-vulkan/ggml-vulkan-common.h"
#include "../mobie.h"
#include "../vulkan/mobie-vulkan.h"

namespace {

int64_t n_groups(int64_t n) {
    return (n + MOBIE_GROUP_LEN - 1) / MOBIE_GROUP_LEN;
}

uint64_t act_bytes(const ggml_tensor * src1) {
    return ggml_nrows(src1) * n_groups(src1->ne[0]) * MOBIE_VULKAN_ACT_GROUP_BYTES;
}

uint64_t routing_bytes(const ggml_tensor * dst) {
    return sizeof(uint32_t) * (2 * dst->src[0]->ne[2] + ggml_nelements(dst->src[2]));
}

int64_t vec_tokens(const ggml_tensor * dst) {
    return dst->op == GGML_OP_MUL_MAT_ID ? MOBIE_VULKAN_VEC_TOKENS_IDS : MOBIE_VULKAN_VEC_TOKENS;
}

// Where the shaders find a tensor: a range that begins where the device lets it begin, in whole words.
struct bound {
    vk_subbuffer range;
    uint32_t     first_byte;

    bound(ggml_backend_vk_context * ctx, const ggml_tensor * t)
        : range(ggml_vk_tensor_subbuffer(ctx, t, true)), first_byte(get_misalign_bytes(ctx, t)) {
        range.size = GGML_PAD(range.size, sizeof(uint32_t));
        GGML_ASSERT(range.offset + range.size <= range.buffer->size);
    }
    uint32_t first() const { return first_byte / sizeof(uint32_t); }
};

uint32_t words(size_t bytes) {
    return bytes / sizeof(uint32_t);
}

template <typename Parameters>
void dispatch(ggml_backend_vk_context * ctx, vk_context & subctx, mobie_vulkan_shader_id shader,
              std::initializer_list<vk::DescriptorBufferInfo> buffers, const Parameters & parameters,
              std::array<uint32_t, 3> workgroups) {
    vk_pipeline & pipeline = ctx->device->pipeline_mobie[shader];
    ggml_pipeline_request_descriptor_sets(ctx, pipeline, 1);
    ggml_vk_dispatch_pipeline(ctx, subctx, pipeline, buffers, parameters, workgroups);
}

// All rows of src1, quantized, in the context's memory for second operands. gate and up read the same: it is kept, as
// the backend keeps its own, until the memory is used for something else.
vk_subbuffer quantized(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * src1) {
    const uint64_t bytes = act_bytes(src1);
    if (ctx->prealloc_size_y < bytes) {
        ctx->prealloc_size_y = bytes;
        ggml_vk_preallocate_buffers(ctx, subctx);
    }
    const vk_subbuffer   act      = { ctx->prealloc_y, 0, bytes };
    vk_pipeline_struct * pipeline = ctx->device->pipeline_mobie[MOBIE_VULKAN_QUANTIZE].get();
    if (ctx->prealloc_y_last_pipeline_used == pipeline && ctx->prealloc_y_last_tensor_used == src1) {
        return act;
    }
    if (ctx->prealloc_y_need_sync) {
        ggml_vk_sync_buffers(ctx, subctx);
    }
    const bound                 x(ctx, src1);
    const mobie_vulkan_quantize p = {
        (uint32_t) src1->ne[0],      (uint32_t) n_groups(src1->ne[0]),
        (uint32_t) ggml_nrows(src1), (uint32_t) src1->ne[1],
        (uint32_t) src1->ne[2],      x.first(),
        words(src1->nb[1]),          words(src1->nb[2]),
        words(src1->nb[3]),
    };
    const uint32_t most = ctx->device->properties.limits.maxComputeWorkGroupCount[1];
    dispatch(ctx, subctx, MOBIE_VULKAN_QUANTIZE, { x.range, act, x.range, x.range, x.range }, p,
             { p.n_groups, std::min(p.n_rows, most), 1 });
    ggml_vk_sync_buffers(ctx, subctx);
    ctx->prealloc_y_last_pipeline_used = pipeline;
    ctx->prealloc_y_last_tensor_used   = src1;
    ctx->prealloc_y_last_k_padded      = false;
    return act;
}

vk_subbuffer routed(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * dst, const bound & ids) {
    const uint64_t bytes = routing_bytes(dst);
    if (ctx->prealloc_size_x < bytes) {
        ctx->prealloc_size_x = bytes;
        ggml_vk_preallocate_buffers(ctx, subctx);
    }
    if (ctx->prealloc_x_need_sync) {
        ggml_vk_sync_buffers(ctx, subctx);
    }
    const ggml_tensor *      src2 = dst->src[2];
    const vk_subbuffer       to   = { ctx->prealloc_x, 0, bytes };
    const mobie_vulkan_route p    = {
        (uint32_t) dst->src[0]->ne[2],
        (uint32_t) ggml_nelements(src2),
        (uint32_t) src2->ne[0],
        ids.first(),
        words(src2->nb[1]),
    };
    dispatch(ctx, subctx, MOBIE_VULKAN_ROUTE, { ids.range, to, ids.range, ids.range, ids.range }, p,
             { p.n_expert, 1, 1 });
    ggml_vk_sync_buffers(ctx, subctx);
    return to;
}

void multiply(ggml_backend_vk_context * ctx, vk_context & subctx, const mobie_vulkan_product & p, bool vec,
              const vk_subbuffer & ids_or_routing, const vk_subbuffer & act, const vk_subbuffer & w,
              const vk_subbuffer & scale, const vk_subbuffer & y) {
    if (vec) {
        dispatch(ctx, subctx, MOBIE_VULKAN_MUL_VEC, { ids_or_routing, act, w, scale, y }, p,
                 { CEIL_DIV(p.n_rows, MOBIE_VULKAN_VEC_ROWS), p.n_tokens * p.n_used, 1 });
    } else {
        dispatch(ctx, subctx, MOBIE_VULKAN_MUL_MAT, { ids_or_routing, act, w, scale, y }, p,
                 { CEIL_DIV(p.n_rows, MOBIE_VULKAN_MAT_ROWS), std::max(p.n_expert, 1u),
                   CEIL_DIV(p.n_tokens, MOBIE_VULKAN_MAT_TOKENS) });
    }
    ctx->prealloc_y_need_sync = true;
}

mobie_vulkan_product product_of(const ggml_tensor * dst) {
    const ggml_tensor *  src0 = dst->src[0];
    mobie_vulkan_product p    = {};
    p.row_bytes               = src0->nb[1];
    p.expert_bytes            = src0->nb[2];
    p.n_rows                  = src0->ne[1];
    p.n_blocks                = src0->ne[0] / MOBIE_BLOCK_LEN;
    p.n_used                  = 1;
    p.n_rows_of_act           = 1;
    p.y_stride                = words(dst->nb[1]);
    return p;
}

void mul_mat(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * dst) {
    const ggml_tensor *  src0 = dst->src[0];
    const vk_subbuffer   act  = quantized(ctx, subctx, dst->src[1]);
    const bound          w(ctx, src0), y(ctx, dst);
    mobie_vulkan_product p = product_of(dst);
    p.n_tokens             = dst->ne[1];
    for (int64_t i3 = 0; i3 < dst->ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < dst->ne[2]; i2++) {
            p.w_first_byte = w.first_byte + i2 / (dst->ne[2] / src0->ne[2]) * src0->nb[2] +
                             i3 / (dst->ne[3] / src0->ne[3]) * src0->nb[3];
            p.act_first    = (i3 * dst->ne[2] + i2) * p.n_tokens;
            p.y_first      = y.first() + words(i2 * dst->nb[2] + i3 * dst->nb[3]);
            multiply(ctx, subctx, p, p.n_tokens <= vec_tokens(dst), act, act, w.range, w.range, y.range);
        }
    }
}

void mul_mat_id(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * dst) {
    const ggml_tensor *  src0 = dst->src[0];
    const ggml_tensor *  src2 = dst->src[2];
    const ggml_tensor *  src3 = dst->src[3];
    const vk_subbuffer   act  = quantized(ctx, subctx, dst->src[1]);
    const bound          w(ctx, src0), y(ctx, dst), ids(ctx, src2), scale(ctx, src3 ? src3 : src0);
    mobie_vulkan_product p = product_of(dst);
    p.w_first_byte         = w.first_byte;
    p.n_expert             = src0->ne[2];
    p.n_tokens             = src2->ne[1];
    p.n_used               = src2->ne[0];
    p.n_rows_of_act        = dst->src[1]->ne[1];
    p.ids_first            = ids.first();
    p.ids_stride           = words(src2->nb[1]);
    p.has_scale            = src3 != nullptr;
    p.scale_first          = scale.first();
    p.y_first              = y.first();
    const bool vec         = p.n_tokens <= vec_tokens(dst);
    multiply(ctx, subctx, p, vec, vec ? ids.range : routed(ctx, subctx, dst, ids), act, w.range, scale.range, y.range);
    ctx->prealloc_x_need_sync = ctx->prealloc_x_need_sync || !vec;
}

void get_rows(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * dst) {
    const ggml_tensor *         src0 = dst->src[0];
    const ggml_tensor *         src1 = dst->src[1];
    const bound                 w(ctx, src0), ids(ctx, src1), y(ctx, dst);
    const mobie_vulkan_get_rows p = {
        (uint32_t) src0->ne[0],
        w.first_byte,
        (uint32_t) src0->nb[1],
        (uint32_t) src0->nb[2],
        (uint32_t) src0->nb[3],
        (uint32_t) src1->ne[0],
        (uint32_t) src1->ne[1],
        (uint32_t) src1->ne[2],
        ids.first(),
        words(src1->nb[0]),
        words(src1->nb[1]),
        words(src1->nb[2]),
        y.first(),
        words(dst->nb[1]),
        words(dst->nb[2]),
        words(dst->nb[3]),
    };
    const uint32_t most = ctx->device->properties.limits.maxComputeWorkGroupCount[1];
    dispatch(ctx, subctx, MOBIE_VULKAN_GET_ROWS, { w.range, ids.range, y.range, y.range, y.range }, p,
             { CEIL_DIV(p.n, (uint32_t) MOBIE_BLOCK_LEN), std::min((uint32_t) ggml_nelements(src1), most), 1 });
}

// The shaders count in 32 bits, and a binding has a limit: with what may lie in front of the tensor in it.
bool fits(const vk_device & device, uint64_t bytes) {
    const auto & limits = device->properties.limits;
    return bytes + sizeof(mobie_block) * limits.minStorageBufferOffsetAlignment + sizeof(uint32_t) <=
           limits.maxStorageBufferRange;
}

bool fits(const vk_device & device, const ggml_tensor * t) {
    return fits(device, ggml_nbytes(t));
}

bool has_whole_blocks(const ggml_tensor * src0) {
    return src0->type == GGML_TYPE_MOBIE && src0->nb[0] == sizeof(mobie_block);
}

bool has_whole_words(const ggml_tensor * t, ggml_type type) {
    return t->type == type && t->nb[0] == sizeof(uint32_t) && t->nb[1] % sizeof(uint32_t) == 0 &&
           t->nb[2] % sizeof(uint32_t) == 0 && t->nb[3] % sizeof(uint32_t) == 0;
}

bool supports_product(const vk_device & device, const ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const auto &        most = device->properties.limits.maxComputeWorkGroupCount;
    if (!has_whole_blocks(src0) || !has_whole_words(src1, GGML_TYPE_F32) || !has_whole_words(dst, GGML_TYPE_F32) ||
        !fits(device, src0) || !fits(device, src1) || !fits(device, dst) || !fits(device, act_bytes(src1)) ||
        CEIL_DIV(src0->ne[1], MOBIE_VULKAN_VEC_ROWS) > most[0] || n_groups(src0->ne[0]) > most[0]) {
        return false;
    }
    if (dst->op == GGML_OP_MUL_MAT) {
        return CEIL_DIV(dst->ne[1], MOBIE_VULKAN_MAT_TOKENS) <= most[2];
    }
    const ggml_tensor * src2 = dst->src[2];
    const ggml_tensor * src3 = dst->src[3];
    return has_whole_words(src2, GGML_TYPE_I32) && fits(device, src2) && fits(device, routing_bytes(dst)) &&
           (!src3 || (src3->type == GGML_TYPE_F32 && ggml_is_contiguous(src3) && fits(device, src3) &&
                      ggml_nelements(src3) == src0->ne[2])) &&
           dst->nb[2] == dst->ne[1] * dst->nb[1] && src0->ne[2] <= most[0] && src0->ne[2] <= most[1] &&
           CEIL_DIV(src2->ne[1], MOBIE_VULKAN_MAT_TOKENS) <= most[2] && src2->ne[0] * vec_tokens(dst) <= most[1];
}

}  // namespace

bool mobie_ggml_vulkan_supports_op(const vk_device & device, const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return true;
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            return supports_product(device, op);
        case GGML_OP_GET_ROWS:
            return has_whole_blocks(op->src[0]) && op->src[1]->type == GGML_TYPE_I32 &&
                   has_whole_words(op, GGML_TYPE_F32) && fits(device, op->src[0]) && fits(device, op->src[1]) &&
                   fits(device, op);
        default:
            return false;
    }
}

bool mobie_ggml_vulkan_record(ggml_backend_vk_context * ctx, vk_context & subctx, ggml_tensor * dst) {
    if (!mobie_ggml_concerns(dst)) {
        return false;
    }
    GGML_ASSERT(ctx->num_additional_fused_ops == 0);
    switch (dst->op) {
        case GGML_OP_MUL_MAT:
            mul_mat(ctx, subctx, dst);
            return true;
        case GGML_OP_MUL_MAT_ID:
            mul_mat_id(ctx, subctx, dst);
            return true;
        case GGML_OP_GET_ROWS:
            get_rows(ctx, subctx, dst);
            return true;
        default:
            return false;
    }
}
