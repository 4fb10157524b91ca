"""Write a GGUF with the shapes of a real Mixture-of-Experts model and random contents.

For measuring time and memory at full size without a download. The files load in llama.cpp; what they say is noise.

    python -m tools.assets.fabricate_gguf --shape olmoe-1b-7b --type F16 OUT.gguf
    python -m tools.assets.fabricate_gguf --shape qwen3-30b-a3b --layers 8 --type Q4_0 --experts mobie OUT.gguf

Of every type a few rows are made and repeated from another one on in every tensor: F32, F16 and mobie with numpy, all
others by the quantizers of the installed runtime, or of another build of ggml (--ggml). With --sparse nothing is made
but the header: a file of that size, all zero, that takes no disk; for what a plan says of a model.
"""

import argparse
import math
import shutil
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np

from mobie_export import gguf_io
from mobie_export.errors import NO_SPACE, UNSUPPORTED, MobieError
from mobie_export.gguf_io import BOOL, F32, I32, STRING, U32, align, make_entry
from mobie_export.runtime import libggml, processes
from mobie_export.spec import block as mobie
from mobie_export.spec import metadata

SPREAD = 0.02  # standard deviation of weights, as models are initialised
# Embeddings are larger, so that what the layers add does not drown the token and experts are chosen evenly.
EMBEDDING_SPREAD = 1.0
POOL_WEIGHTS = 1 << 22  # in the rows that a tensor's contents are made of ...
POOL_WEIGHTS_SLOW = 1 << 18  # ... and where the quantizer searches
FAST_TYPES = {"F32", "F16", "BF16", "Q4_0", "Q8_0", "mobie"}
ROW_GROUP = 8  # rows are moved in groups: some builds of ggml have types that interleave up to 8
CHUNK_BYTES = 8 << 20

# What llama-quantize takes for a type whose block (in brackets) does not divide a row: `tensor_type_fallback` in
# src/llama-quant.cpp. Of a type with such a block that is not listed it makes an error.
FALLBACK = {
    "IQ1_S": (256, "IQ4_NL"),
    "IQ1_M": (256, "IQ4_NL"),
    "IQ2_XXS": (256, "IQ4_NL"),
    "Q2_K": (256, "Q4_0"),
    "TQ1_0": (256, "Q4_0"),
    "TQ2_0": (256, "Q4_0"),
    "Q4_K": (256, "Q5_0"),
}

# --- shapes -----------------------------------------------------------------------------------------------------------

Row = tuple[str, tuple[int, ...], str]  # name, shape with the fastest dimension first, role
ONES, NOISE, EMBEDDING, MATRIX, EXPERT = "ones", "noise", "embedding", "matrix", "expert"  # the roles


@dataclass(frozen=True)
class Shape:
    """Sizes as the models' configurations give them."""

    architecture: str
    pre_tokenizer: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head: int
    n_ff: int
    n_ff_expert: int
    n_expert: int
    n_used: int
    n_vocab: int
    n_context: int
    rope_base: float
    norm_eps: float
    attention: Callable[["Shape"], Iterator[Row]]
    ffn_norm: str = "ffn_norm"
    n_ff_shared: int = 0  # width of the expert that all tokens use, 0 where there is none
    shared_gate: bool = False  # ... which a gate weights
    expert_bias: bool = False
    n_dense: int = 0  # first layers without experts
    keys: tuple[tuple[str, int, object], ...] = ()  # further metadata: key after the architecture, type, value


def attention_norms(s: Shape, norms: tuple[int, int]) -> Iterator[Row]:
    """Query, key, value, output; query and key are normed over a head or over all heads."""
    query, key = s.n_head * s.head, s.n_head_kv * s.head
    yield "attn_q_norm.weight", (norms[0],), ONES
    yield "attn_k_norm.weight", (norms[1],), ONES
    yield "attn_q.weight", (s.n_embd, query), MATRIX
    yield "attn_k.weight", (s.n_embd, key), MATRIX
    yield "attn_v.weight", (s.n_embd, key), MATRIX
    yield "attn_output.weight", (query, s.n_embd), MATRIX


def attention_wide_norms(s: Shape) -> Iterator[Row]:
    return attention_norms(s, (s.n_head * s.head, s.n_head_kv * s.head))


def attention_head_norms(s: Shape) -> Iterator[Row]:
    return attention_norms(s, (s.head, s.head))


