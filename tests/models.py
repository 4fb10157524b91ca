"""Tiny random Mixture-of-Experts models as GGUF files, written by gguf-py and loadable by llama.cpp."""

import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from tools.assets.fabricate_gguf import byte_tokens

N_LAYER, N_EMBD, N_FF, N_EXPERT, N_USED = 2, 320, 192, 8, 2  # widths of 5 and 3 blocks: no multiples of 256
N_HEAD, N_HEAD_KV, HEAD = 4, 2, 64
N_VOCAB = 320

Tensors = dict[str, tuple[np.ndarray, Type]]  # name -> (stored array, slowest dimension first; type)


def stored(values: np.ndarray, kind: Type) -> tuple[np.ndarray, Type]:
    return gguf.quants.quantize(values.astype(np.float32), kind), kind


def qwen3moe(experts: str = "F16", seed: int = 0, fused: bool = False) -> Tensors:
    """Random tensors, of a size that keeps activations near one. Everything but experts is F16, or F32 if 1-D."""
    rng = np.random.default_rng(seed)
    kind = Type[experts]

    def matrix(*shape: int, kind: Type = Type.F16) -> tuple[np.ndarray, Type]:
        return stored(rng.standard_normal(shape) / np.sqrt(shape[-1]), kind)

    def norm(n: int) -> tuple[np.ndarray, Type]:
        return stored(rng.uniform(0.5, 1.5, n), Type.F32)

    tensors = {
        "token_embd.weight": matrix(N_VOCAB, N_EMBD),
        "output.weight": matrix(N_VOCAB, N_EMBD),
        "output_norm.weight": norm(N_EMBD),
    }
    for i in range(N_LAYER):
        layer = {
            "attn_q.weight": matrix(N_HEAD * HEAD, N_EMBD),
            "attn_k.weight": matrix(N_HEAD_KV * HEAD, N_EMBD),
            "attn_v.weight": matrix(N_HEAD_KV * HEAD, N_EMBD),
            "attn_output.weight": matrix(N_EMBD, N_HEAD * HEAD),
            "attn_q_norm.weight": norm(HEAD),
            "attn_k_norm.weight": norm(HEAD),
            "attn_norm.weight": norm(N_EMBD),
            "ffn_norm.weight": norm(N_EMBD),
            "ffn_gate_inp.weight": matrix(N_EXPERT, N_EMBD, kind=Type.F32),
        }
        if fused:
            layer["ffn_gate_up_exps.weight"] = matrix(N_EXPERT, 2 * N_FF, N_EMBD, kind=kind)
        else:
            layer["ffn_gate_exps.weight"] = matrix(N_EXPERT, N_FF, N_EMBD, kind=kind)
            layer["ffn_up_exps.weight"] = matrix(N_EXPERT, N_FF, N_EMBD, kind=kind)
        layer["ffn_down_exps.weight"] = matrix(N_EXPERT, N_EMBD, N_FF, kind=kind)
        tensors |= {f"blk.{i}.{name}": value for name, value in layer.items()}
    return tensors


def write_qwen3moe(
    path: Path,
    experts: str = "F16",
    seed: int = 0,
    fused: bool = False,
    split: int = 0,
    alignment: int | None = None,
    change: Callable[[Tensors], None] | None = None,
    keys: Callable[[gguf.GGUFWriter], None] | None = None,
) -> None:
    """Write a model. `split`: at most so many tensors per shard; `change` and `keys` alter it before it is written."""
    tensors = qwen3moe(experts, seed, fused)
    if change:
        change(tensors)
    writer = gguf.GGUFWriter(path, "qwen3moe", split_max_tensors=split)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_name("tiny")
    writer.add_context_length(4096)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(N_EXPERT)
    writer.add_expert_used_count(N_USED)
    writer.add_expert_feed_forward_length(N_FF)
    writer.add_file_type(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = [*byte_tokens(), "Ġt", *(f"<filler {i}>" for i in range(N_VOCAB - 258)), "<|endoftext|>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (N_VOCAB - 1) + [3])
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(N_VOCAB - 1)
    writer.add_eos_token_id(N_VOCAB - 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}→ü{% endfor %}")
    if keys:
        keys(writer)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_projector(path: Path, width: int = N_EMBD, kind: str | None = "mmproj") -> None:
    """The vision part of a model, as LLaVA has it: images of 28 x 28 in four patches, two layers. width: of the model
    beside which it is used; kind: general.type, None as it was before there was one."""
    rng, n, ff, patch = np.random.default_rng(0), 32, 64, 14

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)

    writer = gguf.GGUFWriter(path, "clip")
    if kind:
        writer.add_type(kind)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", True)
    writer.add_string("clip.projector_type", "mlp")
    sizes = {"image_size": 2 * patch, "patch_size": patch, "embedding_length": n, "feed_forward_length": ff}
    for key, value in (sizes | {"block_count": 2, "projection_dim": width, "attention.head_count": 4}).items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    tensors = {"v.patch_embd.weight": matrix(n, 3, patch, patch), "v.position_embd.weight": matrix(4, n)}
    for i in range(2):
        tensors |= {f"v.blk.{i}.attn_{part}.weight": matrix(n, n) for part in ("q", "k", "v", "out")}
        tensors |= {f"v.blk.{i}.ln{j}.{part}": np.ones(n, np.float32) for j in (1, 2) for part in ("weight", "bias")}
        tensors |= {f"v.blk.{i}.ffn_up.weight": matrix(ff, n), f"v.blk.{i}.ffn_down.weight": matrix(n, ff)}
    tensors |= {"mm.0.weight": matrix(width, n), "mm.2.weight": matrix(width, width)}
    tensors |= {f"mm.{i}.bias": np.zeros(width, np.float32) for i in (0, 2)}
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decoded(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file as gguf-py reads and decodes them, slowest dimension first."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def every_kind_of_entry(writer: gguf.GGUFWriter) -> None:
    """Metadata of every type, for `keys` of `write_qwen3moe`."""
    writer.add_uint8("x.u8", 200)
    writer.add_int8("x.i8", -100)
    writer.add_uint16("x.u16", 60000)
    writer.add_int16("x.i16", -30000)
    writer.add_int32("x.i32", -5)
    writer.add_uint64("x.u64", 2**63 + 1)
    writer.add_int64("x.i64", -(2**62))
    writer.add_float64("x.f64", math.pi)
    writer.add_bool("x.bool", True)
    writer.add_array("x.floats", [1.5, -2.0])
    writer.add_array("x.bools", [True, False, True])
    writer.add_array("x.strings", ["ü", "", "→" * 100])


def as_f32(tensors: Tensors) -> None:
    """Everything F32: llama.cpp rounds activations to the type of F16 weights."""
    for name, (array, kind) in tensors.items():
        values = gguf.quants.dequantize(array, kind)
        tensors[name] = stored(values, Type.F32)
