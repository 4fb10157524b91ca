"""The steps of the method `ordered`.

With h the hidden state behind a layer of the original, a tilde for the binarized path, and E_e the experts of a layer,
the layer's sum of experts is to be

    T_t = h_t - b~_t,    b~_t all that the binarized path adds without its experts: residual, attention, shared experts

for every token t. Gate and up of an expert are first multiplied by the linear map that comes nearest to undoing the
drift of their inputs (`towards_original`), then binarized under the second moments of these inputs x~_t, weighted by
the square of the expert's weight p_te for the token. Down is first moved by least squares: with z_te = p_te act(G x~_t,
U x~_t) for the binarized G and U, expert by expert with the others' part subtracted,

    W_e' = argmin sum_t c_t |W z_te - (T_t - sum of the others)|^2 + lambda |W - W_e|^2,

with c_t what a token counts (`_counts`) and lambda such that it holds on tokens that were kept aside (`_hold`), some
sweeps over the experts of a layer; then error propagation of W_e' under sum_t z_te z_te^T, each expert's binary
weights replacing its part before the next one is moved, so that the later ones make up for the earlier. Kin: GPTAQ
(arXiv 2504.02692), which moves every matrix towards its own outputs; here what writes to the stream moves towards the
stream.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mobie_export.calibration import planes, ranks
from mobie_export.calibration.planes import Planes
from mobie_export.calibration.states import States
from mobie_export.calibration.statistics import LayerStatistics
from mobie_export.calibration.store import note, noted, reordered
from mobie_export.calibration.text import Calibration
from mobie_export.methods.base import USABLE, Run
from mobie_export.methods.calibrated import estimate, saving
from mobie_export.methods.calibrated.layer import EXPERTS_AT_ONCE, binarize
from mobie_export.methods.calibrated.options import DESCENTS, TextMethod, spare_bits
from mobie_export.methods.calibrated.second_signs import gains
from mobie_export.methods.calibrated.steps import NUMBERS, Layer, Workspace, check_reached, numbers, thin_experts
from mobie_export.methods.ordered import sensitivity
from mobie_export.models.twin import PROJECTIONS, Experts, Twin, same_choices
from mobie_export.spec import layout
from mobie_export.spec.block import MOBIE, Coding

if TYPE_CHECKING:
    from mobie_export.methods.ordered.method import Ordered

SWEEPS = 3  # of the least squares over the experts of a layer
KEPT = 1 << 30  # bytes of down's inputs and moments that are kept from sweep to sweep; the others are computed anew
TRIMMED_EVERY = 16  # experts: what they leave free between what is kept
COPIES = 8  # of a token's row in float32, in a sweep: measured
TOKEN_POWER = 0.5  # see _counts
TO_DO = "give it more bits (--bpw) or text (--samples), or refine it (mobie-export improve)"
# lambda, of the mean diagonal of the second moments of down's inputs, mean over the experts; a layer's is chosen. Where
# nothing speaks for one of them, the first.
LAMBDAS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
ASIDE = 4  # of a layer's tokens one in so many, the last ones, decides on lambda
ASKED = 8  # experts at most that are looked at for it


@dataclass
class Paths(LayerStatistics):
    """What a layer's experts see on the binarized path, and what they are to add up to."""

    p: Tensor = field(kw_only=True)  # float32 [n_tokens, k]; times the root of what the token counts, as target is
    target: Tensor = field(kw_only=True)  # float32 [n_tokens, width]


@dataclass(frozen=True)
class Seen:
    out: Tensor  # [n, length, width], behind the layer
    x: Tensor  # [n_tokens, width], inputs of the experts
    index: Tensor  # int64 [n_tokens, k]
    p: Tensor  # [n_tokens, k]
    experts: Tensor  # [n, length, width], their sum


