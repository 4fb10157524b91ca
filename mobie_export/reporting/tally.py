"""What became of every tensor: each expert weight accounted for, and whatever else changed, with what the file says
about it."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mobie_export import gguf_io
from mobie_export.gguf_io import Gguf, Tensor
from mobie_export.methods.stream import PIECE
from mobie_export.spec import block, layout, metadata
from mobie_export.spec.layout import Experts

SHOWN = 80  # characters of a metadata value
EXPECTED = (metadata.FILE_TYPE.name, metadata.QUANTIZATION_VERSION.name)  # entries that every export changes
BIAS = re.compile(r"blk\.\d+\.ffn_(gate|up|gate_up|down)_(ch)?exps\.bias")
Step = Callable[[int, str], None]


def tally(file: Gguf, source: Gguf, step: Step = lambda n, what: None) -> dict[str, Any]:
    """The part "tensors" of the report. step: called with bytes of the export that were read."""
    settings = metadata.settings(file)
    ours, theirs = layout.experts(file), layout.experts(source)
    rows = [_accounted(file, source, ours.get(n), theirs.get(n), n, step) for n in {**theirs, **ours}]
    kinds = {k: sum(row["weights"][k] for row in rows) for k in KINDS}
    n_source = sum(row["source_weights"] for row in rows)
    of_source = sum(kinds[k] for k in KINDS if k != "padded")
    return {
        "experts": {
            "source_weights": n_source,
            "weights": kinds,
            "accounted": of_source == n_source,
            "tensors": rows,
            "by_layer": _by_layer(file, ours),
            "companions": _companions(file, source),
        },
        "types": _types(file, source, settings),
        "others": _others(file, source, settings, step),
        "metadata": _metadata(file, source),
        "thin": settings.get("thin", {}),
        "method": metadata.METHOD.of(file),
        "settings": {k: v for k, v in settings.items() if k != "thin"},
    }


# ---- experts ---------------------------------------------------------------------------------------------------------

# Of an expert tensor's weights in the source: with one sign, with two, the same bytes, in another type that is not
# ours, not there any more; and weights of the export that the source has not.
KINDS = ("binary", "two signs", "copied", "other type", "left", "padded")


def _accounted(
    file: Gguf, source: Gguf, ours: Experts | None, theirs: Experts | None, name: str, step: Step
) -> dict[str, Any]:
    n_source, n_file = (x.n_weights if x else 0 for x in (theirs, ours))
    common = _common(ours, theirs)
    weights = dict.fromkeys(KINDS, 0) | {"left": n_source - common, "padded": n_file - common}
    row: dict[str, Any] = {
        "tensor": name,
        "layer": layout.layer(name),
        "source_type": gguf_io.type_name(theirs.tensor.type_id) if theirs else None,
        "type": gguf_io.type_name(ours.tensor.type_id) if ours else None,
        "source_weights": n_source,
        "weights": weights,
        "zero_experts": [],
    }
    if ours is None:
        return row
    if _binary(file, ours.tensor):
        second = min(common, ours.residual.n_weights) if ours.residual is not None else 0
        weights |= {"binary": common - second, "two signs": second}
        row["zero_experts"] = _zero(file, ours, source, theirs, step)
    elif theirs and _same_bytes(file, ours.tensor, source, theirs.tensor, step):
        weights["copied"] = common
    else:
        weights["other type"] = common
    return row


def _binary(file: Gguf, tensor: Tensor) -> bool:
    """Whether the tensor is of the type that the file says its experts have."""
    coding = metadata.coding(file)
    return coding is not None and tensor.type_id == coding.type_id


def _common(ours: Experts | None, theirs: Experts | None) -> int:
    """Weights that have a place in both."""
    if ours is None or theirs is None:
        return 0
    shapes = [(x.cols, x.rows, x.n_expert) for x in (ours, theirs)]
    return int(np.prod([min(pair) for pair in zip(*shapes, strict=True)], dtype=np.int64))


def _zero(file: Gguf, ours: Experts, source: Gguf, theirs: Experts | None, step: Step) -> list[int]:
    """Experts all of whose weights are zero in the export and not in the source."""
    found = []
    scales = np.ones(ours.n_expert, "<f4") if ours.factor is None else file.read(ours.factor).view("<f4")
    coding = block.BY_TYPE[ours.tensor.type_id]
    for e in range(ours.n_expert):
        raw = file.read(ours.tensor, e * ours.expert_bytes, ours.expert_bytes)
        step(ours.expert_bytes, ours.tensor.name)
        if scales[e] != 0 and raw.reshape(-1, coding.block_bytes)[:, : coding.scale.itemsize].any():
            continue
        if theirs is None or e >= theirs.n_expert or _any(source, theirs, e):
            found.append(e)
    return found


def _any(gguf: Gguf, item: Experts, e: int) -> bool:
    """Whether an expert has weights other than zero."""
    raw = gguf.read(item.tensor, e * item.expert_bytes, item.expert_bytes).reshape(item.rows, -1)
    return bool(gguf_io.decode(raw, item.tensor.type_id).any())


def _by_layer(file: Gguf, experts: dict[str, Experts]) -> list[dict[str, Any]]:
    """Bits per expert weight of every layer, and the columns that have a second sign in each of its tensors."""
    found: dict[int, dict[str, Any]] = {}
    stored: dict[int, int] = {}
    weights: dict[int, int] = {}
    for name, item in experts.items():
        i = item.layer
        row = found.setdefault(i, {"layer": i, "second": {}, "further": layout.is_further(file, name)})
        parts = (item.tensor, item.factor, item.residual)
        stored[i] = stored.get(i, 0) + sum(t.n_bytes for t in parts if t is not None)
        weights[i] = weights.get(i, 0) + item.n_weights
        if item.residual is not None:
            row["second"][name.split(".", 2)[2]] = item.residual.shape[0]
    for name, tensor in file.tensors.items():
        layer = layout.layer(name)
        if layer in stored and layout.kind(name) in ("expert columns", "expert factor"):
            stored[layer] += tensor.n_bytes
    return [found[i] | {"bpw": 8 * stored[i] / weights[i]} for i in sorted(found)]


def _companions(file: Gguf, source: Gguf) -> dict[str, dict[str, int]]:
    """Kind -> values in the source and in the export, of what is stored beside the experts' weights."""
    found: dict[str, dict[str, int]] = {}
    for which, gguf in (("source", source), ("file", file)):
        for name, tensor in gguf.tensors.items():
            kind = "expert bias" if BIAS.fullmatch(name) else layout.kind(name)
            if kind in ("expert bias", *layout.BESIDE_EXPERTS):
                row = found.setdefault(kind, {"source": 0, "file": 0})
                row[which] += tensor.n_weights
    return found


