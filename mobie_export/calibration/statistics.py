"""What did the experts of a layer see on the calibration text? Inputs, routing, saliency; second moments of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mobie_export import disk
from mobie_export.calibration import ranks
from mobie_export.calibration.states import save
from mobie_export.models.architecture import Activation, swiglu
from mobie_export.models.twin import PROJECTIONS, Experts, Twin

PRIOR_TOKENS = 4096  # of a layer, that stand in where an expert saw too few
ROWS_AT_ONCE = 8192  # of an expert's inputs


@dataclass(frozen=True)
class Part:
    """Of one batch."""

    x: Tensor  # float32 [n_tokens, width]
    index: Tensor  # int64 [n_tokens, k]
    saliency: dict[str, Tensor]  # projection -> float32 [n_tokens * k, groups], rows are token * k + choice


@dataclass
class LayerStatistics:
    """What a layer's experts saw on the calibration text, in the original model. Tokens are those of this rank; counts
    and what is a sum over tokens are of all ranks.

    Second moments are built when asked for, one expert at a time: all of a large layer's would not fit in memory.
    """

    x: Tensor  # float32 [n_tokens, width], inputs of gate and up
    index: Tensor  # int64 [n_tokens, k], experts of a token
    saliency: dict[str, Tensor]  # projection -> float32 [n_tokens * k, groups], mean squared gradient, scaled to mean 1
    weights: dict[str, Tensor]  # projection -> float32 [n_expert, rows, cols], the original ones
    fisher: dict[str, float]  # projection -> mean squared gradient, by which the saliency was scaled
    biases: dict[str, Tensor] = field(default_factory=dict)  # projection -> float32 [n_expert, rows]
    act: Activation = swiglu
    _of_layer: tuple[int, Tensor] | None = field(default=None, init=False, repr=False)  # see _layers_moment

    @classmethod
    def joined(cls, parts: list[Part], experts: Experts) -> "LayerStatistics":
        x, index = torch.cat([part.x for part in parts]), torch.cat([part.index for part in parts])
        saliency = {p: torch.cat([part.saliency[p] for part in parts]) for p in PROJECTIONS}
        fisher = {p: float(s.mean()) for p, s in saliency.items()}
        scaled = {p: s / max(fisher[p], 1e-30) for p, s in saliency.items()}
        return cls(x, index, scaled, experts.weights, fisher, experts.biases, experts.act)

    def save(self, file: BinaryIO) -> None:
        """Everything but the experts; inputs in bfloat16, as hidden states are."""
        save((self.x.bfloat16().cpu(), self.index.cpu(), self.saliency, self.fisher), file)

    @classmethod
    def load(cls, path: Path, twin: Twin, layer: int) -> "LayerStatistics":
        with disk.reading_back(path):
            x, index, saliency, fisher = torch.load(path, map_location=twin.device)
        return cls(x.float(), index, saliency, twin.experts(layer), fisher, twin.biases(layer), twin.arch.act)

    @property
    def n_expert(self) -> int:
        return len(self.weights["gate"])

    @property
    def counts(self) -> Tensor:  # int64 [n_expert], tokens an expert saw
        return ranks.summed(torch.bincount(self.index.flatten(), minlength=self.n_expert))

    def inputs(self, projection: str, rows: Tensor, expert: int) -> Tensor:
        """float32 [len(rows), cols]: inputs of a projection for rows token * k + choice of one expert."""
        x = self.x[rows // self.index.shape[1]]
        if projection != "down":
            return x
        gate, up = (x @ self.weights[p][expert].T for p in ("gate", "up"))
        if self.biases:
            gate, up = gate + self.biases["gate"][expert], up + self.biases["up"][expert]
        return self.act(gate, up)

    def energy(self, projection: str, expert: int) -> Tensor:  # float32 [cols]
        """sum_t s_t x_t^2, the diagonal of the expert's loss-weighted second moment."""
        rows = torch.nonzero(self.index.flatten() == expert).flatten()
        total = self.x.new_zeros(self.weights[projection].shape[2])
        for part in rows.split(ROWS_AT_ONCE):
            weights = self.saliency[projection][part].mean(1, keepdim=True)
            total += (self.inputs(projection, part, expert).square() * weights).sum(0)
        return ranks.summed(total)

    def second_moment(
        self,
        projection: str,
        expert: int,
        saliency: Tensor,  # float32 [n_tokens * k, groups]; all ones makes the plain second moment
        shrink: bool = True,
    ) -> Tensor:  # float32 [groups, cols, cols]
        """H_g = sum_t s_tg x_t x_t^T over the expert's tokens (GuidedQuant eq. 8).

        An expert that saw fewer tokens than it has columns is shrunk towards the layer: tokens of the whole layer go
        through it, with the weight of the tokens that are missing. So an expert without tokens has the moments of the
        layer's, and nobody's matrix lacks rank for want of tokens. Of several ranks each has its own tokens' part, and
        the sum is the moment.
        """
        rows = torch.nonzero(self.index.flatten() == expert).flatten()
        cols = self.weights[projection].shape[2]
        moments = saliency.new_zeros(saliency.shape[1], cols, cols)
        for part in rows.split(ROWS_AT_ONCE):
            x = self.inputs(projection, part, expert)
            for g in range(saliency.shape[1]):
                weighted = x * saliency[part, g].sqrt().unsqueeze(1)
                moments[g].addmm_(weighted.T, weighted)
        missing = cols - ranks.total(len(rows))
        if shrink and missing > 0:
            n, layers = self._layers_moment(projection, expert)
            moments += missing / n * layers * ranks.mean(saliency, 0)[:, None, None]
        return moments

    def _layers_moment(self, projection: str, expert: int) -> tuple[int, Tensor]:
        """(n, sum_t x_t x_t^T float32 [cols, cols], of this rank) of n tokens of the layer, of any expert. Those of
        gate and up are the same for every expert, and made once."""
        if projection != "down" and self._of_layer is not None:
            return self._of_layer
        spaced = ranks.spaced(len(self.x), PRIOR_TOKENS)  # evenly; their first choice stands for the token
        x = self.inputs(projection, torch.tensor(spaced, device=self.x.device) * self.index.shape[1], expert)
        found = int(ranks.total(len(x))), x.T @ x
        if projection != "down":
            self._of_layer = found
        return found
