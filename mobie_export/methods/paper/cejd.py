"""One factor shared by all experts of a layer: cross-expert joint decomposition. Tensors in, tensors out.

MoBiE (arXiv 2604.06798, eq. 4 and 14-17, "CEJD") puts the experts' matrices side by side, takes the singular value
decomposition [W_1 | ... | W_n] = U S V^T, keeps U S for all experts and binarizes every expert's block of V^T. That is
side "output" here: W_e = shared @ blocks[e]. Stacked one above the other instead, the experts share the other side,
"input": W_e = blocks[e] @ shared.

Only the shared side's Gram matrix is ever decomposed: U and S^2 are the eigenvectors and eigenvalues of
sum_e W_e W_e^T (input side: of sum_e W_e^T W_e), a matrix no larger than the layer is wide.
"""

import gguf
import numpy as np
import torch
from torch import Tensor

SIDES = ("input", "output")
# Directions whose singular value is below this share of the largest one hold nothing but rounding.
NOTHING = 1e-6
FACTOR_TYPES = {16: gguf.GGMLQuantizationType.F16, 8: gguf.GGMLQuantizationType.Q8_0, 4: gguf.GGMLQuantizationType.Q4_0}


def decompose(
    W: Tensor,  # float32 [n_expert, rows, cols]
    side: str,  # "input" or "output"
    rank: int | None = None,  # None: all of it
    moments: Tensor | None = None,  # [cols, cols] (input side) or [n_expert, cols, cols] (output side)
) -> tuple[Tensor, Tensor]:
    """(shared, blocks): float32 [rank, cols] and [n_expert, rows, rank], or [rows, rank] and [n_expert, rank, cols].

    The product is the best of its rank for sum_e |W_e - W'_e|^2 (the weight metric), or with second moments C of the
    inputs for sum_e tr((W_e - W'_e) C_e (W_e - W'_e)^T) (the activation metric; the inputs of the input side are common
    to all experts). At full rank both reproduce W; they differ in the basis, and in the order of energy.

    The blocks have orthonormal columns when stacked (rows when side by side), in the metric: the singular values are in
    the shared factor. Raises ValueError for shapes that do not fit.
    """
    n_expert, rows, cols = W.shape
    width = cols if side == "input" else rows
    rank = width if rank is None else rank
    wanted = None if moments is None else ((cols, cols) if side == "input" else (n_expert, cols, cols))
    if side not in SIDES or not 1 <= rank <= width or (moments is not None and tuple(moments.shape) != wanted):
        found = None if moments is None else tuple(moments.shape)
        raise ValueError(f"side {side!r}, rank {rank} of {width}, moments {found}, wanted {wanted}")
    root = _root(moments) if moments is not None and side == "input" else None
    gram = W.new_zeros(width, width, dtype=torch.double)
    for e in range(n_expert):  # the sum of squares loses half the digits: hence double
        w = W[e].double()
        if side == "input":
            w = w if root is None else w @ root[0]
            gram.addmm_(w.T, w)
        else:
            gram += (w if moments is None else w @ moments[e].double()) @ w.T
    energy, basis = torch.linalg.eigh(gram)  # ascending
    energy, basis = energy.flip(0)[:rank], basis.flip(1)[:, :rank]
    size = energy.clamp_min(0).sqrt()  # singular values
    inverse = torch.where(size > NOTHING * size[0], 1 / size, 0.0)
    if side == "input":
        outer, inner = (basis, basis) if root is None else (root[1] @ basis, root[0] @ basis)
        return (size[:, None] * outer.T).float(), W @ (inner * inverse).float()
    return (basis * size).float(), (basis * inverse).T.float() @ W


def _root(C: Tensor) -> tuple[Tensor, Tensor]:
    """C^(1/2) and its inverse, float64; directions without energy count as the least that is something."""
    values, vectors = torch.linalg.eigh(C.double())
    values = values.clamp_min(NOTHING * values[-1].clamp_min(1e-300)).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def compose(shared: Tensor, blocks: Tensor, side: str) -> Tensor:  # [n_expert, rows, cols]
    """W_e = blocks[e] shared, or shared blocks[e]."""
    return blocks @ shared if side == "input" else shared @ blocks


def rounded(shared: Tensor, bits: int) -> tuple[np.ndarray, Tensor]:
    """(bytes as stored, uint8 [rows, bytes of a row]; float32 of what they decode to) of a factor in 16, 8 or 4 bits.

    8 and 4 bits are GGUF's Q8_0 and Q4_0: 32 weights of a row share a float16 scale, so they take 8.5 and 4.5. The
    inner dimension is the shared one on the output side (singular values fall along it, slowly) and the model's width
    on the input side (a singular value is a row's).
    """
    kind = FACTOR_TYPES[bits]
    stored = gguf.quants.quantize(np.ascontiguousarray(shared.cpu().numpy()), kind)
    values = torch.from_numpy(gguf.quants.dequantize(stored, kind)).to(shared.device)
    return stored.view(np.uint8).reshape(len(shared), -1), values
