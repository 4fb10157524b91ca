"""Where a second sign pays most: columns of layers and projections compete for the bits that are to spare."""

import torch
from torch import Tensor

from mobie_export.calibration.statistics import LayerStatistics
from mobie_export.spec.block import BLOCK_LEN

Unit = tuple[int, tuple[str, ...]]  # what gets second signs together: layer, projections


def gains(statistics: LayerStatistics) -> dict[str, Tensor]:
    """How much less the loss would rise if a column had a second sign: gate and up [cols], down [E, cols].

    The estimate is Fisher's, along the diagonal of the second moments: with r the distance of |w| from the block's
    magnitude a, and a2 the mean r of the block, (r^2 - (r - a2)^2) H_jj, summed over the rows. Its unit is the same in
    all layers.
    """
    found = {}
    for p, W in statistics.weights.items():
        each = []
        for e in range(statistics.n_expert):
            size = W[e].abs().unflatten(-1, (-1, BLOCK_LEN))
            r = (size - size.mean(-1, keepdim=True)).abs()
            a2 = r.mean(-1, keepdim=True)
            less = (r.square() - (r - a2).square()).sum(0).flatten()
            each.append(less * statistics.energy(p, e) * statistics.fisher[p])
        found[p] = torch.stack(each)
    return found | {p: found[p].sum(0) for p in ("gate", "up")}


def curve(gain: dict[str, Tensor], block: int) -> dict[str, list[float]]:
    """Projection -> gain of every further 64 columns, in the order `quantize_layer` takes them in."""
    hidden = (gain["gate"] + gain["up"]).argsort(dim=0, descending=True, stable=True)
    down = gain["down"].sort(dim=1, descending=True).values.sum(0)
    sums = {"gate": gain["gate"][hidden], "up": gain["up"][hidden], "down": down}
    return {p: x.unflatten(0, (-1, block)).sum(1).tolist() for p, x in sums.items()}


def allocate(
    curves: dict[int, dict[str, list[float]]],
    bits: dict[int, dict[str, int]],  # layer -> projection -> what 64 columns cost
    budget: float,
    fused: bool = False,  # gate and up are one tensor: as many columns in one as in the other
    numbers: int = 0,  # what the numbers of 64 columns cost, in a list of the layer that gate and up share
) -> dict[int, dict[str, int]]:
    """Layer -> projection -> columns with a second sign, the budget of bits going where a bit gains most.

    Gate is charged for the list. Where up has more columns that is too little; if it exceeds the budget, whoever makes
    the list longer is charged instead.
    """
    units: dict[Unit, tuple[list[float], int]] = {}
    for i, of_layer in curves.items():
        groups = [("gate", "up"), ("down",)] if fused else [(p,) for p in of_layer]
        for g in groups:
            units[i, g] = [sum(x) for x in zip(*(of_layer[p] for p in g), strict=True)], sum(bits[i][p] for p in g)

    def spent(exact: bool) -> tuple[dict[Unit, int], float]:
        """(64 columns by unit, what they cost)"""
        taken = dict.fromkeys(units, 0)
        left = budget

        def cost(unit: Unit) -> int:
            i, g = unit
            longer = "gate" in g
            if exact and not fused and g != ("down",):
                other = ("up",) if longer else ("gate",)
                longer = taken[unit] >= taken[i, other]
            return units[unit][1] + (numbers if longer else 0)

        def rate(unit: Unit) -> float:
            curve = units[unit][0]
            return curve[taken[unit]] / cost(unit) if taken[unit] < len(curve) and cost(unit) <= left else -1.0

        while max(map(rate, units), default=-1.0) >= 0:
            best = max(units, key=rate)
            left -= cost(best)
            taken[best] += 1
        lists = {i: max(n for (j, g), n in taken.items() if j == i and g != ("down",)) for i in curves}
        return taken, sum(n * units[u][1] for u, n in taken.items()) + numbers * sum(lists.values())

    taken, bits_taken = spent(exact=False)
    if bits_taken > budget:
        taken, _ = spent(exact=True)
    return {i: {p: BLOCK_LEN * n for (j, g), n in taken.items() if j == i for p in g} for i in curves}
