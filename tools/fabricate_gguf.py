#!/usr/bin/env python3
"""Write a GGUF with the shapes of a real Mixture-of-Experts model and random contents.

For measuring time and memory at full size without a download. The files load in llama.cpp; what they say is noise.

    tools/fabricate_gguf.py --shape olmoe-1b-7b --type F16 OUT.gguf
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np

from mobie_export import gguf_io
from mobie_export.gguf_io import BOOL, F32, I32, STRING, TYPE_F32, U32, Writer, make_entry

NOISE = 1 << 23  # random weights, from which every tensor takes its own piece, wrapping around
SPREAD = 0.02  # standard deviation, as models are initialised


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
    norm_per_head: bool  # query and key norms over a head, or over all heads


SHAPES = {
    "olmoe-1b-7b": Shape(
        "olmoe", "olmo", 16, 2048, 16, 16, 128, 1024, 1024, 64, 8, 50304, 4096, 10000.0, 1e-5, norm_per_head=False
    ),
    "qwen3-30b-a3b": Shape(
        "qwen3moe", "qwen2", 48, 2048, 32, 4, 128, 6144, 768, 128, 8, 151936, 40960, 1e6, 1e-6, norm_per_head=True
    ),
}


def tensor_table(s: Shape, type_id: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(name, shape with the fastest dimension first, type) in the order converters write them."""
    query, key = s.n_head * s.head, s.n_head_kv * s.head
    norms = (s.head, s.head) if s.norm_per_head else (query, key)
    yield "token_embd.weight", (s.n_embd, s.n_vocab), type_id
    for i in range(s.n_layer):
        yield f"blk.{i}.attn_norm.weight", (s.n_embd,), TYPE_F32
        yield f"blk.{i}.ffn_down_exps.weight", (s.n_ff_expert, s.n_embd, s.n_expert), type_id
        yield f"blk.{i}.ffn_gate_exps.weight", (s.n_embd, s.n_ff_expert, s.n_expert), type_id
        yield f"blk.{i}.ffn_up_exps.weight", (s.n_embd, s.n_ff_expert, s.n_expert), type_id
        yield f"blk.{i}.ffn_gate_inp.weight", (s.n_embd, s.n_expert), TYPE_F32
        yield f"blk.{i}.ffn_norm.weight", (s.n_embd,), TYPE_F32
        yield f"blk.{i}.attn_q_norm.weight", (norms[0],), TYPE_F32
        yield f"blk.{i}.attn_k_norm.weight", (norms[1],), TYPE_F32
        yield f"blk.{i}.attn_q.weight", (s.n_embd, query), type_id
        yield f"blk.{i}.attn_k.weight", (s.n_embd, key), type_id
        yield f"blk.{i}.attn_v.weight", (s.n_embd, key), type_id
        yield f"blk.{i}.attn_output.weight", (query, s.n_embd), type_id
    yield "output_norm.weight", (s.n_embd,), TYPE_F32
    yield "output.weight", (s.n_embd, s.n_vocab), type_id


def metadata(s: Shape) -> list[gguf_io.Entry]:
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
    return [
        make_entry("general.architecture", STRING, arch),
        make_entry("general.name", STRING, "random weights"),
        *(make_entry(f"{arch}.{key}", U32, value) for key, value in numbers.items()),
        make_entry(f"{arch}.rope.freq_base", F32, s.rope_base),
        make_entry(f"{arch}.attention.layer_norm_rms_epsilon", F32, s.norm_eps),
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


def contents(noise: np.ndarray, size: int, start: int) -> Iterator[np.ndarray]:
    """`size` bytes of `noise`, uint8 [n], from byte `start` on, around and around."""
    while size:
        piece = noise[start : start + size]
        yield piece
        size -= piece.size
        start = 0


def fabricate(path: Path, shape: Shape, type_name: str, seed: int = 0) -> None:
    """Write one file. Raises MobieError when it cannot be written, NotImplementedError for a type without encoder."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(NOISE, dtype=np.float32) * np.float32(SPREAD)).reshape(-1, 256)
    kind = gguf.GGMLQuantizationType[type_name]
    noise = {i: gguf.quants.quantize(values, gguf.GGMLQuantizationType(i)) for i in {TYPE_F32, int(kind)}}
    noise = {i: array.view(np.uint8).reshape(-1) for i, array in noise.items()}
    del values
    table = list(tensor_table(shape, int(kind)))
    with Writer(path, metadata(shape), table) as writer:
        for name, dims, type_id in table:
            if len(dims) == 1:
                writer.write(name, [np.ones(dims, np.float32)])
                continue
            size = gguf_io.tensor_bytes(dims, type_id)
            row = gguf_io.tensor_bytes((256,), type_id)
            start = int(rng.integers(noise[type_id].size // row)) * row
            writer.write(name, contents(noise[type_id], size, start))
        writer.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="olmoe-1b-7b")
    parser.add_argument("--type", default="F16", help="of all matrices but the router: F32, F16, BF16, Q8_0, ...")
    parser.add_argument("--layers", type=int, help="write only so many layers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    fabricate(args.output, replace(shape, n_layer=args.layers) if args.layers else shape, args.type, args.seed)


if __name__ == "__main__":
    main()
