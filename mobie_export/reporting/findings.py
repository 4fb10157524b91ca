"""What of a report should not be so, with the layer where it is; from the report's JSON alone.

A finding is {"kind", "severity", "layer", "what"}: severity is "error" where the export is broken, "warning" where it
may disappoint, "note" for what should be known; layer is None for what belongs to none. Bounds are wide: what a
binarization costs is no finding. They are relative to all layers where models differ in what is usual.
"""

import math
import statistics
from typing import Any

from mobie_export.methods.base import USABLE

SMALL = 0.1  # size of what a layer's experts add, of the layers' median: next to nothing
LARGE = 10.0  # ... many times too much
APART = 0.25  # cosine with what they should add, of the layers' median
SAME_ROUTER = 0.9  # choices that are to be as the original's where nothing but experts changed
OTHER_ROUTER = 0.5  # ... where the file says that more did, of the layers' median
CHANGED = 0.1  # change of a tensor, relative to its size, beyond which it is another one, whatever its type
RATIO = 2.0  # perplexity over the original's
ANSWERS = 0.25  # of the answers, more than the original's, that loop or do not end
SLOWER = 0.9  # of the source's speed

Finding = dict[str, Any]


def find(report: dict[str, Any]) -> list[Finding]:
    """All findings of a report, errors first, then by layer."""
    found = [
        *_file(report["file"]),
        *_tensors(report["tensors"]),
        *_layers(report["layers"], _declared(report["tensors"])),
        *_left_out(report),
        *_scores(report["scores"]),
        *_behaviour(report["behaviour"]),
        *_speed(report["speed"]),
    ]
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda f: (order[f["severity"]], -1 if f["layer"] is None else f["layer"]))


def _one(kind: str, severity: str, layer: int | None, what: str) -> Finding:
    return {"kind": kind, "severity": severity, "layer": layer, "what": what}


def _file(file: dict[str, Any]) -> list[Finding]:
    found = []
    if file["problem"]:
        found.append(_one("file", "error", None, f"the file does not pass verify: {file['problem']}"))
    if not file["of_source"]:
        what = "the file says that it was made from another file than this source, or from other metadata"
        found.append(_one("source", "warning", None, what))
    return found


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _tensors(tensors: dict[str, Any]) -> list[Finding]:
    found, experts = [], tensors["experts"]
    if not experts["accounted"]:
        found.append(_one("tally", "error", None, "the export does not account for every expert weight of the source"))
    for row in experts["tensors"]:
        weights, layer, name = row["weights"], row["layer"], row["tensor"]
        if row["zero_experts"]:
            which = _numbers(row["zero_experts"])
            what = f"{name}: all weights of experts {which} are zero, which they are not in the source"
            found.append(_one("experts zero", "error", layer, what))
        for kind, what in (("left", "are in the source alone"), ("padded", "are in the export alone")):
            if weights[kind]:
                found.append(_one("tally", "error", layer, f"{name}: {weights[kind]:,} weights {what}"))
        for kind, what in (("copied", "are as in the source"), ("other type", f"are {row['type']}")):
            if weights[kind]:
                found.append(_one("not binarized", "warning", layer, f"{name}: {weights[kind]:,} weights {what}"))
    for row in tensors["others"]["changed"]:
        found += _changed(row)
    for layer, few in tensors["thin"].items():
        named = ", ".join(f"{e} ({n})" for e, n in list(few.items())[:8]) + (", ..." if len(few) > 8 else "")
        what = f"{len(few)} experts saw fewer calibration tokens than they have columns: {named}"
        found.append(_one("few tokens", "note", int(layer), what))
    return found


def _changed(row: dict[str, Any]) -> list[Finding]:
    """A tensor that is no expert and not the source's."""
    name, error, moved = row["tensor"], row.get("error"), row.get("moved")
    if row["type"] is None or row["source_type"] is None:
        where = "source" if row["type"] is None else "export"
        return [_one("other tensors", "error", row["layer"], f"{name} is in the {where} alone")]
    if moved:
        what = f"{name}: {moved} rows of the router belong to other experts than in the source"
        return [_one("router", "error", row["layer"], what)]
    if error is None:
        if row["why"] is None:
            return [_one("other tensors", "error", row["layer"], f"{name} cannot be compared with the source's")]
        return []
    if not math.isfinite(error):
        return [_one("other tensors", "error", row["layer"], f"{name} has values that are no numbers")]
    kind = "router" if row["kind"] == "router" else "other tensors"
    if row["why"] is None:
        same_type = row["type"] == row["source_type"]
        severity = "error" if same_type or error > CHANGED else "warning"
        how = "other values" if same_type else f"{row['type']} instead of {row['source_type']}"
        what = f"{name}: {how}, {error:.2%} off the source's, and the file does not say why"
        return [_one(kind, severity, row["layer"], what)]
    if row["why"] == "tensor type" and error > CHANGED:
        return [_one(kind, "warning", row["layer"], f"{name}: {error:.1%} off the source's as {row['type']}")]
    return []


