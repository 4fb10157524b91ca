"""Signs and magnitudes of a matrix under second moments: error propagation, then coordinate descent.

The error that counts is tr(dW H dW^T), as `glas` has it. H = R R^T with R upper triangular, so that for a row with the
error d of its columns it is |R^T d|^2: what column j adds depends on the columns before it alone. Error propagation
(GPTQ, arXiv 2210.17323, in the form of a nearest plane, arXiv 2507.18553) decides column after column by it and needs
no inverse. Descent then goes over the columns again, with all others in view.

Matrices are handled transposed, [batch, cols, rows], so that a column is contiguous. A batch item is one expert.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mobie_export.methods.calibrated import compiled
from mobie_export.spec.block import BLOCK_LEN, Coding

# The largest magnitude of an expert, in medians of its blocks. A scale of 8 bits that counts from the largest one is
# left with steps of a quarter of the median; without a bound the row that writes massive activations takes all of them
# for itself (docs/measured/real-weights.md).
SPREAD = 64.0
SPAN = 256  # columns whose products with all others are made at once; a multiple of every block's length


@dataclass
class Binary:
    """Binary weights that are being searched for: the sum over both planes of magnitude and sign."""

    w: Tensor  # float32 [batch, cols, rows], what they are to be near to
    signs: Tensor  # float32 [batch, cols, rows], +-1
    magnitudes: Tensor  # float32 [batch, cols / block_len, rows], >= 0
    columns: Tensor  # int64 [k], those with a second sign
    signs2: Tensor  # float32 [batch, k, rows], +-1
    magnitudes2: Tensor  # float32 [batch, k / block_len, rows], >= 0
    left: Tensor  # float32 [batch, cols, rows], w without the binary weights
    most: Tensor  # float32 [batch, 1], that a magnitude may be

    @property
    def block_len(self) -> int:
        """Columns that share a magnitude."""
        return self.signs.shape[1] // self.magnitudes.shape[1]

    def places(self) -> dict[int, int]:
        """Column -> its place among those with a second sign."""
        return {column: k for k, column in enumerate(self.columns.tolist())}

    def planes(self) -> tuple[Tensor, ...]:
        """(signs, magnitudes) and, where columns have a second sign, (signs2, magnitudes2), as `Planes` has them."""
        first = (self.signs > 0).mT, self.magnitudes.mT
        return first if not len(self.columns) else (*first, (self.signs2 > 0).mT, self.magnitudes2.mT)


def largest(W: Tensor, coding: Coding) -> Tensor | None:  # float32 [batch, rows, cols] -> [batch, 1]
    """What a magnitude may be for the others to keep their digits; None where the type has digits for all."""
    if coding.stock:  # a float16 for every block
        return None
    sizes = W.abs().unflatten(2, (-1, coding.length)).mean(3).flatten(1)
    median = sizes.masked_fill(sizes == 0, torch.nan).nanmedian(1, keepdim=True).values
    return SPREAD * median.nan_to_num(torch.inf)


def propagate(
    W: Tensor,  # float32 [batch, rows, cols]
    R: Tensor,  # float32 [batch, cols, cols], upper triangular, H = R R^T
    columns: Tensor | None = None,  # int64 [k], those with a second sign, k a multiple of block_len
    block_len: int = BLOCK_LEN,
    most: Tensor | None = None,  # float32 [batch, 1], as `largest` has it; None: as large as it comes
) -> Binary:
    """Signs and block magnitudes, block by block, errors made up for by the columns that follow.

    With d the errors of the columns before, column j would best have the weight x_j = w_j + sum_i R_ij d_i / R_jj: its
    sign is that of x_j, for a magnitude a that is first the mean |x| of the block before any of it is decided, under
    the weights R_jj^2. For the signs b of a block, V = R_bb^T and t what the columns before it add, its magnitude is
    then <V w + t, V b> / |V b|^2, the best one. A column with a second sign takes the nearest of +-a +-a2, with an a2
    that was fitted to the weights before (`_second_magnitudes`).
    """
    w = W.mT.contiguous()
    batch, cols, rows = w.shape
    columns = torch.empty(0, dtype=torch.int64, device=w.device) if columns is None else columns
    a = w.new_empty(batch, cols // block_len, rows)
    r = w.new_empty(batch, len(columns), rows)
    most = w.new_full((batch, 1), torch.inf) if most is None else most
    a2 = torch.minimum(_second_magnitudes(w, R, columns, block_len), most[..., None])
    found = Binary(w, torch.empty_like(w), a, columns, r, a2, w.clone(), most)
    diagonal, places, search = R.diagonal(dim1=1, dim2=2), found.places(), compiled.best(w.device)
    for first in range(0, cols, SPAN):
        end = min(first + SPAN, cols)
        t = R[:, :first, first:end].mT @ found.left[:, :first]
        if search:
            compiled.run(search.propagate, found, slice(first, end), R[:, first:end, first:end], t, places)
            continue
        for start in range(first, end, block_len):
            here = slice(start, start + block_len)
            behind = slice(start - first + block_len, end - first)
            _block(found, here, R[:, here, here], diagonal[:, here], t[:, start - first : behind.start], places)
            t[:, behind].baddbmm_(R[:, here, here.stop : end].mT, found.left[:, here])
    return found


def _block(found: Binary, here: slice, R: Tensor, d: Tensor, t: Tensor, places: dict[int, int]) -> None:
    """Signs and magnitude of one block's columns; R [batch, n, n] of these, d [batch, n] its diagonal, t [batch, n,
    rows] what the columns before add."""
    w, b, left = found.w[:, here], found.signs[:, here], found.left[:, here]
    block_len, d = d.shape[1], d[..., None]
    x = w + torch.linalg.solve_triangular(R.mT, t, upper=False)
    a = torch.minimum((d.square() * x.abs()).sum(1) / d.square().sum(1), found.most)
    x = torch.addcdiv(w, t, d)
    towards, one = R / d.mT, torch.ones_like(a)
    best, own, decided, errors = x.unbind(1), w.unbind(1), b.unbind(1), left.unbind(1)  # views once, not in the loop
    for j in range(block_len):
        torch.copysign(one, best[j], out=decided[j])
        torch.addcmul(own[j], a, decided[j], value=-1, out=errors[j])
        k = places.get(here.start + j)
        if k is not None:
            # the nearest of +-a2 is that of what this column would best have, not of its weight
            rest = torch.addcmul(best[j], a, decided[j], value=-1)
            torch.copysign(one, rest, out=found.signs2[:, k])
            errors[j].addcmul_(found.magnitudes2[:, k // block_len], found.signs2[:, k], value=-1)
        if j + 1 < block_len:
            x[:, j + 1 :].addcmul_(towards[:, j, j + 1 :, None], left[:, j : j + 1])
    left.addcmul_(b, a[:, None])  # what is left for the first plane
    vb = R.mT @ b
    a = (torch.baddbmm(t, R.mT, left) * vb).sum(1).div_(vb.square().sum(1)).clamp_min_(0)
    a = torch.minimum(a, found.most)
    left.addcmul_(b, a[:, None], value=-1)
    found.magnitudes[:, here.start // block_len] = a


def _second_magnitudes(
    w: Tensor,  # [batch, cols, rows]
    R: Tensor,  # [batch, cols, cols]
    columns: Tensor,  # int64 [k]
    block_len: int,
    rounds: int = 4,
) -> Tensor:  # [batch, k / block_len, rows]
    """Magnitudes of the second plane, from weights that nothing was propagated into: both planes' in turn, each the
    mean under R_jj^2 of what the other leaves."""
    batch, _, rows = w.shape
    a2 = w.new_empty(batch, 0, rows)
    if not len(columns):
        return a2
    weights = R.diagonal(dim1=1, dim2=2).square()[..., None]  # [batch, cols, 1]
    size, own, of = w.abs(), weights[:, columns], columns // block_len

    def sums(x: Tensor) -> Tensor:  # over the columns of a block
        return x.unflatten(1, (-1, block_len)).sum(2)

    first, all_weights = sums(size * weights), sums(weights)
    a = first / all_weights
    for _ in range(rounds):
        left = size[:, columns] - a[:, of]
        a2 = sums(left.abs() * own) / sums(own)
        second = torch.copysign(a2.repeat_interleave(block_len, 1), left).mul_(own)
        a = first.index_add(1, of, second, alpha=-1) / all_weights
    return a2


def descend(found: Binary, H: Tensor) -> None:  # float32 [batch, cols, cols], damped
    """One sweep of coordinate descent, in place: every sign turned where that lessens tr(dW H dW^T), one column after
    the other, all rows at once; after a block's signs its magnitude, the best one with all else as it is.

    Error propagation decides a sign by the columns behind it, which can still make up for it; here those before it
    count as well. A sign b of magnitude a that turns adds 2 a b to the error d_j, and the row's part of the form
    changes by 4 a (b (H d)_j + a H_jj).
    """
    cols, block_len, places, search = H.shape[1], found.block_len, found.places(), compiled.best(H.device)
    for first in range(0, cols, SPAN):
        end = min(first + SPAN, cols)
        g = H[:, first:end] @ found.left
        if search:
            compiled.run(search.descend, found, slice(first, end), H[:, first:end, first:end], g, places)
            continue
        for start in range(first, end, block_len):
            here = slice(start, start + block_len)
            behind = slice(start - first + block_len, end - first)
            h = H[:, here, here].contiguous()
            changed = _turned(found, here, h, g[:, start - first : behind.start], places)
            g[:, behind].baddbmm_(H[:, here.stop : end, here], changed)
    for k in range(0, len(found.columns), block_len):
        these = found.columns[k : k + block_len]
        b, a = found.signs2[:, k : k + block_len], found.magnitudes2[:, k // block_len]
        more = _better(a, b, H[:, these] @ found.left, H[:, these][:, :, these], found.most)
        found.left.index_add_(1, these, b * more[:, None], alpha=-1)


def _turned(found: Binary, here: slice, h: Tensor, g: Tensor, places: dict[int, int]) -> Tensor:
    """Signs and magnitude of one block; g = (H d) of its columns. What its errors change by, [batch, n, rows]."""
    n, start = h.shape[1], here.start
    b, a = found.signs[:, here], found.magnitudes[:, start // n]
    changed = _turn(b, a[:, None], h, g, list(range(n)))
    second = [j for j in range(n) if start + j in places]
    if second:
        at = torch.tensor([places[start + j] for j in second], device=b.device)
        b2 = found.signs2[:, at]
        changed += _turn(b2, found.magnitudes2[:, at // n], h, g + h @ changed, second)
        found.signs2[:, at] = b2
    more = _better(a, b, torch.baddbmm(g, h, changed), h, found.most)
    changed.addcmul_(b, more[:, None], value=-1)
    found.left[:, here] += changed
    return changed


def _turn(b: Tensor, a: Tensor, h: Tensor, g: Tensor, at: list[int]) -> Tensor:
    """Turns signs b [batch, len(at), rows], of magnitudes a, of the columns `at` of a block, in place. What the errors
    of all columns of the block change by, [batch, n, rows]."""
    near, twice = g.clone(), 2 * h
    step = b * a
    cost = step.square() * h.diagonal(dim1=1, dim2=2)[:, at, None]
    taken = torch.zeros_like(g)
    # views once and not in the loop, which has a dozen calls for a column
    steps, costs, slopes, turns = step.unbind(1), cost.unbind(1), near.unbind(1), taken.unbind(1)
    for i, j in enumerate(at):
        pays = torch.addcmul(costs[i], steps[i], slopes[j]).lt_(0)
        torch.mul(steps[i], pays, out=turns[j])
        if j + 1 < len(turns):
            near[:, j + 1 :].addcmul_(twice[:, j, j + 1 :, None], taken[:, j : j + 1])  # those before had their turn
    b.copy_(torch.where(taken[:, at] != 0, -b, b))
    return taken.mul_(2)


def _better(a: Tensor, b: Tensor, g: Tensor, h: Tensor, most: Tensor) -> Tensor:
    """Sets magnitudes a [batch, rows] of signs b [batch, n, rows] to the best ones from 0 to most [batch, 1]; what was
    added to them."""
    more = (b * g).sum(1) / (b * (h @ b)).sum(1).clamp_min(1e-30)
    more = torch.minimum(torch.maximum(more, -a), most - a)
    a += more
    return more
