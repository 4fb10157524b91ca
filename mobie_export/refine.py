"""Refinement of binary experts against the original model.

What is tuned are the block magnitudes (through the rounding to the file's 8 bits, straight-through), the signs
(straight-through on latent weights, Bengio et al. 2013, arXiv 1308.3432; frozen for the last part of the steps), the
router and the norms. `streamed` tunes one layer after the other against the original's hidden states, its inputs coming
from the layers done before; `end_to_end` has the whole model in memory and follows the KL divergence from the
original's next-token distributions. Both keep the state that is best on sequences kept aside.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobie_export import format
from mobie_export.calibrate import HELD_OUT, Work
from mobie_export.twin import PROJECTIONS, Experts

FISHER = 4.0  # weight of the error along the loss gradient against the plain error

Packed = dict[str, tuple[Tensor, Tensor]]  # projection -> signs bool [E, rows, cols], magnitudes [E, rows, cols / 64]


@dataclass(frozen=True)
class Settings:
    """What a refinement does. Rates are Adam's, in units relative to the parameter (its block mean, its rms, itself);
    they rise over the first 5 % of the steps and fall along a cosine to nothing."""

    steps: int
    batch_tokens: int = 2048
    rate_signs: float = 0.01
    rate_magnitudes: float = 0.01
    rate_router: float = 0.003
    rate_norm: float = 0.002
    free_signs: float = 0.7  # share of the steps in which signs may change
    seed: int = 0


STREAMED = Settings(steps=40, free_signs=0.0)  # free signs fit the text better and other texts worse
END_TO_END = Settings(steps=260, rate_signs=0.02)


# ---- binary experts --------------------------------------------------------------------------------------------------


class BinaryExperts(Experts):
    """Experts with weights a * sign(v): magnitudes a per 64 columns, latent v in units of the block's mean |w|."""

    def __init__(self, packed: Packed, original: dict[str, Tensor] | None = None, free_signs: bool = False):
        """original: the weights, whose size says how firmly a sign stands at the beginning; only for free signs."""
        nn.Module.__init__(self)
        self.weights, self.tap = {}, None
        self.n_expert = len(packed["gate"][0])
        self.start, self.theta, self.latent = {}, nn.ParameterDict(), nn.ParameterDict()
        for p, (signs, magnitudes) in packed.items():
            self.start[p] = magnitudes
            self.theta[p] = nn.Parameter(torch.zeros_like(magnitudes))
            if free_signs:
                size = original[p].abs().unflatten(-1, (-1, format.BLOCK_LEN))
                size = (size / size.mean(-1, keepdim=True).clamp_min(1e-30)).flatten(-2)
                self.latent[p] = nn.Parameter(torch.where(signs, size, -size))
            else:
                self.latent[p] = nn.Parameter(torch.where(signs, 1, -1).to(torch.int8), requires_grad=False)

    def magnitudes(self, projection: str) -> Tensor:
        """[E, rows, cols / 64], rounded as the file has them; gradients pass the rounding."""
        a = self.start[projection] * self.theta[projection].exp()
        step = a.detach().amax((1, 2), keepdim=True) / format.SCALE_MAX
        step = torch.where(step > 0, step, torch.ones_like(step))
        return a + (torch.round(a.detach() / step) * step - a.detach())

    def forward(self, x: Tensor, index: Tensor, p: Tensor) -> Tensor:
        self._parts = {q: (self.latent[q].unbind(0), self.magnitudes(q).unbind(0)) for q in PROJECTIONS}
        out = super().forward(x, index, p)
        self._parts = None
        return out

    def _each(self, projection: str, x: Tensor, counts: list[int]) -> Tensor:
        latent, a = self._parts[projection]
        parts = x.split(counts)
        return torch.cat([_Product.apply(q, latent[e], a[e]) for e, q in enumerate(parts) if counts[e]])

    def packed(self) -> Packed:
        with torch.no_grad():
            return {q: (self.latent[q] >= 0, self.start[q] * self.theta[q].exp()) for q in PROJECTIONS}


