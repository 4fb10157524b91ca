"""GGUF files in and out, in bounded memory and with bytes kept as they are.

gguf-py knows the types, their sizes and how to decode them; that knowledge is used here. Its reader maps the whole file
and builds one array per metadata string (seconds and hundreds of megabytes for a large vocabulary), its writer encodes
metadata anew. So the container itself is read and written by the functions below: metadata entries stay the bytes they
are, tensor data is read with `pread` (mapped pages would count as resident memory) and written as a stream.

Layout of a GGUF (version 2 and 3, little-endian): magic, version u32, number of tensors u64, number of entries u64;
the entries (key, type u32, value); the tensor table (name, number of dimensions u32, dimensions u64 fastest first, type
u32, offset u64 from the start of the data); padding to `general.alignment`; the data, every tensor padded to it.

`mobie.source.sha256` is the SHA-256 of everything before that padding, of every shard in order: all metadata and the
whole tensor table, but not the tensor data.
"""

import contextlib
import hashlib
import io
import math
import os
import re
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import gguf
import numpy as np

from mobie_export import disk, first_bytes, format
from mobie_export.errors import BAD_INPUT, UNSUPPORTED, MobieError

MAGIC = b"GGUF"
VERSION = 3
READABLE_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_NAME = 63  # bytes of a tensor's name that llama.cpp takes
MAX_HEADER = 1 << 30  # bytes; the largest vocabularies are a hundredth of it
COPY_CHUNK = 8 << 20  # bytes in flight while a tensor is copied

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SCALARS = {
    U8: "<B",
    I8: "<b",
    U16: "<H",
    I16: "<h",
    U32: "<I",
    I32: "<i",
    F32: "<f",
    BOOL: "<?",
    U64: "<Q",
    I64: "<q",
    F64: "<d",
}
# Python type -> what it is called, the metadata types that hold one
VALUE_TYPES = {
    int: ("an integer", (U8, I8, U16, I16, U32, I32, U64, I64)),
    float: ("a floating-point number", (F32, F64)),
    bool: ("a bool", (BOOL,)),
    str: ("a string", (STRING,)),
}
KV_TYPE_NAMES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64")

TYPE_F32 = int(gguf.GGMLQuantizationType.F32)
TYPE_F16 = int(gguf.GGMLQuantizationType.F16)
TYPE_I32 = int(gguf.GGMLQuantizationType.I32)
TYPE_BF16 = int(gguf.GGMLQuantizationType.BF16)

SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


# ---- types -----------------------------------------------------------------------------------------------------------


# What the runtime reads and gguf-py does not know: name, id, weights and bytes of a block. Q2_0 cannot be decoded here.
MORE_TYPES = (
    (format.TYPE_NAME.upper(), format.TYPE_ID, format.BLOCK_LEN, format.BLOCK_BYTES),
    ("Q2_0", 42, 64, 18),
)


def register_types() -> None:
    """Teach gguf-py in this process these types, so that its reader and writer accept our files. Idempotent."""
    types = gguf.GGMLQuantizationType
    for name, type_id, weights, n_bytes in MORE_TYPES:
        if type_id in types._value2member_map_:
            continue
        member = int.__new__(types, type_id)
        member._name_ = name
        member._value_ = type_id
        types._member_map_[name] = member
        types._value2member_map_[type_id] = member
        gguf.GGML_QUANT_SIZES[member] = (weights, n_bytes)


register_types()


def type_name(type_id: int) -> str:
    if type_id == format.TYPE_ID:
        return format.TYPE_NAME
    member = gguf.GGMLQuantizationType._value2member_map_.get(type_id)
    return member.name if member is not None else f"type {type_id}"


