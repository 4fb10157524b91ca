"""Row and column factors that undo what binarization shifts: null-space guided expert-shift suppression.

MoBiE (arXiv 2604.06798, section "NGES"). P projects onto the directions that inputs (nearly) never take. There it does
not matter what the binary matrix does, so the target follows it: D = W - (W - Wq) P. Then br and bc are sought with

    |D - diag(br) Wq diag(bc)|^2 + lambda (|br - 1|^2 + |bc - 1|^2)

least, one after the other, each step being the exact minimum for the other's value:

    br_i = (sum_k Wq_ik bc_k D_ik + lambda) / (sum_k (Wq_ik bc_k)^2 + lambda),   bc_k likewise.

So the objective never rises. Both vectors fold into the scales of a binary matrix. Tensors in, tensors out.
"""

import torch
from torch import Tensor

LAMBDA = 0.2
SWEEPS = 15
TOLERANCE = 1e-5  # relative change of the objective at which the sweeps end
NULL_SHARE = 1e-3  # of the inputs' energy may lie in what is called the null space


def null_projector(
    moments: Tensor,  # float32 [..., n, n], X X^T of the inputs
    share: float = NULL_SHARE,
) -> Tensor:  # float32 [..., n, n]
    """P = U0 U0^T, with U0 the eigenvectors of the least eigenvalues that hold at most `share` of the energy together.

    The paper says "near-zero eigenvalues" and names no threshold.
    """
    values, vectors = torch.linalg.eigh(moments)
    energy = values.clamp_min(0).cumsum(-1)
    null = energy <= share * energy[..., -1:].clamp_min(1e-30)
    U0 = vectors * null.unsqueeze(-2)
    return U0 @ U0.transpose(-1, -2)


def target(
    W: Tensor,  # [..., rows, cols]
    Wq: Tensor,  # [..., rows, cols]
    P: Tensor,  # [..., cols, cols]
) -> Tensor:  # [..., rows, cols]
    """D = W - (W - Wq) P."""
    return W - (W - Wq) @ P


def objective(D: Tensor, Wq: Tensor, br: Tensor, bc: Tensor, lam: float) -> Tensor:  # [...]
    """|D - diag(br) Wq diag(bc)|^2 + lambda (|br - 1|^2 + |bc - 1|^2)."""
    error = D - br.unsqueeze(-1) * Wq * bc.unsqueeze(-2)
    return error.square().sum((-1, -2)) + lam * ((br - 1).square().sum(-1) + (bc - 1).square().sum(-1))


def fit(
    D: Tensor,  # [..., rows, cols]
    Wq: Tensor,  # [..., rows, cols]
    lam: float = LAMBDA,
    sweeps: int = SWEEPS,
    tolerance: float = TOLERANCE,
    columns: bool = True,  # False: bc stays one, where no place is left to fold it into
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(br [..., rows], bc [..., cols], the objective before and after every sweep [...]).

    lambda is in the units of a row's energy: matrices of another scale want another one.
    """
    br, bc = torch.ones_like(D[..., 0]), torch.ones_like(D[..., 0, :])
    product, square = Wq * D, Wq.square()

    def times(M: Tensor, v: Tensor) -> Tensor:
        return (M @ v.unsqueeze(-1)).squeeze(-1)

    history = [objective(D, Wq, br, bc, lam)]
    for _ in range(sweeps):
        br = (times(product, bc) + lam) / (times(square, bc.square()) + lam).clamp_min(1e-30)
        if columns:
            bc = (times(product.mT, br) + lam) / (times(square.mT, br.square()) + lam).clamp_min(1e-30)
        history.append(objective(D, Wq, br, bc, lam))
        if (history[-2] - history[-1] <= tolerance * history[-2]).all():
            break
    return br, bc, history
