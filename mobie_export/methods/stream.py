"""Weights piece by piece, and work in a few threads whose results come in order."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from mobie_export import gguf_io

PIECE = 1 << 18  # weights decoded at once: a megabyte of float32 stays in a core's L2 cache

Result = TypeVar("Result")


def decoded(
    raw: np.ndarray,  # uint8 [rows, bytes of a row]
    type_id: int,
    cols: int,
    factor: np.float32 | None,
) -> Iterator[np.ndarray]:
    """float32 [rows of the piece, cols], times the factor, of one stored matrix."""
    step = max(1, PIECE // cols)
    for start in range(0, len(raw), step):
        weights = gguf_io.decode(raw[start : start + step], type_id)
        yield weights if factor is None else weights * factor


def in_order(pool: ThreadPoolExecutor, work: Callable[[int], Result], n: int, ahead: int) -> Iterator[Result]:
    """work(0), work(1), ... in order, at most `ahead` of them begun and not yet taken."""
    begun: deque[Future[Result]] = deque()
    try:
        for i in range(n):
            begun.append(pool.submit(work, i))
            if len(begun) == ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()
