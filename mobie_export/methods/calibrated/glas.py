"""Signs and magnitudes under second moments: error propagation with loss-aligned weights. Tensors in, tensors out.

For a projection W and its inputs x_t the error that counts is tr(dW H dW^T) with H = sum_t s_t x_t x_t^T. With s = 1 it
is the error of the outputs (GPTQ, arXiv 2210.17323); with s the squared gradient of the loss at the outputs, averaged
over groups of rows, it follows the loss (MoBiE, arXiv 2604.06798, "GLAS"; GuidedQuant, arXiv 2505.07004, eq. 8).

Notation: W is handled transposed, `w` [batch, cols, rows], so that a column of the matrix is contiguous. A batch item
is one expert. `U` is upper triangular with H^-1 = U^T U.
"""

import torch
from torch import Tensor

from mobie_export.calibration.planes import decoded, plus_minus
from mobie_export.spec.block import BLOCK_LEN

DAMPING = 0.01  # of the mean diagonal, as GPTQ has it
SMALL = 256  # columns of a triangle that is inverted by solving
MOST_DAMPINGS = 8  # each ten times the one before; a matrix of numbers is factorized long before
ROWS_AT_ONCE = 256  # of a matrix, in `refit`
ROUNDS = 1  # of "signs for a magnitude, magnitude for these signs" in a block; a second one gains nothing measurable


class NotFactorized(ArithmeticError):
    """Second moments that no damping helps: they hold NaN or infinite values."""


def inverse_factor(
    H: Tensor,  # float32 [batch, n, n], symmetric, >= 0; damped in place
    damping: float = DAMPING,
) -> Tensor:  # float32 [batch, n, n]
    """Upper triangular U with (H + damping * mean diagonal)^-1 = U^T U.

    One factorization and one triangular inverse instead of an inverse and a factorization: reversed in both axes, H is
    C C^T; reversed back, H = R R^T with R upper triangular; U = R^-1. Inputs that never occurred (zero diagonal) count
    as the mean does. An item that cannot be factorized gets ten times the damping until it can; NotFactorized when
    that does not help.
    """
    diagonal = H.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    diagonal.copy_(torch.where(diagonal > 0, diagonal, mean))
    diagonal.add_(damping * mean)
    C, info = torch.linalg.cholesky_ex(H.flip(1, 2))
    for _ in range(MOST_DAMPINGS):
        if not info.any():
            break
        bad = torch.nonzero(info).flatten()
        damping *= 10
        H.diagonal(dim1=1, dim2=2)[bad] += damping * mean[bad]
        C[bad], info[bad] = torch.linalg.cholesky_ex(H[bad].flip(1, 2))
    if info.any() or not torch.isfinite(C.diagonal(dim1=1, dim2=2)).all():
        raise NotFactorized(f"second moments of {len(H)} matrices of {H.shape[1]} columns")
    return _upper_inverse(C.flip(1, 2))


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


