"""What families have in common: keywords of configurations, names of tensors."""

from typing import Any

from mobie_export.gguf_io import Gguf
from mobie_export.models.architecture import Metadata, Parameters, unsupported

SIGMOID = 2  # expert_gating_func
Keywords = dict[str, Any]  # of a configuration of transformers, which takes values of many types

# ---- configurations --------------------------------------------------------------------------------------------------


def shape(gguf: Gguf, name: str) -> tuple[int, ...]:
    """Of a tensor that a configuration needs."""
    if name not in gguf.tensors:
        raise unsupported(gguf, "has a layout", f"no tensor {name}", f"a {gguf.architecture} model")
    return gguf.tensors[name].shape


def keywords(gguf: Gguf, key: Metadata, partial: bool = False) -> Keywords:
    """What every configuration has. partial: whether a part of every head may be rotated, and the rest not."""
    head = key("attention.key_length", key("embedding_length") // key("attention.head_count"))
    rotated = key("rope.dimension_count", head)
    if rotated != head and not partial:
        raise unsupported(gguf, "has a rotation", f"rope.dimension_count {rotated} of {head}", f"{head}")
    return {
        "vocab_size": shape(gguf, "token_embd.weight")[1],
        "hidden_size": key("embedding_length"),
        "num_hidden_layers": key("block_count") - key("nextn_predict_layers", 0),
        "num_attention_heads": key("attention.head_count"),
        "num_key_value_heads": key("attention.head_count_kv"),
        "head_dim": head,
        "rms_norm_eps": key.real("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(gguf, key),
        "max_position_embeddings": key("context_length"),
        "num_experts_per_tok": key("expert_used_count"),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "attn_implementation": "sdpa",
    }


def _rope(gguf: Gguf, key: Metadata) -> Keywords:
    """Position embeddings as transformers names them; MobieError for a scaling that is not here."""
    scaling = key.word("rope.scaling.type", "linear")  # llama.cpp's default: a factor alone is a linear one
    rope: Keywords = {"rope_type": "default", "rope_theta": key.real("rope.freq_base", 10000.0)}
    if scaling == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": key.real("rope.scaling.factor"),
            "original_max_position_embeddings": key("rope.scaling.original_context_length"),
            "beta_fast": key.real("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": key.real("rope.scaling.yarn_beta_slow", 1.0),
            "truncate": True,  # llama.cpp rounds the range outwards, whatever the checkpoint did
        }
        multiplier = key.real("rope.scaling.yarn_log_multiplier", 0.0)
        if multiplier and gguf.architecture == "deepseek2":  # a tenth of what the checkpoint calls mscale_all_dim
            rope |= {"mscale": 10 * multiplier, "mscale_all_dim": 10 * multiplier}
        elif (
            multiplier
            or key.real("rope.scaling.attn_factor", 1.0) != 1.0
            or key.real("rope.scaling.yarn_ext_factor", 1.0) != 1.0
        ):
            raise unsupported(gguf, "has a variant of YaRN", "rope.scaling with own factors", "plain YaRN")
    elif scaling == "linear":
        factor = key.real("rope.scaling.factor", 0.0) or key.real("rope.scale_linear", 0.0)
        if factor not in (0.0, 1.0):
            raise unsupported(gguf, "has a scaling of positions", f"a linear one by {factor:g}", "none or yarn")
    elif scaling == "none":
        key.real("rope.scaling.factor", 0.0)  # without influence then
    else:
        raise unsupported(gguf, "has a scaling of positions", f"rope.scaling.type {scaling!r}", "none or yarn")
    if "rope_freqs.weight" in gguf.tensors:
        raise unsupported(gguf, "has frequencies for positions", "rope_freqs.weight", "plain RoPE or YaRN")
    return rope


def partial_rope(config: Keywords, key: Metadata) -> Keywords:
    """Position embeddings on the first part of every head."""
    share = key("rope.dimension_count", config["head_dim"]) / config["head_dim"]
    rope: Keywords = config["rope_parameters"] | {"partial_rotary_factor": share}
    return rope


# ---- tensors ---------------------------------------------------------------------------------------------------------

ROUTER: Parameters = {"mlp.gate.weight": "ffn_gate_inp.weight"}


def attention(gguf: Gguf, index: int) -> Parameters:
    """Plain attention; biases and norms of heads where the file has them."""
    names: Parameters = {f"self_attn.{p}_proj.weight": f"attn_{p}.weight" for p in "qkv"}
    names["self_attn.o_proj.weight"] = "attn_output.weight"
    if f"blk.{index}.attn_q.bias" in gguf.tensors:
        names |= {f"self_attn.{p}_proj.bias": f"attn_{p}.bias" for p in "qkv"}
    if f"blk.{index}.attn_q_norm.weight" in gguf.tensors:
        names |= {f"self_attn.{p}_norm.weight": f"attn_{p}_norm.weight" for p in "qk"}
    return names


def norms(second: str) -> Parameters:
    """second: what the norm in front of the experts is called."""
    return {"input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": f"{second}.weight"}


def network(module: str, suffix: str) -> Parameters:
    """A feed-forward network that is no expert. suffix: of its tensors' names."""
    return {f"{module}.{p}_proj.weight": f"ffn_{p}{suffix}.weight" for p in ("gate", "up", "down")}


def shared_expert() -> Parameters:
    """With a gate of its own."""
    gate: Parameters = {"mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight"}
    return network("mlp.shared_expert", "_shexp") | gate


def experts_or_dense(gguf: Gguf, index: int, dense: int, shared: str) -> Parameters:
    """Layers below `dense` have one feed-forward network; the others a router, shared experts and maybe its bias."""
    if index < dense:
        return network("mlp", "")
    names = ROUTER | network(f"mlp.{shared}", "_shexp")
    if f"blk.{index}.exp_probs_b.bias" in gguf.tensors:
        names["mlp.gate.e_score_correction_bias"] = "exp_probs_b.bias"
    return names
