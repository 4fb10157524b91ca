"""Refinement of binary experts against the original model.

What is tuned are the block magnitudes of both planes (through the rounding to what the file holds, straight-through),
the signs (straight-through on latent weights, Bengio et al. 2013, arXiv 1308.3432; frozen for the last part of the
steps), the router and the norms.

`layerwise` tunes one layer after the other against the original's hidden states, its inputs coming from the layers done
before. `whole` tunes all layers together by the KL divergence from the original's next-token distributions; it does so
with the whole model in memory, or with one layer at a time and the others, their optimizers included, in files: the
gradient is the same, every step reads the layers twice. All keep the state that is best on sequences kept aside.
"""

import functools
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobie_export import disk
from mobie_export.calibration import ranks
from mobie_export.calibration.planes import Planes, as_stored
from mobie_export.calibration.states import States, Work, overflow, save
from mobie_export.calibration.store import complete
from mobie_export.methods.calibrated.method import TOGETHER
from mobie_export.methods.calibrated.snapshots import Course, Snapshots
from mobie_export.models.twin import PROJECTIONS, Experts, Twin
from mobie_export.spec import block
from mobie_export.spec.block import Coding

FISHER = 4.0  # weight of the error along the loss gradient against the plain error
HELD_OUT = 16  # every so many-th sequence is kept aside
MAX_ASIDE = 64  # sequences; more would cost time and say little more
LEAST_FIRM = 1e-3  # size of a latent weight at the beginning, in means of its block
LOGITS, LOGITS_CUDA = 1 << 22, 1 << 26  # made at once: what a cache holds, and what a launch is worth


Packed = dict[str, Planes]  # by projection
Latent = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]  # v, a, v2, a2, columns


@dataclass(frozen=True)
class Settings:
    """What a refinement does. Rates are Adam's, in units relative to the parameter (its block mean, its rms, itself);
    they rise over the first steps and fall along a cosine to nothing."""

    steps: int
    batch_tokens: int = 2048
    rate_signs: float = 0.01
    rate_magnitudes: float = 0.01
    rate_router: float = 0.003
    rate_norm: float = 0.002
    rising: float = 0.05  # share of the steps in which the rates rise
    free_signs: float = 0.7  # share of the steps in which signs may change
    seed: int = 0

    def per_step(self, length: int) -> int:
        """Sequences of so many tokens in a step."""
        return max(1, self.batch_tokens // length)

    def sequences(self, length: int) -> int:
        """How many sequences it sees when it sees none twice, those kept aside included."""
        return math.ceil(self.steps * self.per_step(length) * HELD_OUT / (HELD_OUT - 1))


LAYERWISE = Settings(steps=40, free_signs=0.0)  # free signs fit the text better and other texts worse
# Adam's first steps move every parameter by its whole rate, whatever its gradient says: real weights are lost that way
# unless the rates rise slowly.
WHOLE = Settings(steps=1000, rate_signs=0.005, rate_magnitudes=0.005, rising=0.1)


def together(refinement: str, steps: int | None, seed: int) -> Settings | None:
    """Of the refinement of all layers together; None where the one that is asked for is another."""
    if refinement not in TOGETHER:
        return None
    s = replace(WHOLE, seed=seed, steps=steps or WHOLE.steps)
    return replace(s, free_signs=0.0) if refinement == "magnitudes" else s


# ---- binary experts --------------------------------------------------------------------------------------------------


def _packed(signs: Tensor) -> Tensor:  # bool [..., cols] -> uint8 [..., cols / 8]
    return torch.from_numpy(np.packbits(signs.cpu().numpy(), axis=-1)).to(signs.device)


@functools.cache
def _eight(device: torch.device) -> Tensor:  # float32 [256, 8], the signs +-1 in a byte of `_packed`
    return (
        torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1))
        .float()
        .mul(2)
        .sub(1)
        .to(device)
    )


def _latent(planes: Planes) -> Latent:
    """(v, a, v2, a2, columns) as `_Product` takes them, v being packed signs."""
    if planes.signs2 is None:
        return _packed(planes.signs), planes.magnitudes, None, None, None
    columns = planes.columns
    if columns is None:
        columns = torch.arange(planes.signs2.shape[-1], device=planes.signs.device)
    return _packed(planes.signs), planes.magnitudes, _packed(planes.signs2), planes.magnitudes2, columns


