"""Second moments that are aligned with the loss: their factors, what columns count under them, errors.

For a projection W and its inputs x_t the error that counts is tr(dW H dW^T) with H = sum_t s_t x_t x_t^T. With s = 1 it
is the error of the outputs (GPTQ, arXiv 2210.17323); with s the squared gradient of the loss at the outputs, averaged
over groups of rows, it follows the loss (MoBiE, arXiv 2604.06798, "GLAS"; GuidedQuant, arXiv 2505.07004, eq. 8).

A batch item is one expert. R and U are upper triangular, H = R R^T and H^-1 = U^T U. Tensors in, tensors out.
"""

import torch
from torch import Tensor

from mobie_export.calibration.products import exact

DAMPING = 0.01  # of the mean diagonal, as GPTQ has it
SMALL = 256  # columns of what is factorized, and of a triangle that is inverted, as a whole
MOST_DAMPINGS = 8  # each ten times the one before; a matrix of numbers is factorized long before


class NotFactorized(ArithmeticError):
    """Second moments that no damping helps: they hold NaN or infinite values."""


def factor(
    H: Tensor,  # float32 [batch, n, n], symmetric, >= 0; damped in place
    damping: float = DAMPING,
) -> Tensor:  # float32 [batch, n, n]
    """Upper triangular R with H + damping * mean diagonal = R R^T.

    Inputs that never occurred (zero diagonal) count as the mean does. An item that cannot be factorized gets ten times
    the damping until it can; NotFactorized when that does not help.
    """
    diagonal = H.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    diagonal.copy_(torch.where(diagonal > 0, diagonal, mean))
    diagonal.add_(damping * mean)
    with exact():
        R, info = _upper_factor(H)
        for _ in range(MOST_DAMPINGS):
            if not info.any():
                break
            bad = torch.nonzero(info).flatten()
            damping *= 10
            H.diagonal(dim1=1, dim2=2)[bad] += damping * mean[bad]
            R[bad], info[bad] = _upper_factor(H[bad])
    if info.any() or not torch.isfinite(R.diagonal(dim1=1, dim2=2)).all():
        raise NotFactorized(f"second moments of {len(H)} matrices of {H.shape[1]} columns")
    return R


def _upper_factor(H: Tensor) -> tuple[Tensor, Tensor]:
    """(R, int32 [batch], 0 where it is one). By halves from the last: mostly matrix products, three times as fast as
    LAPACK's with the copies that torch makes for it."""
    n = H.shape[-1]
    if n <= SMALL:
        C, info = torch.linalg.cholesky_ex(H.flip(1, 2))  # reversed in both axes, H is C C^T
        return C.flip(1, 2), info
    a, b = slice(0, n // 2), slice(n // 2, n)
    R = torch.zeros_like(H)
    R[:, b, b], info = _upper_factor(H[:, b, b])
    R[:, a, b] = torch.linalg.solve_triangular(R[:, b, b].mT, H[:, a, b], upper=False, left=False)
    R[:, a, a], more = _upper_factor(H[:, a, a].baddbmm(R[:, a, b], R[:, a, b].mT, alpha=-1))
    return R, info + more


def inverse_factor(
    H: Tensor,  # float32 [batch, n, n], symmetric, >= 0; damped in place
    damping: float = DAMPING,
) -> Tensor:  # float32 [batch, n, n]
    """Upper triangular U with (H + damping * mean diagonal)^-1 = U^T U; as `factor`, whose inverse it is."""
    return _upper_inverse(factor(H, damping))


def _upper_inverse(R: Tensor) -> Tensor:  # [batch, n, n], upper triangular
    """By halves: mostly matrix products, three times as fast as solving for the identity."""
    n = R.shape[-1]
    if n <= SMALL:
        return torch.linalg.solve_triangular(R, torch.eye(n, device=R.device).expand_as(R), upper=True)
    a, b = slice(0, n // 2), slice(n // 2, n)
    U = torch.zeros_like(R)
    U[:, a, a], U[:, b, b] = _upper_inverse(R[:, a, a]), _upper_inverse(R[:, b, b])
    U[:, a, b] = -(U[:, a, a] @ (R[:, a, b] @ U[:, b, b]))
    return U


def saliency(
    W: Tensor,  # float32 [batch, rows, cols]
    U: Tensor,  # float32 [batch, groups, cols, cols], of groups of rows one after the other
) -> Tensor:  # float32 [batch, cols]
    """Mean over the rows j of s_ij = w_ij^2 / ([H_j^-1]_ii)^2, H_j that of the row's group (MoBiE, "GLAS")."""
    batch, groups, cols, _ = U.shape
    inverse_diagonal = U.square().sum(-2).unsqueeze(2)  # of U^T U; [batch, groups, 1, cols]
    w = W.view(batch, groups, -1, cols)
    return (w / inverse_diagonal).square().mean((1, 2))


def error(
    dW: Tensor,  # [batch, rows, cols]
    H: Tensor,  # [batch, cols, cols]
) -> Tensor:  # [batch]
    """tr(dW H dW^T)."""
    return ((dW @ H) * dW).sum((1, 2))
