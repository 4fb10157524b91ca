"""The method `paper`: MoBiE as it was published (arXiv 2604.06798), as far as the file can hold it; no refinement.

docs/method.md lists where it departs from the paper, and why.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mobie_export import gguf_io
from mobie_export.methods.base import Row, Run
from mobie_export.methods.calibrated.options import TextMethod, layer_bytes
from mobie_export.spec import block

if TYPE_CHECKING:
    from mobie_export.calibration.states import Work
    from mobie_export.calibration.statistics import LayerStatistics
    from mobie_export.methods.calibrated.steps import Layer, Workspace
    from mobie_export.models.twin import Twin


@dataclass(frozen=True)
class Paper(TextMethod):
    name = "paper"
    summary = "MoBiE as it was published, shared factors included; for comparisons"
    codings = (block.MOBIE,)  # shared factors, and second planes for what is salient
    groups = 5  # recipe.PAPER.groups, and the plain second moments

    def collecting_bytes(self, run: Run, twin: "Twin") -> int:
        more = 2 * layer_bytes(run, twin) + 4 * self.samples * self.seq_len * twin.width  # in the factors' basis
        return super().collecting_bytes(run, twin) + more

    def more_needs(self, run: Run) -> tuple[int, tuple[Row, ...]]:
        from mobie_export.methods.paper import recipe
        from mobie_export.models.twin import Twin

        beside = recipe.beside_rows(Twin(run.source))
        return sum(gguf_io.tensor_bytes(shape, kind) for _, shape, kind in beside), tuple(beside)

    def more_settings(self) -> dict[str, object]:
        from mobie_export.methods.paper import recipe

        return {self.name: vars(recipe.PAPER).copy()}

    def backward(
        self, files: "Work", step: Callable[[int, str], None], done: Callable[[int], bool]
    ) -> "Iterator[tuple[int, LayerStatistics]]":
        from mobie_export.methods.paper import recipe

        return recipe.backward(files, step, done)

    def encode(self, work: "Workspace", layer: "Layer") -> None:
        from mobie_export.methods.calibrated.steps import numbers
        from mobie_export.methods.paper import recipe

        with numbers(layer.number):
            recipe.put_layer(work.store, layer.number, layer.statistics)