class _Product(torch.autograd.Function):
    """x (a sign(v))^T; keeps neither the weights nor their gradient longer than it needs them."""

    @staticmethod
    def forward(ctx, x: Tensor, v: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(x, v, a)
        return x @ _Product.weights(v, a).T

    @staticmethod
    def weights(v: Tensor, a: Tensor) -> Tensor:
        # `>= 0` is the sign rule of the format; copysign would make a negative zero minus
        b = torch.where(v >= 0, 1.0, -1.0).unflatten(-1, (-1, format.BLOCK_LEN))
        return (b * a.unsqueeze(-1)).flatten(-2)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, v, a = ctx.saved_tensors
        dx = dy @ _Product.weights(v, a) if ctx.needs_input_grad[0] else None
        dv = da = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dw = (dy.T @ x).unflatten(-1, (-1, format.BLOCK_LEN))
            b = torch.where(v >= 0, 1.0, -1.0).view_as(dw)
            da = (dw * b).sum(-1)
            if ctx.needs_input_grad[1]:
                dv = (dw * a.unsqueeze(-1)).flatten(-2)
        return dx, dv, da


# ---- steps -----------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Loss on the sequences kept aside, before and after; in the units of the refinement's loss."""

    before: float
    after: float
    steps: int
    curve: list[tuple[int, float]] = field(default_factory=list)


def held_out(n: int) -> tuple[Tensor, Tensor]:
    """(indices to tune on, indices kept aside) of n sequences."""
    aside = torch.arange(HELD_OUT - 1, n, HELD_OUT)
    keep = torch.ones(n, dtype=torch.bool)
    keep[aside] = False
    return torch.nonzero(keep).flatten(), aside


def _groups(layers: list[nn.Module], work: Work, s: Settings, router: bool, norms: list[str]) -> list[dict]:
    """Parameter groups of Adam; router and norms become trainable here."""
    arch, groups = work.twin.arch, []

    def group(values: list, rate: float, kind: str) -> None:
        if values:
            groups.append({"params": values, "rate": rate, "kind": kind})

    experts = [work.twin.experts_of(layer) for layer in layers]
    group([t for x in experts for t in x.theta.values()], s.rate_magnitudes, "magnitudes")
    group([t for x in experts for t in x.latent.values() if t.requires_grad], s.rate_signs, "signs")
    for layer in layers:
        if router:
            weight = layer.get_parameter(arch.router).requires_grad_()
            group([weight], s.rate_router * float(weight.detach().square().mean().sqrt()), "router")
        for name in norms:
            weight = layer.get_parameter(name).requires_grad_()
            group([weight], s.rate_norm * float(weight.detach().square().mean().sqrt()), "norm")
    return groups


def _optimize(
    groups: list[dict],
    s: Settings,
    train: Tensor,
    per_step: int,
    batch_loss: Callable[[Tensor], Tensor],
    aside_loss: Callable[[], float],
    step: Callable[[int, str], None],
    n_checks: int = 6,
) -> Outcome:
    """Adam over batches of sequences; ends with the state that was best on the sequences kept aside."""
    params = [p for g in groups for p in g["params"]]
    optimizer = torch.optim.Adam([{"params": g["params"], "lr": g["rate"]} for g in groups], betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(s.seed)
    best = before = aside_loss()
    kept = [p.detach().clone() for p in params]
    curve, order = [(0, before)], torch.empty(0, dtype=torch.long)
    every = max(1, s.steps // n_checks)
    for i in range(s.steps):
        if len(order) < per_step:
            order = train[torch.randperm(len(train), generator=generator)]
        batch, order = order[:per_step], order[per_step:]
        factor = min(1.0, (i + 1) / max(1, 0.05 * s.steps)) * 0.5 * (1 + math.cos(math.pi * i / s.steps))
        for g, live in zip(groups, optimizer.param_groups, strict=True):
            live["lr"] = g["rate"] * factor
            if g["kind"] == "signs" and i >= s.free_signs * s.steps:
                for p in g["params"]:
                    p.requires_grad_(False)
                    p.grad = None
        loss = batch_loss(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (i + 1) % every == 0 or i + 1 == s.steps:
            now = aside_loss()
            curve.append((i + 1, now))
            if now < best:
                best = now
                for k, p in zip(kept, params, strict=True):
                    k.copy_(p.detach())
        step(1, f"held-out {curve[-1][1]:.4g} from {before:.4g}")
    with torch.no_grad():
        for k, p in zip(kept, params, strict=True):
            p.copy_(k)
    return Outcome(before, best, s.steps, curve)


# ---- one layer after the other ---------------------------------------------------------------------------------------


def streamed(
    work: Work,
    packed: Callable[[int], Packed],
    s: Settings = STREAMED,
    router: bool = True,
    norm: bool = True,
    step: Callable[[int, str], None] = lambda n, what: None,
) -> Iterator[tuple[int, Packed, dict[str, np.ndarray], Outcome]]:
    """Tune layer after layer; yields (layer, packed experts, tuned tensors by GGUF name, outcome).

    packed: binary experts of a layer to start from. Needs work.hidden and work.gradient of every boundary. With e the
    error of a token's hidden state and g the loss gradient there, the loss is

        4 (g . e)^2 / mean(g^2) + |e|^2, over the width

    (g . e)^2 is the token's part of the empirical Fisher form, which the divergence of the outputs follows to second
    order; it sees one direction per token, so the plain error stands beside it. Without it, tuning on one kind of text
    makes other kinds worse than error propagation left them.
    """
    twin, calibration = work.twin, work.calibration
    train, aside = held_out(len(calibration.tokens))
    per_step = max(1, s.batch_tokens // calibration.tokens.shape[1])
    inputs = work.hidden[0]
    for i in range(twin.n_layers):
        original = twin.experts(i) if s.free_signs else None
        experts = BinaryExperts(packed(i), original, bool(s.free_signs))
        layer = twin.layer(i, experts)
        target = work.hidden[i + 1]
        gradient = work.gradient[i + 1]
        mean = sum(float(gradient.read(b).double().square().sum()) for b in calibration.batches) / math.prod(work.shape)

        def error(batch, layer=layer, inputs=inputs, target=target, gradient=gradient, mean=mean) -> Tensor:
            e = twin.run(layer, inputs.read(batch)) - target.read(batch)
            along = (e * gradient.read(batch)).sum(-1).square() / max(mean, 1e-30)
            return (FISHER * along / e.shape[-1] + e.square().mean(-1)).mean()

        def aside_loss(error=error) -> float:
            with torch.no_grad():
                parts = aside.split(per_step)
                return sum(float(error(b)) * len(b) for b in parts) / len(aside)

        norms = [twin.arch.norm] if norm else []
        groups = _groups([layer], work, s, router, norms)
        outcome = _optimize(groups, s, train, per_step, error, aside_loss, step)
        tuned = _tuned(twin, i, layer, ([twin.arch.router] if router else []) + norms)
        after = work.states(f"quantized-{i + 1}")  # never finished: a refinement starts anew
        with torch.no_grad():
            for where in calibration.batches:
                after.write(where, twin.run(layer, inputs.read(where)))
        if i:
            inputs.delete()
        inputs = after
        yield i, experts.packed(), tuned, outcome


def _tuned(twin, index: int, layer: nn.Module, names: list[str]) -> dict[str, np.ndarray]:
    return {twin.tensor_name(index, n): layer.get_parameter(n).detach().numpy().copy() for n in names}


# ---- the whole model -------------------------------------------------------------------------------------------------


def end_to_end(
    work: Work,
    packed: Callable[[int], Packed],
    tuned: dict[str, np.ndarray],
    s: Settings = END_TO_END,
    router: bool = True,
    norm: bool = True,
    step: Callable[[int, str], None] = lambda n, what: None,
) -> tuple[list[Packed], dict[str, np.ndarray], Outcome]:
    """Tune all layers together against the original's logits; (packed experts by layer, tuned tensors, outcome).

    tuned: tensors changed before, by GGUF name. Needs work.hidden of the last boundary. The loss is the mean KL
    divergence per position in nats.
    """
    twin, calibration = work.twin, work.calibration
    train, aside = held_out(len(calibration.tokens))
    per_step = max(1, s.batch_tokens // calibration.tokens.shape[1])
    layers = []
    for i in range(twin.n_layers):
        original = twin.experts(i) if s.free_signs else None
        layer = twin.layer(i, BinaryExperts(packed(i), original, bool(s.free_signs)))
        for name in twin.arch.tensors:
            if twin.tensor_name(i, name) in tuned:
                layer.get_parameter(name).data = torch.from_numpy(tuned[twin.tensor_name(i, name)].copy())
        layers.append(layer)
    table, head, last = twin.embedding(), twin.head(), twin.n_layers

    def divergence(batch: Tensor) -> Tensor:
        hidden = table[calibration.tokens[batch]]
        for layer in layers:
            hidden = twin.run(layer, hidden)
        with torch.no_grad():
            truth = F.log_softmax(head(work.hidden[last].read(batch)), -1)
        ours = F.log_softmax(head(hidden), -1)
        return F.kl_div(ours.flatten(0, 1), truth.flatten(0, 1), reduction="batchmean", log_target=True)

    def aside_loss() -> float:
        with torch.no_grad():
            return sum(float(divergence(b)) * len(b) for b in aside.split(per_step)) / len(aside)

    norms = [n for n in twin.arch.tensors if "norm" in n] if norm else []
    groups = _groups(layers, work, s, router, norms)
    outcome = _optimize(groups, s, train, per_step, divergence, aside_loss, step)
    changed = dict(tuned)
    for i, layer in enumerate(layers):
        changed |= _tuned(twin, i, layer, ([twin.arch.router] if router else []) + norms)
    return [twin.experts_of(layer).packed() for layer in layers], changed, outcome
