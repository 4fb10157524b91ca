"""Planes of signs: the binary weights of one projection of a layer, as tensors."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mobie_export.spec import exportable
from mobie_export.spec.block import Coding

MAGNITUDES = ("magnitudes", "magnitudes2")


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


def rounded(parts: Sequence[Planes], coding: Coding, name: str) -> list[Planes]:
    """Planes of the projections that are one tensor, of this name, with magnitudes as a file of this type has them.
    MobieError where the type cannot hold them."""
    fields = [(i, f) for i, part in enumerate(parts) for f in MAGNITUDES if getattr(part, f) is not None]
    found = {at: torch.empty_like(getattr(parts[at[0]], at[1])) for at in fields}
    for e in range(len(parts[0].signs)):
        of_expert = [getattr(parts[i], f)[e].cpu().numpy().astype(np.float64) for i, f in fields]
        scale, codes = exportable.scales(np.concatenate([a.ravel() for a in of_expert]), coding, name)
        values = torch.from_numpy(codes.astype(np.float32) * (scale * np.float32(coding.unit)))
        for at, part in zip(fields, values.split([a.size for a in of_expert]), strict=True):
            found[at][e] = part.view(found[at][e].shape)
    return [part._replace(**{f: found[i, f] for j, f in fields if j == i}) for i, part in enumerate(parts)]


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
