"""How GGUF architectures become modules of transformers: the table behind twin.py.

The converter of llama.cpp rearranges some weights on the way from a checkpoint to a GGUF; what is here is the inverse.
Everything a layer needs is either a tensor of the file by another name or a `Made` one. Modules compute what llama.cpp
computes for the file, which is not always what the checkpoint's configuration said.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from mobie_export.errors import BAD_INPUT, UNSUPPORTED, MobieError
from mobie_export.gguf_io import Gguf

EVERYTHING = 1 << 30  # a window that hides nothing


@dataclass(frozen=True)
class Made:
    """A parameter computed from tensors of a layer, by their names without `blk.N.`."""

    names: tuple[str, ...]
    make: Callable[..., Tensor]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture becomes modules of transformers.

    config: (file, its metadata) -> configuration; layer: (configuration, index) -> module without weights; rotary:
    configuration -> module that makes the position embeddings; parameters: (file, configuration, index) -> parameter of
    the layer -> tensor without `blk.N.`, or how it is made.
    moe: attribute of the layer with `experts` in it; router, norm: parameters in front of the experts; act: what is
    between gate, up and down; window: (configuration, index) -> how many tokens back attention sees, None where the
    module masks by itself; prepare: changes to a fresh layer.
    """

    config: Callable[[Gguf, "Metadata"], "transformers.PretrainedConfig"]
    layer: Callable[..., nn.Module]
    rotary: Callable[..., nn.Module]
    parameters: Callable[..., dict[str, "str | Made"]]
    moe: str = "mlp"
    router: str = "mlp.gate.weight"
    norm: str = "post_attention_layernorm.weight"
    act: Callable[[Tensor, Tensor], Tensor] = swiglu
    window: Callable[..., int | None] = lambda config, index: None
    prepare: Callable[[nn.Module], None] = lambda layer: None


# ---- metadata --------------------------------------------------------------------------------------------------------

# Metadata of an architecture that leaves its function as it is: what a tensor's shape says as well, what only tools
# read, and what the pinned llama.cpp reads for none of the architectures below. Everything else that no configuration
# asks for is refused: it may change what the model computes.
WITHOUT_INFLUENCE = {
    *("vocab_size", "embedding_length_out", "feed_forward_length", "expert_feed_forward_length", "tensor_data_layout"),
    *("expert_shared_feed_forward_length", "expert_shared_count", "leading_dense_block_count", "decoder_sparse_step"),
    *("rope.scaling.finetuned", "attention.layer_norm_epsilon", "attention.value_length", "pooling_type"),
    *("attention.sliding_window", "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast"),
    *("rope.scaling.yarn_beta_slow", "expert_weights_norm"),
}
# ... and what does so with one value: llama.cpp has it fixed, or computes the same with it.
NEUTRAL = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "expert_gating_func": (0, 1),  # a softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scale_linear": (0.0, 1.0),
}


class Metadata:
    """Metadata of a file's architecture by the rest of its name; it keeps in mind what was asked for."""

    def __init__(self, gguf: Gguf):
        self.gguf, self.read = gguf, set()

    def __call__(self, name: str, *default):
        """One value for all layers; MobieError where there is none and no default, or where layers have their own."""
        value = self.list(name, *default)
        if isinstance(value, list):
            if not value or value.count(value[0]) != len(value):
                raise _unsupported(self.gguf, "has values of its own for every layer", self._said(name, value), "one")
            value = value[0]
        wanted = next((d for d in default if d is not None), 0)
        if isinstance(value, str) != isinstance(wanted, str):
            raise MobieError(
                BAD_INPUT, f"{self.gguf.paths[0]} has odd metadata", self._said(name, value), f"a value like {wanted!r}"
            )
        return value

    def list(self, name: str, *default):
        """The value as it is."""
        self.read.add(name)
        value = self.gguf.value(f"{self.gguf.architecture}.{name}")
        if value is not None:
            return value
        if not default:
            what = f"{self.gguf.paths[0]} lacks metadata"
            raise MobieError(BAD_INPUT, what, f"no {self.gguf.architecture}.{name}")
        return default[0]

    def check_rest(self) -> None:
        """MobieError for an entry that may change the function and that nobody asked for."""
        start = f"{self.gguf.architecture}."
        for key, entry in self.gguf.entries.items():
            name = key.removeprefix(start)
            if not key.startswith(start) or name in self.read or name in WITHOUT_INFLUENCE:
                continue
            if entry.value not in NEUTRAL.get(name, ()):
                raise _unsupported(self.gguf, "has metadata", self._said(name, entry.value), "no such entry")

    def _said(self, name: str, value) -> str:
        return f"{self.gguf.architecture}.{name} = {str(value)[:80]}"


