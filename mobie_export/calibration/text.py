"""What is calibrated on? A text from a file, checked, as sequences of tokens."""

import hashlib
import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mobie_export.calibration.tokenizer import tokenize
from mobie_export.errors import BAD_INPUT, MobieError

if TYPE_CHECKING:  # a text can be read without it
    from torch import Tensor

N_SAMPLES, SEQ_LEN, SEED = 1024, 256, 0
BATCH_TOKENS = 2048  # per forward or backward of a layer
MIN_SEQUENCES = 32


@dataclass(frozen=True)
class Calibration:
    """Token sequences to calibrate with, in an order drawn by the seed."""

    tokens: "Tensor"  # int64 [n, seq_len]
    sha256: str  # of the text
    notes: tuple[str, ...] = ()  # what a user should know of the text
    rest: "Tensor | None" = None  # int64 [m, seq_len]: the ones that would follow, for a longer refinement

    @property
    def batches(self) -> list[slice]:
        step = max(1, BATCH_TOKENS // self.tokens.shape[1])
        return [slice(i, min(i + step, len(self.tokens))) for i in range(0, len(self.tokens), step)]


def tokens_digest(tokens: "Tensor") -> str:  # int64 [n, seq_len]
    """SHA-256 of sequences, where there is no text that they come from."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


# First bytes of what is no text, and what it is.
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
}
# Byte order marks; UTF-32's little-endian one begins as UTF-16's does.
ENCODINGS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
CONTROLS = bytes(c for c in range(32) if c not in b"\t\n\v\f\r\x1b")  # rare in text; a tenth of random bytes


def read_text(path: Path, what: str = "the calibration text") -> bytes:
    """A text, plain or .xz. UTF-16 and UTF-32 with a byte order mark become UTF-8. what: it is, for errors. MobieError
    for what cannot be read and for what is no text."""
    return _decoded(_raw_text(path, what), path, what)[0]


def _raw_text(path: Path, what: str = "the calibration text") -> bytes:
    try:
        if Path(path).exists() and not Path(path).is_file():  # a pipe can be read once, a device for ever
            raise OSError("it is no file")
        data = Path(path).read_bytes()
        return lzma.decompress(data) if Path(path).suffix == ".xz" else data
    except (OSError, EOFError, ValueError, lzma.LZMAError) as e:
        raise MobieError(BAD_INPUT, f"cannot read {what} {path}", str(e), "text, or .xz") from e


def _decoded(data: bytes, path: Path, what: str = "the calibration text") -> tuple[bytes, list[str]]:
    """(the text in UTF-8, what was done to it)"""
    kind = next((k for first, k in COMPRESSED.items() if data.startswith(first)), None)
    encoding = next((e for mark, e in ENCODINGS.items() if data.startswith(mark)), None)
    if encoding and not kind:
        try:
            return data.decode(encoding).encode(), [f"{path} is in {encoding.upper()}; it was taken as UTF-8"]
        except UnicodeError as e:
            kind = f"{encoding.upper()} by its first bytes, and damaged: {e}"
    if kind is None and (0 in data or 100 * len(data.translate(None, CONTROLS)) < 99 * len(data)):
        kind = "binary data"
    if kind is not None:
        todo = "decompress it first" if kind in COMPRESSED.values() else "give another file"
        raise MobieError(BAD_INPUT, f"{what} {path} is no text", kind, "text in UTF-8, plain or as NAME.xz", todo)
    return data, []


def text_notes(path: Path | None, chat: bool = False) -> list[str]:
    """What a user should know of a text before anything is calibrated on it. Errors as `read_text` raises them."""
    if path is None:
        return []
    data, notes = _decoded(_raw_text(path), path)
    try:
        data.decode()
    except UnicodeDecodeError as e:
        if e.end < len(data):  # a last character that was cut is no matter
            notes.append(f"{path} is not in UTF-8: byte {e.start} is 0x{data[e.start]:02x}; iconv makes it UTF-8")
    lines = [x for x in data[: 1 << 20].splitlines() if x.strip()][:3]
    if not chat and lines and all(map(_is_object, lines)):
        notes.append(
            f"{path} is JSON Lines, taken as it stands; with --chat, dialogues are wrapped as the model has them"
        )
    return notes


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def load(
    model: Path,
    text: bytes,
    n_samples: int = N_SAMPLES,
    seq_len: int = SEQ_LEN,
    seed: int = SEED,
    special: bool = False,
    name: str = "the calibration text",
) -> Calibration:
    """At most n_samples sequences of seq_len tokens: disjoint windows of the text, drawn by the seed.

    special, name: as `tokenize` has them. MobieError when the text has fewer than MIN_SEQUENCES windows.
    """
    import torch

    found = windows(model, text, seq_len, special, name)
    if len(found) < MIN_SEQUENCES:
        raise MobieError(
            BAD_INPUT,
            f"{name} is too short",
            f"{len(found)} sequences of {seq_len} tokens",
            f"at least {MIN_SEQUENCES}",
            "give more text with --calibration, or shorter sequences with --seq-len",
        )
    chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:n_samples]
    return Calibration(found[chosen], hashlib.sha256(text).hexdigest())


def windows(model: Path, text: bytes, seq_len: int, special: bool, name: str) -> "Tensor":  # int64 [n, seq_len]
    """All windows of a text, in order; none of one that is too short. special, name: as `tokenize` has them."""
    import torch

    tokens, first = _tokens(Path(model), text, special, name)
    body = seq_len - (first is not None)
    n = len(tokens) // body
    found = torch.from_numpy(tokens[: n * body].reshape(n, body)).long()
    if first is not None:
        found = torch.cat([torch.full((n, 1), first), found], 1)
    return found


TEXTS_KEPT = 3  # a bundled one has so many parts
_kept: dict[tuple[object, ...], tuple[np.ndarray, int | None]] = {}


def _tokens(model: Path, text: bytes, special: bool, name: str) -> tuple[np.ndarray, int | None]:
    """As `tokenize` has them. Those of the last texts are kept: an export asks in its plan and when it begins."""
    file = model.stat()
    key = model.resolve(), file.st_size, file.st_mtime_ns, hashlib.sha256(text).hexdigest(), special
    if key not in _kept:
        while len(_kept) >= TEXTS_KEPT:
            del _kept[next(iter(_kept))]
        _kept[key] = tokenize(model, text, special, name)
    return _kept[key]