def attention_bias(s: Shape) -> Iterator[Row]:
    query, key = s.n_head * s.head, s.n_head_kv * s.head
    for name, width in (("q", query), ("k", key), ("v", key)):
        yield f"attn_{name}.weight", (s.n_embd, width), MATRIX
        yield f"attn_{name}.bias", (width,), NOISE
    yield "attn_output.weight", (query, s.n_embd), MATRIX


def attention_sinks(s: Shape) -> Iterator[Row]:
    yield from attention_bias(s)
    yield "attn_output.bias", (s.n_embd,), NOISE
    yield "attn_sinks.weight", (s.n_head,), NOISE


def attention_latent(s: Shape, latent: int, rope: int, nope: int) -> Iterator[Row]:
    """DeepSeek's: keys and values of all heads are products with one latent vector."""
    yield "attn_q.weight", (s.n_embd, s.n_head * (nope + rope)), MATRIX
    yield "attn_kv_a_mqa.weight", (s.n_embd, latent + rope), MATRIX
    yield "attn_kv_a_norm.weight", (latent,), ONES
    yield "attn_k_b.weight", (nope, latent, s.n_head), MATRIX
    yield "attn_v_b.weight", (latent, s.head, s.n_head), MATRIX
    yield "attn_output.weight", (s.n_head * s.head, s.n_embd), MATRIX


def yarn(factor: float, original: int) -> tuple[tuple[str, int, object], ...]:
    return (
        ("rope.scaling.type", STRING, "yarn"),
        ("rope.scaling.factor", F32, factor),
        ("rope.scaling.original_context_length", U32, original),
    )


# The sizes in Shape's order:
#   layers, embedding, heads, heads of keys and values, head; feed-forward, expert, experts, used; vocabulary, context
SHAPES = {
    "olmoe-1b-7b": Shape(
        *("olmoe", "olmo", 16, 2048, 16, 16, 128, 1024, 1024, 64, 8, 50304, 4096),
        rope_base=1e4,
        norm_eps=1e-5,
        attention=attention_wide_norms,
    ),
    "qwen3-30b-a3b": Shape(
        *("qwen3moe", "qwen2", 48, 2048, 32, 4, 128, 6144, 768, 128, 8, 151936, 40960),
        rope_base=1e6,
        norm_eps=1e-6,
        attention=attention_head_norms,
    ),
    "qwen1.5-moe-a2.7b": Shape(
        *("qwen2moe", "qwen2", 24, 2048, 16, 16, 128, 5632, 1408, 60, 4, 151936, 8192),
        rope_base=1e6,
        norm_eps=1e-6,
        attention=attention_bias,
        n_ff_shared=5632,
        shared_gate=True,
        keys=(("expert_shared_feed_forward_length", U32, 5632),),
    ),
    "deepseek-v2-lite": Shape(  # a value's head; keys are 64 rotated and 128 other elements
        *("deepseek2", "deepseek-llm", 27, 2048, 16, 1, 128, 10944, 1408, 64, 6, 102400, 163840),
        rope_base=1e4,
        norm_eps=1e-6,
        attention=partial(attention_latent, latent=512, rope=64, nope=128),
        n_ff_shared=2 * 1408,
        n_dense=1,
        keys=(
            ("leading_dense_block_count", U32, 1),
            ("expert_shared_count", U32, 2),
            ("expert_weights_scale", F32, 1.0),
            ("attention.q_lora_rank", U32, 0),  # asked for at any other number of layers than the real one
            ("attention.kv_lora_rank", U32, 512),
            ("attention.key_length", U32, 576),
            ("attention.value_length", U32, 512),
            ("attention.key_length_mla", U32, 192),
            ("attention.value_length_mla", U32, 128),
            ("rope.dimension_count", U32, 64),
            *yarn(40.0, 4096),
            ("rope.scaling.yarn_log_multiplier", F32, 0.0707),
        ),
    ),
    "gpt-oss-20b": Shape(
        *("gpt-oss", "gpt-4o", 24, 2880, 64, 8, 64, 2880, 2880, 32, 4, 201088, 131072),
        rope_base=150000.0,
        norm_eps=1e-5,
        attention=attention_sinks,
        ffn_norm="post_attention_norm",
        expert_bias=True,
        keys=(("attention.sliding_window", U32, 128), *yarn(32.0, 4096)),
    ),
}


