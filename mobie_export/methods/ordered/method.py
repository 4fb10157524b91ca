"""The method `ordered`: layers one after the other, on what the binarized layers before them produce.

Errors compound where every layer is fitted to the original's inputs, as `calibrated` does: models with massive
activations are lost that way (docs/measured/real-weights.md). Here each layer sees the inputs that it will have, and
the projection that writes to the residual stream, down, is fitted to the original's stream behind the layer, so that
it makes up for everything that was lost before it. No gradients; two boundaries of hidden states on the disk.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mobie_export.errors import USAGE, MobieError
from mobie_export.methods.base import Run, option
from mobie_export.methods.calibrated.options import PRESETS, TextMethod, positive

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mobie_export.methods.calibrated.steps import Layer, Workspace


@dataclass(frozen=True)
class Ordered(TextMethod):
    name = "ordered"
    summary = "layers in order, each fitted to make up for what is lost before it"

    samples: int = option(256, "--samples", "sequences of the text (default: 256)", metavar="N", parse=positive)
    bpw: float | None = option(
        None,
        "--bpw",
        "stored bits per expert weight at most (default: the smallest)",
        metavar="X",
        parse=float,
        named=PRESETS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bpw is not None and not (math.isfinite(self.bpw) and self.bpw > 0):
            raise MobieError(USAGE, "--bpw is no number of bits", f"{self.bpw:g}", "a number such as 1.25")

    @property
    def bits(self) -> float | None:
        return self.bpw

    def collect(self, run: Run, work: "Workspace") -> "Iterator[Layer]":
        from mobie_export.methods.ordered import steps

        return steps.collect(self, run, work)

    def encode(self, work: "Workspace", layer: "Layer") -> None:
        from mobie_export.methods.ordered import steps

        steps.encode(work, layer)
