"""How long a calibration will take here: operations counted, the machine's speed measured. Right to a factor of two.

What is counted are products of matrices, two operations per multiplication; and in refinements the passes over the
weights of all experts, which are made from their signs anew in every step. Attention over long sequences is not.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mobie_export.methods.base import Run
from mobie_export.methods.calibrated import refine
from mobie_export.methods.calibrated.options import TextMethod
from mobie_export.models.twin import Twin
from mobie_export.spec import layout

PROBE = 1024  # rows and columns of the product that is timed
PASSES_FIXED, PASSES_FREE = 12, 30  # over the experts' weights in a step, signs fixed or free: measured, in copies


@dataclass(frozen=True)
class Work:
    """Operations of matrix products and copies of float32 weights."""

    products: float = 0.0
    copies: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.products + other.products, self.copies + other.copies)


@dataclass(frozen=True)
class Speed:
    products: float  # operations a second
    copies: float  # weights a second

    def seconds(self, work: Work) -> float:
        return work.products / self.products + work.copies / self.copies


def phases(twin: Twin, method: TextMethod) -> dict[str, Work]:
    """What a calibration does, by phase."""
    n_tokens, k = method.samples * method.seq_len, twin.config.num_experts_per_tok
    head = 2 * twin.config.vocab_size * twin.width  # operations per token
    experts = [x for n, x in layout.experts(twin.gguf).items() if layout.layer_of(n) < twin.n_layers]
    every = sum(x.n_weights for x in experts)
    layers = 2 * (_dense_weights(twin) + sum(x.n_weights // x.n_expert for x in experts) * k)  # per token
    statistics = n_tokens * (layers + 3 * head + 2 * layers)
    for x in experts:  # second moments, gate and up sharing theirs; then error propagation and the refit
        moments = 2 * n_tokens * k * method.groups * x.cols**2 * (1.0 if layout.is_down(x.tensor.name) else 0.5)
        statistics += moments + x.n_expert * (5 * x.rows * x.cols**2 + 2 * x.cols**3)
    found = {"statistics and error propagation": Work(statistics)}
    if not method.refines:
        return found
    s = refine.LAYERWISE
    one = Work(s.steps * s.batch_tokens * 3 * layers + n_tokens * layers, s.steps * every * PASSES_FIXED)
    found["layer by layer"] = one
    whole = method.whole
    if whole is not None:
        targets = whole.sequences(method.seq_len) * method.seq_len * layers
        each = whole.batch_tokens * (4 * head + (4 if method.refinement == "streamed" else 3) * layers)
        passes = PASSES_FREE if whole.free_signs else PASSES_FIXED
        found["all layers together"] = Work(targets + whole.steps * each, whole.steps * every * passes)
    return found


def _dense_weights(twin: Twin) -> int:
    """Weights of a model's layers that are no experts and that every token passes."""
    return sum(
        t.n_weights
        for n, t in twin.gguf.tensors.items()
        if layout.layer(n) is not None and len(t.shape) > 1 and layout.kind(n) not in ("expert", *layout.BESIDE_EXPERTS)
    )


def seconds(method: TextMethod, run: Run) -> dict[str, float]:
    """Phase -> seconds on this machine."""
    here = speed(method.device, run.computing_threads)
    return {name: here.seconds(work) for name, work in phases(Twin(run.source), method).items()}


def speed(device: str, threads: int) -> Speed:
    """Measured, in less than a second."""
    torch.set_num_threads(threads)
    a = torch.rand(PROBE, PROBE, device=device)
    weights = torch.rand(16 * PROBE, PROBE, device=device)
    return Speed(2 * PROBE**3 / _seconds(lambda: a @ a, device), weights.numel() / _seconds(weights.clone, device))


def _seconds(work: Callable[[], object], device: str) -> float:
    """Of one call, the best of several."""
    times: list[float] = []
    while sum(times) < 0.2 or len(times) < 3:
        started = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
