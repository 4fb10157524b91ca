"""Row-column binarization: refits never raise the error, tiny cases against every possible sign, bits as counted."""

import itertools

import pytest

torch = pytest.importorskip("torch")

from mobie_export.methods.calibrated import glas  # noqa: E402 (needs torch)
from mobie_export.methods.paper import arb  # noqa: E402 (needs torch)


def weights(*shape: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) * (0.2 + torch.rand(*shape[:-2], 1, shape[-1], generator=g))


def squared(x) -> float:
    return float(x.double().square().sum())


@pytest.mark.parametrize("masked", [False, True])
def test_refits_never_raise_the_error(masked):
    W = weights(3, 20, 64)
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) < 0.4 if masked else None
    if masked:
        mask[:, 3] = mask[:, :, 5] = False  # an empty row, an empty column
        W = W * mask
    errors = [squared(W - arb.compose(*arb.row_column(W, mask, n))) for n in range(12)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors)) and errors[-1] < errors[0]
    errors = [squared(W - sum(arb.compose(*p) for p in arb.second_order(W, mask, n))) for n in range(12)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors)) and errors[-1] < errors[0]


@pytest.mark.parametrize("columns", [False, True])
def test_two_planes_with_common_columns_never_get_worse(columns):
    W = weights(2, 30, 64, seed=2)

    def error(n):
        B1, B2, a1, a2, ac = arb.two_rows(W, n, columns)
        assert (a1 >= a2).all() and (a2 >= 0).all() and (ac > 0).all()
        return squared(W - (a1.unsqueeze(-1) * B1 + a2.unsqueeze(-1) * B2) * ac.unsqueeze(-2))

    errors = [error(n) for n in range(1, 14)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors)) and errors[-1] < errors[0]
    one = squared(W - arb.compose(*arb.row_column(W, None, 10, columns)))
    assert errors[-1] < 0.5 * one


def test_fixed_point_is_the_leading_singular_pair():
    """With B = sign(W) the fit is the best matrix of rank one to |W|."""
    W = weights(1, 16, 24, seed=3)[0]
    _, ar, ac = arb.row_column(W, None, 500)
    U, S, V = torch.linalg.svd(W.abs())
    torch.testing.assert_close(ar[:, None] * ac, S[0] * U[:, :1] * V[:1], rtol=1e-3, atol=1e-4)


def test_no_other_signs_are_better():
    """All 2^9 sign matrices of 3 x 3 matrices, each with its best row and column scales."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=9))).view(-1, 3, 3)
    W = torch.stack([weights(3, 3, seed=seed) for seed in range(4)])
    T, B = W.unsqueeze(1).expand(-1, len(signs), -1, -1), signs.expand(len(W), -1, -1, -1)
    ar, ac = torch.ones(T.shape[:-1]), torch.ones(T.shape[:-1])
    for _ in range(200):
        ar, ac = arb.refit(T, B, ar, ac)
    best = (T - arb.compose(B, ar, ac)).double().square().sum((-2, -1)).amin(1)
    found = (W - arb.compose(*arb.row_column(W, None, 200))).double().square().sum((-2, -1))
    assert (found <= best * 1.001).all()


def test_nearest_of_four_values():
    W = weights(1, 8, 64, seed=5)
    planes = arb.second_order(W, None, 1)
    found = (W - sum(arb.compose(*p) for p in planes)).abs()
    a1, a2 = (ar.unsqueeze(-1) * ac.unsqueeze(-2) for _, ar, ac in planes)
    for s1, s2 in itertools.product((-1, 1), repeat=2):
        assert (found <= (W - s1 * a1 - s2 * a2).abs() + 1e-5).all()


def moments(n: int, cols: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4 * cols, cols, generator=g)
    x = x + x[..., : cols // 8] @ torch.randn(n, cols // 8, cols, generator=g)
    return x.mT @ x


@pytest.mark.parametrize("salient", [0, 64])
@pytest.mark.parametrize("columns", [False, True])
def test_propagation_is_gptqs(salient, columns):
    """Every group of rows under its own moments; each block's error solved away by the columns behind it."""
    W, H = weights(2, 8, 192, seed=6), moments(4, 192)
    U = glas.inverse_factor(H).view(2, 2, 192, 192)  # H is damped from here on
    H = H.view(2, 2, 192, 192).double()
    found = arb.propagate(W, U, salient, columns, 5)
    approximation = found.decoded().double()
    assert (found.columns == 1).all() != columns and found.signs2.shape[-1] == salient
    for i, group in itertools.product(range(2), range(2)):
        rows = slice(4 * group, 4 * group + 4)
        w = W[i, rows].double()
        for start in range(0, 192, 64):
            here, after = slice(start, start + 64), slice(start + 64, 192)
            if not columns:  # then a group of rows is on its own and its block is the plain fit of what is left
                if start < salient:
                    B1, B2, a1, a2, _ = arb.two_rows(w[:, here].float(), 5, False)
                    wanted = a1[:, None] * B1 + a2[:, None] * B2
                else:
                    B, a, _ = arb.row_column(w[:, here].float(), None, 5, False)
                    wanted = a[:, None] * B
                near = (approximation[i, rows, here] - wanted).abs() < 1e-3 * wanted.abs().max()
                assert near.double().mean() > 0.99  # a weight next to a threshold may fall either way
            delta = approximation[i, rows, here] - w[:, here]
            h = H[i, group]
            if start + 64 < 192:
                w[:, after] -= torch.linalg.solve(h[after, after], (delta @ h[here, after]).T).T
    plain = arb.propagate(W, torch.eye(192).expand(2, 1, 192, 192), salient, columns, 5).decoded()
    errors = [
        float(glas.error((W - x).view(4, 4, 192).double(), H.flatten(0, 1)).sum()) for x in (found.decoded(), plain)
    ]
    assert 0 < errors[0] < 0.8 * errors[1]


def test_second_plane_and_column_scales_pay():
    W, U = weights(2, 32, 128, seed=7), torch.eye(128).expand(2, 1, 128, 128)
    error = {(s, c): squared(W - arb.propagate(W, U, s, c).decoded()) for s in (0, 64, 128) for c in (False, True)}
    assert error[0, False] > error[0, True] > error[64, True] > error[128, True]
    assert error[64, False] > error[64, True]


def test_comparator_stores_what_it_counts():
    rows, cols = 48, 256
    W, H = weights(rows, cols, seed=8), moments(1, cols, seed=9)
    U = glas.inverse_factor(H.clone())[0]
    approximation, bits = arb.arb_llm_rc(W, U)
    assert bits > 2 * rows * cols  # sign and bitmap
    # the most it can be: 50 salient columns a block; six row scales, four scales per column
    assert bits <= 2 * rows * cols + 2 * (50 * rows + 128 + 16 * (6 * rows + 4 * 128))
    one = arb.propagate(W[None], U[None, None]).decoded()[0]
    errors = [float(glas.error((W - x)[None], H)) for x in (approximation, one)]
    assert 0 < errors[0] < errors[1]


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="100 columns"):
        arb.propagate(torch.zeros(1, 4, 100), torch.eye(100)[None, None])
    with pytest.raises(ValueError, match="3 groups"):
        arb.propagate(torch.zeros(1, 4, 64), torch.eye(64).expand(1, 3, 64, 64))
