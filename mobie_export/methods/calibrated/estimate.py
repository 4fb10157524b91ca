"""How long a calibration will take here: operations counted, the machine's speed measured. Right to a factor of two.

What is counted are products of matrices, two operations per multiplication; weights of the source, as often as they are
read; and in refinements the passes over the weights of all experts, which are made from their signs anew in every step.
Attention over long sequences is not.
"""

import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import torch

from mobie_export.calibration import ranks
from mobie_export.calibration.products import products
from mobie_export.errors import MobieError
from mobie_export.methods.base import Run
from mobie_export.methods.calibrated import compiled, refine
from mobie_export.methods.calibrated.options import DESCENTS, TextMethod
from mobie_export.models.twin import Twin
from mobie_export.spec import layout

PROBE = (256, 2048, 1536)  # the product that is timed: rows, what is summed over, columns
SUSTAINED = 0.6  # of its best speed, which products of a whole layer do not reach, with sizes and caches as they come
READ = 1 << 24  # weights whose reading is timed
READS = 5e8  # weights read in a second where there is a header alone
# over the weights while their signs are found, and in each descent, beside products: measured, in copies
PASSES_SIGNS, PASSES_DESCENT = 10, 6
PASSES_SIGNS_TORCH, PASSES_DESCENT_TORCH = 30, 20  # where loops over columns are PyTorch's, which threads cannot share
PASSES_FIXED, PASSES_FREE = 12, 30  # over the experts' weights in a step, signs fixed or free: measured, in copies


@dataclass(frozen=True)
class Work:
    """Operations of matrix products, copies of float32 weights, weights of the source that are read."""

    products: float = 0.0
    copies: float = 0.0
    reads: float = 0.0
    small: float = 0.0  # copies as well, in pieces that threads cannot share: column by column

    def __add__(self, other: "Work") -> "Work":
        parts = zip(astuple(self), astuple(other), strict=True)
        return Work(*(a + b for a, b in parts))

    def of_rank(self, n: int) -> "Work":
        """What each of n ranks does: every one reads the whole source."""
        return Work(self.products / n, self.copies / n, self.reads, self.small / n)


@dataclass(frozen=True)
class Speed:
    products: float  # operations a second
    copies: float  # weights a second
    reads: float  # weights a second
    small: float | None = None  # weights a second that one thread copies; None: as `copies`

    def seconds(self, work: Work) -> float:
        small = work.small / (self.small or self.copies)
        return work.products / self.products + work.copies / self.copies + work.reads / self.reads + small


def phases(twin: Twin, method: TextMethod) -> dict[str, Work]:
    """What a calibration does, by phase."""
    n_tokens, k = method.samples * method.seq_len, twin.config.num_experts_per_tok
    layers = layer_operations(twin)
    statistics = Work(n_tokens * (layers + 3 * head_operations(twin) + 2 * layers), reads=2 * layer_weights(twin))
    for x in expert_tensors(twin):  # second moments, gate and up sharing theirs; then error propagation and descent
        moments = 2 * n_tokens * k * method.groups * x.cols**2 * (1.0 if layout.is_down(x.tensor.name) else 0.5)
        statistics += Work(moments) + propagation(x, method.device)
    found = {"statistics and error propagation": statistics}
    if method.refines:
        s, every = refine.LAYERWISE, sum(x.n_weights for x in expert_tensors(twin))
        products = s.steps * s.batch_tokens * 3 * layers + n_tokens * layers
        found["layer by layer"] = Work(products, s.steps * every * PASSES_FIXED, layer_weights(twin))
    return found | together(twin, method)


def together(twin: Twin, method: TextMethod) -> dict[str, Work]:
    """Of the refinement of all layers together, where there is one."""
    whole = method.whole
    if whole is None:
        return {}
    layers, every = layer_operations(twin), sum(x.n_weights for x in expert_tensors(twin))
    targets = 0 if method.targets_known else whole.sequences(method.seq_len) * method.seq_len * layers
    each = whole.batch_tokens * (4 * head_operations(twin) + (3 if method.refinement == "end-to-end" else 4) * layers)
    passes = PASSES_FREE if whole.free_signs else PASSES_FIXED
    # the targets' pass; layers, and what is no expert of them twice in every step where they are made anew
    reads = 2 * layer_weights(twin)
    if method.refinement != "end-to-end":
        reads += 2 * whole.steps * (layer_weights(twin) - every)
    return {"all layers together": Work(targets + whole.steps * each, whole.steps * every * passes, reads)}


