"""The method `imatrix`: as `sign`, but the magnitudes are those that are best under the importance of the columns, the
mean squares of the activations that llama-imatrix collects.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from mobie_export.calibration import imatrix
from mobie_export.errors import USAGE, MobieError
from mobie_export.methods.base import MatrixMethod, Needs, Outcome, Run, option
from mobie_export.methods.sign.method import binarize
from mobie_export.spec import layout, metadata
from mobie_export.spec.layout import Experts


@dataclass(frozen=True)
class Importance(MatrixMethod):
    """file: of llama-imatrix, in either of its layouts."""

    name = "imatrix"
    summary = "signs of the weights, magnitudes weighted by an importance matrix: uncalibrated"
    suffix = "-uncalibrated"  # with real weights it is gibberish as that of `sign` is

    file: Path | None = option(None, "--imatrix", "an importance matrix of llama-imatrix", metavar="FILE", parse=Path)

    def __post_init__(self) -> None:
        if self.file is None:
            raise MobieError(
                USAGE, "the method imatrix needs an importance matrix", todo="give one with --imatrix FILE"
            )

    @property
    def label(self) -> str:
        return metadata.UNCALIBRATED  # what the file holds; mobie.settings names the matrix

    @property
    def inputs(self) -> list[Path]:
        return [Path(self.file)] if self.file else []

    def importance(self) -> imatrix.Imatrix:
        assert self.file is not None
        path = Path(self.file)
        return _load(path, path.stat().st_mtime_ns if path.exists() else 0)

    def needs(self, run: Run) -> Needs:
        columns = max(x.n_expert * x.cols for x in run.experts.values()) * 24
        self.outcome(run)  # MobieError for a matrix of another model
        return Needs(memory=columns)

    def settings(self) -> dict[str, object]:
        return {"imatrix": self.importance().sha256}

    def outcome(self, run: Run) -> Outcome:
        matrix = self.importance()
        found = {n: matrix.of(x, layout.is_further(run.source, n)) for n, x in run.experts.items()}
        return Outcome(
            rare={n: x.rare for n, x in found.items() if x.rare},
            plain=[n for n, x in found.items() if x.columns is None and not x.rare],
        )

    def columns(self, run: Run, item: Experts) -> np.ndarray | None:
        return self.importance().of(item, layout.is_further(run.source, item.tensor.name)).columns

    def quantize(
        self, weights: np.ndarray, importance: np.ndarray | None, block_len: int
    ) -> tuple[np.ndarray, np.ndarray]:
        return binarize(weights, importance, block_len)


@lru_cache(maxsize=1)
def _load(path: Path, changed: int) -> imatrix.Imatrix:  # changed: a file that is another one now is read again
    return imatrix.load(path)
