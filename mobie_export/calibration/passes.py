"""What does a model do with a text? Forward and backward, one layer in memory at a time.

The forward pass keeps the hidden states between layers in files of a work folder. The backward pass walks the layers
from the last to the first: it reads a layer's input, runs the layer again with gradients, and hands the gradient of its
input on. What the quantizer needs of a layer exists when the walk is at it: the experts' inputs, their routing, and the
squared gradients of the loss at their outputs, averaged over groups of output channels (GuidedQuant, arXiv 2505.07004,
eq. 7; the loss is the next-token cross entropy on the calibration text).
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mobie_export.calibration import ranks
from mobie_export.calibration.states import Work
from mobie_export.calibration.statistics import LayerStatistics, Part
from mobie_export.models.twin import PROJECTIONS, Seen


def forward(work: Work, step: Callable[[int, str], None] = lambda n, what: None) -> None:
    """Fill work.hidden, and work.gradient of the last boundary. step: called with tokens done and what is going on."""
    twin, calibration = work.twin, work.calibration
    table = twin.embedding()
    work.hidden[0] = work.states("hidden-0")
    if not work.hidden[0].finished:
        for where in calibration.batches:
            work.hidden[0].write(where, table[calibration.tokens[where].to(twin.device)])
        work.hidden[0].finish()
    del table
    with torch.no_grad():
        for i in range(twin.n_layers):
            work.hidden[i + 1] = work.states(f"hidden-{i + 1}")
            if work.hidden[i + 1].finished:
                step(calibration.tokens.numel(), f"layer {i}, done before")
                continue
            layer = twin.layer(i)
            for where in calibration.batches:
                work.hidden[i + 1].write(where, twin.run(layer, work.hidden[i].read(where)))
                step(calibration.tokens[where].numel(), f"layer {i}")
            work.hidden[i + 1].finish()
    last = twin.n_layers
    work.gradient[last] = work.states(f"gradient-{last}")
    if work.gradient[last].finished:
        return
    head = twin.head()
    n_targets = calibration.tokens.shape[0] * (calibration.tokens.shape[1] - 1)
    for where in calibration.batches:
        h = work.hidden[last].read(where).requires_grad_()
        (loss(head, h, calibration.tokens[where].to(twin.device)) / n_targets).backward()
        # The mean over all targets would be lost in bfloat16 no more than anything else: its exponent is float32's.
        assert h.grad is not None
        work.gradient[last].write(where, h.grad)
    work.gradient[last].finish()


def targets(work: Work, step: Callable[[int, str], None] = lambda n, what: None) -> None:
    """Fill work.hidden of the last boundary and of no other: what `refine.whole` needs of a text. Goes on from the
    newest boundary that is there."""
    twin, calibration = work.twin, work.calibration
    first = work.newest("hidden")
    before = work.states(f"hidden-{first}")
    step(calibration.tokens.numel() * first, f"{first} layers, done before")
    if not before.finished:
        table = twin.embedding()
        for where in calibration.batches:
            before.write(where, table[calibration.tokens[where].to(twin.device)])
        before.finish()
        del table
    with torch.no_grad():
        for i in range(first, twin.n_layers):
            layer, after = twin.layer(i), work.states(f"hidden-{i + 1}")
            for where in calibration.batches:
                after.write(where, twin.run(layer, before.read(where)))
                step(calibration.tokens[where].numel(), f"layer {i}")
            after.finish()
            ranks.wait()  # a rank that is not so far yet would need what comes before
            before.delete()
            before = after
    work.hidden[twin.n_layers] = before


def loss(head: Callable[[Tensor], Tensor], hidden: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy of every next token, summed, in nats."""
    logits = head(hidden[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def backward(
    work: Work,
    step: Callable[[int, str], None] = lambda n, what: None,
    groups: int = 1,
    basis: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    done: Callable[[int], bool] = lambda layer: False,
) -> Iterator[tuple[int, LayerStatistics]]:
    """Walk the layers from the last to the first; yields (layer, statistics) and fills work.gradient on the way.

    Layers without experts hand the gradient on and yield nothing.
    basis: experts' weights -> for some projections a matrix M [rows, n]; squared there are the gradients of z' in
    z = M z', the projection's outputs, which are M^T times those of z. done: layers whose statistics nobody needs any
    more; they are passed over where their gradient is there.
    """
    twin, calibration = work.twin, work.calibration
    for i in reversed(range(twin.n_layers)):
        work.gradient[i] = work.states(f"gradient-{i}")
        if work.gradient[i].finished and done(i):
            step(calibration.tokens.numel(), f"layer {i}, done before")
            continue
        layer = twin.layer(i)
        experts = twin.experts_of(layer)
        if experts is None:
            for where in calibration.batches:
                h = work.hidden[i].read(where).requires_grad_()
                (grad,) = torch.autograd.grad(twin.run(layer, h), h, work.gradient[i + 1].read(where))
                work.gradient[i].write(where, grad)
                step(calibration.tokens[where].numel(), f"layer {i}")
            work.gradient[i].finish()
            continue
        seen: list[Seen] = []
        experts.tap = seen.append
        bases = basis(experts.weights) if basis else {}
        parts = []
        for where in calibration.batches:
            h = work.hidden[i].read(where).requires_grad_()
            out = twin.run(layer, h)
            (s,) = seen
            seen.clear()
            # gradients of the inner tensors without keeping them all: they are asked for by name
            wanted = (h, s.gate, s.up, s.down)
            grads = torch.autograd.grad(out, wanted, work.gradient[i + 1].read(where))
            work.gradient[i].write(where, grads[0])
            inner = {p: g @ bases[p] if p in bases else g for p, g in zip(PROJECTIONS, grads[1:], strict=True)}
            parts.append(_part(s, inner, groups))
            step(calibration.tokens[where].numel(), f"layer {i}")
        experts.tap = None
        work.gradient[i].finish()
        yield i, LayerStatistics.joined(parts, experts)


def _part(seen: Seen, gradients: dict[str, Tensor], groups: int) -> Part:
    """What one batch says of a layer, detached. gradients: projection -> [n_tokens * k, ...], rows as in `seen`."""
    back = torch.empty_like(seen.order)
    back[seen.order] = torch.arange(len(seen.order), device=seen.order.device)

    def squared(g: Tensor) -> Tensor:
        return g.double().square().view(len(g), groups, -1).mean(-1).float()[back]

    return Part(seen.x.detach(), seen.index, {p: squared(g) for p, g in gradients.items()})