def _unsupported(gguf: Gguf, what: str, found: str, wanted: str) -> MobieError:
    return MobieError(
        UNSUPPORTED,
        f"{gguf.paths[0]} {what} that calibration does not know",
        found,
        wanted,
        "export with --method sign",
    )


def _shape(gguf: Gguf, name: str) -> tuple[int, ...]:
    """Of a tensor that a configuration needs."""
    if name not in gguf.tensors:
        raise _unsupported(gguf, "has a layout", f"no tensor {name}", f"a {gguf.architecture} model")
    return gguf.tensors[name].shape


def _common(gguf: Gguf, key: Metadata, partial: bool = False) -> dict:
    """What every configuration has. partial: whether a part of every head may be rotated, and the rest not."""
    head = key("attention.key_length", key("embedding_length") // key("attention.head_count"))
    rotated = key("rope.dimension_count", head)
    if rotated != head and not partial:
        raise _unsupported(gguf, "has a rotation", f"rope.dimension_count {rotated} of {head}", f"{head}")
    return {
        "vocab_size": _shape(gguf, "token_embd.weight")[1],
        "hidden_size": key("embedding_length"),
        "num_hidden_layers": key("block_count") - key("nextn_predict_layers", 0),
        "num_attention_heads": key("attention.head_count"),
        "num_key_value_heads": key("attention.head_count_kv"),
        "head_dim": head,
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(gguf, key),
        "max_position_embeddings": key("context_length"),
        "num_experts_per_tok": key("expert_used_count"),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "attn_implementation": "sdpa",
    }


def _rope(gguf: Gguf, key: Metadata) -> dict:
    """Position embeddings as transformers names them; MobieError for a scaling that is not here."""
    scaling = key("rope.scaling.type", "linear")  # llama.cpp's default: a factor alone is a linear one
    rope = {"rope_type": "default", "rope_theta": key("rope.freq_base", 10000.0)}
    if scaling == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": key("rope.scaling.factor"),
            "original_max_position_embeddings": key("rope.scaling.original_context_length"),
            "beta_fast": key("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": key("rope.scaling.yarn_beta_slow", 1.0),
            "truncate": True,  # llama.cpp rounds the range outwards, whatever the checkpoint did
        }
        multiplier = key("rope.scaling.yarn_log_multiplier", 0.0)
        if multiplier and gguf.architecture == "deepseek2":  # a tenth of what the checkpoint calls mscale_all_dim
            rope |= {"mscale": 10 * multiplier, "mscale_all_dim": 10 * multiplier}
        elif multiplier or key("rope.scaling.attn_factor", 1.0) != 1.0 or key("rope.scaling.yarn_ext_factor", 1.0) != 1:
            raise _unsupported(gguf, "has a variant of YaRN", "rope.scaling with own factors", "plain YaRN")
    elif scaling == "linear":
        factor = key("rope.scaling.factor", 0.0) or key("rope.scale_linear", 0.0)
        if factor not in (0.0, 1.0):
            raise _unsupported(gguf, "has a scaling of positions", f"a linear one by {factor:g}", "none or yarn")
    elif scaling == "none":
        key("rope.scaling.factor", 0.0)  # without influence then
    else:
        raise _unsupported(gguf, "has a scaling of positions", f"rope.scaling.type {scaling!r}", "none or yarn")
    if "rope_freqs.weight" in gguf.tensors:
        raise _unsupported(gguf, "has frequencies for positions", "rope_freqs.weight", "plain RoPE or YaRN")
    return rope


def _partial(config: dict, key: Metadata) -> dict:
    """Position embeddings on the first part of every head."""
    share = key("rope.dimension_count", config["head_dim"]) / config["head_dim"]
    return config["rope_parameters"] | {"partial_rotary_factor": share}


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _attention(gguf: Gguf, index: int, output_bias: bool = False) -> dict[str, str]:
    """Plain attention; biases and norms of heads where the file has them."""
    names = {f"self_attn.{p}_proj.weight": f"attn_{p}.weight" for p in "qkv"}
    names["self_attn.o_proj.weight"] = "attn_output.weight"
    if f"blk.{index}.attn_q.bias" in gguf.tensors:
        names |= {f"self_attn.{p}_proj.bias": f"attn_{p}.bias" for p in "qkv"}
    if f"blk.{index}.attn_q_norm.weight" in gguf.tensors:
        names |= {f"self_attn.{p}_norm.weight": f"attn_{p}_norm.weight" for p in "qk"}
    return names


def _norms(second: str) -> dict[str, str]:
    """second: what the norm in front of the experts is called."""
    return {"input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": f"{second}.weight"}


def _mlp(module: str, suffix: str) -> dict[str, str]:
    return {f"{module}.{p}_proj.weight": f"ffn_{p}{suffix}.weight" for p in ("gate", "up", "down")}


ROUTER = {"mlp.gate.weight": "ffn_gate_inp.weight"}


def _experts_or_dense(gguf: Gguf, index: int, dense: int, shared: str) -> dict[str, str]:
    """Layers below `dense` have one feed-forward network; the others a router, shared experts and maybe its bias."""
    if index < dense:
        return _mlp("mlp", "")
    names = ROUTER | _mlp(f"mlp.{shared}", "_shexp")
    if f"blk.{index}.exp_probs_b.bias" in gguf.tensors:
        names["mlp.gate.e_score_correction_bias"] = "exp_probs_b.bias"
    return names


# ---- the architectures -----------------------------------------------------------------------------------------------


def _qwen3moe() -> Architecture:
    from transformers.models.qwen3_moe import modeling_qwen3_moe as m

    def config(gguf: Gguf, key: Metadata):
        return transformers.Qwen3MoeConfig(
            **_common(gguf, key),
            num_experts=key("expert_count"),
            moe_intermediate_size=key("expert_feed_forward_length"),
            norm_topk_prob=True,  # llama.cpp normalizes for this architecture, whatever the checkpoint said
            decoder_sparse_step=1,
            mlp_only_layers=[],
        )

    def parameters(gguf: Gguf, config, index: int) -> dict:
        return _norms("ffn_norm") | _attention(gguf, index) | ROUTER

    return Architecture(config, m.Qwen3MoeDecoderLayer, m.Qwen3MoeRotaryEmbedding, parameters)


def _qwen2moe() -> Architecture:
    from transformers.models.qwen2_moe import modeling_qwen2_moe as m

    def config(gguf: Gguf, key: Metadata):
        common = _common(gguf, key)
        return transformers.Qwen2MoeConfig(
            **common,
            qkv_bias=common["attention_bias"],
            num_experts=key("expert_count"),
            moe_intermediate_size=key("expert_feed_forward_length"),
            shared_expert_intermediate_size=_shape(gguf, "blk.0.ffn_up_shexp.weight")[1],
            norm_topk_prob=False,  # as llama.cpp has it for this architecture
            decoder_sparse_step=1,
            mlp_only_layers=[],
            use_sliding_window=False,
        )

    def parameters(gguf: Gguf, config, index: int) -> dict:
        shared = _mlp("mlp.shared_expert", "_shexp") | {"mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight"}
        return _norms("ffn_norm") | _attention(gguf, index) | ROUTER | shared

    return Architecture(config, m.Qwen2MoeDecoderLayer, m.Qwen2MoeRotaryEmbedding, parameters)


def _olmoe() -> Architecture:
    from transformers.models.olmoe import modeling_olmoe as m

    def config(gguf: Gguf, key: Metadata):
        return transformers.OlmoeConfig(
            **_common(gguf, key),
            num_experts=key("expert_count"),
            intermediate_size=key("expert_feed_forward_length", key("feed_forward_length")),
            clip_qkv=key("attention.clamp_kqv", 0.0) or None,
            norm_topk_prob=False,
        )

    def parameters(gguf: Gguf, config, index: int) -> dict:
        return _norms("ffn_norm") | _attention(gguf, index) | ROUTER

    return Architecture(config, m.OlmoeDecoderLayer, m.OlmoeRotaryEmbedding, parameters)


def _mixtral() -> Architecture:
    """`llama` with experts. What rotates together in a head is half of it apart in transformers, neighbours here."""
    from transformers.models.mixtral import modeling_mixtral as m

    def config(gguf: Gguf, key: Metadata):
        common = _common(gguf, key)
        if common["attention_bias"]:
            raise _unsupported(gguf, "has biases in its attention", "attn_q.bias", "a Mixtral model")
        return transformers.MixtralConfig(
            **common,
            num_local_experts=key("expert_count"),
            intermediate_size=key("expert_feed_forward_length", key("feed_forward_length")),
            sliding_window=None,
        )

    def apart(w: Tensor, head_dim: int) -> Tensor:  # [heads * head_dim, width]
        return w.view(-1, head_dim // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)

    def parameters(gguf: Gguf, config, index: int) -> dict:
        turned = {
            f"self_attn.{p}_proj.weight": Made((f"attn_{p}.weight",), lambda w: apart(w, config.head_dim)) for p in "qk"
        }
        return _norms("ffn_norm") | _attention(gguf, index) | turned | ROUTER

    return Architecture(config, m.MixtralDecoderLayer, m.MixtralRotaryEmbedding, parameters)


def _deepseek2() -> Architecture:
    """DeepSeek-V2. llama.cpp keeps the two parts of kv_b apart, the keys' one turned: it is absorbed into the query."""
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as m

    def config(gguf: Gguf, key: Metadata):
        if key("expert_group_count", 1) > 1:
            raise _unsupported(gguf, "has a routing", f"{key('expert_group_count')} groups of experts", "one group")
        if key("expert_weights_norm", False):
            raise _unsupported(gguf, "has a routing", "a softmax with expert_weights_norm", "weights as they are")
        return transformers.DeepseekV2Config(
            **_deepseek_common(gguf, key), topk_method="greedy", n_group=1, topk_group=1, norm_topk_prob=False
        )

    return Architecture(config, m.DeepseekV2DecoderLayer, m.DeepseekV2RotaryEmbedding, _deepseek_parameters)


def _deepseek3() -> Architecture:
    """DeepSeek-V3: `deepseek2` with a sigmoid in the router."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as m

    def config(gguf: Gguf, key: Metadata):
        return transformers.DeepseekV3Config(
            **_deepseek_common(gguf, key),
            n_group=key("expert_group_count", 1) or 1,
            topk_group=key("expert_group_used_count", 1) or 1,
            norm_topk_prob=key("expert_weights_norm", False),
            rope_interleave=True,
        )

    return Architecture(config, m.DeepseekV3DecoderLayer, m.DeepseekV3RotaryEmbedding, _deepseek_parameters)


def _deepseek_common(gguf: Gguf, key: Metadata) -> dict:
    common = _common(gguf, key, partial=True)
    key("expert_gating_func", 0)  # `of` has seen to it
    del common["head_dim"]  # the configuration derives it
    rope_dim = key("rope.dimension_count")
    return common | {
        "num_key_value_heads": common["num_attention_heads"],  # the file says 1, for the absorbed form
        "q_lora_rank": key("attention.q_lora_rank", None),
        "kv_lora_rank": key("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key("attention.key_length_mla") - rope_dim,
        "v_head_dim": key("attention.value_length_mla"),
        "first_k_dense_replace": key("leading_dense_block_count"),
        "intermediate_size": key("feed_forward_length"),
        "n_routed_experts": key("expert_count"),
        "n_shared_experts": key("expert_shared_count"),
        "moe_intermediate_size": key("expert_feed_forward_length"),
        "routed_scaling_factor": key("expert_weights_scale", 1.0) or 1.0,
        "attention_bias": False,
    }


def _deepseek_parameters(gguf: Gguf, config, index: int) -> dict:
    def joined(k_b: Tensor, v_b: Tensor) -> Tensor:  # [heads, kv_lora, nope], [heads, v, kv_lora]
        return torch.cat([k_b.transpose(1, 2), v_b], 1).flatten(0, 1)

    names = {
        "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
        "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
        "self_attn.kv_b_proj.weight": Made(("attn_k_b.weight", "attn_v_b.weight"), joined),
        "self_attn.o_proj.weight": "attn_output.weight",
    }
    if config.q_lora_rank is None:
        names["self_attn.q_proj.weight"] = "attn_q.weight"
    else:
        names["self_attn.q_a_proj.weight"] = "attn_q_a.weight"
        names["self_attn.q_a_layernorm.weight"] = "attn_q_a_norm.weight"
        names["self_attn.q_b_proj.weight"] = "attn_q_b.weight"
    dense = config.first_k_dense_replace
    return _norms("ffn_norm") | names | _experts_or_dense(gguf, index, dense, "shared_experts")


def _glm4moe() -> Architecture:
    from transformers.models.glm4_moe import modeling_glm4_moe as m

    def config(gguf: Gguf, key: Metadata):
        common = _common(gguf, key, partial=True)
        gating = key("expert_gating_func", SIGMOID)
        if gating not in (0, SIGMOID):
            raise _unsupported(gguf, "has a routing", f"expert_gating_func {gating}", f"{SIGMOID}, a sigmoid")
        return transformers.Glm4MoeConfig(
            **common | {"rope_parameters": _partial(common, key)},
            first_k_dense_replace=key("leading_dense_block_count"),
            intermediate_size=key("feed_forward_length"),
            n_routed_experts=key("expert_count"),
            n_shared_experts=key("expert_shared_count"),
            moe_intermediate_size=key("expert_feed_forward_length"),
            routed_scaling_factor=key("expert_weights_scale", 1.0) or 1.0,
            norm_topk_prob=key("expert_weights_norm", False),
            n_group=key("expert_group_count", 1) or 1,
            topk_group=key("expert_group_used_count", 1) or 1,
            use_qk_norm="blk.0.attn_q_norm.weight" in gguf.tensors,
        )

    def parameters(gguf: Gguf, config, index: int) -> dict:
        rest = _experts_or_dense(gguf, index, config.first_k_dense_replace, "shared_experts")
        return _norms("post_attention_norm") | _attention(gguf, index) | rest

    return Architecture(config, m.Glm4MoeDecoderLayer, m.Glm4MoeRotaryEmbedding, parameters)


def _gpt_oss() -> Architecture:
    from transformers.models.gpt_oss import modeling_gpt_oss as m

    def config(gguf: Gguf, key: Metadata):
        common = _common(gguf, key)
        n, theta = common["num_hidden_layers"], common["rope_parameters"]["rope_theta"]
        if key("rope.freq_base_swa", theta) != theta:
            raise _unsupported(gguf, "has positions", "rope.freq_base_swa of its own", f"{theta:g}")
        return transformers.GptOssConfig(
            **common | {"attn_implementation": "eager"},  # its sinks are in no other
            num_local_experts=key("expert_count"),
            intermediate_size=key("expert_feed_forward_length"),
            sliding_window=key("attention.sliding_window"),
            layer_types=["full_attention" if i % 2 else "sliding_attention" for i in range(n)],
        )

    def clamped(gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)

    def parameters(gguf: Gguf, config, index: int) -> dict:
        more = {"self_attn.o_proj.bias": "attn_output.bias", "self_attn.sinks": "attn_sinks.weight"}
        router = {f"mlp.router.{p}": f"ffn_gate_inp.{p}" for p in ("weight", "bias")}
        return _norms("post_attention_norm") | _attention(gguf, index) | more | router

    return Architecture(
        config,
        m.GptOssDecoderLayer,
        m.GptOssRotaryEmbedding,
        parameters,
        router="mlp.router.weight",
        act=clamped,
        window=lambda config, i: config.sliding_window if "sliding" in config.layer_types[i] else EVERYTHING,
    )


def _recurrent(gguf: Gguf, key: Metadata) -> dict:
    """Configuration of the architectures of which most layers are recurrent."""
    common = _common(gguf, key, partial=True)
    n, interval = common["num_hidden_layers"], key("full_attention_interval", 4)
    recurrent = key.list("attention.recurrent_layers", [(i + 1) % interval != 0 for i in range(n)])
    return common | {
        "rope_parameters": _partial(common, key),
        "num_experts": key("expert_count"),
        "moe_intermediate_size": key("expert_feed_forward_length"),
        "shared_expert_intermediate_size": _shape(gguf, "blk.0.ffn_up_shexp.weight")[1],
        "layer_types": ["linear_attention" if r else "full_attention" for r in recurrent[:n]],
        "linear_conv_kernel_dim": key("ssm.conv_kernel"),
        "linear_key_head_dim": key("ssm.state_size"),
        "linear_num_key_heads": key("ssm.group_count"),
        "linear_num_value_heads": key("ssm.time_step_rank"),
        "linear_value_head_dim": key("ssm.inner_size") // key("ssm.time_step_rank"),
    }


def _recurrent_parameters(gguf: Gguf, config, index: int, mixer: dict) -> dict:
    """mixer: those of a recurrent layer in place of attention."""
    names = ROUTER | _mlp("mlp.shared_expert", "_shexp") | _norms("post_attention_norm")
    names["mlp.shared_expert_gate.weight"] = "ffn_gate_inp_shexp.weight"
    return names | (_attention(gguf, index) if config.layer_types[index] == "full_attention" else mixer)


def _plain_norms(kind: type) -> Callable[[nn.Module], None]:
    """Norms that add one to their weight give way to plain ones: in the file it is added already."""

    def prepare(layer: nn.Module) -> None:
        for name, module in list(layer.named_modules()):
            if type(module) is kind:
                parent, _, attribute = name.rpartition(".")
                setattr(layer.get_submodule(parent), attribute, nn.RMSNorm(module.weight.shape, module.eps))

    return prepare


def _qwen3next() -> Architecture:
    from transformers.models.qwen3_next import modeling_qwen3_next as m

    def config(gguf: Gguf, key: Metadata):
        fixed = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
        return transformers.Qwen3NextConfig(**_recurrent(gguf, key), **fixed)

    def interleaved(config, qkv: Tensor, z: Tensor) -> Tensor:
        """[q; k; v] and z of all heads -> q, k, v, z of one key head after the other."""
        heads = config.linear_num_key_heads
        width = heads * config.linear_key_head_dim
        q, k, v = qkv.split([width, width, len(qkv) - 2 * width])
        return torch.cat([part.view(heads, -1, qkv.shape[1]) for part in (q, k, v, z)], 1).flatten(0, 1)

    def parameters(gguf: Gguf, config, index: int) -> dict:
        mixer = {
            "linear_attn.in_proj_qkvz.weight": Made(
                ("attn_qkv.weight", "attn_gate.weight"), lambda qkv, z: interleaved(config, qkv, z)
            ),
            "linear_attn.in_proj_ba.weight": "ssm_ba.weight",
            "linear_attn.conv1d.weight": "ssm_conv1d.weight",
            "linear_attn.dt_bias": "ssm_dt.bias",
            "linear_attn.A_log": Made(("ssm_a",), lambda a: torch.log(-a)),
            "linear_attn.norm.weight": "ssm_norm.weight",
            "linear_attn.out_proj.weight": "ssm_out.weight",
        }
        return _recurrent_parameters(gguf, config, index, mixer)

    norms = _plain_norms(m.Qwen3NextRMSNorm)
    return Architecture(config, m.Qwen3NextDecoderLayer, m.Qwen3NextRotaryEmbedding, parameters, prepare=norms)


def _qwen35moe() -> Architecture:
    """Qwen3.5: as Qwen3-Next with separate projections. The value heads of a key head are together in transformers,
    in the file the first of all key heads come first, then the second."""
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as m

    def config(gguf: Gguf, key: Metadata):
        made = _recurrent(gguf, key)
        sections = {"mrope_section": key.list("rope.dimension_sections")[:3], "mrope_interleaved": True}
        return transformers.Qwen3_5MoeTextConfig(**made | {"rope_parameters": made["rope_parameters"] | sections})

    def parameters(gguf: Gguf, config, index: int) -> dict:
        keys, dim = config.linear_num_key_heads, config.linear_value_head_dim
        per_key = config.linear_num_value_heads // keys

        def together(w: Tensor, size: int) -> Tensor:  # [value heads * size, ...]
            return w.reshape(per_key, keys, size, *w.shape[1:]).transpose(0, 1).reshape(w.shape)

        def values_together(w: Tensor) -> Tensor:  # [q; k; v, ...]
            first = 2 * keys * config.linear_key_head_dim
            return torch.cat([w[:first], together(w[first:], dim)])

        mixer = {
            "linear_attn.in_proj_qkv.weight": Made(("attn_qkv.weight",), values_together),
            "linear_attn.in_proj_z.weight": Made(("attn_gate.weight",), lambda w: together(w, dim)),
            "linear_attn.in_proj_b.weight": Made(("ssm_beta.weight",), lambda w: together(w, 1)),
            "linear_attn.in_proj_a.weight": Made(("ssm_alpha.weight",), lambda w: together(w, 1)),
            "linear_attn.conv1d.weight": Made(("ssm_conv1d.weight",), values_together),
            "linear_attn.dt_bias": Made(("ssm_dt.bias",), lambda w: together(w, 1)),
            "linear_attn.A_log": Made(("ssm_a",), lambda a: torch.log(-together(a, 1))),
            "linear_attn.norm.weight": "ssm_norm.weight",
            "linear_attn.out_proj.weight": Made(("ssm_out.weight",), lambda w: together(w.T, dim).T),
        }
        return _recurrent_parameters(gguf, config, index, mixer)

    norms = _plain_norms(m.Qwen3_5MoeRMSNorm)
    return Architecture(config, m.Qwen3_5MoeDecoderLayer, m.Qwen3_5MoeTextRotaryEmbedding, parameters, prepare=norms)


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "qwen3moe": _qwen3moe,
    "qwen2moe": _qwen2moe,
    "olmoe": _olmoe,
    "llama": _mixtral,
    "deepseek2": _deepseek2,
    "glm4moe": _glm4moe,
    "gpt-oss": _gpt_oss,
    "qwen3next": _qwen3next,
    "qwen35moe": _qwen35moe,
}
SIGMOID = 2  # expert_gating_func


def of(gguf: Gguf) -> Architecture:
    """The entry for a file; MobieError for an architecture that is not here."""
    if gguf.architecture not in ARCHITECTURES:
        raise MobieError(
            UNSUPPORTED,
            f"{gguf.paths[0]} cannot be calibrated",
            f"architecture {gguf.architecture}",
            f"one of {', '.join(ARCHITECTURES)}",
            "export with --method sign, which works with every architecture",
        )
    try:
        return (
            _deepseek3()
            if gguf.architecture == "deepseek2" and _is_sigmoid(gguf)
            else ARCHITECTURES[gguf.architecture]()
        )
    except ImportError as e:
        raise MobieError(
            UNSUPPORTED,
            f"the installed transformers {transformers.__version__} does not know {gguf.architecture} models",
            str(e),
            "a version that does",
            "pip install 'mobie-export[calibrate]', or export with --method sign",
        ) from e


def _is_sigmoid(gguf: Gguf) -> bool:
    """Whether a `deepseek2` file routes by a sigmoid, as llama.cpp finds out; MobieError for a third way."""
    key = Metadata(gguf)
    gating = key("expert_gating_func", 0)
    if gating not in (0, 1, SIGMOID):
        raise _unsupported(gguf, "has a routing", f"expert_gating_func {gating}", f"1 or {SIGMOID}")
    n_layers = key("block_count") - key("nextn_predict_layers", 0)
    lite = n_layers in (47, 48) and _shape(gguf, "token_embd.weight")[1:] == (154880,)  # GLM-4.7-Lite, without the key
    return gating == SIGMOID or (gating == 0 and lite)
