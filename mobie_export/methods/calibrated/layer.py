"""One layer of the calibrated method: error propagation under its statistics."""

import torch
from torch import Tensor

from mobie_export.calibration.planes import Planes, placed
from mobie_export.calibration.statistics import LayerStatistics
from mobie_export.calibration.store import reordered
from mobie_export.methods.calibrated import glas, signs
from mobie_export.methods.calibrated.options import DESCENTS
from mobie_export.methods.calibrated.second_signs import gains
from mobie_export.spec.block import MOBIE, Coding

EXPERTS_AT_ONCE = 4  # of one projection, in error propagation: their blocks stay in the cache


def quantize_layer(
    statistics: LayerStatistics, second: dict[str, int] | None = None, coding: Coding = MOBIE
) -> tuple[dict[str, Planes], Tensor | None]:
    """Error propagation and descent under the loss-weighted second moments.

    Gate and up read the same inputs and share the mean of their weights. second: projection -> columns that get a
    second sign. Those of gate and up are the hidden channels where it pays most over all experts; the neurons of every
    expert are put in the order in which it pays for down. coding: of the experts. Returns (projection -> Planes, order
    of the neurons int64 [E, ff] or None).
    """
    second = second or {}
    order = columns = None
    if any(second.values()):
        gain = gains(statistics)
        if second.get("down"):
            order = gain["down"].argsort(dim=1, descending=True, stable=True)
            statistics.weights = reordered(statistics.weights, order)
        columns = (gain["gate"] + gain["up"]).argsort(dim=0, descending=True, stable=True)
    W, s = statistics.weights, statistics.saliency
    shared = (s["gate"] + s["up"]) / 2
    at_once = statistics.n_expert if W["gate"].is_cuda else EXPERTS_AT_ONCE
    result: dict[str, Planes] = {}
    # Projections with the same inputs and second columns are one matrix.
    together = [("gate", "up")] if second.get("gate", 0) == second.get("up", 0) else [("gate",), ("up",)]
    for projections in [*together, ("down",)]:
        saliency = s["down"] if projections == ("down",) else shared
        k = second.get(projections[0], 0)
        chosen = None
        if k:
            chosen = (
                torch.arange(k, device=shared.device) if columns is None or projections == ("down",) else columns[:k]
            )
        rows = [W[p].shape[1] for p in projections]
        for first in range(0, statistics.n_expert, at_once):
            some = range(first, min(first + at_once, statistics.n_expert))
            H = torch.cat([statistics.second_moment(projections[0], e, saliency) for e in some])
            weights = torch.cat([W[p][some.start : some.stop] for p in projections], 1)
            parts = (t.split(rows, 1) for t in binarize(weights, H, chosen, coding))
            for p, part in zip(projections, zip(*parts, strict=True), strict=True):
                found = Planes(*part, *([chosen] if k and p != "down" else []))
                result[p] = placed(result.get(p), statistics.n_expert, slice(some.start, some.stop), found)
    return result, order


def binarize(
    W: Tensor,  # float32 [batch, rows, cols]
    H: Tensor,  # float32 [batch, cols, cols], damped in place
    columns: Tensor | None = None,  # int64 [k]
    coding: Coding = MOBIE,
    descents: int = DESCENTS,
) -> tuple[Tensor, ...]:
    """(signs, magnitudes), and those of the second plane where columns are given, as Planes has them."""
    found = signs.propagate(W, glas.factor(H), columns, coding.length, signs.largest(W, coding))
    for _ in range(descents):
        signs.descend(found, H)
    return found.planes()
