"""Binarization with row and column scales, refined in turn (ARB-LLM, arXiv 2410.03129). Tensors in, tensors out.

    ARB-RC          W ~ diag(ar) B diag(ac), B = sign(W); ar and ac are refit in turn by least squares (section 3.3)
    second order    a second plane of signs with scales of its own for the residual of salient columns
    around it       errors of a block of columns are made up for by the columns that follow (GPTQ, arXiv 2210.17323)

`propagate` is that in the bytes of FORMAT.md: magnitudes per row and 64 columns, column scales that go elsewhere in the
model, the second plane on the first blocks of the columns' order. `arb_llm_rc` is ARB-LLM's own form with its bitmap of
magnitudes over every weight, and says what that takes.

Matrices are [..., rows, cols]; all leading dimensions are a batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mobie_export.calibration.planes import decoded, plus_minus, signs_of
from mobie_export.spec.block import BLOCK_LEN

ROUNDS = 10  # of refits; the paper has at most 10, ARB-LLM 15
SMALL = 1e-30  # denominators of empty rows and columns

# ARB-LLM's own form
ARB_BLOCK = 128  # columns
ARB_MOST_SALIENT = 50  # of them
ARB_COUNTS = (1, 2, 4, 8, 16, 24, 32, 40, 50)  # tried; ARB-LLM tries every number
ARB_SPLITS = 17  # quantiles between 0.1 and 0.9 tried for the bitmap; ARB-LLM tries 81
SCALE_BITS = 16  # a scale is a float16


# ---- least squares ---------------------------------------------------------------------------------------------------


def refit(
    T: Tensor,  # [..., rows, cols]
    B: Tensor,  # +-1, or 0 outside a mask
    ar: Tensor,  # [..., rows]
    ac: Tensor,  # [..., cols]
    columns: bool = True,
) -> tuple[Tensor, Tensor]:
    """One turn of ar, then ac, each the exact least squares of |T - diag(ar) B diag(ac)|^2 for the other's value."""
    product, mask = T * B, B.square()
    ar = _times(product, ac) / _times(mask, ac.square()).clamp_min(SMALL)
    if columns:
        ac = _times(product.mT, ar) / _times(mask.mT, ar.square()).clamp_min(SMALL)
    return ar, ac


def _times(M: Tensor, v: Tensor) -> Tensor:
    return (M @ v.unsqueeze(-1)).squeeze(-1)


def compose(B: Tensor, ar: Tensor, ac: Tensor) -> Tensor:
    return ar.unsqueeze(-1) * B * ac.unsqueeze(-2)


def row_column(
    W: Tensor,  # [..., rows, cols]
    mask: Tensor | None = None,  # bool of the same shape: the weights that count
    rounds: int = ROUNDS,
    columns: bool = True,  # False: row scales only, ac stays one
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, ar [..., rows], ac [..., cols]) with diag(ar) B diag(ac) near W; B is 0 outside the mask."""
    B = signs_of(W) if mask is None else signs_of(W) * mask
    size, count = (W * B), B.square()
    ar = size.sum(-1) / count.sum(-1).clamp_min(1)
    ac = torch.ones_like(W[..., 0, :])
    if columns:
        ac = (size / ar.unsqueeze(-1).clamp_min(SMALL)).sum(-2) / count.sum(-2).clamp_min(1)
        for _ in range(rounds):
            ar, ac = refit(W, B, ar, ac)
    return B, ar, ac


def second_order(
    W: Tensor,  # [..., rows, cols]
    mask: Tensor | None = None,
    rounds: int = ROUNDS,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Two planes (B, ar, ac) whose sum is near W: the second starts at the residual, then all six are refined in turn.

    A plane's scales are the least squares for the rest of W; the signs of a weight are the nearest of the four values
    +-a1 +-a2. So the error never rises.
    """
    first = row_column(W, mask, 0)
    planes = [first, row_column(W - compose(*first), mask, 0)]
    for _ in range(rounds):
        for p, (B, ar, ac) in enumerate(planes):
            planes[p] = (B, *refit(W - compose(*planes[1 - p]), B, ar, ac))
        a1, a2 = (ar.unsqueeze(-1) * ac.unsqueeze(-2) for _, ar, ac in planes)
        inside = 1.0 if mask is None else mask
        # for every choice of the second sign, the first's best; then the better of the two
        tried = []
        for sign in (1.0, -1.0):
            b1 = signs_of((W - sign * a2) * a1)
            tried.append((b1, (W - b1 * a1 - sign * a2).abs()))
        plus = tried[0][1] <= tried[1][1]
        b1, b2 = torch.where(plus, tried[0][0], tried[1][0]), plus_minus(plus)
        planes = [(b * inside, ar, ac) for b, (_, ar, ac) in zip((b1, b2), planes, strict=True)]
    return planes


