"""Qwen2-MoE and Qwen3-MoE."""

from torch import nn
from transformers import Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

from mobie_export.gguf_io import Gguf
from mobie_export.models.architecture import Architecture, Metadata, Parameters
from mobie_export.models.families import common


class Qwen3(Architecture):
    config: Qwen3MoeConfig

    def configured(self, key: Metadata) -> Qwen3MoeConfig:
        return Qwen3MoeConfig(
            **common.keywords(self.gguf, key),
            num_experts=key("expert_count"),
            moe_intermediate_size=key("expert_feed_forward_length"),
            norm_topk_prob=True,  # llama.cpp normalizes for this architecture, whatever the checkpoint said
            decoder_sparse_step=1,
            mlp_only_layers=[],
        )

    def layer(self, index: int) -> nn.Module:
        return qwen3.Qwen3MoeDecoderLayer(self.config, index)

    def rotary(self) -> nn.Module:
        return qwen3.Qwen3MoeRotaryEmbedding(self.config)

    def parameters(self, index: int) -> Parameters:
        return common.norms("ffn_norm") | common.attention(self.gguf, index) | common.ROUTER


class Qwen2(Architecture):
    config: Qwen2MoeConfig

    def configured(self, key: Metadata) -> Qwen2MoeConfig:
        keywords = common.keywords(self.gguf, key)
        return Qwen2MoeConfig(
            **keywords,
            qkv_bias=keywords["attention_bias"],
            num_experts=key("expert_count"),
            moe_intermediate_size=key("expert_feed_forward_length"),
            shared_expert_intermediate_size=common.shape(self.gguf, "blk.0.ffn_up_shexp.weight")[1],
            norm_topk_prob=False,  # as llama.cpp has it for this architecture
            decoder_sparse_step=1,
            mlp_only_layers=[],
            use_sliding_window=False,
        )

    def layer(self, index: int) -> nn.Module:
        return qwen2.Qwen2MoeDecoderLayer(self.config, index)

    def rotary(self) -> nn.Module:
        return qwen2.Qwen2MoeRotaryEmbedding(self.config)

    def parameters(self, index: int) -> Parameters:
        attention = common.norms("ffn_norm") | common.attention(self.gguf, index)
        return attention | common.ROUTER | common.shared_expert()


def of(gguf: Gguf) -> Architecture:
    return Qwen3(gguf) if gguf.architecture == "qwen3moe" else Qwen2(gguf)
