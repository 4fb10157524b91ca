"""Signs and magnitudes under second moments: error propagation with loss-aligned weights. Tensors in, tensors out.

For a projection W and its inputs x_t the error that counts is tr(dW H dW^T) with H = sum_t s_t x_t x_t^T. With s = 1 it
is the error of the outputs (GPTQ, arXiv 2210.17323); with s the squared gradient of the loss at the outputs, averaged
over groups of rows, it follows the loss (MoBiE, arXiv 2604.06798, "GLAS"; GuidedQuant, arXiv 2505.07004, eq. 8).

Notation: W is handled transposed, `w` [batch, cols, rows], so that a column of the matrix is contiguous. A batch item
is one expert. `U` is upper triangular with H^-1 = U^T U.
"""

import torch
from torch import Tensor

from mobie_export.format import BLOCK_LEN

DAMPING = 0.01  # of the mean diagonal, as GPTQ has it
ROUNDS = 1  # of "signs for a magnitude, magnitude for these signs" in a block; a second one gains nothing measurable


def inverse_factor(
    H: Tensor,  # float32 [batch, n, n], symmetric, >= 0; damped in place
    damping: float = DAMPING,
) -> Tensor:  # float32 [batch, n, n]
    """Upper triangular U with (H + damping * mean diagonal)^-1 = U^T U.

    One factorization and one triangular inverse instead of an inverse and a factorization: reversed in both axes, H is
    C C^T; reversed back, H = R R^T with R upper triangular; U = R^-1. Inputs that never occurred (zero diagonal) count
    as the mean does. An item that cannot be factorized gets ten times the damping until it can.
    """
    diagonal = H.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    diagonal.copy_(torch.where(diagonal > 0, diagonal, mean))
    diagonal.add_(damping * mean)
    C, info = torch.linalg.cholesky_ex(H.flip(1, 2))
    while info.any():
        bad = torch.nonzero(info).flatten()
        damping *= 10
        H.diagonal(dim1=1, dim2=2)[bad] += damping * mean[bad]
        C[bad], info[bad] = torch.linalg.cholesky_ex(H[bad].flip(1, 2))
    return _upper_inverse(C.flip(1, 2))


def _upper_inverse(R: Tensor) -> Tensor:  # [batch, n, n], upper triangular
    """By halves: mostly matrix products, three times as fast as solving for the identity."""
    n = R.shape[-1]
    if n <= 4 * BLOCK_LEN:
        return torch.linalg.solve_triangular(R, torch.eye(n).expand_as(R), upper=True)
    a, b = slice(0, n // 2), slice(n // 2, n)
    U = torch.zeros_like(R)
    U[:, a, a], U[:, b, b] = _upper_inverse(R[:, a, a]), _upper_inverse(R[:, b, b])
    U[:, a, b] = -(U[:, a, a] @ (R[:, a, b] @ U[:, b, b]))
    return U


def propagate(
    W: Tensor,  # float32 [batch, rows, cols]
    U: Tensor,  # float32 [batch, cols, cols]
    rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor]:  # bool [batch, rows, cols], True is plus; float32 [batch, rows, cols / 64], >= 0
    """Signs and block magnitudes, block by block, errors made up for by the columns that follow (GPTQ, eq. 3).

    In a block with current weights w0 and V = U_bb^-T, the loss that the columns behind it cannot make up for is
    |V (w0 - a b)|^2. Signs b are found column by column for a given magnitude a, the first one being the mean |w0|
    under the weights 1 / U_jj^2; then a = <V w0, V b> / |V b|^2 is the best for these signs.
    """
    w = W.transpose(1, 2).contiguous()
    signs = torch.empty_like(w, dtype=torch.bool)
    magnitudes = torch.empty(w.shape[0], w.shape[1] // BLOCK_LEN, w.shape[2])
    for block, start in enumerate(range(0, w.shape[1], BLOCK_LEN)):
        here, after = slice(start, start + BLOCK_LEN), slice(start + BLOCK_LEN, None)
        u = U[:, here, here]
        w0 = w[:, here]
        v0 = torch.linalg.solve_triangular(u.transpose(1, 2), w0, upper=False)
        d = u.diagonal(dim1=1, dim2=2)
        weights = (1 / d.square()).unsqueeze(2)
        a = (weights * w0.abs()).sum(1) / weights.sum(1)
        for _ in range(rounds):
            b = _signs(w0, a, u, d)
            vb = torch.linalg.solve_triangular(u.transpose(1, 2), b, upper=False)
            a = ((v0 * vb).sum(1) / vb.square().sum(1)).clamp_min(0)
        signs[:, here] = b > 0
        magnitudes[:, block] = a
        if start + BLOCK_LEN < w.shape[1]:
            error = v0 - a.unsqueeze(1) * vb
            w[:, after].baddbmm_(U[:, here, after].transpose(1, 2), error, alpha=-1)
    return signs.transpose(1, 2), magnitudes.transpose(1, 2)


def _signs(w0: Tensor, a: Tensor, u: Tensor, d: Tensor) -> Tensor:
    """+-1 [batch, 64, rows] of one block with magnitudes a [batch, rows], one column after the other."""
    w = w0.clone()
    b = torch.empty_like(w)
    for j in range(w.shape[1]):
        torch.copysign(torch.ones_like(a), w[:, j], out=b[:, j])
        if j + 1 < w.shape[1]:
            error = (w[:, j] - a * b[:, j]) / d[:, j : j + 1]
            w[:, j + 1 :].addcmul_(u[:, j, j + 1 :, None], error[:, None], value=-1)
    return b


def refit(
    W: Tensor,  # float32 [batch, rows, cols]
    H: Tensor,  # float32 [batch, cols, cols], damped
    signs: Tensor,  # bool [batch, rows, cols]
    magnitudes: Tensor,  # float32 [batch, rows, cols / 64], kept where the best one is negative
) -> Tensor:  # float32 [batch, rows, cols / 64]
    """All magnitudes of a row at once: the least of (w - sum_p a_p b_p)^T H (w - sum_p a_p b_p) for given signs b."""
    batch, rows, cols = W.shape
    n = cols // BLOCK_LEN
    b = torch.where(signs, 1.0, -1.0).transpose(1, 2).contiguous()  # [batch, cols, rows]

    def per_block(x: Tensor) -> Tensor:  # [batch, cols, rows] -> [batch, rows, n]
        return (b * x).view(batch, n, BLOCK_LEN, rows).sum(2).transpose(1, 2)

    A = torch.empty(batch, rows, n, n)
    for q in range(n):
        here = slice(q * BLOCK_LEN, (q + 1) * BLOCK_LEN)
        A[..., q] = per_block(H[:, :, here] @ b[:, here])
    right = per_block(H @ W.transpose(1, 2))
    factor, info = torch.linalg.cholesky_ex(A)
    best = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    good = (info == 0).unsqueeze(-1) & torch.isfinite(best).all(-1, keepdim=True) & (best >= 0).all(-1, keepdim=True)
    return torch.where(good, best, magnitudes)


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


def decoded(signs: Tensor, magnitudes: Tensor) -> Tensor:
    """Weights from signs bool [..., cols] and magnitudes [..., cols / 64]."""
    a = magnitudes.repeat_interleave(BLOCK_LEN, -1)
    return torch.where(signs, a, -a)
