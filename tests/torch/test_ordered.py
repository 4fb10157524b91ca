"""The method `ordered` on a layer whose inputs have drifted from the original's."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mobie_export import gguf_io  # noqa: E402
from mobie_export.calibration import planes  # noqa: E402 (they need torch)
from mobie_export.methods.calibrated.options import spare_bits  # noqa: E402
from mobie_export.methods.ordered import sensitivity, steps  # noqa: E402
from mobie_export.models import twin  # noqa: E402
from mobie_export.spec import layout  # noqa: E402
from mobie_export.spec.block import MOBIE, Q1_0  # noqa: E402
from tests import models  # noqa: E402

E, WIDTH, FF, N, USED = 4, 128, 192, 3000, 2


def layer(drift: float, tokens: int = N, ff: int = FF) -> steps.Paths:
    """`drift`: how far the binarized path's residual stream is from the original's, relative to the experts' sum."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    weights = {"gate": randn(E, ff, WIDTH), "up": randn(E, ff, WIDTH), "down": randn(E, WIDTH, ff)}
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


def test_down_does_not_follow_noise():
    """What is lost by chance on the calibration's tokens would be added to all others."""
    plain, noisy = layer(0, tokens=800), layer(0, tokens=800)
    noisy.target += noisy.target.std() * torch.randn(noisy.target.shape, generator=torch.Generator().manual_seed(1))
    fresh = layer(0)
    lost = [error(fresh, decoded(steps.binarized(s, {})[0])) for s in (plain, noisy)]
    assert lost[1] < 1.15 * lost[0], lost


def test_gate_and_up_follow_the_drift_of_their_inputs():
    """What a linear map of the inputs can undo is undone; chance is not followed."""
    s, g = layer(0), torch.Generator().manual_seed(2)
    x = s.x
    s.x = x + 0.3 * x @ (torch.randn(WIDTH, WIDTH, generator=g) / WIDTH**0.5)
    before = {p: w.clone() for p, w in s.weights.items()}

    def lost(x, drifted):
        """The error of what gate and up make, relative to what it was without."""
        parts = [(s.weights[p], before[p]) for p in ("gate", "up")]
        now = sum(float(((drifted @ w.mT) - (x @ own.mT)).square().sum()) for w, own in parts)
        then = sum(float(((drifted - x) @ own.mT).square().sum()) for _, own in parts)
        return now / then

    steps.towards_original(s, x)
    assert lost(x, s.x) < 0.05 and torch.equal(s.weights["down"], before["down"])

    few = layer(0, tokens=200)
    before = {p: w.clone() for p, w in few.weights.items()}
    chance = few.x.std(0) * torch.randn(few.x.shape, generator=g)
    s, x = few, few.x - 0.3 * chance  # what the original had cannot be told from what the path has
    steps.towards_original(s, x)
    fresh = layer(0).x
    more = fresh + 0.3 * fresh.std(0) * torch.randn(fresh.shape, generator=g)
    assert lost(fresh, more) < 1.05


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


def test_a_row_of_massive_activations_leaves_the_others_their_digits():
    """Block scales have eight bits and count from the largest one of their expert."""
    row, others = 7, [r for r in range(WIDTH) if r != 7]
    plain, massive = layer(0.5), layer(0.5)
    massive.weights["down"][:, row] *= 1000
    massive.target[:, row] *= 1000

    def lost(s, made):  # of the other rows' sums, in the file
        (down,) = planes.rounded([made["down"]], MOBIE)
        weights = decoded(made) | {"down": planes.decoded(*down)}
        missing = twin.Experts(**weights)(s.x, s.index, s.p) - s.target
        return float(missing[:, others].square().sum() / s.target[:, others].square().sum())

    found = [lost(s, steps.binarized(s, {})[0]) for s in (plain, massive)]
    assert found[1] < 1.02 * found[0], found