def writing(twin: Twin, method: TextMethod) -> Work:
    """Of the model's own text, token by token."""
    return Work(2.0 * method.samples * method.seq_len * (layer_operations(twin) + head_operations(twin)))


def expert_tensors(twin: Twin) -> list[layout.Experts]:
    return [x for n, x in layout.experts(twin.gguf).items() if layout.layer_of(n) < twin.n_layers]


def layer_operations(twin: Twin) -> int:
    """Of one token through all layers."""
    k = twin.config.num_experts_per_tok
    return 2 * (_dense_weights(twin) + sum(x.n_weights // x.n_expert for x in expert_tensors(twin)) * k)


def layer_weights(twin: Twin) -> int:
    """Of all layers."""
    return _dense_weights(twin) + sum(x.n_weights for x in expert_tensors(twin))


def checking(run: Run) -> Work:
    """Before anything else: a digest of all weights, and whether they are numbers."""
    return Work(reads=2.0 * sum(t.n_weights for t in run.source.tensors.values()))


def head_operations(twin: Twin) -> int:
    """Of one token."""
    return 2 * twin.config.vocab_size * twin.width


def propagation(x: layout.Experts, device: str, descents: int = DESCENTS) -> Work:
    """Error propagation and descent of all experts of a tensor."""
    products = x.n_expert * ((1 + 2 * descents) * x.rows * x.cols**2 + x.cols**3)
    if compiled.best(device):
        return Work(products, (PASSES_SIGNS + PASSES_DESCENT * descents) * x.n_weights)
    return Work(products, small=(PASSES_SIGNS_TORCH + PASSES_DESCENT_TORCH * descents) * x.n_weights)


def _dense_weights(twin: Twin) -> int:
    """Weights of a model's layers that are no experts and that every token passes."""
    return sum(
        t.n_weights
        for n, t in twin.gguf.tensors.items()
        if layout.layer(n) is not None and len(t.shape) > 1 and layout.kind(n) not in ("expert", *layout.BESIDE_EXPERTS)
    )


def seconds(found: dict[str, Work], method: TextMethod, run: Run) -> dict[str, float]:
    """Phase -> seconds on this machine."""
    here = speed(method.device, run.computing_threads, method.twin(run.source))
    return {name: here.seconds(work.of_rank(ranks.world())) for name, work in found.items()}


def speed(device: str, threads: int, twin: Twin) -> Speed:
    """Measured, in less than a second; of products in the type that a calibration has them in."""
    torch.set_num_threads(threads)
    rows, inner, cols = PROBE
    a, b = torch.rand(rows, inner, device=device), torch.rand(inner, cols, device=device)
    weights = torch.rand(8 * inner, inner // 2, device=device)
    with products(device):
        found = Speed(
            SUSTAINED * 2 * rows * inner * cols / _seconds(lambda: a @ b, device),
            weights.numel() / _seconds(weights.clone, device),
            _reading(twin),
        )
    if device != "cpu" or threads == 1:
        return found
    torch.set_num_threads(1)
    found = replace(found, small=weights.numel() / _seconds(weights.clone, device))
    torch.set_num_threads(threads)
    return found


def _reading(twin: Twin) -> float:
    """Weights a second, of the first ones of an expert tensor, from the disk or not."""
    first, *_, last = expert_tensors(twin)
    try:
        twin.check_numbers(first.tensor.name, 1)  # what decodes them is loaded
        started = time.perf_counter()
        n = twin.check_numbers(last.tensor.name, READ)
        return n / max(time.perf_counter() - started, 1e-9)
    except MobieError:  # the header of a model of the hub; what is wrong with weights is found by their check
        return READS


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
