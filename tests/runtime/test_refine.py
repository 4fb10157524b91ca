"""Refinement: what is tuned is what the file will hold, and it gets better on text that was kept aside."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import mobie_export as mobie
from mobie_export import cli, gguf_io
from mobie_export.calibration.tokenizer import tokenize
from mobie_export.cli import Exit
from mobie_export.spec import block
from tests import models
from tests.scoring import log_probabilities

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mobie_export.calibration import (  # noqa: E402
    bundled,
    passes,
    planes,
    states,
    store,
)
from mobie_export.calibration.text import load  # noqa: E402 (they need torch)
from mobie_export.methods.calibrated import Calibrated, glas, refine, second_signs  # noqa: E402
from mobie_export.methods.calibrated.layer import quantize_layer  # noqa: E402
from mobie_export.methods.calibrated.snapshots import Snapshots  # noqa: E402
from mobie_export.models import twin  # noqa: E402 (they need torch)


def some_packed(seed: int = 0, e: int = 3, rows: int = 64, cols: int = 128, second: bool = False, block_len: int = 64):
    """Random experts, and planes for them; the second ones of 64 columns that are not the first in gate and up."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"gate": (e, rows, cols), "up": (e, rows, cols), "down": (e, cols, rows)}
    w = {p: torch.randn(s, generator=g) for p, s in shapes.items()}

    def plane(v):
        return v >= 0, v.abs().unflatten(-1, (-1, block_len)).mean(-1)

    packed = {p: planes.Planes(*plane(v)) for p, v in w.items()}
    if second:
        some = torch.randperm(cols, generator=g)[:64]
        for p, v in w.items():
            columns = None if p == "down" else some
            rest = (v - planes.decoded(*packed[p]))[..., : 64 if columns is None else None]
            rest = rest if columns is None else rest[..., columns]
            packed[p] = packed[p]._replace(signs2=plane(rest)[0], magnitudes2=plane(rest)[1], columns=columns)
    return w, packed


@pytest.mark.parametrize(("coding", "second"), [(block.MOBIE, False), (block.MOBIE, True), (block.Q1_0, False)])
@pytest.mark.parametrize("free", [False, True])
def test_binary_experts_compute_what_the_file_says(free, coding, second, tmp_path):
    w, packed = some_packed(rows=128, second=second, block_len=coding.length)
    experts = refine.BinaryExperts(packed, w, free, coding=coding)
    with torch.no_grad():
        for theta in experts.theta.values():
            theta.normal_(0, 0.3)
    x, index, p = torch.randn(40, 128), torch.randint(3, (40, 2)), torch.rand(40, 2)
    kept, decoded = store.Store(tmp_path), {}
    kept.put(0, experts.packed())
    for projection in twin.PROJECTIONS:
        found = list(store.written(kept, f"blk.0.ffn_{projection}_exps.weight", coding))
        blocks, scales, residual = np.stack(found[:3]), np.ones(3), found[4:]
        if not coding.stock:
            scales = found[3]
        assert len(found) == (7 if second else 3 if coding.stock else 4)
        stored = block.dequantize(blocks, coding=coding)
        if second:
            columns = np.arange(64) if projection == "down" else store.columns(kept, 0)
            stored[..., columns] += block.dequantize(np.stack(residual))
        decoded[projection] = torch.from_numpy(stored * scales[:, None, None].astype(np.float32))
    truth = twin.Experts(**decoded)(x, index, p)
    torch.testing.assert_close(experts(x, index, p), truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))


