"""States of a refinement in a folder, so that a run that was killed goes on from the newest.

A state is a file of every layer, with the values that are tuned and their optimizer's moments, and a header with all
else that decides the further steps. The header is written last; a state counts once it is there. Two stay: the newest
and the best so far, to which a refinement goes back.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mobie_export import disk
from mobie_export.calibration import ranks
from mobie_export.calibration.states import save
from mobie_export.calibration.store import complete

EVERY = 600.0  # seconds between two states, beside those of the checks


@dataclass
class Course:
    """Where a refinement is."""

    best: float  # loss on the sequences kept aside
    curve: list[tuple[int, float]]  # (steps done, that loss) at every check; the first is of before all steps
    generator: Tensor  # state of the random numbers
    order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # sequences, until drawn anew
    step: int = 0  # steps done
    kept: int = 0  # steps done at the best state
    share: float = 1.0  # of the rates


class Tuned(Protocol):
    """What a refinement tunes, by layer."""

    indices: list[int]

    def save(self, i: int, path: Path) -> None:
        """Values and moments of layer i into a file; no file where there are none yet."""

    def load(self, i: int, path: Path) -> None:
        """What `save` saved."""

    def go_back(self, i: int, path: Path) -> None:
        """The values of what `save` saved; the moments stay."""


class Snapshots:
    def __init__(self, folder: Path, layers: Tuned):
        """folder: this refinement's own; it is made where it is not there."""
        self.folder, self.layers = folder, layers
        with disk.writing(folder):
            folder.mkdir(exist_ok=True)
        self._last = time.monotonic()

    def newest(self) -> Course | None:
        """Go on from the newest state; None where there is none. Of several ranks, the newest that all of them have:
        one that was ahead goes back."""
        headers = {int(path.stem.removeprefix("state-")): path for path in self.folder.glob("state-*.pt")}
        steps = set.intersection(*ranks.of_all(set(headers)))
        if not steps:
            return None
        path = headers[max(steps)]
        with disk.reading_back(path):
            course = Course(**torch.load(path))
        for i in self.layers.indices:
            self.layers.load(i, self._layer(course.step, i))
        return course

    def put(self, course: Course) -> None:
        for i in self.layers.indices:
            self.layers.save(i, self._layer(course.step, i))
        with complete(self._header(course.step)) as file:
            save(vars(course), file)
        ranks.wait()  # a rank that is not so far yet would need what comes before
        for path in self.folder.glob("state-*"):
            if int(path.name.split("-")[1].split(".")[0]) not in (course.step, course.kept):
                with disk.writing(path):
                    path.unlink()
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for a state again; the first rank's clock counts."""
        return ranks.from_first(lambda: time.monotonic() - self._last > EVERY)

    def go_back(self, course: Course) -> None:
        """To the values of the best state."""
        for i in self.layers.indices:
            self.layers.go_back(i, self._layer(course.kept, i))

    def _header(self, step: int) -> Path:
        return self.folder / f"state-{step}.pt"

    def _layer(self, step: int, i: int) -> Path:
        return self.folder / f"state-{step}-layer-{i}.bin"
