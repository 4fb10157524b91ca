"""Headers of safetensors files, read without the library: eight bytes of length, JSON, the tensors' data."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from mobie_export.errors import BAD_INPUT, MobieError
from mobie_export.gguf_io import first_bytes

MAX_HEADER = 100 << 20  # bytes, as the library has it
METADATA = "__metadata__"


@dataclass(frozen=True)
class Tensor:
    kind: str  # of its numbers, as BF16
    shape: tuple[int, ...]
    start: int  # of its data in the file
    n_bytes: int

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    raw: bytes  # with its length
    tensors: dict[str, Tensor]
    metadata: dict[str, object]  # strings, in a file that follows the rules


def read(path: Path, todo: str) -> Header:
    """The header of a file that is as long as it says. MobieError for others, which advises `todo`."""
    head, size = first_bytes.read(path), path.stat().st_size
    if len(head) < 9 or head[8:9] != b"{":
        raise first_bytes.other(path, "a safetensors file", todo)
    (length,) = struct.unpack_from("<Q", head)
    start = 8 + length
    if start > size or length > MAX_HEADER:
        raise _truncated(path, size, start, todo)
    raw = first_bytes.read(path, start)
    try:
        header = json.loads(raw[8:])
        metadata = header.pop(METADATA, {})
        tensors = {name: _tensor(t, start) for name, t in header.items()}
        if not isinstance(metadata, dict):
            raise TypeError("metadata that is no table")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as e:
        raise MobieError(
            BAD_INPUT, f"{path} is damaged", f"{type(e).__name__}: {e}"[:200], "a safetensors header", todo
        ) from None
    end = max((t.start + t.n_bytes for t in tensors.values()), default=start)
    if end > size:
        raise _truncated(path, size, end, todo)
    return Header(raw, tensors, metadata)


def make(tensors: dict[str, tuple[str, tuple[int, ...], int]], metadata: dict[str, str]) -> bytes:
    """The header of tensors (kind, shape, bytes) one after the other; a multiple of 8 bytes, as the library pads it."""
    header: dict[str, object] = {METADATA: metadata}
    end = 0
    for name, (kind, shape, n_bytes) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end := end + n_bytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _tensor(entry: dict, start: int) -> Tensor:
    first, end = (int(x) for x in entry["data_offsets"])
    shape = tuple(int(x) for x in entry["shape"])
    if not 0 <= first <= end or min(shape, default=0) < 0:
        raise ValueError(f"data from {first} to {end} of a tensor {list(shape)}")
    return Tensor(str(entry["dtype"]), shape, start + first, end - first)


def _truncated(path: Path, found: int, wanted: int, todo: str) -> MobieError:
    return MobieError(BAD_INPUT, f"{path} is truncated", f"{found} bytes", f"{wanted} bytes", todo)
