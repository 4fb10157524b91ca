"""The method `ordered`: layers one after the other, on what the binarized layers before them produce.

Errors compound where every layer is fitted to the original's inputs, as `calibrated` does: models with massive
activations are lost that way (docs/measured/real-weights.md). Here each layer sees the inputs that it will have, and
the projection that writes to the residual stream, down, is fitted to the original's stream behind the layer, so that
it makes up for everything that was lost before it. No gradients; two boundaries of hidden states on the disk.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mobie_export.errors import USAGE, MobieError
from mobie_export.gguf_io import Gguf
from mobie_export.methods.base import Run, option
from mobie_export.methods.calibrated.method import REFINE_HELP, REFINEMENTS, STEPS_HELP, TOGETHER
from mobie_export.methods.calibrated.options import (
    DESCENTS,
    PRESETS,
    SELF,
    Refining,
    layer_bytes,
    least_bits,
    positive,
    spare_bits,
    vocabulary_bytes,
)
from mobie_export.spec import block, layout
from mobie_export.spec.block import Coding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mobie_export.methods.calibrated.estimate import Work
    from mobie_export.methods.calibrated.steps import Layer, Workspace
    from mobie_export.models.twin import Twin


@dataclass(frozen=True)
class Ordered(Refining):
    name = "ordered"
    summary = "layers in order, each fitted to make up for what is lost before it"
    several = True

    samples: int = option(256, "--samples", "sequences of the text", metavar="N", parse=positive)
    bpw: float | None = option(
        None,
        "--bpw",
        "stored bits per expert weight at most (default: the smallest; of an effort 1.25)",
        metavar="X",
        parse=float,
        named=PRESETS,
    )
    descents: int = option(
        DESCENTS, "--descents", "times that all signs are gone over again", metavar="N", parse=positive
    )
    refine: str = option("none", "--refine", REFINE_HELP, choices=REFINEMENTS, parse=str)
    steps: int | None = option(None, "--steps", STEPS_HELP, metavar="N", parse=positive)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refine not in ("none", *TOGETHER):
            raise MobieError(USAGE, "there is no such refinement", self.refine, f"none, {' or '.join(TOGETHER)}")

    @classmethod
    def efforts(cls, source: Gguf, coding: Coding = block.MOBIE) -> dict[str, list[dict[str, Any]]]:
        from mobie_export.models.twin import in_torch

        experts = layout.experts(source).values()
        least = least_bits(source) / sum(x.n_weights for x in experts)
        bits = {} if coding.stock else {"bpw": max(PRESETS["medium"], math.ceil(1e3 * least) / 1e3)}
        texts: list[dict[str, Any]] = [{"text": SELF}, {}]  # its own where the model fits into memory
        refined: list[dict[str, Any]] = [{"refine": r} for r in TOGETHER] if in_torch(source) else [{}]
        return {
            "fast": [bits | {"samples": 64, "descents": 4}],
            "normal": [bits | {"samples": 256} | t for t in texts],
            "best": [bits | {"samples": 512} | r | t for r in refined for t in texts],
        }

    def twin(self, gguf: Gguf, device: str = "cpu") -> "Twin":
        """Of every architecture, where no gradients are asked for."""
        from mobie_export.models.runtime_twin import RuntimeTwin
        from mobie_export.models.twin import in_torch

        return super().twin(gguf, device) if self.refines else in_torch(gguf, device) or RuntimeTwin(gguf, device)

    @property
    def bits(self) -> float | None:
        return self.bpw

    @property
    def label(self) -> str:
        return self.name if self.refine == "none" else f"{self.name}+{self.refine}"

    def tune(self, run: Run, work: "Workspace") -> None:
        from mobie_export.methods.calibrated import steps

        if self.refines:
            steps.refine_together(self, run, work)

    def states_bytes(self, twin: "Twin", n_tokens: int, second: bool) -> int:
        return 4 * 4 * n_tokens * twin.width  # before this layer and behind it, of both paths, in float32

    def operations(self, twin: "Twin", coding: Coding) -> "dict[str, Work]":
        from mobie_export.methods.ordered import steps

        return steps.operations(self, twin, coding)

    def collecting_bytes(self, run: Run, twin: "Twin") -> int:
        from mobie_export.calibration.products import product_type
        from mobie_export.methods.calibrated.layer import EXPERTS_AT_ONCE
        from mobie_export.methods.ordered import steps

        n_tokens, k, layer = self.own_samples * self.seq_len, twin.config.num_experts_per_tok, layer_bytes(run, twin)
        hidden = 4 * n_tokens * twin.width  # one boundary in float32
        ff, n_expert = max((x.cols, x.n_expert) for x in run.experts.values() if layout.is_down(x.tensor.name))
        spare = spare_bits(run.source, self.bits, run.coding) * 4 / (layer * twin.n_layers)  # bits of a weight
        # the original experts and those of down as they are moved; signs found, a byte each, of the second ones up to
        # three times what a layer has on average; magnitudes
        weights = layer + layer // 3 + int(layer / 4 * (1 + min(1.0, 3 * spare))) + layer // 32
        # of the busiest expert; what the search holds of a few: eight copies of gate and up, moments and factors
        share = min(1.0, 2 * k / n_expert)
        expert = int(4 * n_tokens * share * 3 * (ff + twin.width))
        search = 4 * EXPERTS_AT_ONCE * (8 * 2 * ff * twin.width + 3 * twin.width**2)
        # inputs, target, what is left of it, what is read; of down what is kept from sweep to sweep
        tokens = 4 * hidden + min(steps.KEPT, 4 * n_tokens * k * ff + 2 * 4 * n_expert * ff**2)
        if product_type(self.device) == "bf16":  # rounded copies, which stay for the next product: measured
            tokens += 4 * hidden + search
        # either gate and up are searched for, when nothing of down is there yet, or down's inputs are kept
        gate_and_up = layer + layer // 6 + search + 4 * hidden
        at_once = max(weights + tokens + expert, gate_and_up) + self.scores_bytes(twin)
        at_once = at_once * 21 // 20  # what the C library keeps between: measured
        return max(vocabulary_bytes(twin) // 2 + 2 * hidden, at_once)  # the embedding, before any layer

    def collect(self, run: Run, work: "Workspace") -> "Iterator[Layer]":
        from mobie_export.methods.ordered import steps

        return steps.collect(self, run, work)

    def encode(self, work: "Workspace", layer: "Layer") -> None:
        from mobie_export.methods.ordered import steps

        steps.encode(work, layer, self.descents)