def collect(method: TextMethod, run: Run, work: Workspace) -> Iterator[Layer]:
    """The layers from the first to the last; what is binarized meanwhile is what the next one sees."""
    twin, calibration, store = work.files.twin, work.files.calibration, work.store
    second = _second(method, run, work)
    if method.whole is None:
        saving.save(method, run, work)
    n_tokens = calibration.tokens.numel()
    notes = work.files.folder / "ordered.json"  # of the layers that are done: lines, experts that saw few tokens
    lines, thin = noted(notes, 2)
    with run.phase("layers in order", n_tokens * twin.n_layers, "token") as progress:
        first = max((i for i in range(twin.n_layers + 1) if ranks.everywhere(_there(work, i))), default=0)
        progress.update(n_tokens * first, f"{first} layers, done before")
        original, binary = (_states(work, kind, first) for kind in ("original", "binary"))
        if not first:
            table = twin.embedding()
            for where in calibration.batches:
                for states in (original, binary):
                    states.write(where, table[calibration.tokens[where].to(twin.device)])
            original.finish()
            binary.finish()
            del table
        for i in range(first, twin.n_layers):
            behind = _states(work, "original", i + 1)
            behind_binary = _states(work, "binary", i + 1)
            with torch.no_grad():
                layer = twin.layer(i)
                experts, routing, lines[i] = twin.experts_of(layer), [], f"layer {i}:"
                inputs: list[Tensor] = []  # of the original's experts
                for where in calibration.batches:
                    if experts is None:
                        behind.write(where, twin.run(layer, original.read(where)))
                        continue
                    seen = _run(twin, layer, experts, original.read(where))
                    behind.write(where, seen.out)
                    routing.append(seen.index)
                    inputs.append(seen.x)
                behind.finish()
                if experts is not None:
                    statistics = _paths(twin, layer, experts, calibration, behind, binary)
                    towards_original(statistics, torch.cat(inputs))
                    inputs.clear()
                    same = same_choices(ranks.gathered(torch.cat(routing)), ranks.gathered(statistics.index))
                    lines[i] += f" {same:.1%} of the experts as in the original,"
                    check_reached(method, i, statistics)
                    thin |= {i: found} if (found := thin_experts(statistics)) else {}
                    experts.weights.clear()  # from here on they are the statistics'
                    _trim()
                    if not ranks.everywhere(store.has(i)):
                        yield Layer(i, statistics, second.get(i))
                    del statistics
                    _trim()
                    _install(work, experts, i)
                for where in calibration.batches:
                    behind_binary.write(where, twin.run(layer, binary.read(where)))
                del layer, experts
            lines[i] += f" {_lost(calibration, behind, behind_binary)}"
            note(notes, lines, thin)  # before the layer counts as done
            behind_binary.finish()
            ranks.wait()  # a rank that is not so far yet would need what comes before
            original.delete()
            binary.delete()
            original, binary = behind, behind_binary
            progress.update(n_tokens, f"layer {i}")
    work.outcome.lines += [*(lines[i] for i in sorted(lines)), _whole(work, original, binary)]
    work.outcome.thin = dict(sorted(thin.items()))
    work.files.hidden[twin.n_layers] = original
    work.settings["ordered"] = {"sweeps": SWEEPS, "tokens": TOKEN_POWER}
    if second:
        work.settings["second"] = {str(i): second[i] for i in sorted(second)}