def _declared(tensors: dict[str, Any]) -> bool:
    """Whether the file says that tensors before the experts were changed: tuned, or stored in another type."""
    return any(row["why"] is not None for row in tensors["others"]["changed"])


# ---- layers ----------------------------------------------------------------------------------------------------------


def _layers(layers: dict[str, Any], declared: bool) -> list[Finding]:
    """Of the comparison in PyTorch: the layer's own faults, not what it inherits from those before it."""
    rows = [row for row in layers.get("layers", []) if "experts_error" in row]
    found = []
    # of one layer alone there is nothing to compare with: what is usual is then the original's own
    usual_size, usual_cosine = (_median(rows, f"experts_{k}") if len(rows) > 1 else 1.0 for k in ("size", "cosine"))
    usual_routing = _median(rows, "routing_alone")
    for row in rows:
        layer = row["layer"]
        values = [row[k] for k in ("experts_error", "experts_cosine", "experts_size")]
        if not all(map(_is_number, values)):
            found.append(_one("experts", "error", layer, "what the experts add is no number"))
            continue
        size, cosine = row["experts_size"], row["experts_cosine"]
        if size < SMALL * usual_size or size > LARGE * usual_size:
            what = f"what the experts add is {size:.3g} times the original's size, in most layers {usual_size:.3g}"
            found.append(_one("experts", "error", layer, what))
        elif cosine < APART * usual_cosine:
            what = (
                f"what the experts add has a cosine of {cosine:.2f} with what the original's add, in most layers "
                f"{usual_cosine:.2f}"
            )
            found.append(_one("experts", "error", layer, what))
        alone = row["routing_alone"]
        least = OTHER_ROUTER * usual_routing if declared else SAME_ROUTER
        if not _is_number(alone) or alone < least:
            what = f"the router chooses {_percent(alone)} of the original's experts for the original's tokens"
            found.append(_one("routing", "error", layer, what))
    return found


def _median(rows: list[dict[str, Any]], key: str) -> float:
    values = [row[key] for row in rows if _is_number(row[key])]
    return statistics.median(values) if values else 1.0


# ---- the whole model -------------------------------------------------------------------------------------------------


def _left_out(report: dict[str, Any]) -> list[Finding]:
    parts = ("layers", "scores", "tasks", "speed", "behaviour")
    return [
        _one("left out", "note", None, f"{part}: {report[part]['left_out']}")
        for part in parts
        if "left_out" in report[part]
    ]


def _scores(scores: dict[str, Any]) -> list[Finding]:
    if "left_out" in scores:
        return []
    if not all(_is_number(scores[k]) for k in ("ppl", "kl")):
        return [_one("quality", "error", None, "perplexity or divergence is no number")]
    if scores["kl"] > USABLE or scores["ratio"] > RATIO:
        what = (
            f"far from the source: perplexity {scores['ppl']:.4g} instead of {scores['ppl_source']:.4g}, mean KL "
            f"divergence {scores['kl']:.3g} nats"
        )
        return [_one("quality", "warning", None, what)]
    return []


def _behaviour(behaviour: dict[str, Any]) -> list[Finding]:
    if "left_out" in behaviour:
        return []
    ours, theirs = behaviour["summary"]["file"], behaviour["summary"]["source"]
    found = []

    def more(a: list[int], b: list[int]) -> bool:
        return a[0] / max(a[1], 1) - b[0] / max(b[1], 1) >= ANSWERS

    if more(ours["loops"], theirs["loops"]):
        what = f"{_of(ours['loops'])} answers run in loops, of the source {_of(theirs['loops'])}"
        found.append(_one("loops", "warning", None, what))
    words = {
        "ended": "answers end by themselves",
        "json": "plain requests for JSON are answered with it",
        "schema": "answers fit their schema",
        "tools": "requests for a tool end in a call that can be carried out",
    }
    for key, text in words.items():
        if more(theirs[key], ours[key]):
            what = f"{_of(ours[key])} {text}, of the source {_of(theirs[key])}"
            found.append(_one(key, "warning", None, what))
    return found


def _speed(speed: dict[str, Any]) -> list[Finding]:
    if "left_out" in speed:
        return []
    names = {"prompt": "prompts", "generation": "generation"}
    return [
        _one("speed", "note", None, f"{name}: {speed['file'][k]:.1f} tokens per second, the source {theirs:.1f}")
        for k, name in names.items()
        if speed["file"][k] < SLOWER * (theirs := speed["source"][k])
    ]


def _of(pair: list[int]) -> str:
    return f"{pair[0]} of {pair[1]}"


def _percent(value: float) -> str:
    return f"{value:.1%}" if _is_number(value) else "none"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _numbers(values: list[int]) -> str:
    return ", ".join(map(str, values[:12])) + (f" and {len(values) - 12} more" if len(values) > 12 else "")
