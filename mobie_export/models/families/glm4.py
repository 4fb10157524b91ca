"""GLM-4.5 and 4.6."""

from torch import nn
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe import modeling_glm4_moe

from mobie_export.gguf_io import Gguf
from mobie_export.models.architecture import Architecture, Metadata, Parameters, unsupported
from mobie_export.models.families import common


class Glm4(Architecture):
    config: Glm4MoeConfig

    def configured(self, key: Metadata) -> Glm4MoeConfig:
        keywords = common.keywords(self.gguf, key, partial=True)
        gating = key("expert_gating_func", common.SIGMOID)
        if gating not in (0, common.SIGMOID):
            wanted = f"{common.SIGMOID}, a sigmoid"
            raise unsupported(self.gguf, "has a routing", f"expert_gating_func {gating}", wanted)
        return Glm4MoeConfig(
            **keywords | {"rope_parameters": common.partial_rope(keywords, key)},
            first_k_dense_replace=key("leading_dense_block_count"),
            intermediate_size=key("feed_forward_length"),
            n_routed_experts=key("expert_count"),
            n_shared_experts=key("expert_shared_count"),
            moe_intermediate_size=key("expert_feed_forward_length"),
            routed_scaling_factor=key.real("expert_weights_scale", 1.0) or 1.0,
            norm_topk_prob=key.flag("expert_weights_norm", False),
            n_group=key("expert_group_count", 1) or 1,
            topk_group=key("expert_group_used_count", 1) or 1,
            use_qk_norm="blk.0.attn_q_norm.weight" in self.gguf.tensors,
        )

    def layer(self, index: int) -> nn.Module:
        return modeling_glm4_moe.Glm4MoeDecoderLayer(self.config, index)

    def rotary(self) -> nn.Module:
        return modeling_glm4_moe.Glm4MoeRotaryEmbedding(self.config)

    def parameters(self, index: int) -> Parameters:
        rest = common.experts_or_dense(self.gguf, index, self.config.first_k_dense_replace, "shared_experts")
        return common.norms("post_attention_norm") | common.attention(self.gguf, index) | rest


def of(gguf: Gguf) -> Architecture:
    return Glm4(gguf)
