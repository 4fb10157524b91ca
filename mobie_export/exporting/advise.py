"""Which preset, or one sign per weight alone, fits a machine: what it takes when it runs, weights, context, buffers;
and how fast it writes there at most.

One token after the other, a CPU reads every weight that is in use from its memory once per token, and that takes the
time. So the estimate is the memory's bandwidth, measured, by these bytes: the experts in use, everything else but the
embedding's table, of which a row is read, and keys and values of the whole context.

Of a model in 16 bits what is no expert may be as large as the binary experts; in Q8_0 it is half as large and next to
the same. So every preset is tried with it, and only where nothing fits, with the rest in Q4_0.
"""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobie_export import gguf_io, methods
from mobie_export.errors import BAD_INPUT, MobieError
from mobie_export.exporting import effort, requantize
from mobie_export.gguf_io import Gguf
from mobie_export.methods.base import Needs, Run
from mobie_export.methods.calibrated.options import TextMethod, check_packages, least_bits, spare_bits
from mobie_export.spec import block, exportable, layout
from mobie_export.spec.block import Coding

PROCESS = 100 << 20  # llama.cpp's own, vocabulary and graphs
BATCH = 512  # tokens that llama.cpp reserves its buffers for (n_ubatch)
EVERY, ALMOST, SMALLEST = ".", "q8_0", "q4_0"  # --tensor-type of everything that may have another type
LEAST = "least"  # no preset: one sign per weight
TABLES = ("token_embd.weight", "per_layer_token_embd.weight", "position_embd.weight")  # a row of them per token
PROBE = 512 << 20  # bytes that are read to measure the memory: more than caches hold
PROBE_ROUNDS = 8


@dataclass(frozen=True)
class Choice:
    """A preset, or none. Sizes in bytes."""

    preset: str  # or LEAST
    bpw: float  # stored bits per expert weight
    rest: str | None  # type of what is no expert, as --tensor-type has it; None: as it is
    weights: int
    context: int  # keys and values
    buffers: int
    per_token: int | None  # bytes read to write one token; None where the file does not say how many experts are in use

    @property
    def total(self) -> int:
        return self.weights + self.context + self.buffers


def choices(gguf: Gguf, presets: Mapping[str, float], n_ctx: int, coding: Coding = block.MOBIE) -> list[Choice]:
    """What one sign per weight and every preset need, where the type of the experts has presets, with the rest as it is
    and in smaller types where these save something. Best last: more bits for experts before more bits for the rest, but
    any Q8_0 before Q4_0. MobieError."""
    experts = exportable.check(gguf, coding)
    expert_weights = sum(x.n_weights for x in experts.values())
    beside = {layout.scale_name(n) for n in experts}
    rests = _rests(gguf, {n for n in gguf.tensors if n not in experts and n not in beside})
    context, buffers, found = context_bytes(gguf, n_ctx), buffer_bytes(gguf), []
    active = active_weights(gguf, experts)
    sizes = {LEAST: least_bits(gguf, coding) / expert_weights}
    sizes |= {} if coding.stock else dict(sorted(presets.items(), key=lambda x: x[1]))
    for small in (True, False):
        for preset, bpw in sizes.items():
            if preset != LEAST:
                spare_bits(gguf, bpw)  # an error where the model needs more
            for rest, (n_bytes, read) in rests.items():
                if (rest == SMALLEST) == small:
                    weights = n_bytes + int(bpw * expert_weights / 8)
                    per_token = None if active is None else read + int(bpw * active / 8) + context
                    found.append(Choice(preset, bpw, rest, weights, context, buffers, per_token))
    return found


@dataclass(frozen=True)
class Cost:
    """What a calibration takes here. Sizes in bytes, an upper estimate."""

    effort: str
    seconds: float
    disk: int
    memory: int


def costs(gguf: Gguf, bpw: float, coding: Coding = block.MOBIE) -> list[Cost]:
    """Of every effort on the bundled text, the least first; MobieError where the model cannot be calibrated here. bpw:
    where the type of the experts has a choice."""
    check_packages()
    from mobie_export.methods.calibrated import steps

    run = Run(gguf, layout.experts(gguf), Path("output"), Needs(), None, None, None, coding)
    kind, found = methods.get(effort.METHOD), []
    for level, choices in kind.efforts(gguf, coding).items():
        method = kind(**([o for o in choices if "text" not in o][-1] | ({} if coding.stock else {"bpw": bpw})))
        assert isinstance(method, TextMethod)
        needs = steps.sizes(method, run)
        found.append(Cost(level, sum(method.seconds(run).values()), needs.disk, needs.memory))
    return found


