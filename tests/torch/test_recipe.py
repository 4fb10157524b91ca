"""The paper's recipe on a layer: what is folded, ordered and rounded is still the layer."""

import itertools
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mobie_export import errors  # noqa: E402 (they need torch)
from mobie_export.calibration import planes  # noqa: E402
from mobie_export.calibration.statistics import LayerStatistics  # noqa: E402 (they need torch)
from mobie_export.methods.calibrated import glas  # noqa: E402 (they need torch)
from mobie_export.methods.paper import arb, recipe  # noqa: E402 (they need torch)
from mobie_export.methods.paper.recipe import Settings  # noqa: E402
from mobie_export.models import architecture, twin  # noqa: E402 (they need torch)

E, WIDTH, FF, GROUPS, N = 3, 128, 192, 2, 1500


@pytest.fixture(scope="module")
def statistics():
    """A layer whose inputs have an uneven spectrum and whose down columns differ much in size."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    weights = {"gate": randn(E, FF, WIDTH), "up": randn(E, FF, WIDTH), "down": randn(E, WIDTH, FF)}
    weights = {p: w / w.shape[2] ** 0.5 for p, w in weights.items()}
    weights["down"] *= torch.exp(randn(E, 1, FF) / 2)
    x = randn(N, WIDTH) @ (randn(WIDTH, WIDTH) * torch.logspace(0, -1.5, WIDTH)) / 4
    index = torch.stack([torch.randperm(E, generator=g)[:2] for _ in range(N)])
    saliency = {p: torch.rand(2 * N, GROUPS, generator=g) + 0.2 for p in twin.PROJECTIONS}
    return LayerStatistics(x, index, saliency, weights, dict.fromkeys(twin.PROJECTIONS, 1.0))


def outputs(weights, statistics):
    experts = twin.Experts(**weights)
    return experts(statistics.x, statistics.index, torch.full(statistics.index.shape, 0.5))


def lost(weights, statistics) -> float:
    truth = outputs(statistics.weights, statistics)
    return float((outputs(weights, statistics) - truth).square().sum() / truth.square().sum())


def switches():
    for factor, groups, columns, null in itertools.product((None, 8), (0, GROUPS), (False, True), (False, True)):
        yield Settings(factor_bits=factor, groups=groups, columns=columns, null_space=null)
    yield Settings(groups=GROUPS, activation_metric=True)
    yield Settings(groups=GROUPS, salient=0.05)
    yield Settings(groups=GROUPS, salient=0.6, null_space=False)
    yield Settings(groups=GROUPS, salient=1.0, factor_bits=16)
    yield Settings(factor_bits=None, groups=GROUPS, salient=0.05)


@pytest.mark.parametrize("s", list(switches()), ids=str)
def test_every_switch_leaves_the_layer_whole(statistics, s):
    """A wrong fold or order would put the loss near one and above."""
    plain = {p: recipe.stored(w >= 0, w.abs().unflatten(-1, (-1, 64)).mean(-1)) for p, w in statistics.weights.items()}
    made = recipe.layer(statistics, s)
    assert set(made.factors) == ({"in", "out"} if s.factor_bits else set())
    assert all(values.shape == (WIDTH, WIDTH) for _, values in made.factors.values())
    assert all((a >= 0).all() and torch.isfinite(a).all() for _, a in made.packed.values())
    assert lost(recipe.dense(made), statistics) < 0.95 * lost(plain, statistics)


def test_planes_are_whole_blocks_of_the_first_columns(statistics):
    made = recipe.layer(statistics, Settings(groups=GROUPS, salient=0.4))
    assert {p: tuple(b.shape) for p, (b, _) in made.second.items()} == {
        "gate": (E, FF, 64),
        "up": (E, FF, 64),
        "down": (E, WIDTH, 128),
    }
    assert {p: tuple(a.shape) for p, (_, a) in made.second.items()} == {
        "gate": (E, FF, 1),
        "up": (E, FF, 1),
        "down": (E, WIDTH, 2),
    }


def test_folding_changes_nothing(statistics, monkeypatch):
    """Down with column scales and an order of its own, against the same matrices multiplied out."""
    s = Settings(factor_bits=None, groups=GROUPS, salient=0.3, null_space=False)
    seen = []
    propagate = arb.propagate

    def spy(*args, **more):
        seen.append(propagate(*args, **more))
        return seen[-1]

    monkeypatch.setattr(arb, "propagate", spy)
    monkeypatch.setattr(recipe, "stored", lambda signs, a: planes.decoded(signs, a))  # no rounding
    made = recipe.layer(statistics, s)
    gate_up, downs = seen[:E], seen[E:]
    direct = {p: torch.empty_like(w) for p, w in statistics.weights.items()}
    for e in range(E):
        direct["gate"][e], direct["up"][e] = gate_up[e].decoded()[0].split(FF)
        # the order is found again from the scores
        H = statistics.second_moment("down", e, statistics.saliency["down"])
        order = glas.saliency(statistics.weights["down"][e : e + 1], glas.inverse_factor(H)[None])[0].argsort(
            descending=True
        )
        assert (order != torch.arange(FF)).any()
        direct["down"][e][:, order] = downs[e].decoded()[0]
    torch.testing.assert_close(
        outputs(recipe.dense(made), statistics), outputs(direct, statistics), rtol=1e-3, atol=1e-4
    )


def test_gradients_behind_the_factor(statistics):
    """dl/dz' of z = M z' is M^T dl/dz."""
    M = recipe.gradient_basis(statistics.weights, Settings())["down"]
    inner = torch.randn(5, WIDTH, requires_grad=True)
    target = torch.randn(5, WIDTH)

    def loss(z):
        return (z - target).pow(3).sum()

    z = (inner @ M.T).detach().requires_grad_()
    (g,) = torch.autograd.grad(loss(z), z)
    (wanted,) = torch.autograd.grad(loss(inner @ M.T), inner)
    torch.testing.assert_close(g @ M, wanted, rtol=1e-3, atol=1e-3)
    assert recipe.gradient_basis(statistics.weights, Settings(factor_bits=None)) == {}


def test_comparator_is_better_and_larger(statistics):
    weights, bits = recipe.arb_llm_rc(statistics)
    n = sum(w.numel() for w in weights.values())
    assert 2.3 < bits / n < 3.4
    assert lost(weights, statistics) < lost(recipe.dense(recipe.layer(statistics, Settings(groups=GROUPS))), statistics)


@pytest.mark.parametrize("bias,act", [(True, architecture.swiglu), (False, torch.nn.functional.gelu)])
def test_experts_whose_rows_cannot_be_scaled_are_refused(bias, act):
    gguf = SimpleNamespace(
        tensors={"blk.0.ffn_up_exps.bias": None} if bias else {}, paths=["m.gguf"], architecture="other"
    )
    with pytest.raises(errors.MobieError, match="cannot be exported by the paper's recipe"):
        recipe.beside_rows(SimpleNamespace(gguf=gguf, arch=SimpleNamespace(act=act)))
