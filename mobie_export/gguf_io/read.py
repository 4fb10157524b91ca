"""Reading GGUF files in bounded memory, with bytes kept as they are.

gguf-py's reader maps the whole file and builds one array per metadata string (seconds and hundreds of megabytes for a
large vocabulary). So the container itself is read here: metadata entries stay the bytes they are, tensor data is read
with `pread` (mapped pages would count as resident memory).

Layout of a GGUF (version 2 and 3, little-endian): magic, version u32, number of tensors u64, number of entries u64;
the entries (key, type u32, value); the tensor table (name, number of dimensions u32, dimensions u64 fastest first, type
u32, offset u64 from the start of the data); padding to `general.alignment`; the data, every tensor padded to it.

`mobie.source.sha256` is the SHA-256 of everything before that padding, of every shard in order: all metadata and the
whole tensor table, but not the tensor data.
"""

import builtins
import hashlib
import io
import math
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar, overload

import numpy as np

from mobie_export import disk
from mobie_export.errors import BAD_INPUT, UNSUPPORTED, MobieError
from mobie_export.gguf_io import first_bytes
from mobie_export.gguf_io.types import (
    ARRAY,
    KV_TYPE_NAMES,
    SCALARS,
    STRING,
    VALUE_TYPES,
    align,
    block_size,
    can_decode,
    tensor_bytes,
    type_name,
)

MAGIC = b"GGUF"
VERSION = 3
READABLE_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_NAME = 63  # bytes of a tensor's name that llama.cpp takes
MAX_HEADER = 1 << 30  # bytes; the largest vocabularies are a hundredth of it
COPY_CHUNK = 8 << 20  # bytes in flight while a tensor is copied

SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


Scalar = int | float | bool | str
Value = Scalar | list[Scalar]
T = TypeVar("T", int, float, bool, str)


@dataclass(frozen=True)
class Entry:
    """One metadata entry. `raw` is the whole entry as stored, key included."""

    key: str
    type: int
    raw: bytes

    @cached_property
    def value(self) -> Value:
        """A Python scalar, string (bytes that are no UTF-8 replaced) or list of them."""
        pos = 8 + len(self.key.encode()) + 4
        if self.type == ARRAY:
            item, count = struct.unpack_from("<IQ", self.raw, pos)
            pos += 12
            values: list[Scalar] = []
            for _ in range(count):
                value, pos = self._one(item, pos)
                values.append(value)
            return values
        return self._one(self.type, pos)[0]

    @property
    def item_type(self) -> int:
        """Type of an array's items."""
        (item,) = struct.unpack_from("<I", self.raw, 8 + len(self.key.encode()) + 4)
        return int(item)

    @property
    def type_name(self) -> str:
        """`u32`, or `array of u32`"""
        if self.type == ARRAY:
            return f"array of {KV_TYPE_NAMES[self.item_type]}"
        return KV_TYPE_NAMES[self.type]

    def as_type(self, path: Path, wanted: builtins.type[T]) -> T:
        """The value as an int, float, bool or str. MobieError where it is of another type, whatever the file may mean
        by it. path: of the file, for the error."""
        name, types = VALUE_TYPES[wanted]
        if self.type in types and isinstance(self.value, wanted):
            return self.value
        raise self._wrong_type(path, name)

    def as_list(self, path: Path, wanted: builtins.type[T]) -> T | list[T]:
        """The value as one of a type or a list of them. MobieError as of `as_type`."""
        name, types = VALUE_TYPES[wanted]
        if self.type == ARRAY and self.item_type in types and isinstance(self.value, list):
            return [v for v in self.value if isinstance(v, wanted)]  # all of them: the array is of this type
        if self.type in types and isinstance(self.value, wanted):
            return self.value
        raise self._wrong_type(path, f"{name}, or an array of one per layer")

    def _wrong_type(self, path: Path, wanted: str) -> MobieError:
        what, todo = f"metadata {self.key} of {path} is of a wrong type", "download or convert the model again"
        return MobieError(BAD_INPUT, what, self.type_name, wanted, todo)

    def _one(self, kind: int, pos: int) -> tuple[Scalar, int]:
        if kind == STRING:
            (size,) = struct.unpack_from("<Q", self.raw, pos)
            return self.raw[pos + 8 : pos + 8 + size].decode("utf-8", "replace"), pos + 8 + size
        return struct.unpack_from(SCALARS[kind], self.raw, pos)[0], pos + struct.calcsize(SCALARS[kind])