def expert_matrices(s: Shape) -> dict[str, tuple[int, int, int]]:
    """Shape of every expert tensor of a layer."""
    inner = (s.n_embd, s.n_ff_expert, s.n_expert)
    return {"ffn_gate_exps": inner, "ffn_up_exps": inner, "ffn_down_exps": (s.n_ff_expert, s.n_embd, s.n_expert)}


def feed_forward(s: Shape, suffix: str, width: int) -> Iterator[Row]:
    yield f"ffn_gate{suffix}.weight", (s.n_embd, width), MATRIX
    yield f"ffn_up{suffix}.weight", (s.n_embd, width), MATRIX
    yield f"ffn_down{suffix}.weight", (width, s.n_embd), MATRIX


def experts(s: Shape) -> Iterator[Row]:
    yield "ffn_gate_inp.weight", (s.n_embd, s.n_expert), NOISE
    for name, dims in expert_matrices(s).items():
        yield f"{name}.weight", dims, EXPERT
        if s.expert_bias:
            yield f"{name}.bias", dims[1:], NOISE
    if s.expert_bias:
        yield "ffn_gate_inp.bias", (s.n_expert,), NOISE
    if s.n_ff_shared:
        yield from feed_forward(s, "_shexp", s.n_ff_shared)
    if s.shared_gate:
        yield "ffn_gate_inp_shexp.weight", (s.n_embd,), NOISE


def tensors(s: Shape) -> Iterator[Row]:
    yield "token_embd.weight", (s.n_embd, s.n_vocab), EMBEDDING
    for i in range(s.n_layer):
        norms = [("attn_norm.weight", (s.n_embd,), ONES), (f"{s.ffn_norm}.weight", (s.n_embd,), ONES)]
        inner = feed_forward(s, "", s.n_ff) if i < s.n_dense else experts(s)
        for name, dims, role in (*norms, *s.attention(s), *inner):
            yield f"blk.{i}.{name}", dims, role
    yield "output_norm.weight", (s.n_embd,), ONES
    yield "output.weight", (s.n_embd, s.n_vocab), MATRIX


def make_entries(s: Shape, type_name: str) -> list[gguf_io.Entry]:
    """Hyperparameters, and a byte-level tokenizer filled up to the vocabulary's size."""
    arch = s.architecture
    tokens = [*byte_tokens(), "Ġt", *(f"<filler {i}>" for i in range(s.n_vocab - 258)), "<|endoftext|>"]
    numbers = {
        "block_count": s.n_layer,
        "context_length": s.n_context,
        "embedding_length": s.n_embd,
        "feed_forward_length": s.n_ff,
        "expert_feed_forward_length": s.n_ff_expert,
        "attention.head_count": s.n_head,
        "attention.head_count_kv": s.n_head_kv,
        "attention.key_length": s.head,
        "attention.value_length": s.head,
        "expert_count": s.n_expert,
        "expert_used_count": s.n_used,
    }
    keys = {key: (U32, value) for key, value in numbers.items()}
    keys["rope.freq_base"] = (F32, s.rope_base)
    keys["attention.layer_norm_rms_epsilon"] = (F32, s.norm_eps)
    keys |= {key: (kind, value) for key, kind, value in s.keys}
    ours = [metadata.FORMAT_VERSION.entry(mobie.FORMAT_VERSION), metadata.TYPE_ID.entry(mobie.TYPE_ID)]
    return [
        make_entry("general.architecture", STRING, arch),
        make_entry("general.name", STRING, "random weights"),
        make_entry("general.quantization_version", U32, 2),
        *(make_entry(f"{arch}.{key}", kind, value) for key, (kind, value) in keys.items()),
        *(ours if type_name == mobie.TYPE_NAME else []),
        make_entry("tokenizer.ggml.model", STRING, "gpt2"),
        make_entry("tokenizer.ggml.pre", STRING, s.pre_tokenizer),
        make_entry("tokenizer.ggml.tokens", gguf_io.ARRAY, tokens, STRING),
        make_entry("tokenizer.ggml.token_type", gguf_io.ARRAY, [1] * (s.n_vocab - 1) + [3], I32),
        make_entry("tokenizer.ggml.merges", gguf_io.ARRAY, ["Ġ t"], STRING),
        make_entry("tokenizer.ggml.eos_token_id", U32, s.n_vocab - 1),
        make_entry("tokenizer.ggml.add_bos_token", BOOL, False),
    ]


def byte_tokens() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes as."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(rest)) for b in range(256)]


# --- types ------------------------------------------------------------------------------------------------------------


