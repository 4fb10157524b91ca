"""The method `sign`: the best binary approximation of the weights alone. Seconds, and no calibration.

With W ~ a B, B = +-1, and h_j >= 0 the importance of column j, sum_j h_j (w_j - a b_j)^2 over a block is least for
b_j = sign(w_j) and a = sum_j h_j |w_j| / sum_j h_j (Rastegari et al. 2016, XNOR-Net, arXiv 1603.05279, eq. 4 and 6).
"""

from dataclasses import dataclass

import numpy as np

from mobie_export.methods.base import MatrixMethod
from mobie_export.spec import metadata


@dataclass(frozen=True)
class Sign(MatrixMethod):
    name = "sign"
    summary = "signs and mean magnitudes of the weights alone: uncalibrated"
    suffix = "-uncalibrated"

    @property
    def label(self) -> str:
        return metadata.UNCALIBRATED

    def settings(self) -> dict[str, object]:
        return {"imatrix": None}

    def quantize(
        self, weights: np.ndarray, importance: np.ndarray | None, block_len: int
    ) -> tuple[np.ndarray, np.ndarray]:
        return binarize(weights, importance, block_len)


def binarize(
    weights: np.ndarray,  # float32 [rows, cols]
    importance: np.ndarray | None,  # float64 [cols], >= 0
    block_len: int,  # cols is a multiple of it
) -> tuple[np.ndarray, np.ndarray]:
    """(signs bool [rows, cols], True for weights >= 0; magnitudes float64 [rows, cols / block_len]).

    A block whose importance is all zero gets the plain mean. A magnitude is non-finite exactly when one of the block's
    weights is (the sum of some float32 cannot overflow a float64).
    """
    blocks = (weights.shape[0], weights.shape[1] // block_len, block_len)
    absolute = np.abs(weights).reshape(blocks)
    magnitudes = np.add.reduce(absolute, axis=-1, dtype=np.float64)
    magnitudes /= block_len
    if importance is not None:
        h = importance.reshape(blocks[1:])
        total = np.add.reduce(h, axis=-1)
        some = total > 0
        with np.errstate(invalid="ignore"):  # infinity times no importance
            weighted = np.add.reduce(absolute * h, axis=-1) / np.where(some, total, 1)
        magnitudes = np.where(some & np.isfinite(magnitudes), weighted, magnitudes)
    return weights >= 0, magnitudes