@dataclass(frozen=True)
class Tensor:
    """A row of the tensor table."""

    name: str
    shape: tuple[int, ...]  # as stored, fastest dimension first
    type_id: int
    n_bytes: int
    shard: int  # index into Gguf.paths
    offset: int  # from the start of that file

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    entries: dict[str, Entry]
    tensors: list[Tensor]
    alignment: int
    raw: bytes  # everything before the padding that precedes the data
    file_size: int
    path: Path

    def get(self, key: str, wanted: type[T]) -> T | None:
        """See Gguf.get."""
        return self.entries[key].as_type(self.path, wanted) if key in self.entries else None


class Gguf:
    """A GGUF of one or more files. Tensors and metadata as of one file; `split.*` entries are gone.

    Reading is safe from several threads.
    """

    def __init__(self, paths: list[Path], headers: list[Header]):
        self.paths = paths
        self.entries = {k: e for k, e in headers[0].entries.items() if k not in SPLIT_KEYS}
        self.tensors = {t.name: t for h in headers for t in h.tensors}
        self.alignment = headers[0].alignment
        self.file_size = sum(h.file_size for h in headers)
        self.header_size = sum(len(h.raw) for h in headers)
        self.sha256 = hashlib.sha256(b"".join(h.raw for h in headers)).hexdigest()
        self._files: dict[int, io.FileIO] = {}  # opened when first read
        self._lock = threading.Lock()

    def __enter__(self) -> "Gguf":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def value(self, key: str) -> Value | None:
        """Of any type: to be shown or compared. What is computed with is asked for by `get`."""
        entry = self.entries.get(key)
        return None if entry is None else entry.value

    @overload
    def get(self, key: str, wanted: type[T], default: T) -> T: ...
    @overload
    def get(self, key: str, wanted: type[T], default: None = None) -> T | None: ...
    def get(self, key: str, wanted: type[T], default: T | None = None) -> T | None:
        """The value of an entry, which must be an int, float, bool or str; `default` where there is none. MobieError
        where it is something else."""
        entry = self.entries.get(key)
        return default if entry is None else entry.as_type(self.paths[0], wanted)

    def get_list(self, key: str, wanted: type[T]) -> T | list[T] | None:
        """As `get`, of an entry that is one value for all layers or a list of one for each."""
        entry = self.entries.get(key)
        return None if entry is None else entry.as_list(self.paths[0], wanted)

    @overload
    def of_layer(self, key: str, layer: int, default: int) -> int: ...
    @overload
    def of_layer(self, key: str, layer: int, default: None = None) -> int | None: ...
    def of_layer(self, key: str, layer: int, default: int | None = None) -> int | None:
        """An integer of the architecture (`key` without its name) that is one for all layers or one for each."""
        full = f"{self.architecture}.{key}"
        value = self.get_list(full, int)
        if not isinstance(value, list):
            return default if value is None else value
        if layer >= len(value):
            raise damaged(self.paths[0], f"{full} for {len(value)} layers", f"a value for layer {layer}")
        return value[layer]

    @property
    def architecture(self) -> str:
        return self.get("general.architecture", str, "unknown")

    def read(self, tensor: Tensor, start: int = 0, size: int | None = None) -> np.ndarray:
        """Bytes [start, start + size) of a tensor as uint8 [size]; their cached pages are given back."""
        size = tensor.n_bytes - start if size is None else size
        out = np.empty(size, np.uint8)
        file, offset, done = self._file(tensor.shard), tensor.offset + start, 0
        while done < size:
            try:
                n = self._read_at(file, out.data[done:], offset + done)
            except OSError as e:
                raise MobieError(BAD_INPUT, f"cannot read {self.paths[tensor.shard]}", str(e)) from e
            if n == 0:
                raise MobieError(
                    BAD_INPUT,
                    f"{self.paths[tensor.shard]} ended while tensor {tensor.name} was read",
                    f"{offset + done} bytes",
                    f"{offset + size} bytes",
                    "do not change the file while it is exported",
                )
            done += n
        disk.advise(file.fileno(), offset, size, "POSIX_FADV_DONTNEED")
        return out

    def chunks(self, tensor: Tensor, size: int = COPY_CHUNK) -> Iterator[np.ndarray]:
        """The whole tensor, piece by piece."""
        for start in range(0, tensor.n_bytes, size):
            yield self.read(tensor, start, min(size, tensor.n_bytes - start))

    def content(self, step: Callable[[int, str], None] = lambda n, what: None) -> str:
        """SHA-256 of the header and of all tensor data. step: called with bytes read and the tensor."""
        digest = hashlib.sha256(self.sha256.encode())
        for name, tensor in self.tensors.items():
            for chunk in self.chunks(tensor):
                digest.update(chunk.data)
                step(chunk.size, name)
        return digest.hexdigest()

    def _file(self, shard: int) -> io.FileIO:
        with self._lock:
            if shard not in self._files:
                try:
                    self._files[shard] = open(self.paths[shard], "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
                except OSError as e:
                    raise MobieError(BAD_INPUT, f"cannot read {self.paths[shard]}", e.strerror or str(e)) from e
                disk.advise(self._files[shard].fileno(), 0, 0, "POSIX_FADV_SEQUENTIAL")
            return self._files[shard]

    def _read_at(self, file: io.FileIO, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [view], offset)
        with self._lock:  # systems without preadv share one file position
            file.seek(offset)
            return file.readinto(view) or 0


def open_model(path: Path) -> Gguf:
    """Open a GGUF, all shards of it when it is split. Raises MobieError for everything that is wrong with it."""
    return assembled(Path(path), read_header, Path.exists)


def assembled(path: Path, read: Callable[[Path], Header], exists: Callable[[Path], bool]) -> Gguf:
    """As `open_model`, of files that are somewhere else: read gives the header of one. Tensors can only be read of
    files that are here."""
    first = read(path)
    count = first.get("split.count", int)
    if count is None or count <= 1:
        _check_unique([path], [first])
        return Gguf([path], [first])
    paths = _shard_paths(path, count, exists)
    headers = [first if p == path else read(p) for p in paths]
    for i, (shard, header) in enumerate(zip(paths, headers, strict=True)):
        no, total = header.get("split.no", int), header.get("split.count", int)
        if no != i or total != count:
            raise MobieError(
                BAD_INPUT,
                f"{shard} is not the shard its name says",
                f"split.no {no}, split.count {total}",
                f"split.no {i}, split.count {count}",
                "put the shards of one model together, under their original names",
            )
    wanted = headers[0].get("split.tensors.count", int)
    found = sum(len(h.tensors) for h in headers)
    if wanted is not None and wanted != found:
        raise MobieError(
            BAD_INPUT,
            f"the shards of {paths[0].name} do not belong together",
            f"{found} tensors",
            f"{wanted} tensors",
            "download all shards again from one place",
        )
    _check_unique(paths, headers)
    return Gguf(paths, headers)


def _shard_paths(path: Path, count: int, exists: Callable[[Path], bool]) -> list[Path]:
    match = SHARD_NAME.fullmatch(path.name)
    if not match or int(match["count"]) != count:
        raise MobieError(
            BAD_INPUT,
            f"{path} is one of {count} shards, and its name does not say where the others are",
            path.name,
            f"NAME-00001-of-{count:05d}.gguf",
            "give the shards their original names back",
        )
    paths = [path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [p.name for p in paths if not exists(p)]
    if missing:
        raise MobieError(
            BAD_INPUT,
            f"{path} is split and shards are missing",
            f"{count - len(missing)} of {count}; not there: {', '.join(missing)}",
            f"all {count} files in {path.parent}",
            "download the missing shards",
        )
    return paths


def _check_unique(paths: list[Path], headers: list[Header]) -> None:
    seen = set()
    for path, header in zip(paths, headers, strict=True):
        for tensor in header.tensors:
            if tensor.name in seen:
                raise MobieError(
                    BAD_INPUT,
                    f"{path} is damaged",
                    f"two tensors named {tensor.name}",
                    "every name once",
                    "download or convert the model again",
                )
            seen.add(tensor.name)
    for i, header in enumerate(headers):
        header.tensors[:] = [Tensor(t.name, t.shape, t.type_id, t.n_bytes, i, t.offset) for t in header.tensors]


class _Cursor:
    """Sequential reading of a header of unknown length."""

    def __init__(self, path: Path, read: Callable[[int], bytes], size: int):
        self.path, self.read, self.size = path, read, size
        self.buffer = bytearray()
        self.pos = 0

    def need(self, n: int) -> None:
        if self.pos + n > self.size:
            raise truncated(self.path, self.size, self.pos + n, "its header")
        if self.pos + n > MAX_HEADER:
            raise damaged(self.path, f"a header of more than {self.pos} bytes", f"at most {MAX_HEADER}")
        while len(self.buffer) < self.pos + n:
            more = self.read(max(1 << 20, self.pos + n - len(self.buffer)))
            if not more:
                raise truncated(self.path, len(self.buffer), self.pos + n, "its header")
            self.buffer += more

    def starts_with(self, magic: bytes) -> bool:
        if self.size:
            self.need(min(len(magic), self.size))
        return self.buffer.startswith(magic)

    def number(self, code: str) -> int:
        size = struct.calcsize(code)
        self.need(size)
        (value,) = struct.unpack_from(code, self.buffer, self.pos)
        self.pos += size
        return int(value)

    def skip(self, n: int) -> None:
        self.need(n)
        self.pos += n

    def name(self) -> str:
        """A key or the name of a tensor: text that can be shown."""
        size = self.number("<Q")
        self.skip(size)
        raw = self.buffer[self.pos - size : self.pos]
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            name = ""
        if not name or not name.isprintable():
            raise damaged(self.path, f"the name {bytes(raw[:MAX_NAME])!r} in its header", "a name in UTF-8")
        return name


def truncated(path: Path, found: int, wanted: int, where: str) -> MobieError:
    return MobieError(
        BAD_INPUT,
        f"{path} is truncated: it ends inside {where}",
        f"{found} bytes",
        f"at least {wanted} bytes",
        "finish the download or copy the file again",
    )


def damaged(path: Path, found: str, wanted: str) -> MobieError:
    return MobieError(BAD_INPUT, f"{path} is damaged", found, wanted, "download or convert the model again")


def check_decodable(gguf: Gguf, tensor: Tensor, or_else: str = "") -> None:
    """MobieError for a tensor of a type that `decode` does not read. or_else: what also helps."""
    if not can_decode(tensor.type_id):
        raise MobieError(
            UNSUPPORTED,
            f"tensor {tensor.name} of {gguf.paths[tensor.shard]} cannot be decoded",
            f"type {type_name(tensor.type_id)}",
            "a type that the gguf package can dequantize",
            "start from an F16, BF16 or Q8_0 version of the model" + (f", or {or_else}" if or_else else ""),
        )


def not_finite(gguf: Gguf, tensor: Tensor, found: str) -> MobieError:
    return MobieError(
        BAD_INPUT,
        f"tensor {tensor.name} of {gguf.paths[tensor.shard]} has NaN or infinite weights",
        found,
        "finite weights",
        "download or convert the model again",
    )


def read_header(path: Path) -> Header:
    """Metadata and tensor table of one file, checked against the file's size."""
    path = Path(path)
    first_bytes.read(path)  # an error for a device, which would be waited for
    try:
        with open(path, "rb", buffering=0) as file:
            return parse_header(path, file.read, os.fstat(file.fileno()).st_size)
    except OSError as e:
        raise MobieError(BAD_INPUT, f"cannot read {path}", e.strerror or str(e), "a GGUF file") from e


def parse_header(path: Path, read: Callable[[int], bytes], size: int) -> Header:
    """As `read_header`, of a file of so many bytes that `read` gives from its start on, at most as many as asked for.
    path: what errors call it."""
    cursor = _Cursor(path, read, size)
    if not cursor.starts_with(MAGIC):
        todo = "convert the model with llama.cpp's convert_hf_to_gguf.py first"
        raise first_bytes.other(path, "a GGUF file", todo, bytes(cursor.buffer))
    cursor.skip(len(MAGIC))
    version = cursor.number("<I")
    if version not in READABLE_VERSIONS:
        swapped = version & 0xFFFF == 0
        raise MobieError(
            UNSUPPORTED if swapped else BAD_INPUT,
            f"{path} has a GGUF version that cannot be read",
            "a big-endian file" if swapped else f"version {version}",
            f"a little-endian file of version {' or '.join(map(str, READABLE_VERSIONS))}",
            "convert the model again with a current llama.cpp",
        )
    n_tensors, n_entries = cursor.number("<Q"), cursor.number("<Q")
    entries = {}
    for _ in range(n_entries):
        entry = _parse_entry(path, cursor)
        if entry.key in entries:
            raise damaged(path, f"two metadata entries named {entry.key}", "every key once")
        entries[entry.key] = entry
    alignment = DEFAULT_ALIGNMENT
    if "general.alignment" in entries:
        alignment = entries["general.alignment"].as_type(path, int)
    if alignment <= 0 or alignment & (alignment - 1):
        raise damaged(path, f"general.alignment {alignment}", "a power of two")
    table = [_parse_tensor(path, cursor) for _ in range(n_tensors)]
    data = align(cursor.pos, alignment)
    tensors = [Tensor(name, shape, kind, tensor_bytes(shape, kind), 0, data + at) for name, shape, kind, at in table]
    end = max((t.offset + t.n_bytes for t in tensors), default=0)
    if end > cursor.size:
        last = max(tensors, key=lambda t: t.offset)
        raise truncated(path, cursor.size, end, f"the tensor data (the last tensor is {last.name})")
    return Header(entries, tensors, alignment, bytes(cursor.buffer[: cursor.pos]), cursor.size, path)


def _parse_entry(path: Path, cursor: _Cursor) -> Entry:
    start = cursor.pos
    key = cursor.name()
    kind = cursor.number("<I")
    item, count = kind, 1
    if kind == ARRAY:
        item, count = cursor.number("<I"), cursor.number("<Q")
    if item == STRING:
        for _ in range(count):
            cursor.skip(cursor.number("<Q"))
    elif item in SCALARS:
        cursor.skip(count * struct.calcsize(SCALARS[item]))
    else:
        raise damaged(path, f"metadata entry {key!r} of value type {item}", "a type of the GGUF specification")
    return Entry(key, kind, bytes(cursor.buffer[start : cursor.pos]))


def _parse_tensor(path: Path, cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.name()
    if len(name.encode()) > MAX_NAME:
        raise damaged(path, f"a tensor with the name {name[:MAX_NAME]}...", f"names of at most {MAX_NAME} bytes")
    n_dims = cursor.number("<I")
    if n_dims > MAX_DIMS:
        raise damaged(path, f"tensor {name!r} with {n_dims} dimensions", f"at most {MAX_DIMS}")
    shape = tuple(cursor.number("<Q") for _ in range(n_dims))
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    try:
        weights, _ = block_size(kind)
    except KeyError:
        raise MobieError(
            UNSUPPORTED,
            f"tensor {name} of {path} has an unknown type",
            f"type id {kind}",
            "a type of the pinned llama.cpp",
            "another program's own type, or one of a newer llama.cpp: use an F16, BF16 or Q8_0 version of the model",
        ) from None
    if shape and shape[0] % weights:
        raise damaged(
            path, f"tensor {name} of type {type_name(kind)} with rows of {shape[0]}", f"rows of a multiple of {weights}"
        )
    return name, shape, kind, offset
