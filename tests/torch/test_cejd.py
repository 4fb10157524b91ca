"""The shared factor against the singular value decomposition it stands for."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mobie_export.methods.paper import cejd  # noqa: E402 (needs torch)

E, ROWS, COLS = 5, 24, 40


def weights(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(E, ROWS, COLS, generator=g) * torch.logspace(0, -2, COLS)


def moments(seed: int, *lead: int):
    x = torch.randn(*lead, 200, COLS, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, 1, COLS)
    return x.mT @ x / 200


def side_by_side(W, side):  # float64, the matrix whose decomposition it is
    W = W.double()
    return W.reshape(-1, W.shape[2]) if side == "input" else W.transpose(0, 1).reshape(W.shape[1], -1)


@pytest.mark.parametrize("side", cejd.SIDES)
@pytest.mark.parametrize("metric", [False, True])
def test_full_rank_loses_nothing(side, metric):
    W = weights()
    C = None if not metric else moments(1) if side == "input" else moments(1, E)
    shared, blocks = cejd.decompose(W, side, moments=C)
    width = COLS if side == "input" else ROWS
    assert shared.shape == (width, width)
    torch.testing.assert_close(cejd.compose(shared, blocks, side), W, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", cejd.SIDES)
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_truncated_it_is_the_best_of_its_rank(side, rank):
    W = weights(2)
    shared, blocks = cejd.decompose(W, side, rank)
    assert shared.shape == ((rank, COLS) if side == "input" else (ROWS, rank))
    lost = float((W - cejd.compose(shared, blocks, side)).double().square().sum())
    best = torch.linalg.svdvals(side_by_side(W, side))[rank:].square().sum()
    assert best > 0 and lost == pytest.approx(float(best), rel=1e-3)


@pytest.mark.parametrize("rank", [3, 11])
def test_the_activation_metric_is_the_outputs_error(rank):
    W = weights(3)
    C = moments(4)
    root = torch.linalg.cholesky(C.double())  # C = root root^T
    shared, blocks = cejd.decompose(W, "input", rank, C)
    lost = ((W - cejd.compose(shared, blocks, "input")).double() @ root).square().sum()
    best = torch.linalg.svdvals((W.double() @ root).reshape(-1, COLS))[rank:].square().sum()
    assert float(lost) == pytest.approx(float(best), rel=1e-3)
    C = moments(5, E)
    root = torch.linalg.cholesky(C.double())
    shared, blocks = cejd.decompose(W, "output", rank, C)
    lost = ((W - cejd.compose(shared, blocks, "output")).double() @ root).square().sum()
    best = torch.linalg.svdvals((W.double() @ root).transpose(0, 1).reshape(ROWS, -1))[rank:].square().sum()
    assert float(lost) == pytest.approx(float(best), rel=1e-3)
    plain = cejd.compose(*cejd.decompose(W, "output", rank), "output")
    assert float(((W - plain).double() @ root).square().sum()) > float(lost)


@pytest.mark.parametrize("side", cejd.SIDES)
def test_blocks_together_are_orthonormal(side):
    _, blocks = cejd.decompose(weights(6), side)
    M = blocks.reshape(-1, COLS) if side == "input" else blocks.transpose(0, 1).reshape(ROWS, -1).T
    torch.testing.assert_close(M.T @ M, torch.eye(M.shape[1]), rtol=1e-3, atol=1e-3)


def test_directions_nobody_has_are_zeros_and_not_noise():
    W = weights(7)
    W[:, :, 10:] = 0
    shared, blocks = cejd.decompose(W, "input")
    assert torch.isfinite(blocks).all() and blocks.abs().max() < 10
    torch.testing.assert_close(cejd.compose(shared, blocks, "input"), W, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bits,stored,loss", [(16, 16, 1e-3), (8, 8.5, 0.02), (4, 4.5, 0.2)])
def test_rounding_takes_what_it_says(bits, stored, loss):
    shared = torch.randn(64, 96)
    raw, values = cejd.rounded(shared, bits)
    assert raw.dtype == np.uint8 and raw.shape[0] == 64 and raw.size * 8 == stored * shared.numel()
    assert 0 < (values - shared).norm() < loss * shared.norm()


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="rank 41 of 40"):
        cejd.decompose(weights(), "input", 41)
    with pytest.raises(ValueError, match="moments"):
        cejd.decompose(weights(), "output", None, moments(0))
    with pytest.raises(ValueError, match="left"):
        cejd.decompose(weights(), "left")