def _rests(gguf: Gguf, names: set[str]) -> dict[str | None, tuple[int, int]]:
    """Type of the tensors that are no experts -> their bytes, and those read per token; the smallest first, None as
    they are."""
    tied = "output.weight" not in gguf.tensors  # the embedding's table is the head
    skipped = {n for n in names if (n in TABLES and not (tied and n == TABLES[0])) or layout.is_further(gguf, n)}

    def sizes(types: Mapping[str, int]) -> tuple[int, int]:
        n_bytes = {n: gguf_io.tensor_bytes(t.shape, types.get(n, t.type_id)) for n, t in gguf.tensors.items()}
        return sum(n_bytes[n] for n in names), sum(n_bytes[n] for n in names - skipped)

    found: dict[str | None, tuple[int, int]] = {None: sizes({})}
    for kind in (ALMOST, SMALLEST):
        try:
            types = requantize.chosen(gguf, (requantize.parse(f"{EVERY}={kind}"),))
        except MobieError:  # a width that is no multiple of the type's block
            continue
        if sizes(types)[0] < 0.95 * min(n for n, _ in found.values()):
            found[kind] = sizes(types)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def active_weights(gguf: Gguf, experts: Mapping[str, layout.Experts]) -> float | None:
    """Weights of the experts that one token uses; None where the file does not say how many experts that are."""
    total = 0.0
    for name, item in experts.items():
        used = gguf.of_layer("expert_used_count", item.layer)
        if used is None:
            return None
        total += 0 if layout.is_further(gguf, name) else item.n_weights * used / item.n_expert
    return total


def bandwidth(threads: int, available: int | None) -> float:
    """Bytes per second that so many threads read from this machine's memory together, the best of a few rounds; takes
    some hundred milliseconds. available: bytes of memory that may be taken, of which a quarter is enough."""
    size = PROBE if available is None else min(PROBE, available // 4)
    words = np.ones(size // 4 // threads * threads, np.int32).reshape(threads, -1)  # written, so that pages are there
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PROBE_ROUNDS):
            began = time.perf_counter()
            list(pool.map(np.max, words))
            seconds.append(time.perf_counter() - began)
    return words.nbytes / min(seconds)


def context_bytes(gguf: Gguf, n_ctx: int) -> int:
    """Keys and values of n_ctx tokens in float16, an upper estimate: windows and recurrent layers count in full."""
    n_layers = _number(gguf, "block_count")
    rank = _number(gguf, "attention.kv_lora_rank")
    if rank:  # latent attention keeps one vector per token
        return 2 * n_layers * n_ctx * (rank + _number(gguf, "rope.dimension_count"))
    heads = _numbers(gguf, "attention.head_count_kv", 0)
    total = sum(heads) if len(heads) > 1 else heads[0] * n_layers
    head = _number(gguf, "embedding_length") // max(1, _number(gguf, "attention.head_count"))
    width = _number(gguf, "attention.key_length", head) + _number(gguf, "attention.value_length", head)
    return 2 * total * n_ctx * width


def buffer_bytes(gguf: Gguf) -> int:
    """The process and the buffers of a batch: logits, and what a layer makes on its way."""
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise MobieError(BAD_INPUT, f"{gguf.paths[0]} is no whole model", "no matrix token_embd.weight")
    vocabulary = embedding.shape[1]
    used = max(1, _number(gguf, "expert_used_count", 1))
    width, ff = _number(gguf, "embedding_length"), _number(gguf, "expert_feed_forward_length")
    return PROCESS + 4 * BATCH * (vocabulary + 8 * width + used * (3 * ff + width))


def _number(gguf: Gguf, key: str, default: int = 0) -> int:
    return max(_numbers(gguf, key, default))


def _numbers(gguf: Gguf, key: str, default: int) -> list[int]:
    """Of all layers, or one for all."""
    value = gguf.get_list(f"{gguf.architecture}.{key}", int)
    return [value] if isinstance(value, int) else value or [default]


def best(found: list[Choice], ram: int) -> Choice | None:
    """The best one that fits."""
    fitting = [c for c in found if c.total <= ram]
    return fitting[-1] if fitting else None