# ---- everything else -------------------------------------------------------------------------------------------------


def _others(file: Gguf, source: Gguf, settings: dict[str, object], step: Step) -> dict[str, Any]:
    """Tensors that are no experts: how many are the same, byte for byte, and the others with the reason for it."""
    skip = ("expert", *layout.BESIDE_EXPERTS)
    names = [n for n in {**source.tensors, **file.tensors} if layout.kind(n) not in skip]
    changed, same = [], 0
    for name in names:
        ours, theirs = file.tensors.get(name), source.tensors.get(name)
        if ours and theirs and _same_bytes(file, ours, source, theirs, step):
            same += 1
            continue
        row: dict[str, Any] = {
            "tensor": name,
            "layer": layout.layer(name),
            "kind": layout.kind(name),
            "source_type": gguf_io.type_name(theirs.type_id) if theirs else None,
            "type": gguf_io.type_name(ours.type_id) if ours else None,
            "why": _why(name, ours, theirs, settings),
        }
        if ours and theirs:
            row |= _difference(file, ours, source, theirs)
        changed.append(row)
    return {"same": same, "changed": changed}


def _why(name: str, ours: Tensor | None, theirs: Tensor | None, settings: dict[str, object]) -> str | None:
    """What the file's metadata gives as the reason for a tensor that is not the source's; None: nothing."""
    if ours is None or theirs is None:
        return None
    tuned, rules = settings.get("tuned"), settings.get("tensor_types")
    if isinstance(tuned, list) and name.split(".", 2)[-1] in tuned:
        return "tuned"
    if isinstance(rules, list) and ours.type_id != theirs.type_id:
        for rule in map(str, rules):
            pattern, _, kind = rule.rpartition("=")
            if re.search(pattern, name) and kind.lower() == gguf_io.type_name(ours.type_id).lower():
                return "tensor type"
    return None