def _signed(v: Tensor, a: Tensor) -> Tensor:  # [..., blocks, block_len]
    """Every block's magnitude a [..., blocks] with the signs of v: latent weights, negative zeros being minus, or
    packed signs."""
    if v.dtype == torch.uint8:
        signs = F.embedding(v.int(), _eight(v.device)).flatten(-2)
        return signs.unflatten(-1, (a.shape[-1], -1)).mul_(a.unsqueeze(-1))
    return torch.copysign(a.unsqueeze(-1), v.unflatten(-1, (a.shape[-1], -1)))


def _weights(v: Tensor, a: Tensor, v2: Tensor | None, a2: Tensor | None, columns: Tensor | None) -> Tensor:
    """[..., rows, cols] of signs and magnitudes."""
    w = _signed(v, a).flatten(-2)
    if v2 is not None and a2 is not None and columns is not None:
        w.index_add_(w.dim() - 1, columns, _signed(v2, a2).flatten(-2))
    return w


class BinaryExperts(Experts):
    """Experts with weights a * sign(v) and a second such plane for some columns: magnitudes a per block of columns,
    latent v in units of the block's mean."""

    _parts: dict[str, Latent]  # while a forward goes on
    _places: tuple[Tensor, Tensor] | None

    def __init__(
        self,
        packed: Packed,
        original: dict[str, Tensor] | None = None,
        free_signs: bool = False,
        device: torch.device | str = "cpu",
        coding: Coding = block.MOBIE,
    ):
        """original: the weights, whose size says how firmly a sign stands at the beginning; only for free signs.
        coding: how the file will hold them."""
        assert original is not None or not free_signs
        nn.Module.__init__(self)
        self.weights, self.tap, self.coding = {}, None, coding
        self.n_expert = len(packed["gate"].signs)
        self.columns: dict[str, Tensor | None] = {}
        self.theta, self.latent = nn.ParameterDict(), nn.ParameterDict()
        for p, planes in packed.items():
            v, a, v2, a2, columns = _latent(planes.to(device))
            self.columns[p] = columns
            rest = original[p].to(device) if original is not None and free_signs else None
            self._plane(p, v, a, rest)
            if v2 is not None and a2 is not None:
                if rest is not None:
                    rest = (rest - _weights(v, a, None, None, None))[..., columns]
                self._plane(p + "2", v2, a2, rest)

    def _plane(self, name: str, v: Tensor, a: Tensor, target: Tensor | None) -> None:
        self.theta[name] = nn.Parameter(a.log())  # of a block of zeros minus infinity, which no step changes
        if target is not None:
            size = target.abs().unflatten(-1, (a.shape[-1], -1))
            size = (size / size.mean(-1, keepdim=True).clamp_min(1e-30)).flatten(-2)
            size = size.clamp_min(LEAST_FIRM)  # the sign of a weight of zero is one, too
            v = _signed(v, torch.ones_like(a)).flatten(-2).mul_(size)
        self.latent[name] = nn.Parameter(v, requires_grad=target is not None)

    def magnitudes(self, projection: str) -> tuple[Tensor, Tensor | None]:
        """Of both planes, rounded as the file has them; gradients pass the rounding."""
        planes = [n for n in (projection, projection + "2") if n in self.theta]
        a = [self.theta[n].exp() for n in planes]
        rounded = as_stored([t.detach() for t in a], self.coding)
        a = [t + (r - t.detach()) for t, r in zip(a, rounded, strict=True)]
        return a[0], a[1] if len(a) > 1 else None

    def forward(self, x: Tensor, index: Tensor, p: Tensor) -> Tensor:
        self._parts, self._places = {}, None
        for q in PROJECTIONS:
            a, a2 = self.magnitudes(q)
            self._parts[q] = (self.latent[q], a, self.latent[q + "2"] if a2 is not None else None, a2, self.columns[q])
        out = super().forward(x, index, p)
        self._parts, self._places = {}, None
        return out

    def _each(self, projection: str, x: Tensor, counts: list[int]) -> Tensor:
        if not x.is_cuda:
            return _Product.apply(x, counts, *self._parts[projection])
        # all experts in one product: a launch takes longer than an expert
        if self._places is None:
            self._places = _places(counts, x.device)
        rows, back = self._places
        return _Product.apply(x[rows], None, *self._parts[projection]).flatten(0, 1)[back]

    def packed(self) -> Packed:
        def plane(name: str) -> tuple[Tensor, Tensor]:
            v, a = self.latent[name], self.theta[name].exp()
            return (_signed(v, torch.ones_like(a)).flatten(-2) > 0).cpu(), a.cpu()

        with torch.no_grad():
            result = {}
            for q in PROJECTIONS:
                columns = self.columns[q]
                if columns is None:
                    result[q] = Planes(*plane(q))
                else:  # of down, always the first ones
                    result[q] = Planes(*plane(q), *plane(q + "2"), None if q == "down" else columns.cpu())
            return result


