"""What of a calibration depends neither on the size nor on the type that is written, kept in one file for the next one.

The form is that of safetensors, so that any program reads it:

    tokens              int32 [n, seq_len]: the sequences of the text, in their order
    sensitivity         float64 [n_layers]: what every layer alone costs, in nats (methods/ordered/sensitivity.py)
    sensitivity_layers  int32 [n_layers]: their numbers
    targets             bfloat16 [n_targets, seq_len, width]: the original's hidden states behind its last layer, for
                        the first of the sequences

All but the tokens may be missing. One string of metadata, `KEY`, says as JSON what the rest was made from and how
(`About`), and has the SHA-256 of every tensor. Statistics of the layers are not among it: those of `ordered` depend on
the layers that are binarized already.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mobie_export import disk
from mobie_export.calibration.text import Calibration, tokens_digest
from mobie_export.errors import BAD_INPUT, MobieError
from mobie_export.sources import safetensors

if TYPE_CHECKING:  # a file can be looked at without it
    import torch

    from mobie_export.calibration.states import SavedStates

FORMAT = 1
KEY = "mobie.statistics"
OPTION = "--save-statistics"
TODO = f"give a file that {OPTION} wrote, or leave --statistics out"
NUMBERS: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "F64": np.dtype("<f8"), "BF16": np.dtype("<u2")}
# tensor -> kind of its numbers, dimensions
FORMS = {"tokens": ("I32", 2), "sensitivity": ("F64", 1), "sensitivity_layers": ("I32", 1), "targets": ("BF16", 3)}
CHUNK = 8 << 20  # bytes in flight


@dataclass(frozen=True)
class About:
    """What the tensors were made from."""

    source: str  # digest of the model's bytes: `Gguf.content`
    text: str  # its name
    text_sha256: str  # of a text that the model wrote: of all tokens
    own: bool  # whether the model wrote it
    chat: bool  # whether it is dialogues in the model's template
    seed: int  # of the order
    samples: int  # sequences that a calibration may take: no others are the model's own, where it wrote the text
    made: dict[str, dict[str, object]] = field(default_factory=dict)  # tensor -> what else decides its numbers


class Statistics:
    """A file of statistics. MobieError where it is none, or damaged; the tensors' bytes are checked when they are
    read."""

    def __init__(self, path: Path):
        self.path = Path(path)
        header = safetensors.read(self.path, TODO)
        self.tensors = header.tensors
        self.digest = hashlib.sha256(header.raw).hexdigest()  # of all that is in it: the header has the tensors' own
        text = header.metadata.get(KEY)
        if not isinstance(text, str):
            raise MobieError(
                BAD_INPUT,
                f"{path} holds no statistics",
                f"no {KEY} in its metadata",
                "statistics of a calibration",
                TODO,
            )
        try:
            found = json.loads(text)
            version, self.sha256 = found.pop("format"), found.pop("sha256")
            if version == FORMAT:
                self.about = About(**found)
                self._check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise self.damaged(f"{type(e).__name__}: {e}"[:200]) from None
        if version != FORMAT:
            raise MobieError(
                BAD_INPUT,
                f"the statistics {path} have another format",
                str(version)[:200],
                str(FORMAT),
                "install the mobie-export that wrote them, or save them again",
            )

    def damaged(self, found: str) -> MobieError:
        return MobieError(
            BAD_INPUT, f"the statistics {self.path} are damaged", found, "the file as it was written", "save them again"
        )

    def _check(self) -> None:
        """ValueError, KeyError or TypeError for what no export writes."""
        a, kinds = self.about, {"seed": int, "samples": int, "own": bool, "chat": bool, "made": dict}
        for name, value in vars(a).items():
            if type(value) is not kinds.get(name, str):
                raise TypeError(f"{name} is {value!r:.80}")
        for name, t in self.tensors.items():
            kind, dimensions = FORMS[name]
            size = math.prod(t.shape) * NUMBERS[kind].itemsize
            if (
                t.kind != kind
                or len(t.shape) != dimensions
                or t.n_bytes != size
                or not isinstance(self.sha256[name], str)
            ):
                raise ValueError(f"{name} is {t.kind} {list(t.shape)} in {t.n_bytes} bytes")
        for name in self.tensors.keys() & {"sensitivity", "targets"}:
            if not isinstance(a.made[name], dict):
                raise TypeError(f"made has no {name}")
        if self.n < 1 or self.seq_len < 2 or not 1 <= a.samples <= self.n or not 0 <= a.seed < 2**63:
            raise ValueError(f"{a.samples} of {self.n} sequences of {self.seq_len} tokens, seed {a.seed}")
        if self.n_targets > self.n or (self.n_targets and self.tensors["targets"].shape[1] != self.seq_len):
            raise ValueError(f"targets {list(self.tensors['targets'].shape)} of tokens {[self.n, self.seq_len]}")

    @property
    def n(self) -> int:
        """Sequences."""
        return self.tensors["tokens"].shape[0]

    @property
    def seq_len(self) -> int:
        return self.tensors["tokens"].shape[1]

    @property
    def n_targets(self) -> int:
        """Sequences that there are targets of, the first ones."""
        return self.tensors["targets"].shape[0] if "targets" in self.tensors else 0

    def calibration(self, n: int, vocabulary: int) -> Calibration:
        """The first n sequences, or all; the others are its `rest`. vocabulary: tokens that the model knows."""
        import torch

        values = self._read("tokens")
        if values.min() < 0 or values.max() >= vocabulary:
            raise self.damaged(f"tokens from {values.min()} to {values.max()} of a vocabulary of {vocabulary}")
        tokens = torch.from_numpy(values).long()
        sha256 = tokens_digest(tokens[:n]) if self.about.own else self.about.text_sha256
        return Calibration(tokens[:n], sha256, rest=tokens[n:])

    @cached_property
    def sensitivity(self) -> dict[int, float] | None:
        """Layer -> mean KL divergence from the original in nats when it alone is binary."""
        if "sensitivity" not in self.tensors:
            return None
        layers, values = self._read("sensitivity_layers"), self._read("sensitivity")
        if len(layers) != len(values) or not np.isfinite(values).all():
            raise self.damaged(f"sensitivity of {len(layers)} layers in {len(values)} numbers")
        return dict(zip(layers.tolist(), values.tolist(), strict=True))

    def targets(
        self,
        shape: tuple[int, ...],  # of a rank's sequences: [n, seq_len, width]
        first: int,  # of them
        device: "torch.device | str",
    ) -> "SavedStates":
        from mobie_export.calibration.states import SavedStates

        t = self.tensors["targets"]
        if shape[1:] != t.shape[1:] or first + shape[0] > t.shape[0]:
            raise self.damaged(
                f"targets {list(t.shape)} for sequences {first} to {first + shape[0]} of {list(shape[1:])}"
            )
        return SavedStates(self.path, t.start + first * (t.n_bytes // t.shape[0]), shape, device, self.damaged)

    def check_bytes(self, name: str, step: Callable[[int, str], None]) -> None:
        """MobieError where a tensor is not what was written. step: called with bytes read."""
        digest = hashlib.sha256()
        for chunk in self._chunks(name):
            digest.update(chunk)
            step(len(chunk), name)
        if digest.hexdigest() != self.sha256[name]:
            raise self.damaged(f"other bytes of {name} than were written")

    def _read(self, name: str) -> np.ndarray:
        data, t = b"".join(self._chunks(name)), self.tensors[name]
        if hashlib.sha256(data).hexdigest() != self.sha256[name]:
            raise self.damaged(f"other bytes of {name} than were written")
        return np.frombuffer(data, NUMBERS[t.kind]).reshape(t.shape).copy()

    def _chunks(self, name: str) -> Iterator[bytes]:
        if name not in self.tensors:
            raise self.damaged(f"no {name}")
        t = self.tensors[name]
        try:
            with open(self.path, "rb") as file:
                file.seek(t.start)
                for at in range(0, t.n_bytes, CHUNK):
                    size = min(CHUNK, t.n_bytes - at)
                    if len(chunk := file.read(size)) < size:
                        raise EOFError(f"the file ends in {name}")
                    yield chunk
        except (OSError, EOFError) as e:
            raise self.damaged(str(e)) from e


Part = tuple[tuple[int, ...], Iterator[np.ndarray]]  # shape of a tensor; its numbers, piece by piece


def write(
    path: Path,
    about: About,
    parts: dict[str, Part],  # by the names of FORMS
    overwrite: bool,
    step: Callable[[int, str], None],
    named: Callable[[str], None],
) -> None:
    """Write a file of statistics, which has its name when it is whole. step: called with bytes written; named: with the
    digest that it will have (`Statistics.digest`) just before. MobieError where it cannot be written, or another file
    came there meanwhile."""
    part = f".mobie-{disk.PART}-{disk.digest('statistics', path.name)}"
    busy = f"{path} is being written by another process"
    disk.check_folder(path.parent, OPTION)
    with disk.private(path.with_name(part), f"the unfinished {path.name}", busy, keep=False) as folder:
        unfinished, digests = folder / path.name, dict.fromkeys(parts, "0" * 64)
        sizes = {n: math.prod(shape) * NUMBERS[FORMS[n][0]].itemsize for n, (shape, _) in parts.items()}

        def header() -> bytes:
            said = json.dumps({"format": FORMAT, "sha256": digests} | asdict(about))
            return safetensors.make({n: (FORMS[n][0], parts[n][0], sizes[n]) for n in parts}, {KEY: said})

        with disk.writing(path, OPTION), open(unfinished, "wb") as file:
            disk.reserve(file, len(header()) + sum(sizes.values()))
            file.write(header())
            for name, (_, pieces) in parts.items():
                digest, end = hashlib.sha256(), file.tell() + sizes[name]
                for values in pieces:
                    data = np.ascontiguousarray(values, NUMBERS[FORMS[name][0]]).reshape(-1).view(np.uint8).data
                    digest.update(data)
                    file.write(data)
                    step(len(data), name)
                if file.tell() != end:
                    raise ValueError(f"{name} ends {end - file.tell()} bytes early")
                digests[name] = digest.hexdigest()
            file.seek(0)
            file.write(header())  # as long as before
            file.flush()
            os.fsync(file.fileno())
        named(hashlib.sha256(header()).hexdigest())
        disk.place(unfinished, path, overwrite, OPTION)
        disk.sync(path.parent)


def size(n: int, seq_len: int, n_targets: int, width: int) -> int:
    """Bytes of a file, but for some thousands."""
    return n * seq_len * NUMBERS["I32"].itemsize + n_targets * seq_len * width * NUMBERS["BF16"].itemsize
