"""What a GGUF holds: tensors, types, sizes, true bits per weight, metadata."""

from dataclasses import dataclass
from pathlib import Path

from mobie_export import gguf_io
from mobie_export.gguf_io import Gguf, Value
from mobie_export.progress import size_text
from mobie_export.spec import layout, metadata


@dataclass(frozen=True)
class TensorInfo:
    """One tensor. type: name of its type; shape: fastest dimension first; bytes: stored, without padding; kind: what it
    is for ("expert", "router", ..., "other")."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    kind: str


@dataclass(frozen=True)
class TypeInfo:
    """How many tensors and weights are of one type, and their bytes."""

    tensors: int
    weights: int
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect` returns, in the order of `inspect --json`.

    files: all shards; file_bytes: of all files together; name, layers, experts_used: as the file has them, or None;
    experts: of the layer with the most, 0 for a dense model; expert_tensors: how many there are.
    bpw: stored bits per weight of all tensors; expert_bpw: stored bits per expert weight, with all that is stored for
    the experts; active_bpw: bits read per active expert weight and token. The last two are None where there are no
    experts, or the file does not say how many are active.
    types: by name; mobie: the entries of FORMAT.md; metadata: all entries, arrays as "N x TYPE".
    """

    files: tuple[Path, ...]
    file_bytes: int
    architecture: str
    name: Value | None
    alignment: int
    layers: Value | None
    experts: int
    experts_used: Value | None
    expert_tensors: int
    bpw: float
    expert_bpw: float | None
    active_bpw: float | None
    types: dict[str, TypeInfo]
    mobie: dict[str, Value]
    metadata: dict[str, Value]
    tensors: tuple[TensorInfo, ...]


def inspect(path: str | Path) -> Inspection:
    """What a GGUF holds (given its first shard, all of them). MobieError where it cannot be read."""
    with gguf_io.open_model(Path(path)) as gguf:
        return describe(gguf)


def describe(gguf: Gguf) -> Inspection:
    """As `inspect`, of an open file."""
    overall, of_experts = layout.bits_per_weight(gguf)
    experts = layout.experts(gguf)
    types: dict[str, TypeInfo] = {}
    for t in gguf.tensors.values():
        name = gguf_io.type_name(t.type_id)
        so_far = types.get(name, TypeInfo(0, 0, 0))
        types[name] = TypeInfo(so_far.tensors + 1, so_far.weights + t.n_weights, so_far.bytes + t.n_bytes)
    return Inspection(
        files=tuple(gguf.paths),
        file_bytes=gguf.file_size,
        architecture=gguf.architecture,
        name=gguf.value("general.name"),
        alignment=gguf.alignment,
        layers=gguf.value(f"{gguf.architecture}.block_count"),
        experts=max((x.n_expert for x in experts.values()), default=0),
        experts_used=gguf.value(f"{gguf.architecture}.expert_used_count"),
        expert_tensors=len(experts),
        bpw=overall,
        expert_bpw=of_experts,
        active_bpw=layout.active_bits_per_weight(gguf),
        types=types,
        mobie={k: e.value for k, e in gguf.entries.items() if k.startswith(metadata.PREFIX)},
        metadata={k: _short(e) for k, e in gguf.entries.items()},
        tensors=tuple(
            TensorInfo(t.name, gguf_io.type_name(t.type_id), t.shape, t.n_bytes, layout.kind(t.name))
            for t in gguf.tensors.values()
        ),
    )


def _short(entry: gguf_io.Entry) -> Value:
    if isinstance(entry.value, list):
        return f"{len(entry.value)} x {gguf_io.KV_TYPE_NAMES[entry.item_type]}"
    return entry.value


def render(info: Inspection) -> str:
    """What `inspect` returns as text."""
    width = max((len(t.name) for t in info.tensors), default=4)
    lines = [
        f"{'tensor':<{width}}  {'type':<8} {'bytes':>13}  shape",
        *(f"{t.name:<{width}}  {t.type:<8} {t.bytes:>13,}  {list(t.shape)}" for t in info.tensors),
        "",
        f"{'type':<8} {'tensors':>7} {'weights':>16} {'bytes':>16}",
        *(f"{k:<8} {v.tensors:>7} {v.weights:>16,} {v.bytes:>16,}" for k, v in info.types.items()),
        "",
        *(f"file          {f}" for f in info.files),
        f"size          {size_text(info.file_bytes)} ({info.file_bytes:,} bytes)",
        f"architecture  {_shown(info.architecture)}" + (f" ({_shown(info.name)})" if info.name else ""),
        f"layers        {info.layers}",
    ]
    if info.expert_tensors:
        used = info.experts_used
        lines.append(
            f"experts       {info.experts} per layer, {used} used, in {info.expert_tensors} tensors"
            if used is not None
            else f"experts       {info.experts} per layer in {info.expert_tensors} tensors"
        )
    lines.append(f"stored        {info.bpw:.4f} bits per weight")
    if info.expert_bpw is not None:
        lines.append(f"  experts     {info.expert_bpw:.4f} bits per weight, with all that is stored for them")
        if info.active_bpw is not None:
            lines.append(f"  active      {info.active_bpw:.4f} bits read per active expert weight and token")
    lines += [f"{k:<22} {_shown(v)}" for k, v in info.mobie.items()]
    return "\n".join(lines)


def _shown(value: Value) -> str:
    """Without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))
