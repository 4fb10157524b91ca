"""Writing GGUF files front to back. gguf-py's writer would encode the metadata anew; here entries stay their bytes."""

import contextlib
import hashlib
import io
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mobie_export import disk
from mobie_export.gguf_io.read import DEFAULT_ALIGNMENT, MAGIC, VERSION, Entry, Scalar
from mobie_export.gguf_io.types import ARRAY, I32, SCALARS, STRING, U16, Row, align, tensor_bytes


def make_entry(key: str, kind: int, value: Scalar | Sequence[Scalar], item: int | None = None) -> Entry:
    """A metadata entry from a Python value; `item` is the type of an array's items. struct.error where the value is
    none of the type."""
    raw = _pack_string(key) + struct.pack("<I", kind)
    if kind == ARRAY:
        if item is None or isinstance(value, Scalar):
            raise TypeError(f"{key}: an array is made of a sequence and a type for its items")
        raw += struct.pack("<IQ", item, len(value)) + b"".join(_pack_value(item, v) for v in value)
    else:
        raw += _pack_value(kind, value)
    return Entry(key, kind, raw)


def _pack_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pack_value(kind: int, value: Scalar | Sequence[Scalar]) -> bytes:
    if kind == STRING and isinstance(value, str):
        return _pack_string(value)
    return struct.pack(SCALARS[kind], value)


def make_header(entries: Iterable[Entry], tensors: Iterable[Row], alignment: int) -> bytes:
    """Everything before the data of a file, padding included."""
    entries, tensors = list(entries), list(tensors)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(entries)), *(e.raw for e in entries)]
    offset = 0
    for name, shape, kind in tensors:
        parts += [_pack_string(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)]
        offset += align(tensor_bytes(shape, kind), alignment)
    header = b"".join(parts)
    return header + bytes(align(len(header), alignment) - len(header))


def data_size(tensors: Iterable[Row], alignment: int) -> int:
    return sum(align(tensor_bytes(shape, kind), alignment) for _, shape, kind in tensors)


def shard_path(path: Path, no: int, count: int) -> Path:
    """`name.gguf` -> `name-00001-of-00003.gguf` for the first (0) of three."""
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{no + 1:05d}-of-{count:05d}.gguf")


def split_rows(rows: Sequence[Row], max_bytes: int | None) -> list[list[Row]]:
    """Tensor tables of the shards: as many tensors in each as fit into max_bytes of data, at least one."""
    shards: list[list[Row]] = [[]]
    size = 0
    for row in rows:
        n = tensor_bytes(*row[1:])
        if max_bytes is not None and shards[-1] and size + n > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += n
    return shards


def file_paths(path: Path, rows: Sequence[Row], max_bytes: int | None) -> list[Path]:
    """The files a Writer makes: `path`, or its shards."""
    n = len(split_rows(rows, max_bytes))
    return [shard_path(path, i, n) for i in range(n)] if n > 1 else [path]


class Writer:
    """A GGUF written front to back, in one file or several. Tensors come in the order of the table; their digests are
    kept.

    max_bytes: of tensor data in one file; where one does not do, files are named as shards are (`paths` has them all).
    The first has all metadata, the others what says that they are shards. seals: of string entries, key -> what the
    entry becomes at the end, of as many characters; asked of the writer, which by then has its digests.
    """

    def __init__(
        self,
        path: Path,
        entries: Iterable[Entry],
        tensors: Iterable[Row],
        alignment: int = DEFAULT_ALIGNMENT,
        seals: Mapping[str, Callable[["Writer"], str]] | None = None,
        max_bytes: int | None = None,
    ):
        entries = list(entries)
        self.tensors = list(tensors)
        shards = split_rows(self.tensors, max_bytes)
        self.paths, n = file_paths(Path(path), self.tensors, max_bytes), len(shards)
        self.alignment = alignment
        self.digests: dict[str, bytes] = {}  # SHA-256 by tensor
        self.data = hashlib.sha256()  # of all tensor data in file order, padding left out
        self.sealed: list[Entry] = []  # as they stand in the finished file
        self._seals = {e: seals[e.key] for e in entries if seals and e.key in seals}
        self._begins: dict[str, int] = {}  # tensor -> the file that it is the first of
        self._files: list[io.BufferedWriter] = []
        for i, (file_path, rows) in enumerate(zip(self.paths, shards, strict=True)):
            header = make_header(_shard_entries(entries, i, n, len(self.tensors)), rows, alignment)
            if i == 0:
                self._seals_at = {e: header.index(e.raw) for e in self._seals}
            with disk.writing(file_path):
                self._files.append(open(file_path, "wb"))  # noqa: SIM115 (closed by `finish` or `__exit__`)
                disk.reserve(self._files[i], len(header) + data_size(rows, alignment))
                self._files[i].write(header)
            if rows:
                self._begins[rows[0][0]] = i
        self._now = 0  # index of the file being written

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):  # `finish` has reported what matters
                file.close()

    def write(self, name: str, chunks: Iterable[np.ndarray]) -> None:
        """The next tensor, from contiguous arrays of any type. ValueError when it is another, or of another size."""
        wanted, shape, kind = self.tensors[len(self.digests)]
        if name != wanted:
            raise ValueError(f"tensor {name} written in place of {wanted}")
        self._now = self._begins.get(name, self._now)
        file, path = self._files[self._now], self.paths[self._now]
        size, written, digest = tensor_bytes(shape, kind), 0, new_digest()
        for chunk in chunks:
            data = chunk.data.cast("B")
            digest.update(data)
            self.data.update(data)
            written += len(data)
            if written > size:
                break
            with disk.writing(path):
                file.write(data)
        if written != size:
            raise ValueError(f"tensor {name}: {written} bytes written, {size} wanted")
        with disk.writing(path):
            file.write(bytes(align(size, self.alignment) - size))
        self.digests[name] = digest.digest()

    def finish(self) -> None:
        """Everything on the disk, and out of the page cache, so that reading back reads the disk.

        ValueError when tensors are missing."""
        if len(self.digests) != len(self.tensors):
            raise ValueError(f"{len(self.digests)} tensors written, {len(self.tensors)} wanted")
        with disk.writing(self.paths[0]):
            for entry, text in self._seals.items():
                sealed = make_entry(entry.key, STRING, text(self))
                if len(sealed.raw) != len(entry.raw):
                    raise ValueError(f"{entry.key} does not fit into its place")
                self._files[0].seek(self._seals_at[entry])
                self._files[0].write(sealed.raw)
                self.sealed.append(sealed)
        for file, path in zip(self._files, self.paths, strict=True):
            with disk.writing(path):
                file.flush()
                os.fsync(file.fileno())
                disk.advise(file.fileno(), 0, 0, "POSIX_FADV_DONTNEED")
                file.close()


def _shard_entries(entries: list[Entry], no: int, count: int, n_tensors: int) -> list[Entry]:
    """Metadata of one file of several; the same where there is one. The types are those of upstream's gguf-split."""
    if count == 1:
        return entries
    own = [
        make_entry("split.no", U16, no),
        make_entry("split.count", U16, count),
        make_entry("split.tensors.count", I32, n_tensors),
    ]
    return [*(e for e in entries if no == 0 or e.key == "general.alignment"), *own]


def new_digest() -> "hashlib._Hash":
    return hashlib.sha256()
