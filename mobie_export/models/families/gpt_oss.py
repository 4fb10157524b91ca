"""GPT-OSS: biases of experts, sinks in attention, a clamped activation, every other layer with a window."""

from torch import nn
from transformers import GptOssConfig
from transformers.models.gpt_oss import modeling_gpt_oss

from mobie_export.gguf_io import Gguf
from mobie_export.models.architecture import Architecture, Metadata, Parameters, clamped, unsupported
from mobie_export.models.families import common

EVERYTHING = 1 << 30  # a window that hides nothing
FULL, SLIDING = "full_attention", "sliding_attention"  # as transformers calls them


class GptOss(Architecture):
    config: GptOssConfig
    router = "mlp.router.weight"
    act = staticmethod(clamped)

    def configured(self, key: Metadata) -> GptOssConfig:
        keywords = common.keywords(self.gguf, key)
        n, theta = keywords["num_hidden_layers"], keywords["rope_parameters"]["rope_theta"]
        if key.real("rope.freq_base_swa", theta) != theta:
            raise unsupported(self.gguf, "has positions", "rope.freq_base_swa of its own", f"{theta:g}")
        return GptOssConfig(
            **keywords | {"attn_implementation": "eager"},  # its sinks are in no other
            num_local_experts=key("expert_count"),
            intermediate_size=key("expert_feed_forward_length"),
            sliding_window=key("attention.sliding_window"),
            layer_types=[FULL if i % 2 else SLIDING for i in range(n)],
        )

    def layer(self, index: int) -> nn.Module:
        return modeling_gpt_oss.GptOssDecoderLayer(self.config, index)

    def rotary(self) -> nn.Module:
        return modeling_gpt_oss.GptOssRotaryEmbedding(self.config)

    def parameters(self, index: int) -> Parameters:
        more: Parameters = {"self_attn.o_proj.bias": "attn_output.bias", "self_attn.sinks": "attn_sinks.weight"}
        router: Parameters = {f"mlp.router.{p}": f"ffn_gate_inp.{p}" for p in ("weight", "bias")}
        return common.norms("post_attention_norm") | common.attention(self.gguf, index) | more | router

    def window(self, index: int) -> int | None:
        return self.config.sliding_window if (self.config.layer_types or [])[index] == SLIDING else EVERYTHING


def of(gguf: Gguf) -> Architecture:
    return GptOss(gguf)
