"""Where are a model's hidden states between two passes? In files of a work folder.

They are kept in bfloat16: the residual stream of large models has outliers beyond float16's range, and 2 bytes per
token and channel in every layer are enough disk already. The rounding, 2^-9 of a value, is far below what binary
weights change. Gradients have the same form.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from mobie_export import disk
from mobie_export.calibration import ranks
from mobie_export.calibration.text import Calibration
from mobie_export.errors import BAD_INPUT, MobieError
from mobie_export.models.twin import Twin

# What is in a file of states, by the first part of its name.
STATES = {
    **dict.fromkeys(("hidden", "original"), "hidden states"),
    **dict.fromkeys(("quantized", "binary"), "hidden states of the binary model"),
    "gradient": "loss gradients",
}


def overflow(what: str) -> MobieError:
    """For numbers that a model makes on its way and that are none."""
    return MobieError(
        BAD_INPUT,
        "the model computes values that are no numbers",
        f"infinite or NaN: {what}",
        "a model whose activations stay in float32's range",
        "check the model with llama-perplexity; --method sign does not compute activations",
    )


class States:
    """Hidden states, or gradients of them, in one file: [n_sequences, seq_len, width].

    The file has another name until `finish`; one that is there under its own name is complete and is taken as it is.
    Its disk space is taken at once, and it is read and written, not mapped: on a full disk a write into mapped memory
    is a signal that ends the process. MobieError where that fails, and for values that are infinite or NaN; the file's
    name says whose they are.
    """

    start = 0  # of the first sequence in the file

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ):
        self.path, self.shape, self.dtype, self.device = Path(path), tuple(shape), dtype, device
        self.number = np.dtype(np.uint16 if dtype == torch.bfloat16 else np.float32)
        self.row_bytes = math.prod(self.shape[1:]) * self.number.itemsize  # of a sequence
        self.finished = self.path.exists()
        if self.finished:
            with disk.reading_back(self.path):
                self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (closed by `delete`, or with the object)
                size, wanted = os.fstat(self._file.fileno()).st_size, self.shape[0] * self.row_bytes
                if size != wanted:
                    raise ValueError(f"{size} bytes in place of {wanted}")
        else:
            with disk.writing(self.path):
                self._file = open(self._part, "w+b", buffering=0)  # noqa: SIM115
                disk.reserve(self._file, self.shape[0] * self.row_bytes)

    @property
    def _part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    def finish(self) -> None:
        """On the disk, and under its own name."""
        if not self.finished:
            with disk.writing(self.path):
                os.fsync(self._file.fileno())
                self._part.rename(self.path)
            self.finished = True

    def write(self, where: slice, values: Tensor) -> None:
        if self.finished:  # by an earlier run, with the same values
            return
        values = values.detach().to(self.dtype).contiguous()
        if not torch.isfinite(values).all():
            kind, boundary = self.path.name.split("-")
            place = f"behind layer {int(boundary) - 1}" if int(boundary) else "before the first layer"
            raise overflow(f"{STATES[kind]} {place}")
        data = (values.view(torch.uint16) if self.dtype == torch.bfloat16 else values).cpu().numpy()
        rest = data.reshape(-1).view(np.uint8).data
        with disk.writing(self.path):
            self._file.seek(where.indices(self.shape[0])[0] * self.row_bytes)
            while rest:
                rest = rest[self._file.write(rest) :]

    def read(self, where: slice | Tensor) -> Tensor:
        """float32 [n, seq_len, width], on the device, of a range of sequences or of those with the given numbers."""
        if isinstance(where, slice):
            start, stop, _ = where.indices(self.shape[0])
            ranges, n = [(start, stop - start)], stop - start
        else:
            ranges, n = [(i, 1) for i in where.tolist()], len(where)
        values = np.empty((n, *self.shape[1:]), self.number)
        rest = values.reshape(-1).view(np.uint8).data
        with self._reading():
            for first, count in ranges:
                self._file.seek(self.start + first * self.row_bytes)
                rest = self._filled(rest, count * self.row_bytes)
        found = torch.from_numpy(values).to(self.device)
        return found.view(self.dtype).float() if self.dtype == torch.bfloat16 else found

    def _reading(self) -> AbstractContextManager[None]:
        return disk.reading_back(self.path)

    def _filled(self, buffer: memoryview, size: int) -> memoryview:
        """What of the buffer comes behind the `size` bytes that are read into it."""
        while size > 0:
            n = self._file.readinto(buffer[:size])
            if not n:
                raise EOFError(f"the file ends {size} bytes early")
            buffer, size = buffer[n:], size - n
        return buffer

    def delete(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)
        self._part.unlink(missing_ok=True)


class SavedStates(States):
    """States of so many sequences that lie in a file of the user's (saved.py), from `start` on. They are read alone."""

    def __init__(
        self,
        path: Path,
        start: int,
        shape: tuple[int, ...],
        device: torch.device | str,
        damaged: Callable[[str], MobieError],  # the error for a file that cannot be read
    ):
        self.path, self.start, self.shape, self.dtype, self.device = path, start, shape, torch.bfloat16, device
        self.number, self.finished, self._damaged = np.dtype(np.uint16), True, damaged
        self.row_bytes = math.prod(shape[1:]) * self.number.itemsize
        with self._reading():
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `delete`, or with the object)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError) as e:
            raise self._damaged(str(e)) from e

    def delete(self) -> None:
        self._file.close()


def save(value: object, file: BinaryIO) -> None:
    """torch.save, which hides what interrupted it, the system's error or a signal, behind an error of its own."""
    try:
        torch.save(value, file)
    except RuntimeError as e:
        if isinstance(e.__context__, (OSError, KeyboardInterrupt)):
            raise e.__context__ from None
        raise


class Work:
    """The files of one calibration: the original model's hidden states before layer i, `hidden[i]`, with
    hidden[n_layers] those before the head, and the loss gradients with respect to them, `gradient[i]`.

    What an earlier run with the same settings finished in the same folder is not done again. Of several ranks each has
    the states of its own part of the sequences: `every` is all of them, `calibration` the part.
    """

    def __init__(self, folder: Path, twin: Twin, calibration: Calibration, dtype: torch.dtype = torch.bfloat16):
        self.folder, self.dtype = Path(folder), dtype
        self.twin, self.every = twin, calibration
        self.own = ranks.divide(len(calibration.tokens))
        self.calibration = replace(calibration, tokens=calibration.tokens[self.own])
        self.shape = (*self.calibration.tokens.shape, twin.width)
        self.hidden: dict[int, States] = {}
        self.gradient: dict[int, States] = {}

    def newest(self, kind: str) -> int:
        """The last boundary of which all ranks have finished such states in an earlier run; 0 where there is none."""
        boundaries = range(self.twin.n_layers + 1)
        return max((i for i in boundaries if ranks.everywhere((self.folder / f"{kind}-{i}").exists())), default=0)

    def states(self, name: str) -> States:
        return States(self.folder / name, self.shape, self.dtype, self.twin.device)

    def read(self, states: States, numbers: Tensor) -> Tensor:
        """As `States.read`, sequences being counted among those of all ranks, which ask for the same ones together."""
        if ranks.world() == 1:
            return states.read(numbers)
        here = (numbers >= self.own.start) & (numbers < self.own.stop)
        found = torch.zeros(len(numbers), *self.shape[1:], device=self.twin.device)
        found[here] = states.read(numbers[here] - self.own.start)
        return ranks.summed(found)


def disk_bytes(n_layers: int, n_tokens: int, width: int) -> int:
    """What `Work` takes in its folder at most."""
    return 2 * 2 * (n_layers + 2) * n_tokens * width
