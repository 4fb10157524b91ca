"""What a GGUF holds, and whether a MoBiE file keeps the promises of FORMAT.md."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping

import numpy as np

from mobie_export import gguf_io
from mobie_export.errors import VERIFY_FAILED, MobieError
from mobie_export.gguf_io import Gguf
from mobie_export.progress import Callback, Progress, size_text
from mobie_export.spec import block, layout
from mobie_export.spec.layout import Experts

SEAL, EXPERT_SEAL = "mobie.data.sha256", "mobie.experts.sha256"
MAX_PROBLEMS = 10  # named in an error; the rest are counted

WANTED_VALUES = {
    "mobie.format_version": block.FORMAT_VERSION,
    "mobie.type_id": block.TYPE_ID,
    "general.quantization_version": 2,
}
WANTED_TYPES = {
    "mobie.format_version": gguf_io.U32,
    "mobie.type_id": gguf_io.U32,
    "mobie.method": gguf_io.STRING,
    "mobie.settings": gguf_io.STRING,
    "mobie.exporter": gguf_io.STRING,
    "mobie.runtime": gguf_io.STRING,
    "mobie.source.sha256": gguf_io.STRING,
    SEAL: gguf_io.STRING,
    "mobie.expert_bpw": gguf_io.F32,
    "general.file_type": gguf_io.U32,
    "general.quantization_version": gguf_io.U32,
}
OPTIONAL_TYPES = {EXPERT_SEAL: gguf_io.STRING}  # files of before have none
SEALED_KINDS = ("expert", "expert scale", "expert residual", "expert columns")  # which no other program changes


def expert_seal(digests: Mapping[str, bytes]) -> str:
    """`mobie.experts.sha256`, from the SHA-256 of every tensor by name (FORMAT.md)."""
    lines = [f"{d.hex()}  {n}\n" for n, d in sorted(digests.items()) if layout.kind(n) in SEALED_KINDS]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# What gguf_io.Writer fills in: key -> its value.
SEALS = {SEAL: lambda writer: writer.data.hexdigest(), EXPERT_SEAL: lambda writer: expert_seal(writer.digests)}


# ---- describe --------------------------------------------------------------------------------------------------------


def bits_per_weight(gguf: Gguf) -> tuple[float, float | None]:
    """True stored bits per weight: (of all tensors, of the experts or None).

    Scales, second planes and shared factors of experts are storage of the experts, not weights.
    """
    beside = {n: t for n, t in gguf.tensors.items() if layout.kind(n) in layout.BESIDE_EXPERTS}
    weights = sum(t.n_weights for n, t in gguf.tensors.items() if n not in beside)
    stored = sum(t.n_bytes for t in gguf.tensors.values())
    experts = layout.experts(gguf)
    expert_weights = sum(x.n_weights for x in experts.values())
    expert_bytes = sum(x.tensor.n_bytes for x in experts.values()) + sum(t.n_bytes for t in beside.values())
    return 8 * stored / max(weights, 1), 8 * expert_bytes / expert_weights if expert_weights else None


def active_bits_per_weight(gguf: Gguf) -> float | None:
    """Bits of experts and of what they share read for one token, per weight of the experts that are active for it.

    None where the file does not say how many those are.
    """
    experts = layout.experts(gguf)
    own, weights = 0.0, 0.0
    for name, item in experts.items():
        used = gguf.of_layer("expert_used_count", layout.layer(name))
        if used is None:
            return None
        parts = [t for t in (item.tensor, item.factor, item.residual) if t is not None]
        own += sum(t.n_bytes for t in parts) * used / item.n_expert
        weights += item.n_weights * used / item.n_expert
    shared = ("expert factor", "expert columns")
    own += sum(t.n_bytes for n, t in gguf.tensors.items() if layout.kind(n) in shared)
    return 8 * own / weights if weights > 0 else None


def describe(gguf: Gguf) -> dict:
    """Everything `inspect` shows, as JSON-able data."""
    overall, of_experts = bits_per_weight(gguf)
    experts = layout.experts(gguf)
    tensors = [
        {
            "name": t.name,
            "type": gguf_io.type_name(t.type_id),
            "shape": list(t.shape),
            "bytes": t.n_bytes,
            "kind": layout.kind(t.name),
        }
        for t in gguf.tensors.values()
    ]
    types: dict[str, dict] = {}
    for t in gguf.tensors.values():
        row = types.setdefault(gguf_io.type_name(t.type_id), {"tensors": 0, "weights": 0, "bytes": 0})
        row["tensors"] += 1
        row["weights"] += t.n_weights
        row["bytes"] += t.n_bytes
    return {
        "files": [str(p) for p in gguf.paths],
        "file_bytes": gguf.file_size,
        "architecture": gguf.architecture,
        "name": gguf.value("general.name"),
        "alignment": gguf.alignment,
        "layers": gguf.value(f"{gguf.architecture}.block_count"),
        "experts": max((x.n_expert for x in experts.values()), default=0),
        "experts_used": gguf.value(f"{gguf.architecture}.expert_used_count"),
        "expert_tensors": len(experts),
        "bpw": overall,
        "expert_bpw": of_experts,
        "active_bpw": active_bits_per_weight(gguf),
        "types": types,
        "mobie": {k: e.value for k, e in gguf.entries.items() if k.startswith("mobie.")},
        "metadata": {k: _short(e) for k, e in gguf.entries.items()},
        "tensors": tensors,
    }


def _short(entry: gguf_io.Entry):
    if entry.type == gguf_io.ARRAY:
        return f"{len(entry.value)} x {gguf_io.KV_TYPE_NAMES[entry.item_type]}"
    return entry.value


def render(info: dict) -> str:
    """The data of `describe` as text."""
    width = max((len(t["name"]) for t in info["tensors"]), default=4)
    lines = [
        f"{'tensor':<{width}}  {'type':<8} {'bytes':>13}  shape",
        *(f"{t['name']:<{width}}  {t['type']:<8} {t['bytes']:>13,}  {t['shape']}" for t in info["tensors"]),
        "",
        f"{'type':<8} {'tensors':>7} {'weights':>16} {'bytes':>16}",
        *(f"{k:<8} {v['tensors']:>7} {v['weights']:>16,} {v['bytes']:>16,}" for k, v in info["types"].items()),
        "",
        *(f"file          {f}" for f in info["files"]),
        f"size          {size_text(info['file_bytes'])} ({info['file_bytes']:,} bytes)",
        f"architecture  {_shown(info['architecture'])}" + (f" ({_shown(info['name'])})" if info["name"] else ""),
        f"layers        {info['layers']}",
    ]
    if info["expert_tensors"]:
        used = info["experts_used"]
        lines.append(
            f"experts       {info['experts']} per layer, {used} used, in {info['expert_tensors']} tensors"
            if used is not None
            else f"experts       {info['experts']} per layer in {info['expert_tensors']} tensors"
        )
    lines.append(f"stored        {info['bpw']:.4f} bits per weight")
    if info["expert_bpw"] is not None:
        lines.append(f"  experts     {info['expert_bpw']:.4f} bits per weight, with all that is stored for them")
        if info["active_bpw"] is not None:
            lines.append(f"  active      {info['active_bpw']:.4f} bits read per active expert weight and token")
    lines += [f"{k:<22} {_shown(v)}" for k, v in info["mobie"].items()]
    return "\n".join(lines)


def _shown(value) -> str:
    """Without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


