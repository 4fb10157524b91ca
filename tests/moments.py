"""Small matrices and the second moments of their inputs, correlated and of unequal sizes."""

import torch

from mobie_export.methods.calibrated import glas

ROWS, COLS = 6, 320


def problem(seed: int, n_tokens: int = 1000, batch: int = 2, cols: int = COLS):
    """W [batch, ROWS, cols], H [batch, cols, cols]"""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(batch, cols // 8, cols, generator=g)
    x = torch.randn(batch, n_tokens, cols, generator=g)
    x = x + x[..., : cols // 8] @ mix
    x *= 0.1 + torch.rand(cols, generator=g)
    return torch.randn(batch, ROWS, cols, generator=g), x.transpose(1, 2) @ x


def damped(H):
    return H + glas.DAMPING * H.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(H.shape[1])