def _second(method: TextMethod, run: Run, work: Workspace) -> dict[int, dict[str, int]]:
    """Layer -> projection -> columns with a second sign; empty where the bits are for one only."""
    twin, spare = work.files.twin, spare_bits(run.source, method.bits, run.coding)
    if spare <= 0:
        return {}
    every = work.files.every.tokens
    n = sensitivity.sequences(len(every), twin.n_layers)
    here, layers = saving.made(method, run, sequences=n), [i for i in range(twin.n_layers) if twin.has_experts(i)]
    if work.sensitivity is None:
        n_tokens = n * every.shape[1] // ranks.world()
        with run.phase("sensitivity", n_tokens * twin.n_layers * (twin.n_layers + 1) // 2, "token") as progress:
            work.sensitivity, work.made["sensitivity"] = sensitivity.damage(work, progress.update), here
    else:
        if work.known is not None and sorted(work.sensitivity) != layers:
            raise work.known.damaged(f"sensitivity of the layers {sorted(work.sensitivity)} in place of {layers}")
        saving.taken(work, "sensitivity", here)
    damage = work.sensitivity
    found = sensitivity.shares(run.source, twin, damage, spare, NUMBERS)
    for i, columns in found.items():
        wide = ", ".join(f"{p} {k}" for p, k in columns.items())
        work.outcome.lines.append(f"layer {i}: binary alone {damage[i]:.3f} nats; columns with a second sign: {wide}")
    return found


def _states(work: Workspace, kind: str, i: int) -> States:
    files = work.files
    return States(files.folder / f"{kind}-{i}", files.shape, torch.float32, files.twin.device)


def _trim() -> None:
    """Free memory back to the system, where the C library would keep it (glibc): it is counted as resident."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _there(work: Workspace, i: int) -> bool:
    """Whether an earlier run finished both paths' states before layer i, from which all others follow."""
    return all((work.files.folder / f"{kind}-{i}").exists() for kind in ("original", "binary"))


def _lost(calibration: Calibration, original: States, binary: States) -> str:
    """The error of the residual stream, the root mean square over tokens of each token's relative error."""
    total, n = 0.0, 0
    for where in calibration.batches:
        a, b = original.read(where), binary.read(where)
        total += float(((a - b).square().sum(-1) / a.square().sum(-1).clamp_min(1e-30)).sum())
        n += a.shape[0] * a.shape[1]
    return f"error of the residual stream {(ranks.total(total) / ranks.total(n)) ** 0.5:.4f}"


def _whole(work: Workspace, original: States, binary: States) -> str:
    """What all layers together do to the output, on as many sequences as `sensitivity` looks at."""
    where = slice(0, min(sensitivity.MOST, original.shape[0]))
    states = [x.read(where)[:, : sensitivity.LENGTH].flatten(0, 1) for x in (original, binary)]
    with torch.no_grad():
        found = sensitivity.divergence(work.files.twin.head(), states[0], {0: states[1]})[0]
    line = f"all layers: KL divergence from the original {found:.4f} nats, on text that was calibrated on"
    return line if found <= USABLE else f"{line}; above {USABLE:g} a file is of little use: {TO_DO}"


def operations(method: "Ordered", twin: Twin, coding: Coding) -> dict[str, estimate.Work]:
    """Phase -> what it computes, for estimates of the time."""
    n_tokens, k = method.samples * method.seq_len, twin.config.num_experts_per_tok
    signs = estimate.Work()
    total = 3.0 * n_tokens * estimate.layer_operations(twin)  # the original, the experts' inputs, the binarized layer
    for x in estimate.expert_tensors(twin):
        if layout.is_down(x.tensor.name):
            ff, width = x.cols, x.rows
            inputs, moments, product = 2 * ff * 2 * width, 2 * ff**2, 2 * ff * width  # of a token of an expert
            anew = 1 - min(1.0, KEPT / (4 * n_tokens * k * ff))
            total += n_tokens * k * ((1 + anew * (SWEEPS + 1)) * inputs + 2 * moments + (SWEEPS + 1) * 2 * product)
            total += x.n_expert * (ff**3 + (SWEEPS + 1) * 4 * width * ff**2)  # solved
            total += len(LAMBDAS) * min(ASKED, x.n_expert) * (ff**3 + 4 * width * ff**2)  # lambda
            total += 4 * n_tokens * width**2 + 7 * (len(LAMBDAS) + 1) * width**3  # the drift of gate's and up's inputs
        else:
            total += n_tokens * k * x.cols**2  # second moments, which gate and up share
            total += 2 * x.n_weights * x.cols  # times a map of the inputs
        signs += estimate.propagation(x, method.device, method.descents)
    copies = (SWEEPS + 2) * n_tokens * k * COPIES * twin.width * twin.n_layers
    reads = estimate.layer_weights(twin)  # to be copied into place as well
    found = {"layers in order": estimate.Work(total, copies + reads, reads) + signs}
    known = method.known is not None and method.known.sensitivity is not None
    if spare_bits(twin.gguf, method.bits, coding) > 0 and not known:
        n = sensitivity.n_tokens(method.samples, method.seq_len, twin.n_layers)
        products = n * twin.n_layers / 2 * estimate.layer_operations(twin)
        found = {"sensitivity": estimate.Work(products, sensitivity.PASSES * reads, reads)} | found
    return found | estimate.together(twin, method)


# ---- what a layer sees -----------------------------------------------------------------------------------------------


def _run(twin: Twin, layer: nn.Module, experts: Experts, hidden: Tensor) -> Seen:
    taken: list[Tensor] = []
    before = experts.register_forward_pre_hook(lambda module, args: taken.extend(args))
    after = experts.register_forward_hook(lambda module, args, out: taken.append(out))
    try:
        out = twin.run(layer, hidden)
    finally:
        before.remove()
        after.remove()
    x, index, p, added = taken
    return Seen(out, x.reshape(-1, x.shape[-1]), index, p, added.view(out.shape))


def _paths(
    twin: Twin, layer: nn.Module, experts: Experts, calibration: Calibration, behind: States, binary: States
) -> Paths:
    """On the binarized path, with the layer's own experts still in their place."""
    n_tokens, done = calibration.tokens.numel(), 0
    x, target = (torch.empty(n_tokens, twin.width, device=twin.device) for _ in range(2))
    choices, shares, sizes = [], [], torch.empty(n_tokens, device=twin.device)
    for where in calibration.batches:
        seen, truth = _run(twin, layer, experts, binary.read(where)), behind.read(where)
        here = slice(done, done := done + len(seen.x))
        x[here] = seen.x
        target[here] = (truth - (seen.out - seen.experts)).flatten(0, 1)
        sizes[here] = truth.flatten(0, 1).square().mean(-1)
        choices.append(seen.index)
        shares.append(seen.p)
    index, p = torch.cat(choices), torch.cat(shares)
    root = _counts(sizes).sqrt()[:, None]
    p = p * root
    target.mul_(root)
    weight = p.reshape(-1, 1).square()
    weight = weight / ranks.mean(weight).clamp_min(1e-30)
    ones = dict.fromkeys(PROJECTIONS, 1.0)
    saliency = dict.fromkeys(PROJECTIONS, weight)
    return Paths(x, index, saliency, dict(experts.weights), ones, experts.biases, experts.act, p=p, target=target)


def _counts(sizes: Tensor) -> Tensor:  # [n_tokens] each
    """What tokens count, by the mean square of their stream behind the layer; 1 at the median.

    The next norm divides by the root of it, so that errors count in relation to it; but tokens of massive activations,
    hundreds of times the others, are what attention rests on, and with weights of 1 / size they are lost. Between the
    two: measured, docs/measured/real-weights.md.
    """
    return (sizes / ranks.gathered(sizes).median().clamp_min(1e-30)).clamp_min(1e-6).pow(-TOKEN_POWER)


def _install(work: Workspace, experts: Experts, i: int) -> None:
    """The binary experts of a layer in place of its own."""
    device = work.files.twin.device
    for projection, found in work.store.tensors(i).items():
        experts.weights[projection] = planes.decoded(*found.to(device))


def towards_original(s: Paths, x: Tensor) -> None:  # [n_tokens, width], the original's inputs of the experts
    """Gate and up for inputs that have drifted: W (I + M^T), in place, where M^T x~_t comes nearest to x_t - x~_t.

    Experts read the same stream, so that one map serves a layer, and all of its tokens decide on it.
    """
    counts, aside = s.p.square().sum(1, keepdim=True), len(x) - len(x) // ASIDE

    def moments(i: slice) -> tuple[Tensor, Tensor]:  # of some tokens, as `_drift` takes them
        weighted = (s.x[i] * counts[i]).T
        return ranks.summed(weighted @ s.x[i]), ranks.summed(weighted @ (x[i] - s.x[i]))

    some, others = moments(slice(0, aside)), moments(slice(aside, None))
    unit = max(float(some[0].diagonal().mean()), 1e-30)
    gate_and_up = [s.weights[p][:: -(-s.n_expert // ASKED)].flatten(0, 1) for p in ("gate", "up")]
    square = sum(W.T @ W for W in gate_and_up)  # of what some experts make of an error of their inputs
    gain = dict.fromkeys((unit * x for x in LAMBDAS), 0.0)
    for hold in gain:
        M = _drift(*some, hold)
        gain[hold] = float(((2 * others[1] - others[0] @ M) * (M @ square)).sum())
    hold = _chosen(gain)
    if not ranks.from_first(lambda: gain[hold] > 0):
        return
    M = _drift(some[0] + others[0], some[1] + others[1], hold)
    for p in ("gate", "up"):
        for W in s.weights[p]:
            W += W @ M.T


def _drift(A: Tensor, C: Tensor, hold: float) -> Tensor:  # [width, width]
    """argmin sum_t c_t |x_t - x~_t - M^T x~_t|^2 + hold |M|^2, with A = sum c x~ x~^T and C = sum c x~ (x - x~)^T."""
    return torch.linalg.solve(_keep(A, hold), C)


# ---- signs -----------------------------------------------------------------------------------------------------------


def encode(work: Workspace, layer: Layer, descents: int) -> None:
    with numbers(layer.number), torch.no_grad():
        assert isinstance(layer.statistics, Paths)
        names = work.files.twin.expert_names(layer.number)
        fused = names["gate"][0] == names["up"][0]
        found = binarized(layer.statistics, layer.second or {}, work.coding, descents, fused)
        work.store.put(layer.number, *found)


def binarized(
    s: Paths,
    second: dict[str, int],
    coding: Coding = MOBIE,
    descents: int = DESCENTS,
    fused: bool = False,
) -> tuple[dict[str, Planes], Tensor | None]:
    """(projection -> planes, order of the neurons int64 [E, ff] or None). second: columns that get a second sign;
    coding: of the experts, whose magnitudes are rounded as it does; descents: sweeps over all signs; fused:
    gate and up are one tensor."""
    order, columns = None, None
    if any(second.values()):
        gain = gains(s)
        if second.get("down"):
            order = gain["down"].argsort(dim=1, descending=True, stable=True)
            for p in PROJECTIONS:  # one after the other: two copies of a layer may not fit
                s.weights |= reordered({p: s.weights[p]}, order)
            s.biases = {p: b if p == "down" else b.gather(1, order) for p, b in s.biases.items()}
        columns = (gain["gate"] + gain["up"]).argsort(dim=0, descending=True, stable=True)[: second.get("gate", 0)]
    gate, up = _gate_and_up(s, columns if columns is not None and len(columns) else None, coding, descents, fused)
    return {"gate": gate, "up": up, "down": _down(s, second.get("down", 0), coding, descents)}, order


def _gate_and_up(s: Paths, columns: Tensor | None, coding: Coding, descents: int, fused: bool) -> tuple[Planes, Planes]:
    """One matrix for each expert: they read the same inputs. Every rank takes some experts. The binary weights take the
    place of the original ones: down's inputs are to be theirs."""
    rows, made = [s.weights[p].shape[1] for p in ("gate", "up")], dict[str, Planes]()
    chosen = [] if columns is None else [columns]
    at_once = s.n_expert if s.x.is_cuda else ranks.world() * EXPERTS_AT_ONCE
    for some in torch.arange(s.n_expert).tensor_split(-(-s.n_expert // at_once)):
        H = ranks.own_sum(torch.cat([s.second_moment("gate", e, s.saliency["gate"]) for e in some.tolist()]))
        own = some[ranks.divide(len(some))]
        W = torch.cat([s.weights[p][own[0] : own[-1] + 1] for p in ("gate", "up")], 1)
        both = [ranks.gathered(t).split(rows, 1) for t in binarize(W, H, columns, coding, descents)]
        pair = [Planes(*parts, *chosen) for parts in zip(*both, strict=True)]
        pair = planes.rounded(pair, coding) if fused else [planes.rounded([x], coding)[0] for x in pair]
        for p, found in zip(("gate", "up"), pair, strict=True):
            made[p] = planes.placed(made.get(p), s.n_expert, some, found)
            s.weights[p][some] = planes.decoded(*found)
        _trim()
    return made["gate"], made["up"]


def _down(s: Paths, k: int, coding: Coding, descents: int) -> Planes:
    """Down moved by least squares towards the target, then binarized, expert by expert. Every rank takes some rows of
    an expert: the next one is to see what this one became."""
    flat, weight, n_used = s.index.flatten(), s.p.flatten(), s.index.shape[1]
    rows = [torch.nonzero(flat == e).flatten() for e in range(s.n_expert)]
    tokens = [r // n_used for r in rows]
    left = s.target.clone()  # what the experts' sum lacks
    W = s.weights["down"].clone()
    columns = torch.arange(k, device=W.device) if k else None
    kept: dict[int, Tensor] = {}
    solved: dict[int, _LeastSquares] = {}
    # every rank keeps the same experts' solutions: what makes them is summed over all
    size = 4 * W.shape[2]
    all_inputs = int(ranks.total(flat.numel())) * size // ranks.world()
    most_solved = max(0, KEPT - all_inputs) // (2 * size * W.shape[2])
    room = KEPT - min(most_solved, s.n_expert) * 2 * size * W.shape[2]

    def inputs(e: int) -> Tensor:  # z_te, [tokens of the expert, ff]
        nonlocal room
        if e in kept:
            return kept[e]
        z = s.inputs("down", rows[e], e) * weight[rows[e], None]
        if 4 * z.numel() <= room:
            kept[e] = z
            room -= 4 * z.numel()
        return z

    def replace(e: int, z: Tensor, by: Tensor) -> None:
        left.index_add_(0, tokens[e], z @ (W[e] - by).T)
        W[e] = by

    energy = 0.0
    for e in range(s.n_expert):
        z = inputs(e)
        energy += float(z.square().sum())
        left.index_add_(0, tokens[e], -(z @ W[e].T))
        if "down" in s.biases:
            left.index_add_(0, tokens[e], -weight[rows[e], None] * s.biases["down"][e])
    unit = max(ranks.total(energy) / W.shape[0] / W.shape[2], 1e-30)
    hold = _hold(s, inputs, left, tokens, unit)
    original, found, own = s.weights["down"], None, ranks.divide(W.shape[1])

    def least_squares(e: int, z: Tensor) -> _LeastSquares:
        if e in solved:
            return solved[e]
        made = _LeastSquares.of(ranks.summed(z.T @ z), _prior(s, e, int(ranks.total(len(z)))), hold)
        if len(solved) < most_solved:
            solved[e] = made
        return made

    for sweep in range(SWEEPS + 1):
        for e in range(s.n_expert):
            if e % TRIMMED_EVERY == 0:
                _trim()
            z = inputs(e)
            expert = least_squares(e, z)
            B = ranks.own_sum((z.T @ left[tokens[e]]).T).T
            moved = expert.moved(B, W[e, own], original[e, own])
            if sweep < SWEEPS:
                replace(e, z, ranks.gathered(moved))
                continue
            H = ranks.summed(z.T @ z)[None]
            if expert.prior is not None:
                H += expert.prior
            made = binarize(moved[None], H, columns, coding, descents)
            one = Planes(*(ranks.gathered(t[0])[None] for t in made))  # second signs are the first columns'
            (one,) = planes.rounded([one], coding)
            replace(e, z, planes.decoded(*one)[0])
            found = planes.placed(found, s.n_expert, slice(e, e + 1), one)
    assert found is not None
    return found


def _hold(s: Paths, inputs: Callable[[int], Tensor], left: Tensor, tokens: list[Tensor], unit: float) -> float:
    """lambda in units of the moments: the one of LAMBDAS, times `unit`, with which some experts, each moved on most of
    the tokens, take most from what is left on the others. The fewer tokens and the less there is to be made up for, the
    larger: real-weights.md has what a fixed one costs. It is the same for all experts of a layer, so that those with
    few tokens stay nearer to their own weights.

    inputs, left, tokens: as `_down` has them.
    """
    holds = [unit * x for x in LAMBDAS]
    gain, aside = dict.fromkeys(holds, 0.0), len(left) - len(left) // ASIDE
    for e in range(0, s.n_expert, -(-s.n_expert // ASKED)):
        z, here = inputs(e), left[tokens[e]]
        parts = [(z[m], here[m]) for m in (tokens[e] < aside, tokens[e] >= aside)]
        (A, B), (C, D) = ((ranks.summed(x.T @ x), ranks.summed(x.T @ y)) for x, y in parts)
        prior = _prior(s, e, int(ranks.total(len(parts[0][0]))))
        for hold in holds:
            more = _LeastSquares.of(A, prior, hold).solve(B)
            gain[hold] += float(2 * (more * D).sum() - (more * (C @ more)).sum())
    return _chosen(gain)


def _chosen(gain: dict[float, float]) -> float:
    """The lambda with which most is gained, the first rank's: their CPUs may round differently."""
    return ranks.from_first(lambda: max(gain, key=lambda x: gain[x]))


@dataclass(frozen=True)
class _LeastSquares:
    """argmin |W' z - wanted|^2 + hold |W' - W0|^2 + the prior's part: what of it does not depend on what is wanted."""

    prior: Tensor | None  # [ff, ff]
    hold: float
    factor: Tensor  # [ff, ff], lower triangular, of A + prior + hold
    whole: Tensor | None  # [ff, ff], where it has no such factor: rounded moments

    @classmethod
    def of(cls, A: Tensor, prior: Tensor | None, hold: float) -> "_LeastSquares":  # A = z^T z
        whole = _keep(A if prior is None else A + prior, hold)
        factor, info = torch.linalg.cholesky_ex(whole)
        return cls(prior, hold, factor, whole if info.item() else None)

    def solve(self, B: Tensor) -> Tensor:  # [ff, n] -> the same
        return torch.cholesky_solve(B, self.factor) if self.whole is None else torch.linalg.solve(self.whole, B)

    def moved(self, B: Tensor, W: Tensor, W0: Tensor) -> Tensor:  # [width, ff]
        """W', with B = z^T (wanted - W z): what W lacks, so that rounded products cost nothing of W itself."""
        back = (W0 - W).T
        held = self.hold * back if self.prior is None else (self.prior @ back).add_(back, alpha=self.hold)
        return W + self.solve(B + held).T


def _keep(moments: Tensor, hold: float) -> Tensor:  # [n, n]
    """Second moments with lambda on their diagonal. Those of a prior so are what holds an expert's down at its own
    weights."""
    return moments + hold * torch.eye(len(moments), device=moments.device)


def _prior(s: Paths, e: int, n: int) -> Tensor | None:
    """What tokens of the layer add to the second moments of an expert whose n tokens are fewer than its columns: there
    the original weights hold. None for others."""
    cols = s.weights["down"].shape[2]
    if n >= cols:
        return None
    some = torch.tensor(ranks.spaced(len(s.x), cols), device=s.x.device) * s.index.shape[1]
    z = s.inputs("down", some, e) * ranks.mean(s.p.square()).sqrt()
    return (cols - n) / ranks.total(len(z)) * ranks.summed(z.T @ z)