@pytest.mark.parametrize("coding", [MOBIE, Q1_0], ids=lambda c: c.option)
@pytest.mark.parametrize("fused", [False, True])
def test_magnitudes_are_those_of_the_file(coding, fused):
    """What follows is fitted to them: rounding them again changes nothing."""
    s = layer(0.5, ff=256)  # blocks of 128
    made, _ = steps.binarized(s, {"down": 64} if coding is MOBIE else {}, coding, fused=fused)
    again = dict(zip(("gate", "up"), planes.rounded([made["gate"], made["up"]], coding), strict=True))
    if not fused:
        again = {p: planes.rounded([made[p]], coding)[0] for p in ("gate", "up")}
    again["down"] = planes.rounded([made["down"]], coding)[0]
    for p, found in again.items():
        for a, b in zip(found[1::2], made[p][1::2], strict=True):
            assert a is b is None or torch.allclose(a, b, rtol=1e-6, atol=0)
    assert len(made["down"].magnitudes[0].unique()) <= (255 if coding is MOBIE else 1 << 16)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_few_tokens_leave_the_weights_whole(tokens):
    """Experts without a token, and with fewer than columns, keep about their own weights."""
    s, before = layer(0.5, tokens), layer(0.5, tokens).weights
    made, _ = steps.binarized(s, {}, descents=4)  # with eight one expert is at 0.4995: they fit the few more closely
    for w in decoded(made).values():
        assert torch.isfinite(w).all()
    down, own = decoded(made)["down"], before["down"]
    nearness = (down * own).sum((1, 2)) / (down.norm(dim=(1, 2)) * own.norm(dim=(1, 2)))
    assert (nearness > 0.5).all(), nearness


# ---- where the bits go -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bpw", [1.3, 1.5, 2.2])
def test_bits_go_where_the_damage_is_and_no_further(tmp_path, fused, bpw):
    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, fused=fused)
    with gguf_io.open_model(path) as gguf:
        spare, t = spare_bits(gguf, bpw), twin.Twin(gguf)
        experts = layout.experts(gguf)

        def bits(found):
            total = 0
            for i, columns in found.items():
                names = {p: experts[name] for p, (name, _) in t.expert_names(i).items()}
                for p, x in names.items():
                    rows = x.rows // 2 if fused and p != "down" else x.rows
                    total += x.n_expert * rows * columns[p] // 64 * 72
                total += 32 * max(columns["gate"], columns["up"])
            return total

        one = sensitivity.shares(gguf, t, {0: 0.001, 1: 9.0}, spare, 2048)
        even = sensitivity.shares(gguf, t, {0: 1.0, 1: 1.0}, spare, 2048)
        assert 0 < bits(one) <= spare and 0 < bits(even) <= spare
        assert one[1]["gate"] > one[0]["gate"] or bpw != 1.5
        assert abs(even[0]["gate"] - even[1]["gate"]) <= 128
        assert all(c["gate"] == c["up"] for c in (*one.values(), *even.values()))


def test_damage_is_that_of_the_layer_alone(tmp_path):
    """Against the whole model with that layer's experts replaced."""
    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path)
    with gguf_io.open_model(path) as gguf, torch.no_grad():
        t = twin.Twin(gguf)
        tokens = torch.arange(96).view(2, 48) % 100
        found = sensitivity._damage(t, tokens, lambda n, what: None)

        def logits(binary):
            hidden = t.embedding()[tokens]
            for i in range(t.n_layers):
                layer = t.layer(i)
                if i == binary:
                    experts = t.experts_of(layer)
                    for p, w in experts.weights.items():
                        size = w.unflatten(-1, (-1, 64)).abs().mean(-1, keepdim=True)
                        experts.weights[p] = (w.sign().unflatten(-1, (-1, 64)) * size).flatten(-2)
                hidden = t.run(layer, hidden)
            return t.head()(hidden).log_softmax(-1)

        truth = logits(None)
        for i in range(t.n_layers):
            kl = (truth.exp() * (truth - logits(i))).sum(-1).mean()
            assert found[i] == pytest.approx(float(kl), rel=1e-3) and found[i] > 0


def test_routing_is_compared_by_choice_in_any_order():
    index = torch.tensor([[0, 1], [2, 3], [1, 2]])
    assert twin.same_choices(index, index.flip(1)) == 1.0
    assert twin.same_choices(index, torch.tensor([[1, 4], [2, 3], [0, 3]])) == pytest.approx(0.5)