@pytest.mark.parametrize("counts", [None, [7, 0, 13]], ids=["rectangle", "row by row"])
def test_gradients_are_those_of_the_decoded_weights(counts):
    def some(*shape, draw=torch.randn):
        return draw(*shape, dtype=torch.double, requires_grad=True)

    x, v, v2 = some(*([20] if counts else [3, 20]), 128), some(3, 64, 128), some(3, 64, 64)
    a, a2 = some(3, 64, 2, draw=torch.rand), some(3, 64, 1, draw=torch.rand)
    columns = torch.randperm(128)[:64]
    y = refine._Product.apply(x, counts, v, a, v2, a2, columns)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, v, a, v2, a2), dy)
    b, b2 = (torch.where(t >= 0, 1.0, -1.0).double() for t in (v, v2))
    w = (b * a.repeat_interleave(64, -1)).index_add(-1, columns, b2 * a2).detach().requires_grad_()
    truth = torch.cat([part @ one.T for part, one in zip(x.split(counts), w, strict=True)]) if counts else x @ w.mT
    torch.testing.assert_close(y, truth)
    dx, dw = torch.autograd.grad(truth, (x, w), dy)
    torch.testing.assert_close(found[0], dx)
    torch.testing.assert_close(found[1], dw * a.detach().repeat_interleave(64, -1))
    torch.testing.assert_close(found[2], (dw * b).unflatten(-1, (-1, 64)).sum(-1))
    torch.testing.assert_close(found[3], dw[..., columns] * a2.detach())
    torch.testing.assert_close(found[4], (dw[..., columns] * b2).sum(-1, keepdim=True))


def test_products_in_bfloat16_are_those_of_float32_but_for_rounding(monkeypatch):
    counts = [30, 34]
    x, v, a = torch.randn(64, 128), torch.randn(2, 64, 128), torch.rand(2, 64, 2).add(0.1)
    dy = torch.randn(64, 64)

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, v, a)]
        y = refine._Product.apply(leaves[0], counts, *leaves[1:], None, None, None)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    truth = run()
    monkeypatch.setattr(refine, "_reduced", lambda x: torch.bfloat16)
    for found, wanted in zip(run(), truth, strict=True):
        assert found.dtype == torch.float32
        error = (found - wanted).square().mean() / wanted.square().mean()
        assert 0 < error < 3 * 2.0**-16, "inputs and outputs are rounded to 8 bits, three times 2^-9 of a value"


def test_packed_signs_are_the_planes():
    signs, a = torch.rand(2, 8, 128) > 0.5, torch.rand(2, 8, 2).add(0.1)
    v, *_ = refine._latent(planes.Planes(signs, a))
    assert v.dtype == torch.uint8 and v.shape == (2, 8, 16)
    assert torch.equal(refine._weights(v, a, None, None, None), planes.decoded(signs, a))


