"""The column loops of `signs`, compiled: kernels_cpp/search.h, in the patched runtime where one is installed.

What takes PyTorch a dozen calls for each column is one call for a span of them. Results differ by how sums are rounded.
"""

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mobie_export.runtime import libggml

if TYPE_CHECKING:
    from mobie_export.methods.calibrated.signs import Binary

ROWS = 64  # that are gone over together; a thread takes a multiple


class Span(ctypes.Structure):  # mobie_span
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_cols", "block_len", "first", "end", "stride")),
        *((name, ctypes.c_void_p) for name in ("w", "signs", "magnitudes", "left", "places", "signs2", "magnitudes2")),
        *((name, ctypes.c_void_p) for name in ("square", "sums")),
        ("most", ctypes.c_float),
    )


class _Search(ctypes.Structure):  # mobie_search
    _of_span = ctypes.CFUNCTYPE(None, ctypes.POINTER(Span))  # lets go of the interpreter's lock
    _fields_ = (("name", ctypes.c_char_p), ("propagate", _of_span), ("descend", _of_span))


@dataclass(frozen=True)
class Search:
    """One implementation."""

    name: str
    propagate: Callable[[Span], None]
    descend: Callable[[Span], None]


@functools.cache
def every() -> list[Search]:
    """What the installed runtime has for this CPU, slowest first; none where it is not patched, or from before this."""
    try:
        library = libggml.cpu_library()
    except OSError:  # it does not load: for `doctor`
        return []
    if library is None or not hasattr(library, "mobie_search_all"):
        return []
    library.mobie_search_all.restype = ctypes.POINTER(ctypes.POINTER(_Search))
    library.mobie_search_all.argtypes = [ctypes.POINTER(ctypes.c_int)]
    n = ctypes.c_int()
    found = library.mobie_search_all(ctypes.byref(n))
    return [Search(s.name.decode(), s.propagate, s.descend) for s in (found[i].contents for i in range(n.value))]


def best(device: torch.device | str) -> Search | None:
    """None: PyTorch has to do it."""
    return every()[-1] if torch.device(device).type == "cpu" and every() else None


def name(device: torch.device | str) -> str:
    """What goes over the columns, for settings: sums are rounded as it does."""
    search = best(device)
    return search.name if search else "torch"


def run(
    of_span: Callable[[Span], None],
    found: "Binary",
    columns: slice,  # whole blocks
    square: Tensor,  # float32 [batch, n, n] of these columns: of the factor R, or of H
    sums: Tensor,  # float32 [batch, n, rows], R^T left of the columns before, or H left; changed
    places: dict[int, int],  # as `Binary.places` has them
) -> None:
    """`Search.propagate` or `descend` of these columns, in torch's number of threads."""
    first, block_len = columns.start, found.block_len
    batch, n, rows = sums.shape
    assert block_len in (64, 128) and n % block_len == 0, (n, block_len)
    square, sums = square.contiguous(), sums.contiguous()
    at = (ctypes.c_int64 * n)(*(places.get(first + j, -1) for j in range(n)))
    threads = torch.get_num_threads()
    each = -(-rows // (ROWS * -(-threads // batch))) * ROWS
    spans = []
    for e in range(batch):
        w, signs, left = (t[e, columns].data_ptr() for t in (found.w, found.signs, found.left))
        magnitudes = found.magnitudes[e, first // block_len :].data_ptr()
        second = found.signs2[e].data_ptr(), found.magnitudes2[e].data_ptr()
        tables = square[e].data_ptr(), sums[e].data_ptr(), float(found.most[e])
        pointers = w, signs, magnitudes, left, ctypes.addressof(at), *second, *tables
        spans += [Span(n, block_len, r, min(r + each, rows), rows, *pointers) for r in range(0, rows, each)]
    if threads == 1:
        for span in spans:
            of_span(span)
    else:
        list(_pool(threads).map(of_span, spans))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "search")