# ---- verify ----------------------------------------------------------------------------------------------------------


def verify(
    gguf: Gguf,
    digests: Mapping[str, bytes] | None = None,
    progress: Callback | None = None,
    max_ram: int | None = None,
) -> dict:
    """Check a MoBiE file; MobieError names what is wrong with it.

    Metadata, tensor table, every block and every scale are checked, and all data against the SHA-256 in the metadata.
    With `digests` (of gguf_io.new_digest, by tensor name) the damaged tensor is named. max_ram: bytes that may be
    resident at most. Returns counts of what was seen, and as `requantized` the types of the tensors that are no
    experts, type -> tensors, where another program gave them others: then their data are checked against nothing.
    """
    problems = _metadata_problems(gguf)
    experts = layout.experts(gguf)
    if "mobie.format_version" not in gguf.entries or not experts:
        raise MobieError(
            VERIFY_FAILED,
            f"{gguf.paths[0]} is not a MoBiE file",
            f"architecture {gguf.architecture}, {len(experts)} expert tensors",
            "mobie.format_version and tensors of type mobie",
            "export it: mobie-export MODEL.gguf",
        )
    blocks, seal, found = 0, hashlib.sha256(), {}
    second = {x.residual.name: x for x in experts.values() if x.residual is not None}
    largest: dict[str, np.ndarray] = {}  # expert tensor -> its largest block scale by expert, of both planes
    total = sum(t.n_bytes for t in gguf.tensors.values())
    with Progress("verify", total, progress, max_ram=max_ram) as shown:
        for name, tensor in gguf.tensors.items():
            digest = gguf_io.new_digest()
            if name in experts:
                problems += _expert_problems(gguf, experts[name], (digest, seal), shown, largest)
                blocks += tensor.n_bytes // block.BLOCK_BYTES
            elif name in second:
                problems += _block_problems(gguf, second[name], tensor, (digest, seal), shown, largest)
                blocks += tensor.n_bytes // block.BLOCK_BYTES
            else:
                if layout.kind(name) == "expert factor":
                    problems += _factor_problems(gguf, tensor, experts)
                for chunk in gguf.chunks(tensor):
                    digest.update(chunk)
                    seal.update(chunk)
                    shown.update(chunk.size, name)
            found[name] = digest.digest()
            if digests is not None and found[name] != digests[name]:
                problems.append(f"{name}: the bytes on the disk are not those that were written")
    problems += _largest_problems(gguf, experts, largest)
    requantized = None
    if gguf.value(SEAL) not in (None, seal.hexdigest()):
        if gguf.value(EXPERT_SEAL) == expert_seal(found) and gguf.value("general.file_type") != block.TYPE_ID:
            rest = (gguf_io.type_name(t.type_id) for n, t in gguf.tensors.items() if layout.kind(n) not in SEALED_KINDS)
            requantized = dict(Counter(rest))
        else:
            problems.append(
                f"{SEAL} is {gguf.value(SEAL)}, the data have {seal.hexdigest()}: the file was changed or damaged"
            )
    if requantized is None:
        problems += _type_problems(gguf)
    if problems:
        more = f"\n          and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        raise MobieError(
            VERIFY_FAILED,
            f"{gguf.paths[0]} is not a sound MoBiE file",
            "\n          ".join(problems[:MAX_PROBLEMS]) + more,
            "what FORMAT.md says",
            "export again from the original model",
        )
    bpw = bits_per_weight(gguf)[1]
    return {"expert_tensors": len(experts), "blocks": blocks, "expert_bpw": bpw, "requantized": requantized}


