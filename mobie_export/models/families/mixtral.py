"""Mixtral: `llama` with experts."""

from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral import modeling_mixtral

from mobie_export.gguf_io import Gguf
from mobie_export.models.architecture import Architecture, Made, Metadata, Parameters, unsupported
from mobie_export.models.families import common


class Mixtral(Architecture):
    """What rotates together in a head is half of it apart in transformers, neighbours in the file."""

    config: MixtralConfig

    def configured(self, key: Metadata) -> MixtralConfig:
        keywords = common.keywords(self.gguf, key)
        if keywords["attention_bias"]:
            raise unsupported(self.gguf, "has biases in its attention", "attn_q.bias", "a Mixtral model")
        return MixtralConfig(
            **keywords,
            num_local_experts=key("expert_count"),
            intermediate_size=key("expert_feed_forward_length", key("feed_forward_length")),
            sliding_window=None,
        )

    def layer(self, index: int) -> nn.Module:
        return modeling_mixtral.MixtralDecoderLayer(self.config, index)

    def rotary(self) -> nn.Module:
        return modeling_mixtral.MixtralRotaryEmbedding(self.config)

    def parameters(self, index: int) -> Parameters:
        turned: Parameters = {
            f"self_attn.{p}_proj.weight": Made((f"attn_{p}.weight",), self._halves_apart) for p in "qk"
        }
        return common.norms("ffn_norm") | common.attention(self.gguf, index) | turned | common.ROUTER

    def _halves_apart(self, w: Tensor) -> Tensor:  # [heads * head_dim, width]
        half = (self.config.head_dim or 0) // 2
        return w.view(-1, half, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def of(gguf: Gguf) -> Architecture:
    return Mixtral(gguf)
