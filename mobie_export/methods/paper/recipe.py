"""One layer by the paper's recipe: CEJD, GLAS, ARB row-column binarization, NGES, folded into what the file can hold.

MoBiE, arXiv 2604.06798. `docs/method.md` restates the method and lists where this departs from it, and why. In short:

    gate, up    W_e ~ B_e S_in     S_in shared by gate and up of all experts, applied once per token before them
    down        W_e ~ S_out B_e    S_out shared by all experts, applied once per token behind their weighted sum

B_e has a magnitude per row and 64 columns. Column scales go where they cost nothing: those of gate and up, common to
all experts, into the rows of S_in; those of down into the rows of the expert's up. For the same reason any order of the
columns is free: the salient ones come first, and their second plane is that of the first columns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from mobie_export.calibration import passes
from mobie_export.calibration.planes import Planes, decoded
from mobie_export.calibration.states import Work
from mobie_export.calibration.statistics import LayerStatistics
from mobie_export.calibration.store import Store
from mobie_export.errors import UNSUPPORTED, MobieError
from mobie_export.methods.calibrated import glas
from mobie_export.methods.paper import arb, cejd, nges
from mobie_export.models.architecture import swiglu
from mobie_export.models.twin import PROJECTIONS, Twin
from mobie_export.spec import block, layout

Packed = dict[str, tuple[Tensor, Tensor]]  # projection -> signs bool [E, rows, cols], magnitudes [E, rows, cols / 64]


@dataclass(frozen=True)
class Settings:
    """The paper's parts, each of them a switch. Values are the paper's where it names one."""

    factor_bits: int | None = 8  # of the shared factors; None: no CEJD
    activation_metric: bool = False  # of the input factor: the error of the outputs, not of the weights
    groups: int = 4  # of output channels whose squared gradients are averaged (GuidedQuant's number); 0: no GLAS
    columns: bool = True  # column scales
    rounds: int = arb.ROUNDS
    salient: float = 0.0  # share of the columns with a second plane, rounded up to 64 columns
    null_space: bool = True  # NGES
    relative_lambda: bool = True  # NGES's lambda in units of the mean energy of a row; False: as it stands in the paper

    def salient_columns(self, cols: int) -> int:
        """Columns of `cols` that get a second plane: whole blocks."""
        return min(cols, -(-round(self.salient * cols) // block.BLOCK_LEN) * block.BLOCK_LEN)


PAPER = Settings(salient=0.05)


@dataclass
class Layer:
    """The experts of a layer as the file has them."""

    packed: Packed
    second: Packed  # the second plane of every expert's first columns; empty without one
    # "in", "out" -> the shared factor [width, width]: bytes as stored, uint8, and float32 of what they decode to
    factors: dict[str, tuple[np.ndarray, Tensor]] = field(default_factory=dict)


# ---- shared factors --------------------------------------------------------------------------------------------------


def gradient_basis(weights: dict[str, Tensor], s: Settings) -> dict[str, Tensor]:
    """Projection -> matrix M with z = M z': the squared gradients that the layer needs are those of z'.

    Behind S_out an expert's outputs are z' = B x with z = S_out z', so that dl/dz' = S_out^T dl/dz.
    """
    if s.factor_bits is None:
        return {}
    return {"down": cejd.decompose(weights["down"], "output")[0]}


def layer(statistics: LayerStatistics, s: Settings = PAPER) -> Layer:
    """Binary experts of a layer. The statistics' saliency has s.groups groups, of z' where there is a shared factor."""
    W, G = statistics.weights, s.groups
    rows, width = W["gate"].shape[1:]
    gate_up = torch.cat([W["gate"], W["up"]], 1)
    down, factors = W["down"], {}
    if s.factor_bits is not None:
        metric = statistics.x.T @ statistics.x if s.activation_metric else None
        factors["in"], gate_up = cejd.decompose(gate_up, "input", moments=metric)
        factors["out"], down = cejd.decompose(down, "output")
        if s.columns:  # the least squares of all experts together: common, so that it folds
            _, _, ac = arb.row_column(gate_up.reshape(-1, width), None, s.rounds)
            gate_up, factors["in"] = gate_up / ac.clamp_min(arb.SMALL), ac[:, None] * factors["in"]
    saliency = statistics.saliency
    both = torch.cat([saliency["gate"], saliency["up"]], 1) if G else None

    inner = replace(statistics, x=statistics.x @ factors["in"].T) if "in" in factors else statistics
    binary, order = _gate_up(inner, gate_up, both, s)
    if "in" in factors:
        factors["in"] = factors["in"][order]
    downs, orders = _down(statistics, down, saliency["down"] if G else None, s)

    # fold: the rows of gate and up are down's columns, in down's order and with down's column scales in up
    def of(x: Tensor, projection: str) -> Tensor:
        part = x.split(rows, 1)[("gate", "up").index(projection)]
        return part.gather(1, orders.unsqueeze(-1).expand(-1, -1, part.shape[2]))

    packed, second = {}, {}
    for p in ("gate", "up"):  # `of` gathers rows; an empty second plane has none
        factor = downs.columns if p == "up" else torch.ones_like(downs.columns)
        packed[p] = _scaled_rows(of(binary.signs, p), of(binary.magnitudes, p), factor)
        second[p] = _scaled_rows(of(binary.signs2, p), of(binary.magnitudes2, p), factor)
    packed["down"], second["down"] = (downs.signs, downs.magnitudes), (downs.signs2, downs.magnitudes2)
    if "in" in factors:
        factors["in"] = binary.columns[0][:, None] * factors["in"]
    rounded = {n: cejd.rounded(f, s.factor_bits) for n, f in factors.items() if s.factor_bits is not None}
    return Layer(packed, second if s.salient_columns(width) else {}, rounded)


def _scaled_rows(signs: Tensor, magnitudes: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """A binary matrix with its rows multiplied by `factor` [E, rows]; magnitudes stay positive."""
    return signs ^ (factor < 0).unsqueeze(-1), magnitudes * factor.abs().unsqueeze(-1)


# ---- projections -----------------------------------------------------------------------------------------------------


def _moments(statistics: LayerStatistics, projection: str, e: int, saliency: Tensor | None) -> tuple[Tensor, Tensor]:
    """(second moments [groups, cols, cols] under the loss, or plain ones where saliency is None; plain [cols, cols])"""
    some = next(iter(statistics.saliency.values()))
    ones = some.new_ones(len(some), 1)
    H = statistics.second_moment(projection, e, ones if saliency is None else torch.cat([saliency, ones], 1))
    return (H if saliency is None else H[:-1]), H[-1].clone()


def _gate_up(
    statistics: LayerStatistics,
    W: Tensor,  # float32 [E, 2 rows, width], gate above up, in the basis of the statistics' inputs
    saliency: Tensor | None,  # float32 [n_tokens * k, 2 groups]
    s: Settings,
) -> tuple[arb.Binary, Tensor]:
    """(binary matrices with common column scales [1, width], order of the columns, the salient ones first)."""
    n, width = statistics.n_expert, W.shape[2]
    free = s.factor_bits is not None  # a factor's rows can be scaled and put in another order
    salient = s.salient_columns(width) if free else 0
    order = torch.arange(width, device=W.device)
    if salient:
        scores = W.new_zeros(width)
        for e in range(n):
            H, _ = _moments(statistics, "gate", e, saliency)
            score = glas.saliency(W[e : e + 1], glas.inverse_factor(H).unsqueeze(0))[0]
            scores += score / score.sum().clamp_min(arb.SMALL)  # moments of experts differ in size with their tokens
        order = scores.argsort(descending=True)
        W = W[:, :, order]
    parts, targets = [], []
    for e in range(n):
        H, C = (M[..., order, :][..., order] for M in _moments(statistics, "gate", e, saliency))
        w = W[e : e + 1]
        parts.append(arb.propagate(w, glas.inverse_factor(H).unsqueeze(0), salient, False, s.rounds))
        if s.null_space:
            targets.append(_target(parts[-1], C))
    binary = _joined(parts)
    binary.columns = W.new_ones(1, width)
    if s.null_space:
        D, Wq = torch.cat(targets).view(1, -1, width), binary.decoded().view(1, -1, width)
        br, bc, _ = nges.fit(D, Wq, _lambda(D, s), columns=s.columns and free)
        _fold(binary, br.view(n, -1), bc)
    return binary, order


def _down(
    statistics: LayerStatistics, W: Tensor, saliency: Tensor | None, s: Settings
) -> tuple[arb.Binary, Tensor]:  # with the order of every expert's columns, int64 [E, cols]
    cols = W.shape[2]
    salient = s.salient_columns(cols)
    parts, orders = [], []
    for e in range(statistics.n_expert):
        H, C = _moments(statistics, "down", e, saliency)
        w, order = W[e : e + 1], torch.arange(cols, device=W.device)
        if salient:
            order = glas.saliency(w, glas.inverse_factor(H.clone()).unsqueeze(0))[0].argsort(descending=True)
            w, H, C = w[:, :, order], H[:, order][:, :, order], C[order][:, order]
        binary = arb.propagate(w, glas.inverse_factor(H).unsqueeze(0), salient, s.columns, s.rounds)
        if s.null_space:
            D, Wq = _target(binary, C), binary.decoded()
            br, bc, _ = nges.fit(D, Wq, _lambda(D, s), columns=s.columns)
            _fold(binary, br, bc)
        parts.append(binary)
        orders.append(order)
    return _joined(parts), torch.stack(orders)


def _target(binary: arb.Binary, C: Tensor) -> Tensor:
    """What NGES aims at: not the original weights, which would undo the propagation of errors, but what it left."""
    return nges.target(binary.aims, binary.decoded(), nges.null_projector(C))


def _lambda(D: Tensor, s: Settings) -> float:
    return nges.LAMBDA * (float(D.square().sum(-1).mean()) if s.relative_lambda else 1.0)


def _fold(binary: arb.Binary, br: Tensor, bc: Tensor) -> None:
    """Row factors [E, rows] into the magnitudes, column factors into the column scales."""
    binary.signs, binary.magnitudes = _scaled_rows(binary.signs, binary.magnitudes, br)
    binary.signs2, binary.magnitudes2 = _scaled_rows(binary.signs2, binary.magnitudes2, br)
    binary.columns = binary.columns * bc


def _joined(parts: list[arb.Binary]) -> arb.Binary:
    return arb.Binary(*(torch.cat([getattr(b, n) for b in parts]) for n in arb.Binary.__dataclass_fields__))


# ---- what the file says ----------------------------------------------------------------------------------------------


def stored(signs: Tensor, magnitudes: Tensor) -> Tensor:
    """Weights [E, rows, cols] of what the file holds: magnitudes in 8 bits and one float per expert."""
    a = []
    for values in magnitudes.double().cpu().numpy():
        scale, codes = block.encode_scales(values)
        a.append(torch.from_numpy(codes.astype("float32") * (scale * block.SCALE_UNIT)))
    return decoded(signs, torch.stack(a).to(signs.device))


def dense(result: Layer) -> dict[str, Tensor]:
    """Projection -> float32 [E, rows, cols]: the matrices that the stored layer stands for."""
    weights = {}
    for p in PROJECTIONS:
        W = stored(*result.packed[p])
        if p in result.second:
            W[:, :, : result.second[p][0].shape[2]] += stored(*result.second[p])
        end, side = ("out", "output") if p == "down" else ("in", "input")
        weights[p] = cejd.compose(result.factors[end][1], W, side) if end in result.factors else W
    return weights


def arb_llm_rc(statistics: LayerStatistics) -> tuple[dict[str, Tensor], int]:
    """(projection -> float32 [E, rows, cols], bits): the layer by ARB-LLM-RC, to compare with.

    Its own second moments are the plain ones, of the inputs.
    """
    weights, bits = {}, 0
    ones = statistics.x.new_ones(statistics.index.numel(), 1)
    for p, W in statistics.weights.items():
        made = []
        for e in range(statistics.n_expert):
            U = glas.inverse_factor(statistics.second_moment(p, e, ones))[0]
            approximation, n = arb.arb_llm_rc(W[e], U)
            made.append(approximation)
            bits += n
        weights[p] = torch.stack(made)
    return weights, bits


# ---- the whole model -------------------------------------------------------------------------------------------------


def beside_rows(twin: Twin) -> list[tuple[str, tuple[int, ...], int]]:
    """(name, shape, type) of second planes and shared factors of an export by the recipe. MobieError where there cannot
    be one."""
    biases = [n for n in twin.gguf.tensors if n.endswith("_exps.bias")]
    if biases or twin.arch.act is not swiglu:
        raise MobieError(
            UNSUPPORTED,
            f"{twin.gguf.paths[0]} cannot be exported by the paper's recipe",
            f"experts with biases, {biases[0]}" if biases else f"the activation of {twin.gguf.architecture}",
            "experts whose neurons can be scaled and put in another order",
            "leave --recipe out",
        )
    rows: dict[str, tuple[tuple[int, ...], int]] = {}
    experts = {n: x for n, x in layout.experts(twin.gguf).items() if layout.layer_of(n) < twin.n_layers}
    for name, item in experts.items():
        k = PAPER.salient_columns(item.cols)
        if k:
            rows[layout.residual_name(name)] = (k, item.rows, item.n_expert), block.TYPE_ID
        rows[layout.shared_name(name)] = (twin.width, twin.width), _factor_type()
    return [(name, *row) for name, row in rows.items()]


def _factor_type() -> int:
    assert PAPER.factor_bits is not None
    return int(cejd.FACTOR_TYPES[PAPER.factor_bits])


def backward(
    work: Work, step: Callable[[int, str], None], done: Callable[[int], bool]
) -> Iterator[tuple[int, LayerStatistics]]:
    """passes.backward with the gradients that the recipe wants."""
    return passes.backward(work, step, max(1, PAPER.groups), lambda weights: gradient_basis(weights, PAPER), done)


def put_layer(store: Store, index: int, statistics: LayerStatistics) -> None:
    """Quantize a layer into the calibration's store."""
    made = layer(statistics, PAPER)
    for end, (rows, _) in made.factors.items():
        store.put_factor(f"blk.{index}.ffn_moe_{end}.weight", rows, _factor_type())
    made_planes = {p: Planes(*made.packed[p], *made.second.get(p, ())) for p in PROJECTIONS}
    store.put(index, made_planes)  # last: with it the layer counts as done
