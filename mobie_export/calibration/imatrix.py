"""Importance of the experts' input columns, as llama-imatrix collects it.

The file is a GGUF with `general.type` = `imatrix` and, for every weight tensor, `<name>.in_sum2` F32 [cols, n_expert]
(sums of squared activations of the tokens that went to each expert) and `<name>.counts` F32 [1, n_expert] (how many
tokens went there). Files of the older `.dat` layout hold, entry by entry: length of the name i32, name, number of calls
i32, number of values i32, values f32 (means over an expert's tokens times the number of calls); no counts per expert.
"""

import hashlib
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mobie_export import gguf_io
from mobie_export.errors import BAD_INPUT, MobieError
from mobie_export.gguf_io import Tensor, first_bytes
from mobie_export.spec.layout import Experts

SUMS, COUNTS = ".in_sum2", ".counts"
MAX_NAME = 1024  # bytes of a name; anything longer is no imatrix
# Projections that read the same activations: a model with fused experts can use a file of one with split experts and
# the other way round.
SAME_INPUT = {
    "ffn_gate_up_": ("ffn_gate_", "ffn_up_"),
    "ffn_gate_": ("ffn_gate_up_", "ffn_up_"),
    "ffn_up_": ("ffn_gate_up_", "ffn_gate_"),
}


@dataclass
class Importance:
    """Importance of every expert of a tensor; `rare` are the experts without tokens, which got the layer's mean."""

    columns: np.ndarray | None  # float64 [n_expert, cols]; None: nothing is known, all columns count the same
    rare: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    offset: int  # of the sums in the file
    n_values: int  # float32
    counts: np.ndarray  # float64, one per expert or one


@dataclass(frozen=True)
class Imatrix:
    """An imatrix file. The sums stay in the file: for the largest models they are half a gigabyte."""

    path: Path
    sha256: str
    entries: dict[str, Entry]

    def of(self, experts: Experts, further: bool = False) -> Importance:
        """Importance for one expert tensor. MobieError when the file is of another model.

        further: the tensor is of a layer that predicts further tokens, of which an imatrix need not know.
        """
        name = self._name(experts.tensor.name)
        if name is None and further:
            return Importance(None)
        if name is None:
            found = f"no entry {experts.tensor.name} among {len(self.entries)}"
            raise self._other_model(found, "an entry for every expert tensor")
        entry = self.entries[name]
        if entry.n_values != experts.n_expert * experts.cols or entry.counts.size not in (1, experts.n_expert):
            raise self._other_model(
                f"{name} with {entry.n_values} values and {entry.counts.size} counts",
                f"{experts.n_expert} experts of {experts.cols} columns: {experts.n_expert * experts.cols} values",
            )
        sums = self._sums(name, entry).astype(np.float64).reshape(experts.n_expert, experts.cols)
        counts = np.broadcast_to(entry.counts, experts.n_expert)
        if not counts.any():
            return Importance(None, list(range(experts.n_expert)))
        rare = np.flatnonzero(counts == 0)
        columns = sums / np.where(counts > 0, counts, 1)[:, None]
        columns[rare] = sums.sum(axis=0) / counts.sum()
        return Importance(columns, rare.tolist())

    def columns(self, tensor: Tensor) -> np.ndarray | None:
        """float32 [cols] for a matrix that is no expert; None where the file says nothing about it."""
        entry = self.entries.get(tensor.name)
        if entry is None or entry.n_values != tensor.shape[0] or not entry.counts.any():
            return None
        return self._sums(tensor.name, entry) / np.float32(entry.counts.sum())

    def _sums(self, name: str, entry: Entry) -> np.ndarray:
        """float32 [n_values] of an entry; MobieError where they, or its counts, are no sums of squares."""
        sums = np.fromfile(self.path, "<f4", entry.n_values, offset=entry.offset)
        if len(sums) < entry.n_values:
            raise gguf_io.truncated(self.path, entry.offset + sums.nbytes, entry.offset + 4 * entry.n_values, name)
        for values in (sums, entry.counts):
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise MobieError(
                    BAD_INPUT,
                    f"{self.path} is damaged",
                    f"negative or non-finite values in {name}",
                    "sums of squares and counts",
                    "run llama-imatrix again",
                )
        return sums

    def _name(self, name: str) -> str | None:
        """The entry for an expert tensor, under its own name or that of one with the same input."""
        if name in self.entries:
            return name
        prefix, _, rest = name.partition("ffn_")
        for part, others in SAME_INPUT.items():
            tail = ("ffn_" + rest).removeprefix(part)
            if tail in ("exps.weight", "chexps.weight"):
                for other in others:
                    if prefix + other + tail in self.entries:
                        return prefix + other + tail
        return None

    def _other_model(self, found: str, wanted: str) -> MobieError:
        return MobieError(
            BAD_INPUT,
            f"{self.path} is the imatrix of another model",
            found,
            wanted,
            MAKE_ONE,
        )


def load(path: Path) -> Imatrix:
    """Read an imatrix of either layout. MobieError for anything else, and for values that are no importance."""
    path = Path(path)
    entries = (_load_gguf if first_bytes.read(path, 4) == gguf_io.MAGIC else _load_dat)(path)
    if not entries:
        raise _not_imatrix(path, "no entries")
    with open(path, "rb") as file:
        return Imatrix(path, hashlib.file_digest(file, "sha256").hexdigest(), entries)


MAKE_ONE = "make one: llama-imatrix -m MODEL -f TEXT -o imatrix.gguf"


def _not_imatrix(path: Path, found: str) -> MobieError:
    return MobieError(BAD_INPUT, f"{path} is not an imatrix", found, "a file written by llama-imatrix", MAKE_ONE)


def _load_gguf(path: Path) -> dict[str, Entry]:
    with gguf_io.open_model(path) as file:
        if file.value("general.type") != "imatrix" or len(file.paths) > 1:
            raise _not_imatrix(path, f"a GGUF of general.type {file.value('general.type')!r}")
        entries = {}
        for name, tensor in file.tensors.items():
            counts = file.tensors.get(name.removesuffix(SUMS) + COUNTS)
            if name.endswith(SUMS) and counts is not None and tensor.type_id == counts.type_id == gguf_io.TYPE_F32:
                values = file.read(counts).view("<f4").astype(np.float64)
                entries[name.removesuffix(SUMS)] = Entry(tensor.offset, tensor.n_weights, values)
    return entries


def _load_dat(path: Path) -> dict[str, Entry]:
    entries = {}
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size

            def number() -> int:
                return struct.unpack("<i", file.read(4))[0]

            for _ in range(number()):
                length = number()
                name = file.read(length).decode() if 0 < length < MAX_NAME else ""
                calls, n_values, offset = number(), number(), file.tell()
                if not name or n_values < 1 or offset + 4 * n_values > size:
                    raise ValueError
                entries[name] = Entry(offset, n_values, np.array([float(calls)]))
                file.seek(4 * n_values, os.SEEK_CUR)
    except (struct.error, ValueError):
        raise first_bytes.other(path, "an imatrix of either layout, or damaged", MAKE_ONE) from None
    return entries
