"""The tensors of an output: in which order, and how each one's bytes are made, piece by piece."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import gguf as gguf_py
import numpy as np

from mobie_export import gguf_io
from mobie_export.calibration.imatrix import Imatrix
from mobie_export.exporting import requantize
from mobie_export.gguf_io import Entry, Gguf, Tensor
from mobie_export.methods.base import Makers, Row, Rows, Writing
from mobie_export.methods.stream import PIECE, decoded, in_order
from mobie_export.progress import Progress
from mobie_export.spec import block, layout
from mobie_export.spec.block import Coding
from mobie_export.spec.layout import Experts


@dataclass(frozen=True)
class Job:
    """Tensors of the output that are made together: rows that follow each other, and their bytes in this order. No
    piece has bytes of two tensors."""

    rows: Rows
    pieces: Callable[[], Iterable[np.ndarray]]


def table(
    gguf: Gguf, experts: dict[str, Experts], types: Mapping[str, int], beside: Iterable[Row], coding: Coding
) -> Rows:
    """The tensor table of the output: the source's, every expert tensor followed by what is stored beside it.

    types: of tensors that are no experts, where the source's do not stay; coding: of the experts.
    """
    scales = {layout.scale_name(n) for n in experts}
    more: dict[str, Row] = {row[0]: row for row in beside}
    rows: Rows = []
    for name, tensor in gguf.tensors.items():
        if name in experts:
            rows.append((name, tensor.shape, coding.type_id))
            if not coding.stock:
                rows.append((layout.scale_name(name), (experts[name].n_expert,), gguf_io.TYPE_F32))
            names = (layout.residual_name(name), layout.columns_name(name), layout.shared_name(name))
            rows += [more.pop(n) for n in names if n in more]
        elif name not in scales:
            rows.append((name, tensor.shape, types.get(name, tensor.type_id)))
    return rows


def jobs(rows: Rows, makers: Makers, gguf: Gguf, progress: Progress) -> list[Job]:
    """What has no maker is copied."""
    left, found = iter(rows), []
    for row in left:
        if row[0] in makers:
            n, pieces = makers[row[0]]
            found.append(Job([row, *itertools.islice(left, n - 1)], pieces))
        else:
            found.append(copied(gguf, gguf.tensors[row[0]], progress, check=True))
    return found


def converted(types: Mapping[str, int], importance: Imatrix | None, writing: Writing) -> Makers:
    """Tensors that get another type and nothing else."""
    return {name: (1, _requantized(writing, name, type_id, importance)) for name, type_id in types.items()}


def _requantized(
    writing: Writing, name: str, type_id: int, importance: Imatrix | None
) -> Callable[[], Iterator[np.ndarray]]:
    gguf = writing.run.source
    tensor = gguf.tensors[name]
    cols = tensor.shape[0]
    n_rows, step = tensor.n_weights // cols, max(1, PIECE // cols)
    row_bytes = tensor.n_bytes // n_rows

    def chunks() -> Iterator[np.ndarray]:
        quantized = requantize.quantizer(gguf, tensor, type_id, importance)

        def one(i: int) -> np.ndarray:
            n = min(step, n_rows - i * step)
            raw = gguf.read(tensor, i * step * row_bytes, n * row_bytes).reshape(n, -1)
            return quantized(gguf_io.decode(raw, tensor.type_id))

        for i, data in enumerate(in_order(writing.pool, one, -(-n_rows // step), writing.ahead)):
            yield data
            writing.progress.update(min(step, n_rows - i * step) * row_bytes, tensor.name)

    return chunks


def copied(gguf: Gguf, tensor: Tensor, progress: Progress, check: bool = False) -> Job:
    """check: MobieError for weights that are no numbers, where the type can be decoded."""
    n_rows = math.prod(tensor.shape[1:])
    row, cols = (tensor.n_bytes // n_rows, tensor.n_weights // n_rows) if tensor.n_weights else (0, 0)
    check = check and row > 0 and gguf_io.can_decode(tensor.type_id)
    size = max(1, gguf_io.COPY_CHUNK // row) * row if check else gguf_io.COPY_CHUNK

    def chunks() -> Iterator[np.ndarray]:
        bad = 0
        for chunk in gguf.chunks(tensor, size):
            if check:
                for values in decoded(chunk.reshape(-1, row), tensor.type_id, cols, None):
                    bad += values.size - int(np.count_nonzero(np.isfinite(values)))
            yield chunk
            progress.update(chunk.size, tensor.name)
        if bad:
            raise gguf_io.not_finite(gguf, tensor, f"{bad} infinite or NaN weights")

    return Job([(tensor.name, tensor.shape, tensor.type_id)], chunks)


def dequantized(gguf: Gguf, item: Experts, type_id: int, progress: Progress) -> Callable[[], Iterator[np.ndarray]]:
    kind = gguf_py.GGMLQuantizationType(type_id)

    def chunks() -> Iterator[np.ndarray]:
        for parts in weights_of(gguf, item):
            for weights in parts:
                yield requantize.as_floats(gguf, item.tensor, weights, kind)
            progress.update(item.expert_bytes, item.tensor.name)

    return chunks


def weights_of(gguf: Gguf, item: Experts) -> Iterator[Iterable[np.ndarray]]:
    """The matrices of an exported tensor, expert by expert, each as pieces float32 [rows of the piece, cols]: both
    planes, expert scale and shared factor applied."""
    scales = np.ones(item.n_expert, "<f4") if item.factor is None else gguf.read(item.factor).view("<f4")
    columns, shared = item.second_columns(gguf), None
    if item.shared is not None:
        raw = gguf.read(item.shared).reshape(item.shared.shape[1], -1)
        shared = gguf_io.decode(raw, item.shared.type_id)

    def pieces(e: int) -> Iterator[np.ndarray]:
        raw, start = gguf.read(item.tensor, e * item.expert_bytes, item.expert_bytes).reshape(item.rows, -1), 0
        for weights in decoded(raw, item.tensor.type_id, item.cols, None):
            if item.residual is not None:
                size = item.residual.n_bytes // item.n_expert
                more = gguf.read(item.residual, e * size, size).reshape(item.rows, -1)
                weights[:, columns] += block.dequantize(more[start : start + len(weights)])
            start += len(weights)
            yield weights * scales[e]

    for e in range(item.n_expert):
        if shared is None:
            yield pieces(e)
        elif layout.is_down(item.tensor.name):
            yield [shared @ np.concatenate(list(pieces(e)))]
        else:
            yield (w @ shared for w in pieces(e))


def rows_of(made: Iterable[Job]) -> Rows:
    return [row for job in made for row in job.rows]


def file_size(entries: list[Entry], rows: Rows, alignment: int) -> int:
    return len(gguf_io.make_header(entries, rows, alignment)) + gguf_io.data_size(rows, alignment)
