"""One expert: weights to packed blocks and one scale."""

from collections.abc import Iterable

import numpy as np

from mobie_export.methods.sign import binarize
from mobie_export.spec import block


class NonFinite(ValueError):
    """`count` weights of the expert are infinite or not a number."""

    def __init__(self, count: int):
        super().__init__(f"{count} non-finite weights")
        self.count = count


def expert(
    pieces: Iterable[np.ndarray],  # float32 [rows of the piece, cols], in order
    importance: np.ndarray | None = None,  # float64 [cols]
) -> tuple[np.ndarray, np.float32]:
    """(blocks uint8 [rows, cols / 64 * 9], scale) of one expert. Raises NonFinite.

    The matrix comes in pieces so that its float32 form is never whole in memory.
    """
    signs, magnitudes, bad = [], [], 0
    for weights in pieces:
        s, a = binarize.sign(weights, importance)
        if not np.isfinite(a).all():
            bad += weights.size - int(np.count_nonzero(np.isfinite(weights)))
        signs.append(s)
        magnitudes.append(a)
    if bad:
        raise NonFinite(bad)
    scale, codes = block.encode_scales(np.concatenate(magnitudes))
    blocks, row = [], 0
    for s in signs:
        blocks.append(block.pack(s, codes[row : row + len(s)]))
        row += len(s)
    return np.concatenate(blocks), scale