def _difference(file: Gguf, ours: Tensor, source: Gguf, theirs: Tensor) -> dict[str, Any]:
    """error: of the export's values, relative to the source's (root of the sums of squares); moved: of a router with
    the same rows in another order, how many are elsewhere. Nothing where they cannot be compared."""
    if ours.shape != theirs.shape or not all(gguf_io.can_decode(t.type_id) for t in (ours, theirs)):
        return {}
    off = norm = 0.0
    for a, b in zip(_values(source, theirs), _values(file, ours), strict=True):
        off += float(np.square(a - b, dtype=np.float64).sum())
        norm += float(np.square(a, dtype=np.float64).sum())
    found: dict[str, Any] = {"error": (off / norm) ** 0.5 if norm > 0 else None}
    if layout.kind(theirs.name) == "router":
        a, b = (np.concatenate(list(_values(g, t))) for g, t in ((source, theirs), (file, ours)))
        rows = {row.tobytes(): i for i, row in enumerate(a)}
        places = [rows.get(row.tobytes()) for row in b]
        if len(rows) == len(a) and set(places) == set(range(len(a))):
            found["moved"] = sum(p != i for i, p in enumerate(places))
    return found


def _values(gguf: Gguf, tensor: Tensor) -> Iterator[np.ndarray]:
    """float32 [some rows, cols] at a time; of a vector every value is a row."""
    cols = tensor.shape[0] if len(tensor.shape) > 1 else gguf_io.block_size(tensor.type_id)[0]
    rows = tensor.n_weights // cols
    size, step = tensor.n_bytes // rows, max(1, PIECE // cols)
    for i in range(0, rows, step):
        n = min(step, rows - i)
        raw = gguf.read(tensor, i * size, n * size).reshape(n, -1)
        yield gguf_io.decode(raw, tensor.type_id).astype(np.float32, copy=False)


def _same_bytes(file: Gguf, ours: Tensor, source: Gguf, theirs: Tensor, step: Step) -> bool:
    same = (ours.type_id, ours.shape) == (theirs.type_id, theirs.shape)
    if same:
        pairs = zip(file.chunks(ours), source.chunks(theirs), strict=True)
        same = all(np.array_equal(a, b) for a, b in pairs)
    step(ours.n_bytes, ours.name)
    return same


def _types(file: Gguf, source: Gguf, settings: dict[str, object]) -> list[dict[str, Any]]:
    """Which tensors have which type, and why: a row for each kind of tensor and type."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for name, tensor in file.tensors.items():
        kind, type_name, theirs = layout.kind(name), gguf_io.type_name(tensor.type_id), source.tensors.get(name)
        if kind in ("expert", *layout.BESIDE_EXPERTS):
            why = _why_expert(file, name, kind, tensor, settings)
        elif theirs is not None and theirs.type_id == tensor.type_id:
            why = "as in the source"
        else:
            why = {"tuned": "tuned with the experts, which F32 keeps", "tensor type": "asked for: --tensor-type"}.get(
                _why(name, tensor, theirs, settings) or "", "the file does not say"
            )
        row = found.setdefault(
            (kind, type_name, why),
            {"kind": kind, "type": type_name, "why": why, "tensors": 0, "weights": 0, "bytes": 0},
        )
        row["tensors"] += 1
        row["weights"] += tensor.n_weights
        row["bytes"] += tensor.n_bytes
    return sorted(found.values(), key=lambda row: -row["bytes"])


def _why_expert(file: Gguf, name: str, kind: str, tensor: Tensor, settings: dict[str, object]) -> str:
    if kind == "expert" and not _binary(file, tensor):
        return "not binarized"
    if kind == "expert" and layout.is_further(file, name):
        return "a layer that predicts further tokens: signs of the weights alone"
    if kind in ("expert residual", "expert columns"):
        bits = settings.get("bpw")
        return (
            f"second signs where they count most, for {bits:g} bits per weight"
            if isinstance(bits, float)
            else ("second signs where they count most")
        )
    reasons = {
        "expert": f"binarized by the method {metadata.METHOD.of(file)}",
        "expert scale": "an expert's scale, by which its block scales are multiplied",
        "expert factor": "matrices that the experts of a layer share",
    }
    return reasons[kind]


def _metadata(file: Gguf, source: Gguf) -> dict[str, Any]:
    """Entries that differ, but for those of FORMAT.md."""
    ours, theirs = file.entries, source.entries
    own = [k for k in {**theirs, **ours} if not k.startswith((metadata.PREFIX, "split.")) and k not in EXPECTED]

    def shown(gguf: Gguf, key: str) -> str:
        value = gguf.value(key)
        text = f"{len(value)} values" if isinstance(value, list) else str(value)
        return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"

    return {
        "added": {k: shown(file, k) for k in own if k not in theirs},
        "removed": {k: shown(source, k) for k in own if k not in ours},
        "changed": {
            k: [shown(source, k), shown(file, k)]
            for k in own
            if k in ours and k in theirs and ours[k].raw != theirs[k].raw
        },
    }
