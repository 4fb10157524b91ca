"""What a calibration has found so far: packed experts by layer and tuned tensors by name, in files of a folder."""

import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mobie_export import disk
from mobie_export.calibration.planes import Planes
from mobie_export.models.twin import Twin
from mobie_export.spec import block, exportable, layout
from mobie_export.spec.block import Coding


class Arrays(NamedTuple):
    """Planes as they are read; what was not asked for is None, too."""

    signs: np.ndarray | None
    magnitudes: np.ndarray | None
    signs2: np.ndarray | None = None
    magnitudes2: np.ndarray | None = None
    columns: np.ndarray | None = None


class Store:
    """Packed experts by layer and tuned tensors by name, in files of a folder.

    A file is there when it is complete. What a refinement puts lies beside what it started from, under a name of its
    own, so that a run that was killed in it starts it again from the same place.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.tuned: dict[str, np.ndarray] = {}  # GGUF name -> float32, slowest dimension first
        self.refined: dict[int, str] = {}  # layer -> the last refinement that put something

    def put_factor(self, name: str, rows: np.ndarray, type_id: int) -> None:
        """A factor that the experts of a layer share: its bytes, uint8 [rows, bytes of a row]."""
        with complete(self.folder / f"{name}.{type_id}.npy") as file:
            _save(file, rows)

    def factors(self) -> list[tuple[str, tuple[int, ...], int]]:
        """(GGUF name, shape, type) of the shared factors."""
        found: list[tuple[str, tuple[int, ...], int]] = []
        for path in sorted(self.folder.glob("blk.*.npy")):
            name, kind, _ = path.name.rsplit(".", 2)
            with disk.reading_back(path):
                n = len(np.load(path, mmap_mode="r"))
            found.append((name, (n, n), int(kind)))
        return found

    def factor(self, name: str) -> np.ndarray:
        (path,) = self.folder.glob(f"{name}.*.npy")
        with disk.reading_back(path):
            return np.load(path)

    def has(self, layer: int) -> bool:
        return self._path(layer).exists()

    def put(self, layer: int, packed: Mapping[str, Planes], order: Tensor | None = None) -> None:
        """packed: projection -> Planes; order: int64 [E, ff], where the neurons of the planes were originally."""
        arrays: dict[str, np.ndarray] = {}
        for projection, planes in packed.items():
            for name, tensor in zip(planes._fields, planes, strict=True):
                if tensor is not None:
                    values = np.ascontiguousarray(tensor.cpu().numpy())
                    arrays[f"{projection}-{name}"] = np.packbits(values, -1) if "signs" in name else values
        if order is not None:
            with complete(self._path(layer, "order")) as file:
                _save(file, order.cpu().numpy())
        with complete(self._path(layer)) as file:
            np.savez(file, allow_pickle=False, **arrays)

    def put_refined(
        self, layer: int, refinement: str, packed: Mapping[str, Planes] | None, tuned: dict[str, np.ndarray]
    ) -> None:
        """What a refinement made of a layer; packed: None where it has no experts."""
        with complete(self.folder / f"{refinement}-{layer}-tuned.npz") as file:
            np.savez(file, allow_pickle=False, **tuned)
        self._take(layer, refinement, packed is not None, tuned)
        if packed is not None:
            self.put(layer, packed)

    def take_refined(self, layer: int, refinement: str) -> None:
        """What `put_refined` put in an earlier run."""
        path = self.folder / f"{refinement}-{layer}-tuned.npz"
        with disk.reading_back(path), np.load(path) as arrays:
            tuned = dict(arrays)
        self._take(layer, refinement, (self.folder / f"{refinement}-{layer}.npz").exists(), tuned)

    def _take(self, layer: int, refinement: str, packed: bool, tuned: dict[str, np.ndarray]) -> None:
        self.tuned |= tuned
        if packed:
            self.refined[layer] = refinement

    def get(self, layer: int, names: tuple[str, ...] | None = None) -> dict[str, Arrays]:
        """By projection. names: fields to read."""
        path = self._path(layer)
        with disk.reading_back(path), np.load(path) as arrays:
            found: dict[str, dict[str, np.ndarray | None]] = {}
            for key in arrays.files:
                projection, name = key.split("-")
                if names is not None and name not in names:
                    found.setdefault(projection, {})[name] = None
                    continue
                values = arrays[key]
                found.setdefault(projection, {})[name] = (
                    np.unpackbits(values, axis=-1).view(np.bool_) if "signs" in name else values
                )
        return {p: Arrays(**fields) for p, fields in found.items()}

    def shape(self, layer: int, projection: str, name: str) -> tuple[int, ...] | None:
        """Of a field of the planes as it is stored, signs 8 to a byte; None where the planes have none."""
        with self._stored(layer, projection, name) as found:
            return found[1] if found else None

    def experts(self, layer: int, projection: str, name: str) -> Iterator[np.ndarray]:
        """A field of the planes expert by expert, read one at a time."""
        with self._stored(layer, projection, name) as found:
            assert found is not None
            file, (n, *shape), dtype = found
            size = dtype.itemsize * int(np.prod(shape))
            for _ in range(n):
                with disk.reading_back(self._path(layer)):
                    values = np.frombuffer(file.read(size), dtype).reshape(shape)
                yield np.unpackbits(values, axis=-1).view(np.bool_) if "signs" in name else values

    @contextmanager
    def _stored(
        self, layer: int, projection: str, name: str
    ) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype] | None]:
        """(file at the first value, shape, dtype) or None."""
        path, key = self._path(layer), f"{projection}-{name}.npy"
        with disk.reading_back(path):
            archive = zipfile.ZipFile(path)
        with archive:
            if key not in archive.namelist():
                yield None
                return
            with archive.open(key) as file:
                with disk.reading_back(path):
                    np.lib.format.read_magic(file)
                    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                yield file, shape, dtype

    def tensors(self, layer: int) -> dict[str, Planes]:
        """By projection."""
        found = {}
        for projection, arrays in self.get(layer).items():
            signs, magnitudes, *second = (None if a is None else torch.from_numpy(a) for a in arrays)
            assert signs is not None and magnitudes is not None
            found[projection] = Planes(signs, magnitudes, *second)
        return found

    def original(self, twin: Twin, layer: int) -> dict[str, Tensor]:
        """Projection -> the weights that the planes stand for: the twin's, with the neurons in the planes' order."""
        weights, path = twin.experts(layer), self._path(layer, "order")
        if not path.exists():
            return weights
        with disk.reading_back(path):
            order = np.load(path)
        return reordered(weights, torch.from_numpy(order).to(twin.device))

    def _path(self, layer: int, what: str = "planes") -> Path:
        if what == "planes":
            what = self.refined.get(layer, what)
        return self.folder / f"{what}-{layer}.np{'y' if what == 'order' else 'z'}"


@contextmanager
def complete(path: Path) -> Iterator[BinaryIO]:
    """A file to write that has its name when it is complete and on the disk."""
    part = path.with_name(path.name + ".part")
    with disk.writing(path):
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)


def note(path: Path, *by_layer: Mapping[int, object]) -> None:
    """Leave what is known of the layers that are done, things by layer, for a run that goes on from here."""
    with complete(path) as file:
        file.write(json.dumps(by_layer).encode())


def noted(path: Path, n: int) -> list[dict[int, Any]]:
    """What an earlier run noted, n things by layer; empty ones where there was none. Keys that were numbers are."""
    if not path.exists():
        return [{} for _ in range(n)]
    with disk.reading_back(path):
        found: list[dict[int, Any]] = json.loads(
            path.read_bytes(), object_pairs_hook=lambda pairs: {int(k) if k.isdigit() else k: v for k, v in pairs}
        )
        return found


def _save(file: BinaryIO, values: np.ndarray) -> None:
    """np.save; into a file itself it does not say why a write failed."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    file.write(buffer.getbuffer())


