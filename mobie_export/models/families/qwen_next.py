"""Qwen3-Next and Qwen3.5-MoE, of which most layers are recurrent."""

import torch
from torch import Tensor, nn
from transformers import Qwen3_5MoeTextConfig, Qwen3NextConfig
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as qwen35
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3next

from mobie_export.gguf_io import Gguf
from mobie_export.models.architecture import Architecture, Made, Metadata, Parameters
from mobie_export.models.families import common

FULL, LINEAR = "full_attention", "linear_attention"  # as transformers calls them


class Recurrent(Architecture):
    """What both have."""

    config: Qwen3NextConfig | Qwen3_5MoeTextConfig
    adding_norm: type[nn.Module]

    def _keywords(self, key: Metadata) -> common.Keywords:
        keywords = common.keywords(self.gguf, key, partial=True)
        n, interval = keywords["num_hidden_layers"], key("full_attention_interval", 4)
        usual = [(i + 1) % interval != 0 for i in range(n)]
        recurrent = key.several("attention.recurrent_layers", bool, usual)
        return keywords | {
            "rope_parameters": common.partial_rope(keywords, key),
            "num_experts": key("expert_count"),
            "moe_intermediate_size": key("expert_feed_forward_length"),
            "shared_expert_intermediate_size": common.shape(self.gguf, "blk.0.ffn_up_shexp.weight")[1],
            "layer_types": [LINEAR if r else FULL for r in recurrent[:n]],
            "linear_conv_kernel_dim": key("ssm.conv_kernel"),
            "linear_key_head_dim": key("ssm.state_size"),
            "linear_num_key_heads": key("ssm.group_count"),
            "linear_num_value_heads": key("ssm.time_step_rank"),
            "linear_value_head_dim": key("ssm.inner_size") // key("ssm.time_step_rank"),
        }

    def parameters(self, index: int) -> Parameters:
        names = common.ROUTER | common.shared_expert() | common.norms("post_attention_norm")
        full = (self.config.layer_types or [])[index] == FULL
        return names | (common.attention(self.gguf, index) if full else self._mixer())

    def prepare(self, layer: nn.Module) -> None:
        """Norms that add one to their weight give way to plain ones: in the file it is added already."""
        for name, module in list(layer.named_modules()):
            if type(module) is self.adding_norm:
                parent, _, attribute = name.rpartition(".")
                plain = nn.RMSNorm(module.get_parameter("weight").shape, self.config.rms_norm_eps)
                setattr(layer.get_submodule(parent), attribute, plain)

    def _mixer(self) -> Parameters:
        """Of a recurrent layer, in place of attention."""
        raise NotImplementedError


class Qwen3Next(Recurrent):
    config: Qwen3NextConfig
    adding_norm = qwen3next.Qwen3NextRMSNorm

    def configured(self, key: Metadata) -> Qwen3NextConfig:
        return Qwen3NextConfig(**self._keywords(key), norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])

    def layer(self, index: int) -> nn.Module:
        return qwen3next.Qwen3NextDecoderLayer(self.config, index)

    def rotary(self) -> nn.Module:
        return qwen3next.Qwen3NextRotaryEmbedding(self.config)

    def _mixer(self) -> Parameters:
        return {
            "linear_attn.in_proj_qkvz.weight": Made(("attn_qkv.weight", "attn_gate.weight"), self._interleaved),
            "linear_attn.in_proj_ba.weight": "ssm_ba.weight",
            "linear_attn.conv1d.weight": "ssm_conv1d.weight",
            "linear_attn.dt_bias": "ssm_dt.bias",
            "linear_attn.A_log": Made(("ssm_a",), lambda a: torch.log(-a)),
            "linear_attn.norm.weight": "ssm_norm.weight",
            "linear_attn.out_proj.weight": "ssm_out.weight",
        }

    def _interleaved(self, qkv: Tensor, z: Tensor) -> Tensor:
        """[q; k; v] and z of all heads -> q, k, v, z of one key head after the other."""
        heads = self.config.linear_num_key_heads
        width = heads * self.config.linear_key_head_dim
        q, k, v = qkv.split([width, width, len(qkv) - 2 * width])
        return torch.cat([part.view(heads, -1, qkv.shape[1]) for part in (q, k, v, z)], 1).flatten(0, 1)


class Qwen35(Recurrent):
    """As Qwen3-Next with separate projections. The value heads of a key head are together in transformers, in the file
    the first of all key heads come first, then the second."""

    config: Qwen3_5MoeTextConfig
    adding_norm = qwen35.Qwen3_5MoeRMSNorm

    def configured(self, key: Metadata) -> Qwen3_5MoeTextConfig:
        keywords = self._keywords(key)
        sections = {"mrope_section": key.several("rope.dimension_sections", int)[:3], "mrope_interleaved": True}
        return Qwen3_5MoeTextConfig(**keywords | {"rope_parameters": keywords["rope_parameters"] | sections})

    def layer(self, index: int) -> nn.Module:
        return qwen35.Qwen3_5MoeDecoderLayer(self.config, index)

    def rotary(self) -> nn.Module:
        return qwen35.Qwen3_5MoeTextRotaryEmbedding(self.config)

    def _mixer(self) -> Parameters:
        dim = self.config.linear_value_head_dim
        return {
            "linear_attn.in_proj_qkv.weight": Made(("attn_qkv.weight",), self._values_together),
            "linear_attn.in_proj_z.weight": Made(("attn_gate.weight",), lambda w: self._together(w, dim)),
            "linear_attn.in_proj_b.weight": Made(("ssm_beta.weight",), lambda w: self._together(w, 1)),
            "linear_attn.in_proj_a.weight": Made(("ssm_alpha.weight",), lambda w: self._together(w, 1)),
            "linear_attn.conv1d.weight": Made(("ssm_conv1d.weight",), self._values_together),
            "linear_attn.dt_bias": Made(("ssm_dt.bias",), lambda w: self._together(w, 1)),
            "linear_attn.A_log": Made(("ssm_a",), lambda a: torch.log(-self._together(a, 1))),
            "linear_attn.norm.weight": "ssm_norm.weight",
            "linear_attn.out_proj.weight": Made(("ssm_out.weight",), lambda w: self._together(w.T, dim).T),
        }

    def _together(self, w: Tensor, size: int) -> Tensor:  # [value heads * size, ...]
        keys = self.config.linear_num_key_heads
        per_key = self.config.linear_num_value_heads // keys
        return w.reshape(per_key, keys, size, *w.shape[1:]).transpose(0, 1).reshape(w.shape)

    def _values_together(self, w: Tensor) -> Tensor:  # [q; k; v, ...]
        first = 2 * self.config.linear_num_key_heads * self.config.linear_key_head_dim
        return torch.cat([w[:first], self._together(w[first:], self.config.linear_value_head_dim)])


def of(gguf: Gguf) -> Architecture:
    return Qwen3Next(gguf) if gguf.architecture == "qwen3next" else Qwen35(gguf)