def _places(counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows sorted by expert as a rectangle: (row at each place [E, longest], place of each row). Places beyond an
    expert's rows hold any row; nothing comes back from them."""
    n = torch.tensor(counts, device=device)
    first, longest = n.cumsum(0) - n, max(counts)
    rows = first[:, None] + torch.arange(longest, device=device)
    owner = torch.repeat_interleave(torch.arange(len(counts), device=device), n, output_size=sum(counts))
    back = owner * longest + torch.arange(len(owner), device=device) - first[owner]
    return rows.clamp_max(len(owner) - 1), back


class _Product(torch.autograd.Function):
    """x W^T with the weights of `_weights`, of all experts: x [E, n, cols], or [n, cols] with the rows of one expert
    after those of the other, as many as `counts` says. Keeps neither the weights nor their gradient longer than an
    expert needs them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        counts: list[int] | None,
        v: Tensor,
        a: Tensor,
        v2: Tensor | None,
        a2: Tensor | None,
        columns: Tensor | None,
    ) -> Tensor:
        ctx.counts, ctx.kind = counts, x.dtype
        x = x.to(_reduced(x))
        ctx.save_for_backward(x, v, a, v2, a2, columns)
        y = x.new_empty(*x.shape[:-1], v.shape[-2])
        for rows, e in _experts(counts):
            w = _weights(v[e], a[e], _of(v2, e), _of(a2, e), columns).to(x.dtype)
            torch.matmul(x[rows], w.transpose(-1, -2), out=y[rows])
        return y.to(ctx.kind)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, v, a, v2, a2, columns = ctx.saved_tensors
        wanted, dy = ctx.needs_input_grad, dy.to(x.dtype)
        dx = torch.empty_like(x) if wanted[0] else None
        grads = [torch.zeros_like(t) if w else None for t, w in zip((v, a, v2, a2), wanted[2:6], strict=True)]
        for rows, e in _experts(ctx.counts):
            if dx is not None:
                w = _weights(v[e], a[e], _of(v2, e), _of(a2, e), columns).to(x.dtype)
                torch.matmul(dy[rows], w, out=dx[rows])
            if any(wanted[2:6]):
                dw = (dy[rows].transpose(-1, -2) @ x[rows]).to(ctx.kind)
                dv, da, dv2, da2 = (_of(t, e) for t in grads)
                _plane_gradients(dw, v[e], a[e], dv, da)
                if v2 is not None:
                    _plane_gradients(dw[..., columns], v2[e], a2[e], dv2, da2)
        return None if dx is None else dx.to(ctx.kind), None, *grads, None


def _experts(counts: list[int] | None) -> Iterator[tuple[Any, Any]]:
    """(rows, expert) of every expert that has rows, as indices; all at once where there are no counts."""
    if counts is None:
        yield ..., ...
        return
    first = 0
    for e, n in enumerate(counts):
        if n:
            yield slice(first, first + n), e
        first += n


def _of(t: Tensor | None, expert: Any) -> Tensor | None:
    return None if t is None else t[expert]


def _plane_gradients(dw: Tensor, v: Tensor, a: Tensor, dv: Tensor | None, da: Tensor | None) -> None:
    """dw [..., rows, cols]: of a plane's weights; dv, da: where those of its latent weights and magnitudes go."""
    g = dw.unflatten(-1, (a.shape[-1], -1))
    if dv is not None:
        torch.mul(g, a.unsqueeze(-1), out=dv.view_as(g))
    if da is not None:
        torch.sum(g * _signed(v, torch.ones_like(a)), -1, out=da)


def _reduced(x: Tensor) -> torch.dtype:
    """What products with x are computed in: bfloat16 in and out, twice as fast, where those of float32 round what they
    take to it anyway."""
    rounds = torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
    return torch.bfloat16 if rounds and x.dtype == torch.float32 and not x.is_cuda else x.dtype


# ---- layers and their optimizers -------------------------------------------------------------------------------------

Groups = list[dict[str, Any]]  # of parameters, as Adam takes them


def beside(twin: Twin, layer: int, router: bool, norm: bool, every_norm: bool) -> list[str]:
    """Parameters of a layer that are tuned beside its experts: router, and the norm in front of them or every norm."""
    experts = twin.has_experts(layer)
    norms = twin.norms(layer) if every_norm else [twin.arch.norm] if experts else []
    return ([twin.arch.router] if router and experts else []) + (norms if norm else [])


def _groups(twin: Twin, layer: nn.Module, s: Settings, names: list[str]) -> Groups:
    """Router and norms, by their names, become trainable here."""
    groups: Groups = []
    experts = twin.experts_of(layer)

    def group(values: list[Tensor], rate: float, kind: str) -> None:
        if values:
            groups.append({"params": values, "lr": rate, "rate": rate, "kind": kind})

    if isinstance(experts, BinaryExperts):
        group(list(experts.theta.values()), s.rate_magnitudes, "magnitudes")
        group([t for t in experts.latent.values() if t.requires_grad], s.rate_signs, "signs")
    for name in names:
        weight = layer.get_parameter(name).requires_grad_()
        kind, rate = ("router", s.rate_router) if name == twin.arch.router else ("norm", s.rate_norm)
        group([weight], rate * float(weight.detach().square().mean().sqrt()), kind)
    return groups


class Adam(torch.optim.Optimizer):
    """Adam (arXiv 1412.6980) with its moments in bfloat16, whose rounding is less than what one batch of tokens and
    the next differ by: 4 bytes for a parameter in place of 8."""

    def __init__(self, groups: Groups, betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-8):
        super().__init__(groups, {"lr": 0.0})
        self.betas, self.eps = betas, eps

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (b1, b2), groups = self.betas, self.param_groups
        for p, rate in ((p, g["lr"]) for g in groups for p in g["params"] if p.grad is not None):
            state = self.state[p]
            n = state["step"] = state.get("step", 0) + 1
            mean, square = (state[k].float() if k in state else torch.zeros_like(p) for k in ("mean", "square"))
            mean.lerp_(p.grad, 1 - b1)
            square.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
            state["mean"], state["square"] = mean.bfloat16(), square.bfloat16()
            p.addcdiv_(mean, square.sqrt_().div_((1 - b2**n) ** 0.5).add_(self.eps), value=-rate / (1 - b1**n))


class Layers:
    """Layers in refinement with their optimizers: all in memory; or one of them, the others, optimizers included, in
    files; or of all what is tuned, the rest being made anew every time."""

    def __init__(
        self,
        indices: list[int],
        make: Callable[[int], nn.Module],
        groups: Callable[[int, nn.Module], Groups],
        folder: Path | None = None,
        anew: bool = False,
    ):
        """make: a layer; where `anew` with the parts that are tuned of the first one that it made."""
        self.indices, self.make, self.groups, self.folder, self.anew = indices, make, groups, folder, anew
        self._held: dict[int, nn.Module] = {}
        self._optimizers: dict[int, Adam | None] = {}  # None: nothing to tune in this layer

    def take(self, i: int) -> nn.Module:
        if i not in self._held:
            if self.folder is not None or self.anew:
                self._held.clear()
            if self.folder is not None:
                self._optimizers.clear()
            self._held[i] = self.make(i)
            if i not in self._optimizers:
                groups = self.groups(i, self._held[i])
                optimizer = self._optimizers[i] = Adam(groups) if groups else None
                if optimizer is not None and self.folder is not None and self._path(i).exists():
                    self._load(self._path(i), optimizer)
        return self._held[i]

    def _optimizer(self, i: int) -> Adam | None:
        if i not in self._optimizers:
            self.take(i)
        return self._optimizers[i]

    def update(self, i: int, factor: float, signs: bool) -> None:
        """One step of layer i with its gradients. factor: of the rates; signs: whether they may change."""
        optimizer = self._optimizer(i)
        if optimizer is None:
            return
        for g in optimizer.param_groups:
            g["lr"] = g["rate"] * factor
            if g["kind"] == "signs" and not signs:
                for p in g["params"]:
                    p.grad = None
        for p in _parameters(optimizer):
            if p.grad is not None:
                p.grad = ranks.summed(p.grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.folder is not None:
            self._write(self._path(i), _values(optimizer), optimizer.state_dict())

    def save(self, i: int, path: Path) -> None:
        if self.folder is not None:
            if self._path(i).exists():
                disk.link(self._path(i), path)
        elif (optimizer := self._optimizer(i)) is not None:
            with complete(path) as file:
                save({"values": _values(optimizer), "optimizer": optimizer.state_dict()}, file)

    def load(self, i: int, path: Path) -> None:
        if self.folder is not None:
            with disk.writing(self._path(i)):
                self._path(i).unlink(missing_ok=True)
            if path.exists():
                disk.link(path, self._path(i))
        elif (optimizer := self._optimizer(i)) is not None:
            self._load(path, optimizer)

    def go_back(self, i: int, path: Path) -> None:
        if self.folder is None:
            optimizer = self._optimizer(i)
            if optimizer is not None:
                self._load(path, optimizer, moments=False)
        elif self._path(i).exists():
            values = self._read(path)["values"] if path.exists() else None  # those that `make` makes
            self._write(self._path(i), values, self._read(self._path(i))["optimizer"])
            self._held.clear()
            self._optimizers.clear()

    def _load(self, path: Path, optimizer: Adam, moments: bool = True) -> None:
        parameters = _parameters(optimizer)
        state = self._read(path, parameters[0].device)
        if state["values"] is not None:
            with torch.no_grad():
                for p, value in zip(parameters, state["values"], strict=True):
                    p.copy_(value)
        if moments:
            optimizer.load_state_dict(state["optimizer"])

    def _read(self, path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
        with disk.reading_back(path):
            state: dict[str, Any] = torch.load(path, map_location=device)
        return state

    def _write(self, path: Path, values: list[Tensor] | None, optimizer: dict[str, Any]) -> None:
        """Another file each time: states that were saved are links to the earlier ones."""
        part = path.with_name(path.name + ".part")
        with disk.writing(path):
            with open(part, "wb") as file:
                save({"values": values, "optimizer": optimizer}, file)
            part.replace(path)

    def _path(self, i: int) -> Path:
        assert self.folder is not None
        return self.folder / f"now-{i}.bin"


def _values(optimizer: Adam) -> list[Tensor]:
    return [p.detach() for p in _parameters(optimizer)]


def _parameters(optimizer: Adam | None) -> list[nn.Parameter]:
    return [p for g in optimizer.param_groups for p in g["params"]] if optimizer else []


# ---- steps -----------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Loss on the sequences kept aside, before and after; in the units of the refinement's loss."""

    before: float
    after: float
    steps: int
    curve: list[tuple[int, float]] = field(default_factory=list)


def held_out(n: int) -> tuple[Tensor, Tensor]:
    """(indices to tune on, indices kept aside) of n >= 2 sequences; of fewer than HELD_OUT, the last is kept aside."""
    aside = torch.arange(min(HELD_OUT, n) - 1, n, HELD_OUT)
    keep = torch.ones(n, dtype=torch.bool)
    keep[aside] = False
    return torch.nonzero(keep).flatten(), aside[:MAX_ASIDE]


def _optimize(
    s: Settings,
    snapshots: Snapshots,
    train: Tensor,
    per_step: int,
    train_step: Callable[[Tensor, float, bool], None],  # (sequences, factor of the rates, whether signs may change)
    aside_loss: Callable[[], float],
    step: Callable[[int, str], None],
    n_checks: int = 6,
) -> Outcome:
    """Steps over batches of sequences, from the newest state on where there is one; ends with the state that was best
    on the sequences kept aside.

    Where a check finds the model worse than it was before all steps, the best values are taken up again, at half the
    rates: how large they may be depends on the model. Adam's moments stay: without them its first steps would move
    every parameter by the whole rate."""
    generator = torch.Generator().manual_seed(s.seed)
    course = snapshots.newest()
    if course is None:
        before = aside_loss()
        if not math.isfinite(before):
            raise overflow("the loss of the binary model")
        course = Course(before, [(0, before)], generator.get_state())
        snapshots.put(course)
    else:
        step(course.step, "done before")
    generator.set_state(course.generator)
    before, every = course.curve[0][1], max(1, s.steps // n_checks)
    for i in range(course.step, s.steps):
        if len(course.order) < per_step:
            course.order = train[torch.randperm(len(train), generator=generator)]
            course.generator = generator.get_state()
        batch, course.order = course.order[:per_step], course.order[per_step:]
        factor = min(1.0, (i + 1) / max(1, s.rising * s.steps)) * 0.5 * (1 + math.cos(math.pi * i / s.steps))
        train_step(batch, course.share * factor, i < s.free_signs * s.steps)
        course.step = i + 1
        check = course.step % every == 0 or course.step == s.steps
        if check:
            now = aside_loss()
            course.curve.append((course.step, now))
            if now < course.best:
                course.best, course.kept = now, course.step
            elif not now < before:  # NaN as well
                snapshots.go_back(course)
                course.share /= 2
        if snapshots.due() or check:
            snapshots.put(course)
        step(1, f"held-out {course.curve[-1][1]:.4g} from {before:.4g}")
    snapshots.go_back(course)
    return Outcome(before, course.best, s.steps, course.curve)


# ---- one layer after the other ---------------------------------------------------------------------------------------


def layerwise(
    work: Work,
    packed: Callable[[int], Packed],
    s: Settings = LAYERWISE,
    router: bool = True,
    norm: bool = True,
    step: Callable[[int, str], None] = lambda n, what: None,
    original: Callable[[int], dict[str, Tensor]] | None = None,
    coding: Coding = block.MOBIE,
) -> Iterator[tuple[int, Packed, dict[str, np.ndarray], Outcome]]:
    """Tune layer after layer; yields (layer, packed experts, tuned tensors by GGUF name, outcome).

    packed: binary experts of a layer to start from; original: the weights they stand for, the twin's where not given;
    coding: how the file will hold them.
    Layers that an interrupted run has done are passed over. Needs work.hidden and work.gradient of every boundary. With
    e the error of a token's hidden state and g the loss gradient there, the loss is

        4 (g . e)^2 / mean(g^2) + |e|^2, over the width

    (g . e)^2 is the token's part of the empirical Fisher form, which the divergence of the outputs follows to second
    order; it sees one direction per token, so the plain error stands beside it. Without it, tuning on one kind of text
    makes other kinds worse than error propagation left them.
    """
    twin, calibration = work.twin, work.calibration
    train, aside = held_out(len(calibration.tokens))
    per_step = s.per_step(calibration.tokens.shape[1])
    first = layers_done(work)
    inputs = work.states(f"quantized-{first}") if first else work.hidden[0]
    for i in range(first, twin.n_layers):
        after = work.states(f"quantized-{i + 1}")
        if not twin.has_experts(i):
            layer = twin.layer(i)
            with torch.no_grad():
                for where in calibration.batches:
                    after.write(where, twin.run(layer, inputs.read(where)))
            inputs = _replaced(inputs, after, i)
            continue
        weights = (original or twin.experts)(i) if s.free_signs else None
        experts = BinaryExperts(packed(i), weights, bool(s.free_signs), twin.device, coding)
        layer = twin.layer(i, experts)
        names = beside(twin, i, router, norm, every_norm=False)

        def groups(_: int, layer: nn.Module, names: list[str] = names) -> Groups:
            return _groups(twin, layer, s, names)

        layers = Layers([i], {i: layer}.__getitem__, groups)
        target = work.hidden[i + 1]
        gradient = work.gradient[i + 1]
        mean = sum(float(gradient.read(b).double().square().sum()) for b in calibration.batches) / math.prod(work.shape)

        def error(
            batch: Tensor,
            layer: nn.Module = layer,
            inputs: States = inputs,
            target: States = target,
            gradient: States = gradient,
            mean: float = mean,
        ) -> Tensor:
            e = twin.run(layer, inputs.read(batch)) - target.read(batch)
            along = (e * gradient.read(batch)).sum(-1).square() / max(mean, 1e-30)
            return (FISHER * along / e.shape[-1] + e.square().mean(-1)).mean()

        def train_step(
            batch: Tensor,
            factor: float,
            signs: bool,
            error: Callable[[Tensor], Tensor] = error,
            layers: Layers = layers,
            i: int = i,
        ) -> None:
            error(batch).backward()
            layers.update(i, factor, signs)

        def aside_loss(error: Callable[[Tensor], Tensor] = error) -> float:
            with torch.no_grad():
                parts = aside.split(per_step)
                return sum(float(error(b)) * len(b) for b in parts) / len(aside)

        snapshots = Snapshots(work.folder / f"layerwise-{i}", layers)
        outcome = _optimize(s, snapshots, train, per_step, train_step, aside_loss, step)
        tuned = _tuned(twin, i, layer, names)
        with torch.no_grad():
            for where in calibration.batches:
                after.write(where, twin.run(layer, inputs.read(where)))
        yield i, experts.packed(), tuned, outcome
        inputs = _replaced(inputs, after, i)
        shutil.rmtree(snapshots.folder, ignore_errors=True)


def layers_done(work: Work) -> int:
    """By a layerwise refinement that was interrupted: the first so many layers, on all ranks."""
    return work.newest("quantized")


def _replaced(inputs: States, after: States, layer: int) -> States:
    """The next layer's inputs, with which the layer counts as done; the old ones go, unless they are the
    original's."""
    after.finish()
    ranks.wait()  # a rank that is not so far yet would need the old ones
    if layer:
        inputs.delete()
    return after


def _tuned(twin: Twin, index: int, layer: nn.Module, names: list[str]) -> dict[str, np.ndarray]:
    return {twin.tensor_name(index, n): layer.get_parameter(n).detach().cpu().numpy().copy() for n in names}


# ---- the whole model -------------------------------------------------------------------------------------------------


class _Divergence(torch.autograd.Function):
    """KL divergence in nats of the next-token distributions, summed over positions, some of which have their logits
    in the cache at a time: there are too many to keep, and to read again."""

    @staticmethod
    def forward(
        ctx: Any,
        ours: Tensor,  # [n, width], what the output matrix takes
        truth: Tensor,  # [n, width]
        weight: Tensor,  # [n_vocab, width]
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=ours.device)
        gradient = torch.empty_like(ours) if ctx.needs_input_grad[0] else None
        at_once = max(1, (LOGITS_CUDA if ours.is_cuda else LOGITS) // len(weight))
        for first in range(0, len(ours), at_once):
            rows = slice(first, first + at_once)
            z, t = ours[rows] @ weight.T, truth[rows] @ weight.T
            q, p = z.softmax(-1), t.softmax(-1)
            normalizers = (z.amax(-1) - q.amax(-1).log()) - (t.amax(-1) - p.amax(-1).log())  # log of the sums of exp
            total += normalizers.double().sum() + t.sub_(z).mul_(p).sum(-1).double().sum()
            if gradient is not None:
                torch.mm(q.sub_(p), weight, out=gradient[rows])
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient * d.float(), None, None


def whole(
    work: Work,
    packed: Callable[[int], Packed],
    tuned: dict[str, np.ndarray],
    s: Settings = WHOLE,
    router: bool = True,
    norm: bool = True,
    step: Callable[[int, str], None] = lambda n, what: None,
    keep: str = "end-to-end",
    original: Callable[[int], dict[str, Tensor]] | None = None,
    coding: Coding = block.MOBIE,
) -> tuple[Iterator[tuple[int, Packed | None, dict[str, np.ndarray]]], Outcome]:
    """Tune all layers together against the original's logits; ((layer, packed experts, tuned tensors)..., outcome).
    Layers without experts have norms to tune.

    tuned: tensors changed before, by GGUF name. keep: one of TOGETHER: all layers and what a step computes in them;
    one at a time, the others in files of the work folder (streamed); or signs at one bit each, magnitudes, what is
    tuned beside them, and of a step the states between layers (magnitudes). Needs work.hidden of the last boundary. The
    loss is the mean KL divergence per position in nats.
    """
    twin, tokens = work.twin, work.every.tokens
    train, aside = held_out(len(tokens))
    per_step = s.per_step(tokens.shape[1])
    table, head, n = twin.embedding(), twin.head(), twin.n_layers
    names = [beside(twin, i, router, norm, every_norm=True) for i in range(n)]

    # of layers that are made anew: the parts that are not
    kept: dict[int, tuple[BinaryExperts | None, dict[str, nn.Parameter]]] = {}

    def make(i: int) -> nn.Module:
        experts, parameters = kept.get(i, (None, {}))
        if twin.has_experts(i) and experts is None:
            weights = (original or twin.experts)(i) if s.free_signs else None
            experts = BinaryExperts(packed(i), weights, bool(s.free_signs), twin.device, coding)
        layer = twin.layer(i, experts)
        for name in twin.parameters(i):
            if twin.tensor_name(i, name) in tuned:
                layer.get_parameter(name).data = torch.from_numpy(tuned[twin.tensor_name(i, name)].copy()).to(
                    twin.device
                )
        if keep == "magnitudes":
            parameters = parameters or {name: nn.Parameter(layer.get_parameter(name)) for name in names[i]}
            kept[i] = experts, parameters
            for name, parameter in parameters.items():
                owner, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(owner), leaf, parameter)
        return layer

    layers = Layers(
        list(range(n)),
        make,
        lambda i, x: _groups(twin, x, s, names[i]),
        work.folder if keep == "streamed" else None,
        keep == "magnitudes",
    )

    def own(batch: Tensor) -> Tensor:
        """What this rank does of a batch."""
        return batch[ranks.divide(len(batch))]

    def divergence(hidden: Tensor, batch: Tensor) -> Tensor:
        """Sum over the positions of this rank's sequences of a batch; hidden is before the head."""
        truth = own(work.read(work.hidden[n], batch))
        found: Tensor = _Divergence.apply(*(head.normed(h.flatten(0, 1)) for h in (hidden, truth)), head.weight)
        return found

    def train_step(batch: Tensor, factor: float, signs: bool) -> None:
        hidden, inputs, outputs = table[tokens[own(batch)].to(twin.device)], [], []
        for i in range(n):
            inputs.append(hidden.detach().requires_grad_())
            if keep == "end-to-end":
                outputs.append(twin.run(layers.take(i), inputs[i]))
                hidden = outputs[i]
            else:
                with torch.no_grad():
                    hidden = twin.run(layers.take(i), inputs[i])
        hidden = hidden.detach().requires_grad_()
        (divergence(hidden, batch) / (len(batch) * hidden.shape[1])).backward()
        gradient = hidden.grad
        for i in reversed(range(n)):
            out = outputs[i] if outputs else twin.run(layers.take(i), inputs[i])
            out.backward(gradient)
            gradient = inputs[i].grad
            layers.update(i, factor, signs)
            del out  # it holds the layer, and the next one may come from a file

    def aside_loss() -> float:
        with torch.no_grad():
            batches = aside.split(per_step)
            hidden = {b: table[tokens[own(where)].to(twin.device)] for b, where in enumerate(batches)}
            for i in range(n):  # all batches through a layer before the next: it may come from a file
                layer = layers.take(i)
                for b in hidden:
                    if len(hidden[b]):  # fewer sequences than ranks
                        hidden[b] = twin.run(layer, hidden[b])
                del layer
            total = 0.0
            for b, where in enumerate(batches):
                total += float(divergence(hidden[b], where))
        return ranks.total(total) / (len(aside) * tokens.shape[1])

    snapshots = Snapshots(work.folder / "refinement", layers)
    outcome = _optimize(s, snapshots, train, per_step, train_step, aside_loss, step)

    def results() -> Iterator[tuple[int, Packed | None, dict[str, np.ndarray]]]:
        for i in range(n):
            layer = layers.take(i)
            experts = twin.experts_of(layer)
            packed = experts.packed() if isinstance(experts, BinaryExperts) else None
            yield i, packed, _tuned(twin, i, layer, names[i])

    return results(), outcome
