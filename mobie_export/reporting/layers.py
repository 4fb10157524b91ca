"""Both models layer by layer, side by side: where is it that they part?

Of every layer with experts, over the same sequences:

    alone      the export's layer on what the original's layer sees: which experts its router chooses, and, with the
               original's inputs, choices and weights, what its experts add. What is wrong shows in its own layer
    on path    the export's layer on what the export's layers before it make: what is lost adds up
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mobie_export.calibration.text import windows
from mobie_export.errors import BAD_INPUT, MobieError
from mobie_export.exporting.tensors import weights_of
from mobie_export.gguf_io import Gguf
from mobie_export.models.runtime_twin import RuntimeTwin
from mobie_export.models.twin import Experts, Twin, in_torch, same_choices
from mobie_export.spec import block, layout

SEQUENCES, LENGTH = 8, 256
QUICK = (2, 128)


class _Binary(Twin):
    """The twin of a MoBiE file: its experts are what both planes, scales and shared factors make."""

    def experts(self, layer: int) -> dict[str, Tensor]:
        found, whole = {}, dict[str, Tensor]()
        items = layout.experts(self.gguf)
        for projection, (name, rows) in self.expert_names(layer).items():
            if items[name].tensor.type_id != block.TYPE_ID:
                return super().experts(layer)
            if name not in whole:
                matrices = [np.concatenate(list(parts)) for parts in weights_of(self.gguf, items[name])]
                whole[name] = self._finite(name, torch.from_numpy(np.stack(matrices)))
            found[projection] = whole[name][:, rows]
        return found


class BinaryTwin(_Binary, Twin):
    """In PyTorch."""


class BinaryRuntimeTwin(_Binary, RuntimeTwin):
    """In llama.cpp but for the experts."""


@contextlib.contextmanager
def _twins(source: Gguf, file: Gguf) -> Iterator[tuple[Twin, Twin]]:
    """Of both, in PyTorch where the architecture is known there. MobieError where it cannot be taken apart at all."""
    if twin := in_torch(source):
        yield twin, BinaryTwin(file)
        return
    with contextlib.closing(RuntimeTwin(source)) as original, contextlib.closing(BinaryRuntimeTwin(file)) as binary:
        original.prepare()
        binary.act, binary.factors = original.act, original.factors
        yield original, binary


def compare(
    file: Gguf, source: Gguf, text: bytes, threads: int, quick: bool, step: Callable[[int, str], None]
) -> dict[str, Any]:
    """The part "layers" of the report. step: called with layers that are done. MobieError where a model has no twin, or
    the text is too short."""
    torch.set_num_threads(threads)
    tokens = _tokens(source.paths[0], text, *(QUICK if quick else (SEQUENCES, LENGTH)))
    rows = []
    with _twins(source, file) as twins, torch.no_grad():
        hidden = [twin.embedding()[tokens] for twin in twins]
        for i in range(twins[0].n_layers):
            row, hidden = _layer(twins, i, hidden)
            rows.append(row)
            step(1, f"layer {i}")
    return {"sequences": len(tokens), "tokens_each": tokens.shape[1], "layers": rows}


def _tokens(model: Path, text: bytes, n: int, length: int) -> Tensor:  # int64 [n, length]
    """Sequences from all over the text."""
    found = windows(model, text, length, False, "the text of the report")
    if not len(found):
        raise MobieError(BAD_INPUT, "the text of the report is too short", f"{len(text)} bytes", f"{length} tokens")
    return found[torch.linspace(0, len(found) - 1, min(n, len(found))).round().long()]


def _layer(twins: tuple[Twin, Twin], i: int, hidden: list[Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
    """What is said of a layer, and the states behind it of both models. One layer's weights are in memory."""
    original = twins[0].layer(i)
    experts = twins[0].experts_of(original)
    seen = _Seen(experts)
    behind = twins[0].run(original, hidden[0])
    del original, experts
    ours = twins[1].layer(i)
    experts = twins[1].experts_of(ours)
    alone = _Seen(experts)
    if seen.there:
        twins[1].run(ours, hidden[0])
    path = _Seen(experts)
    behind_path = twins[1].run(ours, hidden[1])
    row: dict[str, Any] = {"layer": i, "stream_error": relative(behind, behind_path)}
    if seen.there and experts is not None:
        assert seen.x is not None and seen.index is not None and seen.p is not None and seen.out is not None
        out = experts(seen.x, seen.index, seen.p)
        n = experts.n_expert
        row |= {
            "used": seen.index.shape[1],
            "experts_error": error(seen.out, out),
            "experts_cosine": cosine(seen.out, out),
            "experts_size": float(out.norm() / seen.out.norm().clamp_min(1e-30)),
            "routing_alone": _routing(seen.index, alone.index),
            "routing": _routing(seen.index, path.index),
            "tokens_source": torch.bincount(seen.index.flatten(), minlength=n).tolist(),
            "tokens": torch.bincount(path.index.flatten(), minlength=n).tolist() if path.index is not None else [],
        }
    return row, [behind, behind_path]


class _Seen:
    """What the experts of a layer see and add in its next forward."""

    def __init__(self, experts: Experts | None):
        self.x: Tensor | None = None  # [n_tokens, width]
        self.index: Tensor | None = None  # int64 [n_tokens, k]
        self.p: Tensor | None = None  # [n_tokens, k]
        self.out: Tensor | None = None  # [n_tokens, width]
        self.there = experts is not None
        if experts is not None:
            self.hook = experts.register_forward_hook(self._took)

    def _took(self, module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], out: Tensor) -> None:
        self.x, self.index, self.p = inputs
        self.x = self.x.reshape(-1, self.x.shape[-1])
        self.out = out.reshape(-1, out.shape[-1])
        self.hook.remove()


def error(truth: Tensor, found: Tensor) -> float:
    """Root of the sum of squares of what is lost, over that of the truth."""
    return float((found - truth).norm() / truth.norm().clamp_min(1e-30))


def cosine(truth: Tensor, found: Tensor) -> float:
    """1: the same direction in the space of all tokens; 0: nothing in common."""
    return float((found * truth).sum() / (found.norm() * truth.norm()).clamp_min(1e-30))


def relative(truth: Tensor, found: Tensor) -> float:
    """Error of the residual stream: root of the mean over tokens of squares lost over squares there."""
    lost = (found - truth).square().sum(-1) / truth.square().sum(-1).clamp_min(1e-30)
    return float(lost.mean().sqrt())


def _routing(index: Tensor, other: Tensor | None) -> float:
    return float("nan") if other is None else same_choices(index, other)