def block_size(type_id: int) -> tuple[int, int]:
    """(weights, bytes) of one block of a type; KeyError for a type nobody here knows."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType._value2member_map_[type_id]]


def tensor_bytes(shape: tuple[int, ...], type_id: int) -> int:
    weights, size = block_size(type_id)
    return math.prod(shape) // weights * size


@lru_cache
def can_decode(type_id: int) -> bool:
    """Whether `decode` has a way from this type to float32."""
    if type_id in (TYPE_F32, TYPE_F16, TYPE_BF16, format.TYPE_ID):
        return True
    try:
        decode(np.zeros((1, block_size(type_id)[1]), np.uint8), type_id)
    except (NotImplementedError, KeyError):
        return False
    return True


def decode(
    raw: np.ndarray,  # uint8 [..., bytes of a row]
    type_id: int,
) -> np.ndarray:  # float32 [..., weights of a row]
    """Exact float32 values of stored rows. Non-finite values stay non-finite."""
    if type_id == TYPE_F32:
        return raw.view("<f4")
    if type_id == TYPE_F16:
        return _from_f16(raw)
    if type_id == TYPE_BF16:
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if type_id == format.TYPE_ID:
        return format.dequantize(raw)
    with np.errstate(all="ignore"):  # non-finite block scales are found by the caller, in the result
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(type_id))


def _from_f16(raw: np.ndarray) -> np.ndarray:
    """float16 to float32 in vector instructions: numpy's own cast is a scalar loop, three times slower.

    Sign and magnitude bits are put where float32 has them; the exponents then differ by 112, which is a product with
    a power of two and exact for normal and subnormal numbers. Infinity and NaN are not numbers: left to the cast.
    """
    bits = raw.view("<i2")
    if int((bits & 0x7FFF).max(initial=0)) >= 0x7C00:
        return raw.view("<f2").astype(np.float32)
    wide = bits.astype(np.int32)
    wide <<= 13
    wide &= np.int32(-0x70002000)  # 0x8fffe000: the sign, 5 bits of exponent, 10 of mantissa
    values = wide.view(np.float32)
    values *= np.float32(2.0**112)
    return values


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One metadata entry. `raw` is the whole entry as stored, key included."""

    key: str
    type: int
    raw: bytes

    @cached_property
    def value(self):
        """A Python scalar, string (bytes that are no UTF-8 replaced) or list of them."""
        pos = 8 + len(self.key.encode()) + 4
        if self.type == ARRAY:
            item, count = struct.unpack_from("<IQ", self.raw, pos)
            pos += 12
            values = []
            for _ in range(count):
                value, pos = self._one(item, pos)
                values.append(value)
            return values
        return self._one(self.type, pos)[0]

    @property
    def item_type(self) -> int:
        """Type of an array's items."""
        return struct.unpack_from("<I", self.raw, 8 + len(self.key.encode()) + 4)[0]

    @property
    def type_name(self) -> str:
        """`u32`, or `array of u32`"""
        if self.type == ARRAY:
            return f"array of {KV_TYPE_NAMES[self.item_type]}"
        return KV_TYPE_NAMES[self.type]

    def as_type(self, path: Path, wanted: type, array: bool = False):
        """The value as an int, float, bool or str; with `array`, or as a list of them. MobieError where it is of
        another type, whatever the file may mean by it. path: of the file, for the error."""
        name, types = VALUE_TYPES[wanted]
        if self.type in types or (array and self.type == ARRAY and self.item_type in types):
            return self.value
        raise MobieError(
            BAD_INPUT,
            f"metadata {self.key} of {path} is of a wrong type",
            self.type_name,
            f"{name}, or an array of one per layer" if array else name,
            "download or convert the model again",
        )

    def _one(self, kind: int, pos: int):
        if kind == STRING:
            (size,) = struct.unpack_from("<Q", self.raw, pos)
            return self.raw[pos + 8 : pos + 8 + size].decode("utf-8", "replace"), pos + 8 + size
        return struct.unpack_from(SCALARS[kind], self.raw, pos)[0], pos + struct.calcsize(SCALARS[kind])


