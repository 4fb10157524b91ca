"""DeepSeek-V2 and V3, and their relatives: `deepseek2`, with a softmax or a sigmoid in the router.

llama.cpp keeps the two parts of kv_b apart, the keys' one turned: it is absorbed into the query. Files converted before
April 2025 have kv_b as it was, which it runs as well.
"""

import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from mobie_export.gguf_io import Gguf
from mobie_export.models.architecture import Architecture, Made, Metadata, Parameters, unsupported
from mobie_export.models.families import common


class DeepSeek(Architecture):
    """What both have."""

    config: DeepseekV2Config | DeepseekV3Config

    def _keywords(self, key: Metadata) -> common.Keywords:
        keywords = common.keywords(self.gguf, key, partial=True)
        key("expert_gating_func", 0)  # `of` has seen to it
        del keywords["head_dim"]  # the configuration derives it
        rope_dim = key("rope.dimension_count")
        form = "_mla" if self._apart(0) else ""  # lengths of a head, where the plain ones are of the absorbed form
        return keywords | {
            "num_key_value_heads": keywords["num_attention_heads"],  # the file says 1, for the absorbed form
            "q_lora_rank": key("attention.q_lora_rank") if key.has("attention.q_lora_rank") else None,
            "kv_lora_rank": key("attention.kv_lora_rank"),
            "qk_rope_head_dim": rope_dim,
            "qk_nope_head_dim": key(f"attention.key_length{form}") - rope_dim,
            "v_head_dim": key(f"attention.value_length{form}"),
            "first_k_dense_replace": key("leading_dense_block_count"),
            "intermediate_size": key("feed_forward_length"),
            "n_routed_experts": key("expert_count"),
            "n_shared_experts": key("expert_shared_count"),
            "moe_intermediate_size": key("expert_feed_forward_length"),
            "routed_scaling_factor": key.real("expert_weights_scale", 1.0) or 1.0,
            "attention_bias": False,
        }

    def _apart(self, index: int) -> bool:
        """Whether a layer has kv_b in two parts."""
        return f"blk.{index}.attn_kv_b.weight" not in self.gguf.tensors

    def parameters(self, index: int) -> Parameters:
        names: Parameters = {
            "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
            "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
            "self_attn.kv_b_proj.weight": (
                Made(("attn_k_b.weight", "attn_v_b.weight"), _joined) if self._apart(index) else "attn_kv_b.weight"
            ),
            "self_attn.o_proj.weight": "attn_output.weight",
        }
        if self.config.q_lora_rank is None:
            names["self_attn.q_proj.weight"] = "attn_q.weight"
        else:
            names["self_attn.q_a_proj.weight"] = "attn_q_a.weight"
            names["self_attn.q_a_layernorm.weight"] = "attn_q_a_norm.weight"
            names["self_attn.q_b_proj.weight"] = "attn_q_b.weight"
        dense = self.config.first_k_dense_replace or 0
        rest = common.experts_or_dense(self.gguf, index, dense, "shared_experts")
        return common.norms("ffn_norm") | names | rest


def _joined(k_b: Tensor, v_b: Tensor) -> Tensor:  # [heads, kv_lora, nope], [heads, v, kv_lora]
    return torch.cat([k_b.transpose(1, 2), v_b], 1).flatten(0, 1)


class DeepSeekV2(DeepSeek):
    config: DeepseekV2Config

    def configured(self, key: Metadata) -> DeepseekV2Config:
        groups = key("expert_group_count", 1)
        if groups > 1:
            raise unsupported(self.gguf, "has a routing", f"{groups} groups of experts", "one group")
        if key.flag("expert_weights_norm", False):
            raise unsupported(self.gguf, "has a routing", "a softmax with expert_weights_norm", "weights as they are")
        return DeepseekV2Config(
            **self._keywords(key), topk_method="greedy", n_group=1, topk_group=1, norm_topk_prob=False
        )

    def layer(self, index: int) -> nn.Module:
        return v2.DeepseekV2DecoderLayer(self.config, index)

    def rotary(self) -> nn.Module:
        return v2.DeepseekV2RotaryEmbedding(self.config)


class DeepSeekV3(DeepSeek):
    config: DeepseekV3Config

    def configured(self, key: Metadata) -> DeepseekV3Config:
        return DeepseekV3Config(
            **self._keywords(key),
            n_group=key("expert_group_count", 1) or 1,
            topk_group=key("expert_group_used_count", 1) or 1,
            norm_topk_prob=key.flag("expert_weights_norm", False),
            rope_interleave=True,
        )

    def layer(self, index: int) -> nn.Module:
        return v3.DeepseekV3DecoderLayer(self.config, index)

    def rotary(self) -> nn.Module:
        return v3.DeepseekV3RotaryEmbedding(self.config)


def of(gguf: Gguf) -> Architecture:
    """V3 where the file routes by a sigmoid, as llama.cpp finds out; MobieError for a third way."""
    key = Metadata(gguf)
    gating = key("expert_gating_func", 0)
    if gating not in (0, 1, common.SIGMOID):
        raise unsupported(gguf, "has a routing", f"expert_gating_func {gating}", f"1 or {common.SIGMOID}")
    n_layers = key("block_count") - key("nextn_predict_layers", 0)
    # GLM-4.7-Lite comes without the key
    lite = n_layers in (47, 48) and common.shape(gguf, "token_embd.weight")[1:] == (154880,)
    sigmoid = gating == common.SIGMOID or (gating == 0 and lite)
    return DeepSeekV3(gguf) if sigmoid else DeepSeekV2(gguf)