def reordered(weights: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:  # order int64 [E, ff]
    """Experts with their neurons in another order, which is the same function: rows of gate and up, columns of down."""
    rows, columns = order.unsqueeze(-1), order.unsqueeze(1)
    return {  # the gate of experts that have none has no rows
        p: w.gather(2, columns.expand_as(w)) if p == "down" else w.gather(1, rows[:, : w.shape[1]].expand_as(w))
        for p, w in weights.items()
    }


# ---- tensors for the writer ------------------------------------------------------------------------------------------


def projections(name: str) -> tuple[str, ...]:
    """Of a GGUF tensor; fused ones are gate, then up."""
    return ("gate", "up") if "gate_up" in name else (name.split("ffn_")[1].split("_exps")[0],)


def written(store: Store, name: str, coding: Coding = block.MOBIE) -> Iterator[np.ndarray]:
    """What one GGUF tensor of a store becomes, piece by piece: blocks uint8 [rows, bytes of a row] of every expert,
    scales float32 [E] where the type has some, then, where there is one, the second plane as the first. Both share the
    scale of the expert.
    """
    layer, parts = layout.layer_of(name), projections(name)
    second = second_columns(store, name) > 0

    def joined(field_name: str) -> Iterator[np.ndarray]:
        of_experts = zip(*(store.experts(layer, p, field_name) for p in parts), strict=True)
        return (np.concatenate(x) for x in of_experts)

    def codes() -> Iterator[tuple[np.float32, np.ndarray, np.ndarray]]:
        """(scale, block scales of the first plane, of the second) of every expert."""
        for a in zip(joined("magnitudes"), *([joined("magnitudes2")] if second else []), strict=True):
            scale, both = exportable.scales(np.concatenate(a, 1).astype(np.float64), coding, name)
            n = a[0].shape[1]
            yield scale, np.ascontiguousarray(both[:, :n]), np.ascontiguousarray(both[:, n:])

    scales = []
    for signs, (scale, first, _) in zip(joined("signs"), codes(), strict=True):
        scales.append(scale)
        yield block.pack(signs, first, coding)
    if not coding.stock:
        yield np.array(scales, "<f4")
    if second:
        for signs, (_, _, more) in zip(joined("signs2"), codes(), strict=True):
            yield block.pack(signs, more, coding)


def second_columns(store: Store, name: str) -> int:
    """How many columns of a GGUF tensor have a second sign."""
    shape = store.shape(layout.layer_of(name), projections(name)[0], "magnitudes2")
    return shape[2] * block.BLOCK_LEN if shape else 0


def columns(store: Store, layer: int) -> np.ndarray | None:
    """int32 [k]: the hidden channels with a second sign in gate or up, the most important one first."""
    found = [x.columns for x in store.get(layer, ("columns",)).values() if x.columns is not None]
    return max(found, key=len).astype(np.int32) if found else None
