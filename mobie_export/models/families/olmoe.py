"""OLMoE."""

from torch import nn
from transformers import OlmoeConfig
from transformers.models.olmoe import modeling_olmoe

from mobie_export.gguf_io import Gguf
from mobie_export.models.architecture import Architecture, Metadata, Parameters
from mobie_export.models.families import common


class Olmoe(Architecture):
    config: OlmoeConfig

    def configured(self, key: Metadata) -> OlmoeConfig:
        return OlmoeConfig(
            **common.keywords(self.gguf, key),
            num_experts=key("expert_count"),
            intermediate_size=key("expert_feed_forward_length", key("feed_forward_length")),
            clip_qkv=key.real("attention.clamp_kqv", 0.0) or None,
            norm_topk_prob=False,
        )

    def layer(self, index: int) -> nn.Module:
        return modeling_olmoe.OlmoeDecoderLayer(self.config, index)

    def rotary(self) -> nn.Module:
        return modeling_olmoe.OlmoeRotaryEmbedding(self.config)

    def parameters(self, index: int) -> Parameters:
        return common.norms("ffn_norm") | common.attention(self.gguf, index) | common.ROUTER


def of(gguf: Gguf) -> Architecture:
    return Olmoe(gguf)
