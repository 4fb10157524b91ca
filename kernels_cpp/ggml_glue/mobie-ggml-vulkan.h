// Where ggml's Vulkan backend meets the shaders of vulkan/. Included at the end of ggml-vulkan-common.h.
#pragma once

#include "mobie-ggml-backend.h"

// Whether the device runs an operation on MOBIE tensors. Those are ours alone: the backend's own fusions, which do not
// know the scale of an expert, leave them.
bool mobie_ggml_vulkan_supports_op(const vk_device & device, const ggml_tensor * op);

// Records MUL_MAT, MUL_MAT_ID or GET_ROWS of MOBIE tensors; a fourth source of MUL_MAT_ID, F32 [n_expert], holds the
// scales of the experts. false: not ours, ggml goes on as usual.
bool mobie_ggml_vulkan_record(ggml_backend_vk_context * ctx, vk_context & subctx, ggml_tensor * dst);