def test_the_divergence_is_that_of_the_logits(monkeypatch):
    monkeypatch.setattr(refine, "LOGITS", 7 * 50)  # seven positions at a time
    ours, truth, weight = torch.randn(30, 16, requires_grad=True), torch.randn(30, 16), torch.randn(50, 16)
    found = refine._Divergence.apply(ours, truth, weight)
    logits = [torch.log_softmax(t @ weight.T, -1) for t in (ours, truth)]
    wanted = torch.nn.functional.kl_div(*logits, reduction="sum", log_target=True)
    torch.testing.assert_close(found.float(), wanted, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(2 * t, ours)[0] for t in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_rows_in_a_rectangle_come_back():
    counts = [3, 0, 5]
    rows, back = refine._places(counts, torch.device("cpu"))
    x = torch.arange(8)
    assert rows.shape == (3, 5) and torch.equal(x[rows].flatten()[back], x)
    assert torch.equal(back // 5, torch.tensor([0, 0, 0, 2, 2, 2, 2, 2])), "every row is with its expert"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("refine") / "m.gguf"
    models.write_qwen3moe(path, seed=7)
    return path


@pytest.fixture
def short(monkeypatch):
    """Few steps: these are tests of the way, not of the quality."""
    monkeypatch.setattr(refine, "LAYERWISE", dataclasses.replace(refine.LAYERWISE, steps=12, batch_tokens=512))
    monkeypatch.setattr(refine, "WHOLE", dataclasses.replace(refine.WHOLE, steps=12, rate_signs=0.01, batch_tokens=512))


TRAINED = Path(__file__).resolve().parents[2] / "examples/tiny-moe/tiny-moe-f16.gguf"
ARGUMENTS = ["--method", "calibrated", "--samples", "40", "--seq-len", "64", "--threads", "1", "--quiet"]


def export(model, output, *more) -> None:
    assert cli.main([str(model), "-o", str(output), *ARGUMENTS, *more]) == 0


def divergence(original, path) -> float:
    tokens, _ = tokenize(original, bundled.books()[-4000:])
    chunks = tokens[:1024].reshape(2, 512)
    truth, found = (log_probabilities(p, chunks, one_by_one=False) for p in (original, path))
    return float((np.exp(truth) * (truth - found)).sum(-1).mean())


def test_every_step_brings_the_model_nearer(tmp_path, short, runtime_tools):
    """On trained weights: those of a random model are as near as so few steps bring them."""
    model = TRAINED
    kl, tuned, seal = {}, {}, {}
    assert cli.main([str(model), "-o", str(tmp_path / "sign.gguf"), "--method", "sign", "--quiet"]) == 0
    kl["sign"] = divergence(model, tmp_path / "sign.gguf")
    for refinement in ("none", "layerwise", "streamed", "end-to-end"):
        out = tmp_path / f"{refinement}.gguf"
        export(model, out, "--samples", "64", "--refine", refinement)
        kl[refinement] = divergence(model, out)
        assert cli.main(["verify", str(out), "-q"]) == 0
        with gguf_io.open_model(model) as a, gguf_io.open_model(out) as b:
            assert b.value("mobie.method") == ("glas" if refinement == "none" else f"glas+{refinement}")
            seal[refinement] = b.value("mobie.data.sha256")
            settings = json.loads(b.value("mobie.settings"))
            assert settings["calibration"] and settings["sequences"] == 64 and settings["seed"] == 0
            rest = [n for n in a.tensors if "_exps." not in n]
            tuned[refinement] = {n for n in rest if bytes(a.read(a.tensors[n])) != bytes(b.read(b.tensors[n]))}
    assert kl["sign"] > kl["none"] > 0 and kl["sign"] > kl["layerwise"] > kl["end-to-end"] > 0
    assert seal["streamed"] == seal["end-to-end"], "one layer in memory or all: the same steps, the same bytes"
    both = {f"blk.{i}.{n}.weight" for i in range(4) for n in ("ffn_gate_inp", "ffn_norm")}
    assert tuned["none"] == set() < tuned["layerwise"] <= both, "a layer that gains nothing keeps what it had"
    assert tuned["end-to-end"] == tuned["streamed"] > both


def test_what_must_stay_stays_and_the_bytes_repeat(model, tmp_path, short):
    for name in ("a", "b"):
        export(model, tmp_path / name, "--no-tune-router", "--no-tune-norms", "--refine", "streamed")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    export(model, tmp_path / "c", "--seed", "1", "--no-tune-router", "--no-tune-norms")
    with (
        gguf_io.open_model(tmp_path / "a") as a,
        gguf_io.open_model(tmp_path / "c") as c,
        gguf_io.open_model(model) as m,
    ):
        assert a.value("mobie.data.sha256") != c.value("mobie.data.sha256")
        for name in m.tensors:
            if "_exps." not in name:
                assert bytes(a.read(a.tensors[name])) == bytes(m.read(m.tensors[name]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"], "the work folder is gone"


def test_second_signs_are_stored_counted_and_checked(model, tmp_path, capsys):
    out = tmp_path / "o.gguf"
    export(model, out, "--bpw", "1.5", "--refine", "none")
    assert cli.main(["verify", str(out), "-q"]) == 0
    with gguf_io.open_model(out) as g:
        beside = [t for n, t in g.tensors.items() if "_exps." in n or "exps.columns" in n]
        weights = sum(t.n_weights for t in beside if t.name.endswith(".weight"))
        assert g.value("mobie.expert_bpw") == pytest.approx(8 * sum(t.n_bytes for t in beside) / weights)
        assert 1.4 < g.value("mobie.expert_bpw") <= 1.5
        named = [t for t in beside if t.name.endswith(".columns")]
        assert named and json.loads(g.value("mobie.settings"))["second"]
    capsys.readouterr()
    for wrong in ([5, 5], [-1, 10**6]):
        data = bytearray(out.read_bytes())
        data[named[0].offset : named[0].offset + 8] = np.array(wrong, "<i4").tobytes()
        (tmp_path / "bad.gguf").write_bytes(data)
        assert cli.main(["verify", str(tmp_path / "bad.gguf"), "-q"]) == Exit.VERIFY_FAILED
        assert "names a column twice, or one that" in capsys.readouterr().err
    assert cli.main([str(model), "-o", str(tmp_path / "p"), *ARGUMENTS, "--bpw", "1.1"]) == 2
    assert cli.main(["plan", str(model), "--method", "calibrated", "--preset", "large"]) == 0
    assert "experts    1.5" in capsys.readouterr().out


@pytest.mark.usefixtures("without_runtime")  # llama.cpp has no such tensors for this architecture
def test_fused_experts_are_written_in_their_order(tmp_path):
    """As the file says them, the experts compute what the original's do, the nearer the more bits they have."""
    path, cosine = tmp_path / "m.gguf", {}
    models.write_qwen3moe(path, fused=True)
    torch.manual_seed(0)
    x, index = torch.randn(64, models.N_EMBD), torch.randint(models.N_EXPERT, (64, 2))
    for bpw in ("1.13", "1.4"):
        out, plain = tmp_path / f"{bpw}.gguf", tmp_path / f"{bpw}-f32.gguf"
        export(path, out, "--refine", "none", "--bpw", bpw)
        assert cli.main(["dequantize", str(out), "-o", str(plain), "-q"]) == 0
        with gguf_io.open_model(path) as a, gguf_io.open_model(plain) as b:
            truth, found = (
                torch.stack([twin.Experts(**t.experts(i))(x, index, torch.ones(64, 2)) for i in range(models.N_LAYER)])
                for t in (twin.Twin(a), twin.Twin(b))
            )
        cosine[bpw] = float((found * truth).sum() / (found.norm() * truth.norm()))
    assert 0.2 < cosine["1.13"] < cosine["1.4"] - 0.01 < 0.99, "gate and up in the wrong order have about 0"


def test_packages_and_options_are_asked_for(model, tmp_path, monkeypatch, capsys):
    plan = mobie.plan(model, method=Calibrated())
    assert plan.work_size > 0
    assert not list(tmp_path.iterdir())


def test_sequences_kept_aside_are_not_tuned_on():
    train, aside = refine.held_out(100)
    assert len(train) + len(aside) == 100 and not set(train.tolist()) & set(aside.tolist()) and len(aside) == 6


class Parabola:
    """x^2, from 1 on, by steps along its slope; what `Snapshots` takes in place of layers."""

    indices = (0,)

    def __init__(self, rate: float):
        self.x, self.rate, self.largest = 1.0, rate, 0.0

    def save(self, i: int, path: Path) -> None:
        path.write_text(repr(self.x))

    def load(self, i: int, path: Path) -> None:
        self.x = float(path.read_text())

    go_back = load

    def step(self, batch: torch.Tensor, factor: float, signs: bool) -> None:
        self.x -= factor * self.rate * 2 * self.x

    def loss(self) -> float:
        self.largest = max(self.largest, self.x**2)
        return self.x**2


@pytest.mark.parametrize("kept_at", [0, 3])
def test_going_back_is_the_same_from_memory_and_from_files(tmp_path, kept_at):
    """The values of a state, also of the one before all steps, with the moments of now."""

    def run(name: str, streamed: bool) -> torch.Tensor:
        folder = tmp_path / name
        folder.mkdir()

        def make(i: int) -> torch.nn.Module:
            layer = torch.nn.Linear(3, 2, bias=False)
            layer.weight.data = torch.arange(6.0).view(2, 3) + i
            return layer

        def groups(i: int, layer: torch.nn.Module) -> refine.Groups:
            return [{"params": list(layer.parameters()), "lr": 0.1, "rate": 0.1, "kind": "norm"}]

        layers = refine.Layers([0, 1], make, groups, folder if streamed else None)
        for step in range(9):
            if step == kept_at:
                for i in layers.indices:
                    layers.save(i, folder / f"kept-{i}")
            if step == 6:
                for i in layers.indices:
                    layers.go_back(i, folder / f"kept-{i}")
            for i in layers.indices:
                layers.take(i).weight.grad = torch.full((2, 3), float(step - 4 + i))
                layers.update(i, 1.0, True)
        return torch.stack([layers.take(i).weight.detach().clone() for i in layers.indices])

    assert torch.equal(run("memory", False), run("files", True))


@pytest.mark.parametrize("rate", [0.1, 2.0, 1e200], ids=["fine", "too large", "beyond float"])
def test_rates_that_ruin_the_model_are_halved(rate, tmp_path):
    model, s = Parabola(rate), refine.Settings(steps=60, rising=0.0)
    kept = Snapshots(tmp_path, model)
    found = refine._optimize(s, kept, torch.arange(4), 1, model.step, model.loss, lambda n, what: None)
    assert model.x**2 == found.after <= found.before == 1.0
    if rate == 2.0:
        assert model.largest > 1.0 and found.after < 0.01
    if rate == 0.1:
        assert model.largest == 1.0 and found.after < 0.01


def test_error_propagation_is_under_the_loss(model, tmp_path):
    """The quantizer's experts have a smaller loss-weighted error than plain signs, and second signs make it smaller, in
    every projection; putting neurons in another order changes nothing."""
    with gguf_io.open_model(model) as gguf:
        t = twin.Twin(gguf)
        work = states.Work(tmp_path, t, load(model, bundled.books()[:40_000], 40, 64))
        passes.forward(work)
        _, s = next(passes.backward(work))

        def errors(packed) -> dict[str, float]:
            found = {}
            for p, of_one in packed.items():
                H = torch.cat([s.second_moment(p, e, s.saliency[p]) for e in range(s.n_expert)])
                found[p] = float(glas.error(s.weights[p] - planes.decoded(*of_one), H).sum())
            return found

        before = s.weights
        plain = errors({p: (w >= 0, w.abs().unflatten(-1, (-1, 64)).mean(-1)) for p, w in s.weights.items()})
        packed, order = quantize_layer(s)
        one = errors(packed)
        assert order is None
        packed, order = quantize_layer(s, {"gate": 64, "up": 128, "down": 64})
        two = errors(packed)
        for p, k in (("gate", 64), ("up", 128), ("down", 64)):
            assert packed[p].signs2.shape[-1] == k
            assert 0 < two[p] < 0.9 * one[p] and one[p] < 0.9 * plain[p]
        assert torch.equal(order.sort(dim=1).values, torch.arange(models.N_FF).expand(s.n_expert, -1))
        x, index, p = s.x[:50], s.index[:50], torch.ones(50, 2)
        torch.testing.assert_close(twin.Experts(**s.weights)(x, index, p), twin.Experts(**before)(x, index, p))


def test_bits_go_where_they_gain_most():
    curves = {
        0: {"gate": [4.0, 3.0], "up": [1.0, 0.5], "down": [9.0, 2.0]},
        1: {"gate": [5.0], "up": [0.1], "down": [8.0]},
    }
    bits = {i: {"gate": 10, "up": 10, "down": 20} for i in curves}
    found = second_signs.allocate(curves, bits, 65)  # down of 0, gate of 1, down of 1, gate of 0 would be 60
    assert found == {0: {"gate": 64, "up": 0, "down": 64}, 1: {"gate": 64, "up": 0, "down": 64}}
    fused = second_signs.allocate(curves, bits, 65, fused=True)
    assert fused[0]["gate"] == fused[0]["up"] and fused[1]["gate"] == fused[1]["up"]
    assert not any(k for of_layer in second_signs.allocate(curves, bits, 9).values() for k in of_layer.values())
