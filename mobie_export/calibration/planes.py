"""Planes of signs: the binary weights of one projection of a layer, as tensors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mobie_export.spec import block
from mobie_export.spec.block import Coding


class Planes(NamedTuple):
    """The binary weights of one projection of a layer: a b_j in column j, plus a2 b2_j where it has a second sign.

    How many columns share a magnitude, 64 or 128, is what the shapes say.
    """

    signs: Tensor  # bool [E, rows, cols], True is plus
    magnitudes: Tensor  # float32 [E, rows, cols / block_len], >= 0
    signs2: Tensor | None = None  # bool [E, rows, k]
    magnitudes2: Tensor | None = None  # float32 [E, rows, k / block_len], >= 0
    columns: Tensor | None = None  # int64 [k], those with a second sign; None where they are the first k

    def to(self, device: torch.device | str) -> "Planes":
        more = (None if t is None else t.to(device) for t in self[2:])
        return Planes(self.signs.to(device), self.magnitudes.to(device), *more)


def placed(
    whole: Planes | None,  # None: nothing is there yet
    n_expert: int,
    experts: Tensor | slice | int,  # int64 [n], which ones `part` has
    part: Planes,
) -> Planes:
    """The planes of n_expert experts with those of some in their places: nothing is there twice, as when parts are
    joined at the end."""
    if whole is None:
        signs, a, signs2, a2 = (None if t is None else t.new_empty(n_expert, *t.shape[1:]) for t in part[:4])
        assert signs is not None and a is not None
        whole = Planes(signs, a, signs2, a2, part.columns)
    for mine, t in zip(whole[:4], part[:4], strict=True):
        if mine is not None and t is not None:
            mine[experts] = t
    return whole


def rounded(parts: Sequence[Planes], coding: Coding) -> list[Planes]:
    """Planes of the projections that are one tensor, with magnitudes as a file of this type has them."""
    found = iter(as_stored([a for part in parts for a in (part.magnitudes, part.magnitudes2) if a is not None], coding))
    made = []
    for part in parts:
        part = part._replace(magnitudes=next(found))
        made.append(part if part.magnitudes2 is None else part._replace(magnitudes2=next(found)))
    return made


def as_stored(a: list[Tensor], coding: Coding) -> list[Tensor]:
    """Magnitudes, float32 [E, rows, blocks], of all that shares the scale of an expert, as the file holds them.

    What the type cannot hold stays as it is: `exportable.scales` refuses it when it is to be written.
    """
    largest = torch.stack([t.amax((1, 2)) for t in a if t.numel()]).amax(0)[:, None, None]
    if coding.stock:
        held = (largest >= block.LEAST_HALF) & torch.isfinite(largest.half())
        return [torch.where(held, t.half().float(), t) for t in a]
    step = torch.where(largest > 0, largest / block.SCALE_MAX, 1)
    return [torch.round(t / step) * step for t in a]


def plus_minus(signs: Tensor) -> Tensor:
    """bool -> float32 +-1. Not by torch.where, which takes a bool at a time on CPUs: ten times as long."""
    return signs.view(torch.uint8).float().mul_(2).sub_(1)


def signs_of(w: Tensor) -> Tensor:
    """+-1 as the format has them: zero is plus, a negative zero as well."""
    return torch.copysign(w.new_ones((), dtype=torch.float32), w + 0.0)


def decoded(
    signs: Tensor,
    magnitudes: Tensor,
    signs2: Tensor | None = None,
    magnitudes2: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:  # float32 [..., cols]
    """Weights of `Planes`."""

    def plane(b: Tensor, a: Tensor) -> Tensor:
        block_len = b.shape[-1] // max(1, a.shape[-1])  # a plane may have no columns
        return (plus_minus(b).reshape(*a.shape, block_len) * a.unsqueeze(-1)).reshape(b.shape)

    w = plane(signs, magnitudes)
    if signs2 is not None and magnitudes2 is not None:
        columns = torch.arange(signs2.shape[-1], device=w.device) if columns is None else columns
        w.index_add_(w.dim() - 1, columns, plane(signs2, magnitudes2))
    return w
