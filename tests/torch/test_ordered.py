"""The method `ordered` on a layer whose inputs have drifted from the original's."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mobie_export.calibration import planes  # noqa: E402 (they need torch)
from mobie_export.methods.ordered import steps  # noqa: E402
from mobie_export.models import twin  # noqa: E402

E, WIDTH, FF, N, USED = 4, 128, 192, 3000, 2


def layer(drift: float, tokens: int = N) -> steps.Paths:
    """`drift`: how far the binarized path's residual stream is from the original's, relative to the experts' sum."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    weights = {"gate": randn(E, FF, WIDTH), "up": randn(E, FF, WIDTH), "down": randn(E, WIDTH, FF)}
    weights = {p: w / w.shape[2] ** 0.5 for p, w in weights.items()}
    x = randn(tokens, WIDTH) @ (randn(WIDTH, WIDTH) * torch.logspace(0, -1.5, WIDTH)) / 4
    index = torch.stack([torch.randperm(E, generator=g)[:USED] for _ in range(tokens)])
    p = torch.rand(tokens, USED, generator=g) + 0.2
    whole = twin.Experts(**weights)(x, index, p)
    # what was lost before the layer depends on its inputs: there is something to make up for
    lost = torch.tanh(x) @ randn(WIDTH, WIDTH)
    target = whole + drift * lost * (whole.norm() / lost.norm())
    weight = dict.fromkeys(twin.PROJECTIONS, p.reshape(-1, 1).square())
    return steps.Paths(x, index, weight, dict(weights), dict.fromkeys(twin.PROJECTIONS, 1.0), p=p, target=target)


def error(s: steps.Paths, dense: dict) -> float:
    made = twin.Experts(**dense)(s.x, s.index, s.p)
    return float((made - s.target).square().sum() / s.target.square().sum())


def decoded(made: dict) -> dict:
    return {p: planes.decoded(*found) for p, found in made.items()}


@pytest.mark.parametrize("drift", [0.5, 1.0])
def test_down_makes_up_for_what_was_lost(drift):
    """Nearer to the original's stream than the same method's layer that takes nothing for lost."""
    s, unaware = layer(drift), layer(0)
    made, order = steps.binarized(s, {})
    other, _ = steps.binarized(unaware, {})
    assert order is None and all(torch.isfinite(a).all() and (a >= 0).all() for _, a, *_ in made.values())
    assert error(s, decoded(made)) < 0.95 * error(s, decoded(other))


def test_it_is_nearer_than_plain_signs():
    s = layer(0)
    plain = {p: w.unflatten(-1, (-1, 64)) for p, w in s.weights.items()}
    signs = {p: (w.sign() * w.abs().mean(-1, keepdim=True)).flatten(-2) for p, w in plain.items()}
    made, _ = steps.binarized(s, {})
    assert error(s, decoded(made)) < 0.7 * error(s, signs)


def test_more_bits_are_nearer():
    s, wider = layer(0.5), layer(0.5)
    made, _ = steps.binarized(s, {})
    more, order = steps.binarized(wider, {"gate": 64, "up": 64, "down": 128})
    assert order is not None and sorted(order[0].tolist()) == list(range(FF))
    assert tuple(more["down"].signs2.shape) == (E, WIDTH, 128) and tuple(more["up"].signs2.shape) == (E, FF, 64)
    two = {p: planes.decoded(*found) for p, found in more.items()}
    assert error(wider, two) < 0.9 * error(s, decoded(made))


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_few_tokens_leave_the_weights_whole(tokens):
    """Experts without a token, and with fewer than columns, keep about their own weights."""
    s, before = layer(0.5, tokens), layer(0.5, tokens).weights
    made, _ = steps.binarized(s, {})
    for w in decoded(made).values():
        assert torch.isfinite(w).all()
    down, own = decoded(made)["down"], before["down"]
    nearness = (down * own).sum((1, 2)) / (down.norm(dim=(1, 2)) * own.norm(dim=(1, 2)))
    assert (nearness > 0.5).all(), nearness
