"""The method `calibrated`, our own: error propagation weighted by the loss, second signs where they count, refinement.

docs/method.md says what each step does and is worth.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mobie_export.errors import USAGE, MobieError
from mobie_export.methods.base import Run, option
from mobie_export.methods.calibrated.options import PRESETS, Refining, positive

if TYPE_CHECKING:
    from mobie_export.methods.calibrated.steps import Layer, Workspace

TOGETHER = ("end-to-end", "streamed", "magnitudes")  # of all layers
REFINEMENTS = ("none", "layerwise", *TOGETHER)
TOGETHER_HELP = (
    "the whole model in memory (end-to-end), one layer at a time (streamed, the same result in more time), or signs as "
    "they are and all else in memory (magnitudes, a third of a byte for a weight)"
)
REFINE_HELP = (
    "tune what error propagation found: layer by layer (layerwise, calibrated alone); all layers together, with "
    f"{TOGETHER_HELP}; default: none, of calibrated streamed"
)
STEPS_HELP = "of the refinement of all layers together"


@dataclass(frozen=True)
class Calibrated(Refining):
    name = "calibrated"
    summary = "error propagation on a text, second signs, refinement against the original"

    refine: str = option("streamed", "--refine", REFINE_HELP, choices=REFINEMENTS, parse=str)
    bpw: float | None = option(
        None,
        "--bpw",
        "stored bits per expert weight at most; what one sign per weight leaves goes into second signs where they "
        "count (default: the smallest; of an effort 1.25)",
        metavar="X",
        parse=float,
        named=PRESETS,
    )
    steps: int | None = option(None, "--steps", STEPS_HELP, metavar="N", parse=positive)
    tune_router: bool = option(True, "--no-tune-router", "keep the routers", const=False)
    tune_norms: bool = option(True, "--no-tune-norms", "keep the norms", const=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refine not in REFINEMENTS:
            raise MobieError(USAGE, "there is no such refinement", self.refine, " or ".join(REFINEMENTS))

    @property
    def label(self) -> str:
        return "glas" if self.refine == "none" else f"glas+{self.refine}"

    @property
    def tunes(self) -> tuple[bool, bool]:
        return self.tune_router, self.tune_norms

    @property
    def bits(self) -> float | None:
        return self.bpw

    def encode(self, work: "Workspace", layer: "Layer") -> None:
        from mobie_export.methods.calibrated import steps

        steps.propagate(work, layer)

    def tune(self, run: Run, work: "Workspace") -> None:
        if self.refines:
            from mobie_export.methods.calibrated import steps

            steps.refine_layers(self, run, work)
