"""Error propagation against its definition, solved the slow way in float64; descent against single signs turned."""

import pytest

torch = pytest.importorskip("torch")

from mobie_export.calibration import planes  # noqa: E402
from mobie_export.methods.calibrated import compiled, glas, signs  # noqa: E402 (needs torch)
from tests.moments import COLS, ROWS, damped, problem  # noqa: E402

LOOPS = [None, *compiled.every()]  # PyTorch's, and those of the installed runtime


@pytest.fixture(params=LOOPS, ids=[s.name if s else "torch" for s in LOOPS], autouse=True)
def loops(request, monkeypatch):
    """What goes over the columns, in every test."""
    monkeypatch.setattr(compiled, "best", lambda device: request.param)
    return request.param


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
    found, magnitudes = signs.propagate(W, glas.factor(H.clone()), block_len=block_len).planes()
    for i in range(len(W)):
        s, a = by_definition(W[i].double(), damped(H)[i].double(), block_len)
        assert (found[i] == s).double().mean() > 0.999  # a weight next to zero may fall either way
        torch.testing.assert_close(magnitudes[i].double(), a, rtol=2e-3, atol=1e-4)


def test_propagation_pays():
    W, H = problem(2)
    plain = glas.error(W - planes.decoded(W >= 0, W.abs().unflatten(-1, (-1, 64)).mean(-1)), H)
    found = glas.error(W - planes.decoded(*signs.propagate(W, glas.factor(H.clone())).planes()), H)
    assert (found < 0.75 * plain).all()


def test_without_correlations_it_is_the_plain_method():
    W, _ = problem(3)
    found, magnitudes = signs.propagate(W, glas.factor(torch.eye(COLS).repeat(2, 1, 1))).planes()
    assert torch.equal(found, W >= 0)
    torch.testing.assert_close(magnitudes, W.abs().unflatten(-1, (-1, 64)).mean(-1))
    assert (W != 0).all() and (magnitudes > 0).all()


@pytest.mark.parametrize(("second", "block_len", "cols"), [(False, 64, COLS), (True, 64, COLS), (False, 128, 384)])
def test_descent_ends_where_nothing_single_pays(second, block_len, cols):
    """Every sweep is for the better; where the last one changed nothing, no single sign is worth turning and no single
    magnitude worth changing."""
    W, H = problem(5, cols=cols)
    columns = torch.tensor([5, 3, *range(100, 162)]) if second else None
    found = signs.propagate(W, glas.factor(H), columns, block_len)  # H is damped from here on

    def left(planes_now):
        return glas.error(W - planes.decoded(*planes_now, *([columns] if second else [])), H)

    before = first = left(found.planes())
    for _ in range(60):
        signs.descend(found, H)
        after = left(found.planes())
        torch.testing.assert_close(found.left.mT, W - planes.decoded(*found.planes(), *([columns] if second else [])))
        assert (after <= before * (1 + 1e-5)).all()
        before = after
    assert (before < 0.9 * first).all(), "it found something to turn"
    now = [t.clone() for t in found.planes()]
    for plane in range(0, len(now), 2):
        for j in (0, 5, 63):
            turned = [t.clone() for t in now]
            turned[plane][:, :, j] = ~turned[plane][:, :, j]
            for row in range(ROWS):
                one = [t.clone() for t in now]
                one[plane][:, row, j] = turned[plane][:, row, j]
                assert (left(one) >= before * (1 - 1e-5)).all()
        for factor in (0.99, 1.01):
            for row in range(ROWS):
                one = [t.clone() for t in now]
                one[plane + 1][:, row, 0] *= factor
                assert (left(one) >= before * (1 - 1e-5)).all()


def test_descent_keeps_magnitudes_from_turning_negative():
    W, H = problem(5)
    found = signs.propagate(W, glas.factor(H))
    found.signs[:, :64] *= -1
    found.left[:] = found.w - planes.decoded(*found.planes()).mT
    before = glas.error(found.left.mT, H)
    signs.descend(found, H)
    assert (found.magnitudes >= 0).all() and (glas.error(found.left.mT, H) < before).all()


def test_equal_numbers_whatever_is_beside_them():
    """A matrix alone or among others: what a rank or a batch holds changes nothing but roundings."""
    W, H = problem(7)
    H = damped(H)
    both, one = (signs.propagate(w, glas.factor(h.clone())) for w, h in ((W, H), (W[1:], H[1:])))
    for found, h in ((both, H), (one, H[1:])):
        signs.descend(found, h)
    assert (both.signs[1:] == one.signs).double().mean() > 0.999
    torch.testing.assert_close(both.magnitudes[1:], one.magnitudes, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loops", compiled.every(), ids=lambda s: s.name, indirect=True)
@pytest.mark.parametrize(("block_len", "rows", "threads"), [(64, 150, 1), (64, 150, 3), (128, 64, 2), (128, 7, 2)])
def test_compiled_loops_do_what_torch_does(loops, monkeypatch, block_len, rows, threads):
    """Rows that are no multiple of a tile, blocks of both types, second signs all over the columns, a bound."""
    _, H = problem(9, cols=384)
    g = torch.Generator().manual_seed(9)
    W, columns = torch.randn(2, rows, 384, generator=g), torch.randperm(384, generator=g)[:block_len]
    before, found = torch.get_num_threads(), []
    for search in (None, loops):
        monkeypatch.setattr(compiled, "best", lambda device, search=search: search)
        torch.set_num_threads(threads)
        try:
            h = H.clone()
            one = signs.propagate(W, glas.factor(h), columns, block_len, torch.tensor([[0.9], [0.7]]))
            for _ in range(2):
                signs.descend(one, h)
        finally:
            torch.set_num_threads(before)
        found.append((one, glas.error(one.left.mT, h)))
    (torchs, error), (here, mine) = found
    assert (here.signs == torchs.signs).double().mean() > 0.999
    assert (here.signs2 == torchs.signs2).double().mean() > 0.999
    same = (here.signs == torchs.signs).all(1) & (here.signs2 == torchs.signs2).all(1)  # rows with all of them
    assert same.double().mean() > 0.7
    for part in ("magnitudes", "magnitudes2", "left"):
        mine_there, torchs_there = (getattr(x, part).mT[same] for x in (here, torchs))
        torch.testing.assert_close(mine_there, torchs_there, rtol=1e-3, atol=1e-4)
    assert (here.magnitudes <= torch.tensor([0.9, 0.7])[:, None, None]).all()
    torch.testing.assert_close(mine, error, rtol=1e-3, atol=0)
