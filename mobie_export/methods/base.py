"""What a method is: how an export finds the signs and magnitudes of the experts.

A method is a frozen dataclass: its fields are its options, checked when it is made, its functions what an export asks
of it, in this order (exporting/flow.py):

    check        is all here that it needs besides a model: packages, devices, texts
    needs        memory, disk, time; tensors of the output beside those of the source
    workspace    where it keeps unfinished work
    collect      what it wants to know of the layers, one after the other
    encode       one layer's weights and statistics into the workspace
    tune         all layers, against the original
    encoded      what was found, as the bytes of the file

Two kinds are prepared here. A `MatrixMethod` needs the weights alone, and finds signs while they are written: it has
one function, `quantize`. methods/calibrated/options.py has the other kind, `TextMethod`, which collects statistics on
a text.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from mobie_export import gguf_io
from mobie_export.calibration import ranks
from mobie_export.calibration.imatrix import Imatrix
from mobie_export.gguf_io import Gguf, Tensor
from mobie_export.methods.stream import decoded, in_order
from mobie_export.progress import Callback, Progress
from mobie_export.spec import block, exportable, layout
from mobie_export.spec.block import Coding
from mobie_export.spec.layout import Experts

Row = tuple[str, tuple[int, ...], int]  # of a tensor table: name, shape as GGUF has it, type
Rows = list[Row]
# Tensor -> how many tensors of the table, from it on, are made together, and their bytes piece by piece; no piece has
# bytes of two tensors.
Makers = dict[str, tuple[int, Callable[[], Iterable[np.ndarray]]]]

USABLE = 1.0  # nats of divergence from the original: above them a file is of little use


def option(
    default: Any,
    flag: str,
    help: str,
    *,
    metavar: str | None = None,
    parse: Callable[[str], object] | None = None,
    choices: tuple[str, ...] | None = None,
    const: object = None,
    named: Mapping[str, object] | None = None,
) -> Any:
    """A field of a method that is an option of the command line, too.

    parse: its text -> value. const: of a flag that takes no value. named: further values under names of their own, as
    the option --preset (the only one of its kind) has them.
    """
    metadata = {"flag": flag, "help": help, "metavar": metavar, "parse": parse, "choices": choices}
    return field(default=default, metadata=metadata | {"const": const, "named": named})


@dataclass(frozen=True)
class Needs:
    """What a method changes and takes. Sizes in bytes, upper estimates."""

    memory: int = 0  # resident at its peak, libraries included
    base: int = 0  # of memory: what stays of the libraries while the output is written
    disk: int = 0  # of unfinished work, and of what is written beside the output
    disk_there: int = 0  # of that, what an earlier run left
    spare: int = 0  # of the output, what it may take more than the table says: second planes of undecided size
    said: int = 0  # of the output, likewise: what `Encoded.settings` has more than `Method.settings`
    tuned: tuple[str, ...] = ()  # tensors that are no experts and get other values, as F32
    beside: tuple[Row, ...] = ()  # further tensors of the output, as far as known
    notes: tuple[str, ...] = ()  # what a user should know
    sequences: object = None  # of tokens: calibration.text.Calibration, where the method reads a text


@dataclass
class Outcome:
    """What a method did, for reports. Layers and experts are counted from 0."""

    lines: list[str] = field(default_factory=list)  # for people, such as losses before and after
    thin: dict[int, dict[int, int]] = field(default_factory=dict)  # layer -> expert -> tokens it saw, where too few
    rare: dict[str, list[int]] = field(default_factory=dict)  # tensor -> experts that got their layer's importance
    plain: list[str] = field(default_factory=list)  # tensors without importance: layers that predict further tokens


@dataclass(frozen=True)
class Run:
    """One export, as a method sees it."""

    source: Gguf
    experts: dict[str, Experts]
    output: Path
    needs: Needs
    threads: int | None  # asked for; None: as many as there are cores, or its share of them for one of several ranks
    max_ram: int | None  # bytes that may be resident
    progress: Callback | None
    coding: Coding = block.MOBIE  # of the experts
    overwrite: bool = False  # existing files

    @property
    def computing_threads(self) -> int:
        return self.threads or max(1, cpus() // ranks.on_this_machine())

    def phase(self, label: str, total: int, unit: str = "B") -> Progress:
        return Progress(label, total, self.progress, unit, self.max_ram)


@dataclass(frozen=True)
class Writing:
    """What makers work with."""

    run: Run
    pool: ThreadPoolExecutor
    ahead: int  # pieces begun and not yet written
    progress: Progress


@dataclass
class Encoded:
    """What a method found: bytes of the tensors that it makes, and what is said about them."""

    makers: Makers
    beside: Rows = field(default_factory=list)  # tensors of the output that the source has not
    settings: dict[str, object] = field(default_factory=dict)  # for mobie.settings: all that decides the bytes
    outcome: Outcome = field(default_factory=Outcome)


@dataclass(frozen=True)
class Method(ABC):
    """See the module. `name` is the method's on the command line; `summary` one line about it."""

    name: ClassVar[str]
    summary: ClassVar[str]
    suffix: ClassVar[str] = ""  # of the output's name, where the user gave none
    codings: ClassVar[tuple[Coding, ...]] = tuple(block.CODINGS.values())  # types that the experts may have
    several: ClassVar[bool] = False  # whether several processes can do it together (calibration/ranks.py)

    @property
    def label(self) -> str:
        """For the file: mobie.method."""
        return self.name

    @classmethod
    def efforts(cls, source: Gguf, coding: Coding) -> dict[str, list[dict[str, Any]]]:
        """Level of effort (exporting/effort.py) -> options, the better ones first; for the method that is taken where
        none is named."""
        raise NotImplementedError(f"{cls.name} has no levels of effort")

    @classmethod
    def of_effort(cls, level: Mapping[str, Any], given: Mapping[str, Any]) -> Self:
        """With the options of a level of effort, but for those that were given. MobieError for ones of no sense."""
        return cls(**{**level, **given})

    @property
    def inputs(self) -> list[Path]:
        """Files that it reads, which no output may replace."""
        return []

    def check(self) -> None:  # noqa: B027 (a method may have nothing to say to it)
        """MobieError where packages, devices or files are missing, before a model is read."""

    def needs(self, run: Run) -> Needs:
        """MobieError where the model is none for this method."""
        return Needs()

    def seconds(self, run: Run) -> dict[str, float]:
        """Phase -> seconds on this machine, estimated; empty where the disk decides."""
        return {}

    def smaller(self, run: Run) -> str:
        """What to do where memory does not suffice."""
        return "allow more, or take fewer threads, each of which holds an expert"

    def importance(self) -> Imatrix | None:
        """An importance matrix, for tensors that are no experts, too."""
        return None

    def settings(self) -> dict[str, object]:
        """For mobie.settings, as far as it is known beforehand: what decides the bytes."""
        return {}

    def workspace(self, run: Run) -> AbstractContextManager[Any]:
        return nullcontext()

    def collect(self, run: Run, work: Any) -> Iterable[Any]:
        return ()

    def encode(self, work: Any, layer: Any) -> None:
        raise NotImplementedError(f"{self.name} collects statistics and does nothing with them")

    def tune(self, run: Run, work: Any) -> None:  # noqa: B027
        pass

    @abstractmethod
    def encoded(self, work: Any, writing: Writing) -> Encoded: ...