@dataclass(frozen=True)
class Tensor:
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

    def get(self, key: str, wanted: type, default=None):
        """See Gguf.get."""
        return self.entries[key].as_type(self.path, wanted) if key in self.entries else default


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

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def value(self, key: str, default=None):
        """Of any type: to be shown or compared. What is computed with is asked for by `get`."""
        entry = self.entries.get(key)
        return default if entry is None else entry.value

    def get(self, key: str, wanted: type, default=None, array: bool = False):
        """The value of an entry, which must be an int, float, bool or str (with `array`: or a list of them). MobieError
        where it is something else."""
        entry = self.entries.get(key)
        return default if entry is None else entry.as_type(self.paths[0], wanted, array)

    def of_layer(self, key: str, layer: int, default: int | None = None) -> int | None:
        """An integer of the architecture (`key` without its name) that is one for all layers or one for each."""
        full = f"{self.architecture}.{key}"
        value = self.get(full, int, default, array=True)
        if not isinstance(value, list):
            return value
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
                n = self._read_at(file, memoryview(out)[done:], offset + done)
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
        _advise(file, offset, size, "POSIX_FADV_DONTNEED")
        return out

    def prefetch(self, tensor: Tensor, start: int, size: int) -> None:
        """Ask the system to fetch a range that will be read soon."""
        _advise(self._file(tensor.shard), tensor.offset + start, size, "POSIX_FADV_WILLNEED")

    def chunks(self, tensor: Tensor, size: int = COPY_CHUNK) -> Iterator[np.ndarray]:
        """The whole tensor, piece by piece."""
        for start in range(0, tensor.n_bytes, size):
            yield self.read(tensor, start, min(size, tensor.n_bytes - start))

    def content(self, step: Callable[[int, str], None] = lambda n, what: None) -> str:
        """SHA-256 of the header and of all tensor data. step: called with bytes read and the tensor."""
        digest = hashlib.sha256(self.sha256.encode())
        for name, tensor in self.tensors.items():
            for chunk in self.chunks(tensor):
                digest.update(chunk)
                step(chunk.size, name)
        return digest.hexdigest()

    def _file(self, shard: int) -> io.FileIO:
        with self._lock:
            if shard not in self._files:
                try:
                    self._files[shard] = open(self.paths[shard], "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
                except OSError as e:
                    raise MobieError(BAD_INPUT, f"cannot read {self.paths[shard]}", e.strerror or str(e)) from e
                _advise(self._files[shard], 0, 0, "POSIX_FADV_SEQUENTIAL")
            return self._files[shard]

    def _read_at(self, file, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [view], offset)
        with self._lock:  # systems without preadv share one file position
            file.seek(offset)
            return file.readinto(view)


def _advise(file, offset: int, size: int, advice: str) -> None:
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # a hint; some file systems refuse it
            os.posix_fadvise(file.fileno(), offset, size, getattr(os, advice))


def open_model(path: Path) -> Gguf:
    """Open a GGUF, all shards of it when it is split. Raises MobieError for everything that is wrong with it."""
    path = Path(path)
    first = read_header(path)
    count = first.get("split.count", int, 1)
    if count <= 1:
        _check_unique([path], [first])
        return Gguf([path], [first])
    paths = _shard_paths(path, count)
    headers = [read_header(p) for p in paths]
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


def _shard_paths(path: Path, count: int) -> list[Path]:
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
    missing = [p.name for p in paths if not p.exists()]
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

    def __init__(self, path: Path, file, size: int):
        self.path, self.file, self.size = path, file, size
        self.buffer = bytearray()
        self.pos = 0

    def need(self, n: int) -> None:
        if self.pos + n > self.size:
            raise truncated(self.path, self.size, self.pos + n, "its header")
        if self.pos + n > MAX_HEADER:
            raise damaged(self.path, f"a header of more than {self.pos} bytes", f"at most {MAX_HEADER}")
        while len(self.buffer) < self.pos + n:
            more = self.file.read(max(1 << 20, self.pos + n - len(self.buffer)))
            if not more:
                raise truncated(self.path, len(self.buffer), self.pos + n, "its header")
            self.buffer += more

    def number(self, code: str) -> int:
        size = struct.calcsize(code)
        self.need(size)
        (value,) = struct.unpack_from(code, self.buffer, self.pos)
        self.pos += size
        return value

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


def not_finite(gguf: Gguf, tensor: Tensor, found: str) -> MobieError:
    return MobieError(
        BAD_INPUT,
        f"tensor {tensor.name} of {gguf.paths[tensor.shard]} has weights that are no numbers",
        found,
        "finite weights",
        "download or convert the model again",
    )


def read_header(path: Path) -> Header:
    """Metadata and tensor table of one file, checked against the file's size."""
    path = Path(path)
    if first_bytes.read(path, len(MAGIC)) != MAGIC:
        raise first_bytes.other(path, "a GGUF file", "convert the model with llama.cpp's convert_hf_to_gguf.py first")
    try:
        with open(path, "rb", buffering=0) as file:
            return _parse(path, _Cursor(path, file, os.fstat(file.fileno()).st_size))
    except OSError as e:
        raise MobieError(BAD_INPUT, f"cannot read {path}", e.strerror or str(e), "a GGUF file") from e


def _parse(path: Path, cursor: _Cursor) -> Header:
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


# ---- writing ---------------------------------------------------------------------------------------------------------


def align(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def make_entry(key: str, kind: int, value, item: int | None = None) -> Entry:
    """A metadata entry from a Python value; `item` is the type of an array's items."""
    raw = _pack_string(key) + struct.pack("<I", kind)
    if kind == ARRAY:
        raw += struct.pack("<IQ", item, len(value)) + b"".join(_pack_value(item, v) for v in value)
    else:
        raw += _pack_value(kind, value)
    return Entry(key, kind, raw)


def _pack_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pack_value(kind: int, value) -> bytes:
    return _pack_string(value) if kind == STRING else struct.pack(SCALARS[kind], value)


def make_header(entries: Iterable[Entry], tensors: Iterable[tuple[str, tuple[int, ...], int]], alignment: int) -> bytes:
    """Everything before the data of a file, padding included."""
    entries, tensors = list(entries), list(tensors)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(entries)), *(e.raw for e in entries)]
    offset = 0
    for name, shape, kind in tensors:
        parts += [_pack_string(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)]
        offset += align(tensor_bytes(shape, kind), alignment)
    header = b"".join(parts)
    return header + bytes(align(len(header), alignment) - len(header))


