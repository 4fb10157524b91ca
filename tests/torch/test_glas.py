"""Error propagation against its definition, solved the slow way in float64."""

import pytest

torch = pytest.importorskip("torch")

from mobie_export.calibration import planes  # noqa: E402
from mobie_export.methods.calibrated import glas  # noqa: E402 (needs torch)

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


def by_definition(W, H, block_len):
    """float64 W [rows, cols], H [cols, cols] -> signs, magnitudes. Columns are fixed one after the other; all later
    ones move to where they make up best for it, found by solving for them."""
    w, n = W.clone(), W.shape[1]
    signs, magnitudes = torch.empty_like(W), []

    def moved(w, fixed, delta):
        """Columns from `fixed` on after the ones before it were changed by delta [rows, fixed - start]."""
        start = fixed - delta.shape[1]
        return w[:, fixed:] - torch.linalg.solve(H[fixed:, fixed:], (delta @ H[start:fixed, fixed:]).T).T

    for start in range(0, n, block_len):
        end = start + block_len
        inverse = torch.linalg.inv(H[start:, start:])
        # 1 / U_jj^2 is what column j costs when all later ones make up for it
        weights = torch.stack([1 / torch.linalg.inv(H[j:, j:])[0, 0] for j in range(start, end)])
        a = (w[:, start:end].abs() * weights).sum(1) / weights.sum()
        inner = w.clone()
        for j in range(start, end):
            signs[:, j] = torch.where(inner[:, j] >= 0, 1.0, -1.0)
            delta = (a * signs[:, j] - inner[:, j])[:, None]
            if j + 1 < n:
                inner[:, j + 1 :] = moved(inner, j + 1, delta)
        S = torch.linalg.inv(inverse[:block_len, :block_len])
        b = signs[:, start:end]
        a = ((b @ S) * w[:, start:end]).sum(1) / ((b @ S) * b).sum(1)
        magnitudes.append(a)
        delta = a[:, None] * b - w[:, start:end]
        if end < n:
            w[:, end:] = moved(w, end, delta)
    return signs > 0, torch.stack(magnitudes, 1)


@pytest.mark.parametrize(("block_len", "cols"), [(64, COLS), (128, 256)])
def test_propagation_is_its_definition(block_len, cols):
    W, H = problem(1, cols=cols)
    signs, magnitudes = glas.propagate(W, glas.inverse_factor(H.clone()), block_len=block_len)
    for i in range(len(W)):
        s, a = by_definition(W[i].double(), damped(H)[i].double(), block_len)
        assert (signs[i] == s).double().mean() > 0.999  # a weight next to zero may fall either way
        torch.testing.assert_close(magnitudes[i].double(), a, rtol=2e-3, atol=1e-4)


def test_propagation_pays():
    W, H = problem(2)
    plain = glas.error(W - planes.decoded(W >= 0, W.abs().unflatten(-1, (-1, 64)).mean(-1)), H)
    found = glas.error(W - planes.decoded(*glas.propagate(W, glas.inverse_factor(H.clone()))), H)
    assert (found < 0.75 * plain).all()


def test_without_correlations_it_is_the_plain_method():
    W, _ = problem(3)
    signs, magnitudes = glas.propagate(W, glas.inverse_factor(torch.eye(COLS).repeat(2, 1, 1)))
    assert torch.equal(signs, W >= 0)
    torch.testing.assert_close(magnitudes, W.abs().unflatten(-1, (-1, 64)).mean(-1))
    assert (W != 0).all() and (magnitudes > 0).all()


@pytest.mark.parametrize(("block_len", "cols"), [(64, COLS), (128, 384)])
def test_refit_is_the_least_squares(block_len, cols):
    W, H = problem(4, cols=cols)
    signs, magnitudes = glas.propagate(W, glas.inverse_factor(H), block_len=block_len)
    found = glas.refit(W, H, signs, magnitudes)
    n = cols // block_len
    for i, row in ((0, 0), (1, 3)):
        b = torch.where(signs[i, row], 1.0, -1.0).double()
        columns = torch.zeros(cols, n, dtype=torch.double)
        for p in range(n):
            here = slice(block_len * p, block_len * (p + 1))
            columns[here, p] = b[here]
        root = torch.linalg.cholesky(H[i].double()).T
        best = torch.linalg.lstsq(root @ columns, (root @ W[i, row].double())[:, None]).solution[:, 0]
        assert (best > 0).all()
        torch.testing.assert_close(found[i, row].double(), best, rtol=1e-3, atol=1e-4)
    before, after = (glas.error(W - planes.decoded(signs, a), H) for a in (magnitudes, found))
    assert (after < before).all()


def test_refit_keeps_magnitudes_that_would_turn_negative():
    W, H = problem(5)
    signs, magnitudes = glas.propagate(W, glas.inverse_factor(H))
    signs[:, :, :64] = ~signs[:, :, :64]
    found = glas.refit(W, H, signs, magnitudes)
    assert torch.equal(found, magnitudes) and (found >= 0).all()


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


@pytest.mark.parametrize(("second", "block_len", "cols"), [(False, 64, COLS), (True, 64, COLS), (False, 128, 256)])
def test_descent_turns_signs_only_for_the_better(second, block_len, cols):
    """Nearer than before, and no single sign can be turned for the better where it ended by itself."""
    W, H = problem(5, cols=cols)
    H = damped(H)
    columns = torch.tensor([5, 3, *range(100, 162)]) if second else None
    found = glas.propagate(W, glas.inverse_factor(H.clone()), columns, block_len=block_len)
    signs, a, *more = found

    def left(signs, more):
        planes_now = [signs, a, *([more[0], more[1], columns] if second else [])]
        return glas.error(W - planes.decoded(*planes_now), H)

    before = left(signs, more)
    for _ in range(30):
        once = glas.descend(W, H, signs, a, *([*more, columns] if second else []))
        after = left(once[0], [once[1], more[1]] if second else [])
        assert (after <= before * (1 + 1e-5)).all()
        if torch.equal(once[0], signs) and (not second or torch.equal(once[1], more[0])):
            break
        signs, before = once[0], after
        more = [once[1], more[1]] if second else []
    assert (before < left(found[0], list(found[2:]))).all(), "it found something to turn"
    for j in (0, 63, 64, 200, cols - 1):
        turned = signs.clone()
        turned[:, :, j] = ~turned[:, :, j]
        for row in range(ROWS):
            one = signs.clone()
            one[:, row, j] = turned[:, row, j]
            assert (left(one, more) >= before * (1 - 1e-5)).all()