def propagate(
    W: Tensor,  # float32 [batch, rows, cols]
    U: Tensor,  # float32 [batch, cols, cols]
    columns: Tensor | None = None,  # int64 [k], those with a second sign, k a multiple of block_len
    rounds: int = ROUNDS,
    block_len: int = BLOCK_LEN,  # columns that share a magnitude
) -> tuple[Tensor, ...]:
    """Signs and block magnitudes, block by block, errors made up for by the columns that follow (GPTQ, eq. 3).

    Returns signs bool [batch, rows, cols], True is plus, and magnitudes float32 [batch, rows, cols / block_len], >= 0;
    with `columns` also those of the second plane, [batch, rows, k] and [batch, rows, k / block_len].

    In a block with current weights w0 and V = U_bb^-T, the loss that the columns behind it cannot make up for is
    |V (w0 - a b)|^2. Signs b are found column by column for a given magnitude a, the first one being the mean |w0|
    under the weights 1 / U_jj^2; then a = <V w0, V b> / |V b|^2 is the best for these signs. A column with a second
    sign takes the nearest of +-a +-a2, with an a2 that was fitted to the weights before (`_second_magnitudes`).
    """
    w = W.transpose(1, 2).contiguous()
    signs = torch.empty_like(w, dtype=torch.bool)
    magnitudes = W.new_empty(w.shape[0], w.shape[1] // block_len, w.shape[2])
    place: list[int | None] = [None] * w.shape[1]  # of a column in the second plane
    if columns is not None:
        a2 = _second_magnitudes(w, U, columns, block_len)
        signs2 = torch.empty(w.shape[0], len(columns), w.shape[2], dtype=torch.bool, device=w.device)
        for k, column in enumerate(columns.tolist()):
            place[column] = k
    for block, start in enumerate(range(0, w.shape[1], block_len)):
        here, after = slice(start, start + block_len), slice(start + block_len, None)
        u = U[:, here, here]
        w0 = w[:, here]
        v0 = torch.linalg.solve_triangular(u.transpose(1, 2), w0, upper=False)
        d = u.diagonal(dim1=1, dim2=2)
        weights = (1 / d.square()).unsqueeze(2)
        a = (weights * w0.abs()).sum(1) / weights.sum(1)
        second = {j: a2[:, k // block_len] for j, k in enumerate(place[here]) if k is not None}
        for _ in range(rounds):
            b, r = _signs(w0, a, u, d, second)
            vb = torch.linalg.solve_triangular(u.transpose(1, 2), b, upper=False)
            v1 = v0 if r is None else v0 - torch.linalg.solve_triangular(u.transpose(1, 2), r, upper=False)
            a = ((v1 * vb).sum(1) / vb.square().sum(1)).clamp_min(0)
        signs[:, here] = b > 0
        magnitudes[:, block] = a
        if r is not None:
            for j in second:
                signs2[:, place[start + j]] = r[:, j] >= 0
        if start + block_len < w.shape[1]:
            error = v1 - a.unsqueeze(1) * vb
            w[:, after].baddbmm_(U[:, here, after].transpose(1, 2), error, alpha=-1)
    first = signs.transpose(1, 2), magnitudes.transpose(1, 2)
    return first if columns is None else (*first, signs2.transpose(1, 2), a2.transpose(1, 2))


def _signs(
    w0: Tensor, a: Tensor, u: Tensor, d: Tensor, second: dict[int, Tensor]
) -> tuple[Tensor, Tensor | None]:  # [batch, block_len, rows] each
    """+-1 of one block with magnitudes a [batch, rows], one column after the other, and the second plane's part +-a2
    where a column j has one, second[j] [batch, rows]."""
    w = w0.clone()
    b = torch.empty_like(w)
    r = torch.zeros_like(w) if second else None
    for j in range(w.shape[1]):
        torch.copysign(torch.ones_like(a), w[:, j], out=b[:, j])
        left = w[:, j] - a * b[:, j]
        if r is not None and j in second:
            r[:, j] = torch.copysign(second[j], left)
            left = left - r[:, j]
        if j + 1 < w.shape[1]:
            w[:, j + 1 :].addcmul_(u[:, j, j + 1 :, None], (left / d[:, j : j + 1])[:, None], value=-1)
    return b, r


def _second_magnitudes(
    w: Tensor,  # [batch, cols, rows]
    U: Tensor,  # [batch, cols, cols]
    columns: Tensor,  # int64 [k]
    block_len: int,
    rounds: int = 4,
) -> Tensor:  # [batch, k / block_len, rows]
    """Magnitudes of the second plane, from weights that nothing was propagated into: both planes' in turn, each the
    mean under 1 / U_jj^2 of what the other leaves."""
    batch, _, rows = w.shape
    weights = 1 / U.diagonal(dim1=1, dim2=2).square()

    def mean(x: Tensor, h: Tensor) -> Tensor:  # over the columns of a block
        x, h = x.view(batch, -1, block_len, rows), h.view(batch, -1, block_len, 1)
        return (x * h).sum(2) / h.sum(2)

    def spread(a: Tensor) -> Tensor:
        return a.repeat_interleave(block_len, 1)

    size = w.abs()
    a = mean(size, weights)
    for _ in range(rounds):
        left = size[:, columns] - spread(a)[:, columns]
        a2 = mean(left.abs(), weights[:, columns])
        a = mean(size.index_add(1, columns, -torch.copysign(spread(a2), left)), weights)
    return a2


def descend(
    W: Tensor,  # float32 [batch, rows, cols]
    H: Tensor,  # float32 [batch, cols, cols], damped
    signs: Tensor,  # bool [batch, rows, cols]
    magnitudes: Tensor,  # float32 [batch, rows, cols / block_len]
    signs2: Tensor | None = None,  # bool [batch, rows, k]
    magnitudes2: Tensor | None = None,  # float32 [batch, rows, k / block_len]
    columns: Tensor | None = None,  # int64 [k]
) -> tuple[Tensor, ...]:
    """Signs, and those of the second plane where given, each turned where that lessens tr(dW H dW^T): coordinate
    descent, one column after the other, all rows at once.

    Error propagation decides a sign by the columns behind it, which can still make up for it; here those before it
    count as well. A sign b of magnitude a that turns adds 2 a b to the error dw_j, and the row's part of the form
    changes by 4 a (b (H dw)_j + a H_jj).
    """
    s = plus_minus(signs).transpose(1, 2).contiguous()  # [batch, cols, rows]
    a = magnitudes.transpose(1, 2).contiguous()
    planes, block_len = [signs, magnitudes], _block_len(signs, magnitudes)
    s2 = a2 = None
    place: list[int | None] = [None] * s.shape[1]
    if columns is not None and signs2 is not None and magnitudes2 is not None:
        planes += [signs2, magnitudes2, columns]
        s2, a2 = plus_minus(signs2).transpose(1, 2).contiguous(), magnitudes2.transpose(1, 2).contiguous()
        for k, column in enumerate(columns.tolist()):
            place[column] = k
    g = H @ (W - decoded(*planes)).transpose(1, 2)
    for start in range(0, s.shape[1], block_len):
        here = slice(start, start + block_len)
        h, near = H[:, here, here].contiguous(), g[:, here].clone()
        turned = torch.zeros_like(near)
        for j in range(block_len):
            both, second = [(s[:, start + j], a[:, start // block_len])], place[start + j]
            if s2 is not None and a2 is not None and second is not None:
                both.append((s2[:, second], a2[:, second // block_len]))
            for sign, size in both:
                step = size * sign
                better = step * near[:, j] + size.square() * h[:, j, j, None] < 0
                step = torch.where(better, 2 * step, 0.0)
                sign.copy_(torch.where(better, -sign, sign))
                turned[:, j] += step
                near[:, j:].addcmul_(h[:, j:, j, None], step[:, None])  # those before have had their turn
        g.baddbmm_(H[:, :, here], turned)
    first = (s > 0).transpose(1, 2)
    return (first,) if s2 is None else (first, (s2 > 0).transpose(1, 2))


def refit(
    W: Tensor,  # float32 [batch, rows, cols]
    H: Tensor,  # float32 [batch, cols, cols], damped
    signs: Tensor,  # bool [batch, rows, cols]
    magnitudes: Tensor,  # float32 [batch, rows, cols / block_len], kept where a best one of the row is negative
    signs2: Tensor | None = None,  # bool [batch, rows, k]
    magnitudes2: Tensor | None = None,  # float32 [batch, rows, k / block_len]
    columns: Tensor | None = None,  # int64 [k]
) -> Tensor | tuple[Tensor, Tensor]:  # as magnitudes and, where given, magnitudes2
    """All magnitudes of a row at once: the least of (w - sum_p a_p b_p)^T H (w - sum_p a_p b_p) for given signs b."""
    if W.device.type == "cpu":  # a part at a time, whose products stay in the cache: three times as fast
        parts = []
        for e in range(len(W)):
            for rows in torch.arange(W.shape[1]).split(ROWS_AT_ONCE):
                w, b, a = (t[e : e + 1, rows] for t in (W, signs, magnitudes))
                b2, a2 = (None if t is None else t[e : e + 1, rows] for t in (signs2, magnitudes2))
                parts.append(_refit(w, H[e : e + 1], b, a, b2, a2, columns))
        found = torch.cat(parts, 1).view(*magnitudes.shape[:2], -1)
    else:
        found = _refit(W, H, signs, magnitudes, signs2, magnitudes2, columns)
    first = magnitudes.shape[-1]
    return found if columns is None else (found[..., :first], found[..., first:])


def _refit(
    W: Tensor,
    H: Tensor,
    signs: Tensor,
    magnitudes: Tensor,
    signs2: Tensor | None,
    magnitudes2: Tensor | None,
    columns: Tensor | None,
) -> Tensor:
    """Those of both planes, [batch, rows, (cols + k) / block_len]."""
    batch, rows, _ = W.shape
    block_len = _block_len(signs, magnitudes)
    planes: list[tuple[Tensor, Tensor | None]]
    planes = [(plus_minus(signs).transpose(1, 2).contiguous(), None)]  # [batch, cols, rows]
    old = magnitudes
    if columns is not None and signs2 is not None and magnitudes2 is not None:
        old = torch.cat([magnitudes, magnitudes2], -1)
        planes.append((plus_minus(signs2).transpose(1, 2).contiguous(), columns))

    def per_block(b: Tensor, x: Tensor) -> Tensor:  # [batch, n * block_len, rows] -> [batch, rows, n]
        return (b * x).unflatten(1, (-1, block_len)).sum(2).transpose(1, 2)

    A = W.new_zeros(batch, rows, old.shape[-1], old.shape[-1])
    q = 0
    for b, at in planes:  # the lower triangle, which is all that the factorization reads
        for start in range(0, b.shape[1], block_len):
            here = slice(start, start + block_len)
            first = 0
            for rest, to in planes:
                n = rest.shape[1] // block_len
                skip = max(0, q - first)
                if skip < n:
                    below = slice(skip * block_len, None)
                    part = H[:, below if to is None else to[below]][:, :, here if at is None else at[here]]
                    A[..., first + skip : first + n, q] = per_block(rest[:, below], part @ b[:, here])
                first += n
            q += 1
    right = H @ W.transpose(1, 2)
    right = torch.cat([per_block(b, right if at is None else right[:, at]) for b, at in planes], -1)
    factor, info = torch.linalg.cholesky_ex(A)
    best = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    good = (info == 0).unsqueeze(-1) & torch.isfinite(best).all(-1, keepdim=True) & (best >= 0).all(-1, keepdim=True)
    return torch.where(good, best, old)


def _block_len(signs: Tensor, magnitudes: Tensor) -> int:
    return signs.shape[-1] // magnitudes.shape[-1]


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
