"""Which preset fits a machine: what a model takes in memory when it runs, weights, context and buffers."""

import re
from dataclasses import dataclass
from pathlib import Path

from mobie_export import calibrated, gguf_io, model
from mobie_export.errors import USAGE, MobieError
from mobie_export.gguf_io import Gguf

PROCESS = 100 << 20  # llama.cpp's own, vocabulary and graphs
BATCH = 512  # tokens that llama.cpp reserves its buffers for (n_ubatch)
UNITS = {"": 1, "K": 10, "M": 20, "G": 30, "T": 40}


@dataclass(frozen=True)
class Choice:
    """One preset. Sizes in bytes."""

    preset: str
    bpw: float  # stored bits per expert weight
    weights: int
    context: int  # keys and values
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.context + self.buffers


def size(text: str) -> int:
    """`8G` -> bytes; powers of 1024. MobieError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise MobieError(USAGE, "that is no amount of memory", text, "a number with K, M, G or T, such as 8G")
    unit = UNITS[match[2].upper()]
    return int(float(match[1]) * (1 << unit if unit > 1 else 1))


def choices(path: Path, presets: dict[str, float], n_ctx: int) -> list[Choice]:
    """What every preset needs, the smallest first. Raises MobieError."""
    with gguf_io.open_model(Path(path)) as gguf:
        experts = model.check_exportable(gguf)
        expert_weights = sum(x.n_weights for x in experts.values())
        beside = {model.scale_name(n) for n in experts}
        rest = sum(t.n_bytes for n, t in gguf.tensors.items() if n not in experts and n not in beside)
        found = []
        for preset, bpw in sorted(presets.items(), key=lambda item: item[1]):
            calibrated.spare_bits(gguf, bpw)  # an error where the model needs more
            weights = rest + int(bpw * expert_weights / 8)
            found.append(Choice(preset, bpw, weights, context_bytes(gguf, n_ctx), buffer_bytes(gguf)))
        return found


def context_bytes(gguf: Gguf, n_ctx: int) -> int:
    """Keys and values of n_ctx tokens in float16, an upper estimate: windows and recurrent layers count in full."""
    n_layers = _number(gguf, "block_count")
    rank = _number(gguf, "attention.kv_lora_rank")
    if rank:  # latent attention keeps one vector per token
        return 2 * n_layers * n_ctx * (rank + _number(gguf, "rope.dimension_count"))
    heads = gguf.value(f"{gguf.architecture}.attention.head_count_kv", 0)
    total = sum(heads) if isinstance(heads, list) else heads * n_layers
    head = _number(gguf, "embedding_length") // max(1, _number(gguf, "attention.head_count"))
    width = _number(gguf, "attention.key_length", head) + _number(gguf, "attention.value_length", head)
    return 2 * total * n_ctx * width


def buffer_bytes(gguf: Gguf) -> int:
    """The process and the buffers of a batch: logits, and what a layer makes on its way."""
    vocabulary = gguf.tensors["token_embd.weight"].shape[1]
    used = max(1, _number(gguf, "expert_used_count", 1))
    width, ff = _number(gguf, "embedding_length"), _number(gguf, "expert_feed_forward_length")
    return PROCESS + 4 * BATCH * (vocabulary + 8 * width + used * (3 * ff + width))


def _number(gguf: Gguf, key: str, default: int = 0) -> int:
    value = gguf.value(f"{gguf.architecture}.{key}", default)
    return max(value) if isinstance(value, list) else int(value)


def best(found: list[Choice], ram: int) -> Choice | None:
    """The one with the most bits that fits."""
    fitting = [c for c in found if c.total <= ram]
    return fitting[-1] if fitting else None