def fitting_type(type_name: str, cols: int) -> str:
    """The type llama-quantize would give a row of `cols` weights. Raises MobieError where it knows none."""
    block, other = FALLBACK.get(type_name, (0, type_name))
    if block and cols % block:
        return other
    if type_name == "Q1_0" and cols % 128:
        raise MobieError(UNSUPPORTED, f"no Q1_0 for rows of {cols} weights", wanted="a multiple of 128")
    return type_name


def expert_types(s: Shape, type_name: str) -> dict[str, str]:
    """The type of every expert tensor of a layer; MobieError as in `fitting_type`."""
    return {name: fitting_type(type_name, dims[0]) for name, dims in expert_matrices(s).items()}


def runtime_ggml() -> Path:
    path = libggml.base_library()
    if not path.exists():
        raise processes.unavailable(f"there is no {path}", todo="mobie-export runtime build")
    return path


class Types:
    """Sizes and random rows of every type. ggml is loaded when a type needs it."""

    def __init__(self, library: Path | None = None, ids: dict[str, int] | None = None):
        self._ids, self._library, self._ggml = ids or {}, library, None
        self._pools: dict[tuple[str, int, float], np.ndarray] = {}

    def ggml(self) -> libggml.Quantizers:
        if self._ggml is None:
            self._ggml = libggml.Quantizers(self._library or runtime_ggml())
        return self._ggml

    def id(self, name: str) -> int:
        if name == mobie.TYPE_NAME:
            return mobie.TYPE_ID
        return self._ids.get(name) or int(gguf.GGMLQuantizationType[name])

    def row_bytes(self, name: str, cols: int) -> int:
        if name in self._ids:
            return self.ggml().row_bytes(self.id(name), cols)
        return gguf_io.tensor_bytes((cols,), self.id(name))

    def pool(self, name: str, cols: int, spread: float) -> np.ndarray:
        """Random rows one after another, uint8 [at least CHUNK_BYTES], a whole number of groups."""
        key = (name, cols, spread)
        if key not in self._pools:
            n = POOL_WEIGHTS if name in FAST_TYPES else POOL_WEIGHTS_SLOW
            rows = max(1, n // cols // ROW_GROUP) * ROW_GROUP
            raw = self._rows(name, rows, cols, spread, np.random.default_rng([*name.encode(), cols]))
            self._pools[key] = np.tile(raw.reshape(-1), math.ceil(CHUNK_BYTES / raw.size))
        return self._pools[key]

    def _rows(self, name: str, rows: int, cols: int, spread: float, rng: np.random.Generator) -> np.ndarray:
        if name == mobie.TYPE_NAME:
            signs = rng.integers(0, 2, (rows, cols), np.uint8).view(np.bool_)
            return mobie.pack(signs, rng.integers(64, 256, (rows, cols // mobie.BLOCK_LEN), np.uint8))
        values = rng.standard_normal((rows, cols), dtype=np.float32) * np.float32(spread)
        if name == "F32":
            return values.view(np.uint8)
        if name == "F16":
            return values.astype(np.float16).view(np.uint8)
        return self.ggml().quantize(self.id(name), values, np.ones(cols, np.float32))


# --- the file ---------------------------------------------------------------------------------------------------------

Planned = tuple[str, tuple[int, ...], str, str, int]  # name, shape, role, type, bytes


def plan(s: Shape, type_name: str, expert_type: str, types: Types) -> list[Planned]:
    """Every tensor of a file; MobieError for experts that cannot have the type."""
    of_role = {EMBEDDING: type_name, MATRIX: type_name, ONES: "F32", NOISE: "F32"}
    result = []
    for name, dims, role in tensors(s):
        kind = fitting_type(expert_type, dims[0]) if role == EXPERT else of_role[role]
        result.append((name, dims, role, kind, types.row_bytes(kind, dims[0]) * math.prod(dims[1:])))
        if kind == mobie.TYPE_NAME:
            result.append((name.removesuffix("weight") + "scale", dims[2:], NOISE, "F32", 4 * dims[2]))
    return result


def header(entries: list[gguf_io.Entry], planned: list[Planned], types: Types) -> bytes:
    """`gguf_io.make_header` for types whose rows are no whole number of blocks."""
    parts = [gguf_io.MAGIC, struct.pack("<IQQ", gguf_io.VERSION, len(planned), len(entries))]
    parts += [entry.raw for entry in entries]
    offset = 0
    for name, dims, _, kind, size in planned:
        parts += [struct.pack("<Q", len(name)), name.encode()]
        parts.append(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, types.id(kind), offset))
        offset += align(size, gguf_io.DEFAULT_ALIGNMENT)
    return padded(b"".join(parts))


def padded(data: bytes) -> bytes:
    return data + bytes(align(len(data), gguf_io.DEFAULT_ALIGNMENT) - len(data))


def contents(item: Planned, index: int, types: Types, seed: int) -> Iterable[np.ndarray]:
    """A tensor's bytes in pieces; the same for the same seed whatever the types of other tensors are."""
    name, dims, role, kind, size = item
    rng = np.random.default_rng([seed, index])
    if name.endswith(".scale"):
        # decoded mobie weights are 1.25 at one, see Types._rows
        return [(SPREAD / 1.25 * rng.uniform(0.5, 1.5, dims)).astype(np.float32)]
    if role == ONES:
        return [np.ones(dims, np.float32)]
    if role == NOISE:
        return [rng.standard_normal(dims, np.float32) * np.float32(SPREAD)]
    pool = types.pool(kind, dims[0], EMBEDDING_SPREAD if role == EMBEDDING else SPREAD)
    group = types.row_bytes(kind, dims[0]) * ROW_GROUP
    return around(pool, size, int(rng.integers(pool.size // group)) * group)


def around(pool: np.ndarray, size: int, start: int) -> Iterator[np.ndarray]:
    """`size` bytes of the pool, uint8 [n], from byte `start` on, around and around."""
    while size:
        piece = pool[start : start + size]
        yield piece
        size -= piece.size
        start = 0


def fabricate(
    path: Path,
    shape: Shape,
    type_name: str,
    expert_type: str | None = None,
    seed: int = 0,
    types: Types | None = None,
    sparse: bool = False,
) -> None:
    """Write one file: experts of `expert_type`, other matrices of `type_name`, router and vectors F32. sparse: the
    header alone, and zeros that take no disk.

    Raises MobieError when there is no room, when experts cannot have the type, when a type needs the runtime.
    """
    types = types or Types()
    expert_type = expert_type or type_name
    planned = plan(shape, type_name, expert_type, types)
    size = sum(item[-1] for item in planned)
    free = shutil.disk_usage(path.parent).free
    if size > free and not sparse:
        raise MobieError(NO_SPACE, f"cannot write {path}", f"{free / 1e9:.1f} GB free", f"{size / 1e9:.1f} GB")
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(header(make_entries(shape, expert_type), planned, types))
            if sparse:
                file.truncate(file.tell() + sum(align(item[-1], gguf_io.DEFAULT_ALIGNMENT) for item in planned))
            else:
                _write_tensors(file, planned, types, seed)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_tensors(file: BinaryIO, planned: list[Planned], types: Types, seed: int) -> None:
    index = 0  # of tensors, expert scales not counted, so that it does not depend on the types
    for item in planned:
        for piece in contents(item, index, types, seed):
            file.write(memoryview(piece).cast("B"))
        file.write(bytes(align(item[-1], gguf_io.DEFAULT_ALIGNMENT) - item[-1]))
        index += not item[0].endswith(".scale")


def type_numbers(text: str) -> dict[str, int]:
    return {name: int(number) for name, number in (part.split("=") for part in text.split(",") if part)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="olmoe-1b-7b")
    parser.add_argument("--type", default="F16", help="of all matrices but the router: F32, F16, Q8_0, Q4_0, ... (F16)")
    parser.add_argument("--experts", help="type of the expert matrices: mobie, Q1_0, IQ1_S, ... (as --type)")
    parser.add_argument("--layers", type=int, help="write only so many layers")
    parser.add_argument("--vocab", type=int, help="another size of the vocabulary, at least 259")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparse", action="store_true", help="a header and zeros that take no disk")
    parser.add_argument("--ggml", type=Path, help="the library with ggml_quantize_chunk (the installed runtime's)")
    parser.add_argument(
        "--ids", type=type_numbers, help="numbers of types of --ggml that gguf does not know: A=219,..."
    )
    args = parser.parse_args()
    given = {"n_layer": args.layers, "n_vocab": args.vocab}
    shape = replace(SHAPES[args.shape], **{key: value for key, value in given.items() if value})
    try:
        fabricate(args.output, shape, args.type, args.experts, args.seed, Types(args.ggml, args.ids), args.sparse)
    except MobieError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main()