def _type_problems(gguf: Gguf) -> list[str]:
    """Of the metadata that another program changes together with the types of tensors."""
    found, problems = gguf.value("general.file_type"), []
    if found not in (None, block.TYPE_ID):
        problems.append(f"general.file_type is {found}, wanted {block.TYPE_ID}")
    bpw, stated = bits_per_weight(gguf)[1], gguf.value("mobie.expert_bpw")
    if isinstance(stated, float) and np.float32(bpw) != np.float32(stated):
        problems.append(f"mobie.expert_bpw is {stated}, the tensors have {bpw}")
    return problems


def _metadata_problems(gguf: Gguf) -> list[str]:
    problems = []
    for key, kind in (WANTED_TYPES | OPTIONAL_TYPES).items():
        entry = gguf.entries.get(key)
        if entry is None:
            problems += [f"{key} is missing"] if key in WANTED_TYPES else []
        elif entry.type != kind:
            wanted, found = gguf_io.KV_TYPE_NAMES[kind], gguf_io.KV_TYPE_NAMES[entry.type]
            problems.append(f"{key} is of type {found}, wanted {wanted}")
        elif entry.value != WANTED_VALUES.get(key, entry.value):
            problems.append(f"{key} is {entry.value}, wanted {WANTED_VALUES[key]}")
    try:
        settings = json.loads(gguf.value("mobie.settings", "{}"))
    except (TypeError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        problems.append("mobie.settings is no JSON object")
    problems += [
        f"{t.name} is of type mobie and no expert tensor"
        for t in gguf.tensors.values()
        if t.type_id == block.TYPE_ID and layout.kind(t.name) not in ("expert", "expert residual")
    ]
    whole = {x.residual.name for x in layout.experts(gguf).values() if x.residual is not None}
    problems += [
        f"{n} belongs to no expert tensor"
        for n in gguf.tensors
        if layout.kind(n) == "expert residual" and n not in whole
    ]
    return problems


def _expert_problems(gguf: Gguf, item: Experts, digests: tuple, progress: Progress, largest: dict) -> list[str]:
    """Problems of one expert tensor; all its bytes go into every one of `digests`, its block scales into `largest`."""
    name, scale, problems = item.tensor.name, item.factor, item.problems(gguf)
    if item.tensor.type_id != block.TYPE_ID:
        problems.append(f"{name} is of type {gguf_io.type_name(item.tensor.type_id)}, wanted mobie")
    if scale is None:
        problems.append(f"{layout.scale_name(name)} is missing")
    elif _has_scales(item):
        scales = gguf.read(scale).view("<f4")
        bad = np.flatnonzero(~(np.isfinite(scales) & (scales >= 0)))
        if bad.size:
            problems.append(f"{scale.name}: expert {bad[0]} has scale {scales[bad[0]]}, {bad.size} such experts")
    return problems + _block_problems(gguf, item, item.tensor, digests, progress, largest)


def _has_scales(item: Experts) -> bool:
    return item.factor is not None and item.factor.type_id == gguf_io.TYPE_F32 and item.factor.shape == (item.n_expert,)


def _factor_problems(gguf: Gguf, tensor: gguf_io.Tensor, experts: dict[str, Experts]) -> list[str]:
    """Of what its experts do not say (Experts.problems): a factor without experts, and values that are no numbers."""
    name = tensor.name
    users = [x for n, x in experts.items() if layout.shared_name(n) == name]
    if not users:
        return [f"{name} has no experts in its layer"]
    if any(x.problems(gguf) for x in users):
        return []  # named already
    values = gguf_io.decode(gguf.read(tensor).reshape(tensor.shape[1], -1), tensor.type_id)
    bad = int(np.count_nonzero(~np.isfinite(values)))
    return [f"{name} has {bad} values that are no numbers"] if bad else []


def _block_problems(
    gguf: Gguf, item: Experts, tensor: gguf_io.Tensor, digests: tuple, progress: Progress, largest: dict
) -> list[str]:
    problems, size = [], tensor.n_bytes // item.n_expert
    found = largest.setdefault(item.tensor.name, np.zeros(item.n_expert, np.uint8))
    blocks_of_experts = tensor.type_id == block.TYPE_ID and tensor.shape[1:] == item.tensor.shape[1:]
    pieces = (gguf.read(tensor, e * size, size) for e in range(item.n_expert))
    for e, raw in enumerate(pieces if blocks_of_experts else gguf.chunks(tensor)):
        progress.update(raw.size, tensor.name)
        for digest in digests:
            digest.update(raw)
        if not blocks_of_experts:
            continue
        blocks = raw.reshape(-1, block.BLOCK_BYTES)
        codes = blocks[:, 0]
        if blocks[codes == 0].any():
            problems.append(f"{tensor.name}: expert {e} has signs in blocks of scale 0")
        found[e] = max(found[e], codes.max(initial=0))
    return problems


def _largest_problems(gguf: Gguf, experts: dict[str, Experts], largest: dict[str, np.ndarray]) -> list[str]:
    """The scale of an expert is such that the largest block scale of its planes is 255."""
    problems = []
    for name, item in experts.items():
        if not _has_scales(item) or item.tensor.type_id != block.TYPE_ID:
            continue  # named already
        scales = gguf.read(item.factor).view("<f4")
        wanted = np.where(scales > 0, block.SCALE_MAX, 0)
        problems += [
            f"{name}: expert {e}'s largest block scale is {largest[name][e]}, wanted {wanted[e]}"
            for e in np.flatnonzero(largest[name] != wanted)
        ]
    return problems
