"""The method `improve`: an export's signs and magnitudes, refined further against the model that it was made from.

Nothing is calibrated again: the planes come from the file, routers and norms as well, everything else from the source.
`mobie-export improve FILE --against SOURCE` is the command for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobie_export import gguf_io
from mobie_export.errors import BAD_INPUT, UNSUPPORTED, USAGE, MobieError
from mobie_export.gguf_io import Gguf, Row
from mobie_export.methods.base import Needs, Run, option
from mobie_export.methods.calibrated.method import STEPS_HELP, TOGETHER, TOGETHER_HELP
from mobie_export.methods.calibrated.options import SELF, Refining, positive
from mobie_export.spec import block, layout, metadata
from mobie_export.spec.block import Coding

if TYPE_CHECKING:
    from mobie_export.methods.calibrated.estimate import Work
    from mobie_export.methods.calibrated.steps import Layer, Workspace
    from mobie_export.models.twin import Twin

# steps of the efforts: the first are worth most
STEPS = {"fast": 100, "normal": 300, "best": 1000}


@dataclass(frozen=True)
class Improve(Refining):
    name = "improve"
    summary = "an earlier export's signs and magnitudes, refined further"

    start: Path | None = option(None, "--start", "the export to go on from", metavar="FILE", parse=Path)
    samples: int = option(256, "--samples", "sequences of the text", metavar="N", parse=positive)
    refine: str = option(TOGETHER[0], "--refine", TOGETHER_HELP, choices=TOGETHER, parse=str)
    steps: int | None = option(None, "--steps", STEPS_HELP, metavar="N", parse=positive)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is None:
            raise MobieError(USAGE, "nothing to improve is named", todo="name an export with --start FILE")
        if self.refine not in TOGETHER:
            raise MobieError(USAGE, "there is no such refinement", self.refine, " or ".join(TOGETHER))

    @classmethod
    def efforts(cls, source: Gguf, coding: Coding = block.MOBIE) -> dict[str, list[dict[str, Any]]]:
        texts: list[dict[str, Any]] = [{"text": SELF}, {}]  # its own where the model fits into memory
        return {
            level: [{"refine": r, "steps": steps} | t for r in TOGETHER for t in texts]
            for level, steps in STEPS.items()
        }

    @property
    def models(self) -> list[Path]:
        assert self.start is not None
        return [*super().models, self.start]

    @property
    def earlier(self) -> tuple[str, dict[str, object]]:
        """The method's label and the settings of the file that it starts from."""
        assert self.start is not None
        with gguf_io.open_model(self.start) as file:
            return metadata.METHOD.of(file) or "unknown", metadata.settings(file)

    @property
    def label(self) -> str:
        before = "sign" if self.earlier[0] == metadata.UNCALIBRATED else self.earlier[0]
        return before if before.endswith(f"+{self.refine}") else f"{before}+{self.refine}"

    def more_settings(self) -> dict[str, object]:
        label, settings = self.earlier
        return {"start": {"method": label, "settings": settings}}

    def needs(self, run: Run) -> Needs:
        assert self.start is not None
        with gguf_io.open_model(self.start) as file:
            check(file, run)
        return super().needs(run)

    def states_bytes(self, twin: "Twin", n_tokens: int, second: bool) -> int:
        return 0  # but the targets

    def operations(self, twin: "Twin", coding: Coding) -> "dict[str, Work]":
        from mobie_export.methods.calibrated import estimate

        return estimate.together(twin, self)

    def more_needs(self, run: Run) -> tuple[int, tuple[Row, ...]]:
        assert self.start is not None
        with gguf_io.open_model(self.start) as file:
            kinds = ("expert residual", "expert columns")
            beside = [t for t in file.tensors.values() if layout.kind(t.name) in kinds]
            return 0, tuple((t.name, t.shape, t.type_id) for t in beside)

    def collect(self, run: Run, work: "Workspace") -> "Iterator[Layer]":
        from mobie_export.methods.improve import start

        assert self.start is not None
        with gguf_io.open_model(self.start) as file:
            start.take(file, run, work)
        return iter(())

    def tune(self, run: Run, work: "Workspace") -> None:
        from mobie_export.methods.calibrated import steps

        steps.refine_together(self, run, work)


def check(file: Gguf, run: Run) -> None:
    """MobieError where the export is not one that a refinement against the source can go on from."""
    path, found = file.paths[0], layout.experts(file)
    if not metadata.is_mobie(file):
        raise MobieError(BAD_INPUT, f"{path} is no export", wanted="a file that mobie-export wrote")
    metadata.check_version(file)
    for name, item in run.experts.items():
        if layout.is_further(run.source, name):
            continue
        there = found.get(name)
        if there is None or there.tensor.shape != item.tensor.shape:
            shape = "missing" if there is None else str(list(there.tensor.shape))
            raise MobieError(
                BAD_INPUT,
                f"{path} was not made from {run.source.paths[0]}",
                f"{name} {shape}",
                str(list(item.tensor.shape)),
                "name the model that it was made from",
            )
        if there.tensor.type_id != run.coding.type_id:
            raise MobieError(
                USAGE,
                f"{path} has experts of another type",
                gguf_io.type_name(there.tensor.type_id),
                run.coding.type_name,
                f"--type {block.BY_TYPE[there.tensor.type_id].option}" if there.tensor.type_id in block.BY_TYPE else "",
            )
        if there.shared is not None:
            raise MobieError(
                UNSUPPORTED,
                f"{path} has factors that the experts of a layer share",
                there.shared.name,
                "one without: --method paper alone writes them",
            )
        if problems := there.problems(file):
            raise gguf_io.damaged(path, problems[0], "what FORMAT.md says")