@dataclass(frozen=True)
class MatrixMethod(Method):
    """From the weights alone, some rows of an expert at a time, while they are written."""

    @abstractmethod
    def quantize(
        self,
        weights: np.ndarray,  # float32 [rows, cols]: some rows of one expert
        importance: np.ndarray | None,  # float64 [cols], >= 0, of an importance matrix; None without one
        block_len: int,  # weights that share a magnitude: 64, 128; cols is a multiple of it
    ) -> tuple[np.ndarray, np.ndarray]:
        """(signs bool [rows, cols], True is plus; magnitudes float64 [rows, cols / block_len], >= 0).

        Rows are independent of each other: a row gives the same with any others. A magnitude is to be NaN or infinite
        where a weight of its block is; the export then refuses the model.
        """

    def encoded(self, work: Any, writing: Writing) -> Encoded:
        outcome = self.outcome(writing.run)
        return Encoded(self.makers(writing.run.experts, writing), settings=self.settings(), outcome=outcome)

    def outcome(self, run: Run) -> Outcome:
        return Outcome()

    def columns(self, run: Run, item: Experts) -> np.ndarray | None:
        """Importance of every expert's columns, float64 [E, cols], or None."""
        return None

    def makers(self, experts: dict[str, Experts], writing: Writing) -> Makers:
        n = 1 if writing.run.coding.stock else 2
        return {name: (n, self._tensor(item, writing)) for name, item in experts.items()}

    def _tensor(self, item: Experts, writing: Writing) -> Callable[[], Iterator[np.ndarray]]:
        """Blocks of one expert tensor, expert by expert, then their scales, float32 [E], where the type has some."""
        gguf, tensor, size, coding = writing.run.source, item.tensor, item.expert_bytes, writing.run.coding

        def pieces() -> Iterator[np.ndarray]:
            scales = np.zeros(item.n_expert, "<f4")
            columns = self.columns(writing.run, item)
            factors = gguf.read(item.factor).view("<f4") if item.factor is not None else None

            def one(e: int) -> tuple[np.ndarray, np.float32]:
                raw = gguf.read(tensor, e * size, size).reshape(item.rows, -1)
                rows = decoded(raw, tensor.type_id, item.cols, None if factors is None else factors[e])
                return self._expert(rows, None if columns is None else columns[e], coding, gguf, tensor, e)

            for e, (blocks, scale) in enumerate(in_order(writing.pool, one, item.n_expert, writing.ahead)):
                scales[e] = scale
                yield blocks
                writing.progress.update(size, tensor.name)
            if not coding.stock:
                yield scales

        return pieces

    def _expert(
        self,
        pieces: Iterable[np.ndarray],  # float32 [rows of the piece, cols], in order: never whole in memory
        importance: np.ndarray | None,
        coding: Coding,
        gguf: Gguf,
        tensor: Tensor,
        e: int,
    ) -> tuple[np.ndarray, np.float32]:
        """(blocks uint8 [rows, bytes of a row], scale) of one expert."""
        signs, magnitudes, bad = [], [], 0
        for weights in pieces:
            s, a = self.quantize(weights, importance, coding.length)
            if not np.isfinite(a).all():
                bad += weights.size - int(np.count_nonzero(np.isfinite(weights)))
            signs.append(s)
            magnitudes.append(a)
        if bad:
            raise gguf_io.not_finite(gguf, tensor, f"{bad} infinite or NaN weights in expert {e}")
        scale, codes = exportable.scales(np.concatenate(magnitudes), coding, tensor.name)
        blocks, row = [], 0
        for s in signs:
            blocks.append(block.pack(s, codes[row : row + len(s)], coding))
            row += len(s)
        return np.concatenate(blocks), scale


def cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def expert_bits(rows: Iterable[Row], experts: dict[str, Experts]) -> float:
    """Stored bits per expert weight: of the experts and of all that lies beside them."""
    kinds = ("expert", *layout.BESIDE_EXPERTS)
    stored = sum(gguf_io.tensor_bytes(shape, kind) for name, shape, kind in rows if layout.kind(name) in kinds)
    return 8 * stored / sum(x.n_weights for x in experts.values())