def two_rows(
    W: Tensor,  # [..., rows, cols]
    rounds: int = ROUNDS,
    columns: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(B1, B2, a1, a2 [..., rows], ac [..., cols]) with (diag(a1) B1 + diag(a2) B2) diag(ac) near W.

    Both planes have the same column scales, because in the file these stand elsewhere and are everybody's.
    """
    B1, a1, ac = row_column(W, None, rounds, columns)
    B2, a2, _ = row_column(W / ac.unsqueeze(-2).clamp_min(SMALL) - a1.unsqueeze(-1) * B1, None, 0, False)
    for _ in range(rounds):
        rest = a2.unsqueeze(-1) * B2 * ac.unsqueeze(-2)
        a1, _ = refit(W - rest, B1, a1, ac, columns=False)
        a2, _ = refit(W - compose(B1, a1, ac), B2, a2, ac, columns=False)
        if columns:
            both = a1.unsqueeze(-1) * B1 + a2.unsqueeze(-1) * B2
            ac = (both * W).sum(-2) / both.square().sum(-2).clamp_min(SMALL)
        # magnitudes in order and positive: then the nearest of the four values has the signs of W and of what is left
        a1, a2 = torch.maximum(a1.abs(), a2.abs()), torch.minimum(a1.abs(), a2.abs())
        ac = ac.abs()
        scaled = W / ac.unsqueeze(-2).clamp_min(SMALL)
        B1 = signs_of(scaled)
        B2 = signs_of(scaled - a1.unsqueeze(-1) * B1)
    return B1, B2, a1, a2, ac


# ---- in the bytes of the file ----------------------------------------------------------------------------------------


@dataclass
class Binary:
    """W ~ (magnitudes signs) diag(columns), plus on the first columns (magnitudes2 signs2) diag(columns)."""

    signs: Tensor  # bool [batch, rows, cols]
    magnitudes: Tensor  # float32 [batch, rows, cols / 64], >= 0
    columns: Tensor  # float32 [batch, cols]
    signs2: Tensor  # bool [batch, rows, c], c a multiple of 64, may be 0
    magnitudes2: Tensor  # float32 [batch, rows, c / 64]
    aims: Tensor  # float32 [batch, rows, cols], the weights as error propagation left them for their block

    def decoded(self) -> Tensor:  # float32 [batch, rows, cols]
        W = decoded(self.signs, self.magnitudes, self.signs2, self.magnitudes2)
        return W * self.columns.unsqueeze(-2)


def propagate(
    W: Tensor,  # float32 [batch, rows, cols]
    U: Tensor,  # float32 [batch, groups, cols, cols], upper triangular, H_g^-1 = U_g^T U_g; groups of rows
    salient: int = 0,  # so many first columns have a second plane; a multiple of 64
    columns: bool = True,  # whether columns have scales
    rounds: int = ROUNDS,
) -> Binary:
    """ARB-RC block by block, errors made up for by the columns that follow.

    A block's error e = w - wq reaches the columns behind it as e U_bb^-1 U_b,after (GPTQ, eq. 3, for a block at once),
    with the group's U of a row.
    """
    batch, rows, cols = W.shape
    groups = U.shape[1]
    if cols % BLOCK_LEN or salient % BLOCK_LEN or not 0 <= salient <= cols or rows % groups:
        raise ValueError(f"{rows} rows in {groups} groups, {cols} columns, {salient} of them salient")
    w = W.clone()
    made: dict[str, list[Tensor]] = {n: [] for n in Binary.__dataclass_fields__}
    for start in range(0, cols, BLOCK_LEN):
        here, after = slice(start, start + BLOCK_LEN), slice(start + BLOCK_LEN, None)
        w0 = w[..., here]
        made["aims"].append(w0)
        if start < salient:
            B, B2, a, a2, ac = two_rows(w0, rounds, columns)
            wq = (a.unsqueeze(-1) * B + a2.unsqueeze(-1) * B2) * ac.unsqueeze(-2)
            made["signs2"].append(B2 > 0)
            made["magnitudes2"].append(a2.unsqueeze(-1))
        else:
            B, a, ac = row_column(w0, None, rounds, columns)
            wq = compose(B, a, ac)
        made["signs"].append(B > 0)
        made["magnitudes"].append(a.unsqueeze(-1))
        made["columns"].append(ac)
        if start + BLOCK_LEN < cols:
            e = (w0 - wq).view(batch, groups, rows // groups, BLOCK_LEN)
            v = torch.linalg.solve_triangular(U[..., here, here], e, upper=True, left=False)
            w[..., after] -= (v @ U[..., here, after]).view(batch, rows, -1)
    none = {"signs2": W.new_empty(batch, rows, 0, dtype=torch.bool), "magnitudes2": W.new_empty(batch, rows, 0)}
    return Binary(**{n: torch.cat(parts, -1) if parts else none[n] for n, parts in made.items()})


# ---- ARB-LLM's own form ----------------------------------------------------------------------------------------------


def arb_llm_rc(
    W: Tensor,  # float32 [rows, cols]
    U: Tensor,  # float32 [cols, cols], H^-1 = U^T U
    rounds: int = 15,
) -> tuple[Tensor, int]:
    """(weights float32 [rows, cols], bits that they take) of ARB-LLM-RC with its column-group bitmap (section 3.4).

    In blocks of 128 columns: the most salient columns, by w^2 / U_jj^4 as its code has it, get two planes; a bitmap
    over all weights splits both the salient and the other columns in two groups by magnitude. Every one of the four
    zones has row and column scales of its own. The number of salient columns and the thresholds are searched for.

    Counted are: a sign and a bit of the bitmap per weight, a second sign for the salient ones, a bit per column to say
    which those are, and the float16 scales (six per row and block, two per ordinary column, four per salient one).
    """
    rows, cols = W.shape
    w, made, bits = W.clone(), [], 0
    for start in range(0, cols, ARB_BLOCK):
        here, after = slice(start, start + ARB_BLOCK), slice(start + ARB_BLOCK, None)
        w0, u = w[:, here], U[here, here]
        score = (w0.square() / u.diagonal().pow(4)).sum(0)
        wq, count = _zones(w0, score.argsort(descending=True), rounds)
        made.append(wq)
        n = w0.shape[1]
        bits += 2 * rows * n + rows * count + n
        bits += SCALE_BITS * (rows * (6 if count else 2) + 2 * (n - count) + 4 * count)
        if start + ARB_BLOCK < cols:
            v = torch.linalg.solve_triangular(u, w0 - wq, upper=True, left=False)
            w[:, after] -= v @ U[here, after]
    return torch.cat(made, 1), bits


def _zones(W: Tensor, order: Tensor, rounds: int) -> tuple[Tensor, int]:
    """(approximation, number of salient columns) of one block; `order` has the most salient column first."""

    def salient(count: int) -> Tensor:
        mask = torch.zeros_like(W, dtype=torch.bool)
        mask[:, order[:count]] = True
        return mask

    def both(mask: Tensor, n: int) -> Tensor:
        first, second = second_order(W, mask, n)
        return compose(*first) + compose(*second)

    def error(approximation: Tensor) -> float:
        return float((W - approximation).square().sum())

    counts = [c for c in ARB_COUNTS if c < W.shape[1]]
    # as ARB-LLM searches it: with two planes on either side, or more columns would always be better
    count = min(counts, key=lambda c: error(both(salient(c), 0) + both(~salient(c), 0)))
    inner = salient(count)
    zones = []
    for mask, fit in ((inner, both), (~inner, lambda m, n: compose(*row_column(W, m, n)))):
        sizes = W[mask].abs()
        thresholds = torch.quantile(sizes, torch.linspace(0.1, 0.9, ARB_SPLITS, device=W.device))
        pairs = [(mask & (W.abs() >= t), mask & (W.abs() < t)) for t in thresholds]
        large, small = min(pairs, key=lambda pair: error((fit(pair[0], 0) + fit(pair[1], 0)) + W * ~mask))
        zones.append(fit(large, rounds) + fit(small, rounds))
    return zones[0] + zones[1], count
