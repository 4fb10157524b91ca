"""Factors of second moments and saliency against their formulas."""

import pytest

torch = pytest.importorskip("torch")

from mobie_export.methods.calibrated import glas  # noqa: E402 (needs torch)
from tests.moments import COLS, ROWS, damped, problem  # noqa: E402


@pytest.mark.parametrize("cols", [COLS, 1088])
def test_factor_is_one(cols):
    """Triangular, and its product is the moments; of a size that is factorized by parts, too."""
    _, H = problem(0, cols=cols)
    R = glas.factor(H)  # H is damped from here on
    assert torch.equal(R, R.triu()) and (R.diagonal(dim1=1, dim2=2) > 0).all()
    torch.testing.assert_close(R.double() @ R.double().mT, H.double(), rtol=1e-4, atol=1e-5 * float(H.max()))


def test_factor_dampens_only_what_needs_it():
    _, H = problem(0, cols=1088)
    H[1, 1000:, 1000:] -= 2 * torch.eye(88) * H[1].diagonal().max()  # indefinite in the part that comes first
    before = H.clone()
    R = glas.factor(H)
    added = (H - before).diagonal(dim1=1, dim2=2).mean(1) / before.diagonal(dim1=1, dim2=2).mean(1)
    assert added[0] == pytest.approx(glas.DAMPING, rel=1e-3) and added[1] > 2 * glas.DAMPING
    assert torch.isfinite(R).all()


def test_inverse_factor_is_one():
    _, H = problem(0)
    U = glas.inverse_factor(H.clone())
    assert torch.equal(U, U.triu())
    product = U.transpose(1, 2) @ U @ damped(H)
    assert (product - torch.eye(COLS)).abs().max() < 1e-3


def test_inverse_factor_of_hopeless_moments():
    """No tokens at all, fewer tokens than columns, columns that never occurred, hugely different columns."""
    few = torch.randn(3, COLS)
    few[:, 5] = 0
    wild = torch.randn(2000, COLS) * torch.logspace(-8, 8, COLS)
    H = torch.stack([torch.zeros(COLS, COLS), few.T @ few, wild.T @ wild])
    assert torch.isfinite(glas.inverse_factor(H)).all()


def test_saliency_is_its_formula():
    W, H = problem(6, batch=4)
    H = damped(H)
    groups = H.view(2, 2, COLS, COLS)  # two experts, two groups of rows each
    U = glas.inverse_factor(H.clone(), damping=0.0).view_as(groups)
    found = glas.saliency(W[:2], U)
    for e in range(2):
        inverse = [torch.linalg.inv(groups[e, g].double()).diagonal() for g in (0, 1)]
        rows = [W[e, j].double().square() / inverse[j * 2 // ROWS].square() for j in range(ROWS)]
        torch.testing.assert_close(found[e].double(), torch.stack(rows).mean(0), rtol=1e-3, atol=0)