def data_size(tensors: Iterable[tuple[str, tuple[int, ...], int]], alignment: int) -> int:
    return sum(align(tensor_bytes(shape, kind), alignment) for _, shape, kind in tensors)


def shard_path(path: Path, no: int, count: int) -> Path:
    """`name.gguf` -> `name-00001-of-00003.gguf` for the first (0) of three."""
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{no + 1:05d}-of-{count:05d}.gguf")


def split_rows(
    rows: list[tuple[str, tuple[int, ...], int]], max_bytes: int | None
) -> list[list[tuple[str, tuple[int, ...], int]]]:
    """Tensor tables of the shards: as many tensors in each as fit into max_bytes of data, at least one."""
    shards, size = [[]], 0
    for row in rows:
        n = tensor_bytes(*row[1:])
        if max_bytes is not None and shards[-1] and size + n > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size += n
    return shards


def file_paths(path: Path, rows: list[tuple[str, tuple[int, ...], int]], max_bytes: int | None) -> list[Path]:
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
        tensors: Iterable[tuple[str, tuple[int, ...], int]],
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
        self._begins = {}  # tensor -> the file that it is the first of
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

    def __exit__(self, *_) -> None:
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
            data = memoryview(chunk).cast("B")
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
                _advise(file, 0, 0, "POSIX_FADV_DONTNEED")
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


def new_digest():
    return hashlib.sha256()
