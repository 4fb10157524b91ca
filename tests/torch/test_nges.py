"""Expert-shift suppression: the objective never rises, and the factors are where its gradient is zero."""

import itertools

import pytest

torch = pytest.importorskip("torch")

from mobie_export.methods.paper import nges  # noqa: E402 (needs torch)

ROWS, COLS = 12, 20


def problem(seed: int, batch: tuple[int, ...] = (3,)):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(*batch, ROWS, COLS, generator=g) * torch.rand(*batch, 1, COLS, generator=g)
    return W, torch.where(W >= 0, 1.0, -1.0) * W.abs().mean((-1, -2), keepdim=True)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lam", [0.0, 0.2, 5.0])
def test_the_objective_never_rises(seed, lam):
    W, Wq = problem(seed)
    _, _, history = nges.fit(W, Wq, lam, sweeps=40, tolerance=0)
    assert len(history) > 5
    for before, after in itertools.pairwise(history):
        assert (after <= before * (1 + 1e-5)).all()
    assert (history[-1] < 0.95 * history[0]).all()


def test_at_the_end_no_factor_can_be_bettered_alone():
    W, Wq = (x.double() for x in problem(7))
    br, bc, history = nges.fit(W, Wq, 0.2, sweeps=500, tolerance=0)
    br, bc = br.requires_grad_(), bc.requires_grad_()
    now = nges.objective(W, Wq, br, bc, 0.2)
    torch.testing.assert_close(now, history[-1])
    for gradient in torch.autograd.grad(now.sum(), (br, bc)):
        assert gradient.abs().max() < 1e-6


def test_one_step_is_brute_force():
    W, Wq = problem(8, (1,))
    br, _, _ = nges.fit(W, Wq, 0.2, sweeps=1)
    grid = torch.linspace(0, 3, 30001)
    row = 4
    tried = (W[0, row] - grid[:, None] * Wq[0, row]).square().sum(1) + 0.2 * (grid - 1).square()
    assert float(br[0, row]) == pytest.approx(float(grid[tried.argmin()]), abs=2e-4)


def test_it_stops_and_a_perfect_matrix_stays():
    W, Wq = problem(9)
    *_, history = nges.fit(W, Wq, sweeps=200)
    assert len(history) < 100
    br, bc, history = nges.fit(W, W)
    assert torch.allclose(br, torch.ones_like(br)) and torch.allclose(bc, torch.ones_like(bc))
    assert float(history[-1].max()) < 1e-8


def test_scales_that_were_lost_are_found():
    _, Wq = problem(10)
    br, bc = 0.5 + torch.rand(3, ROWS), 0.5 + torch.rand(3, COLS)
    D = br.unsqueeze(-1) * Wq * bc.unsqueeze(-2)
    found = nges.fit(D, Wq, lam=0.0, sweeps=200, tolerance=0)
    torch.testing.assert_close(found[0].unsqueeze(-1) * Wq * found[1].unsqueeze(-2), D, rtol=1e-4, atol=1e-5)


def test_the_target_differs_only_where_inputs_go():
    W, Wq = problem(11)
    x = torch.randn(3, 200, 12) @ torch.randn(3, 12, COLS)  # 12 of 20 directions
    P = nges.null_projector(x.mT @ x)
    torch.testing.assert_close(P @ P, P, rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_rank(P[0]) >= COLS - 12
    D = nges.target(W, Wq, P)
    # on the inputs the target is the original (but for the little energy that counts as null), off them the binary one
    moved, whole = ((M @ x.mT).square().sum() for M in (D - W, Wq - W))
    assert moved <= 2e-3 * whole and (D - W).norm() > 0.1 * (Wq - W).norm()
    torch.testing.assert_close(D @ P, Wq @ P, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(nges.target(W, Wq, torch.zeros_like(P)), W)


def test_projector_shares():
    C = torch.diag(torch.tensor([100.0, 10.0, 0.05, 0.04, 0.0]))
    kept = [int(torch.linalg.matrix_rank(nges.null_projector(C, s))) for s in (1e-9, 5e-4, 1e-3, 0.2, 1.0)]
    assert kept == [1, 2, 3, 4, 5]
    assert torch.isfinite(nges.null_projector(torch.zeros(4, 4))).all()
