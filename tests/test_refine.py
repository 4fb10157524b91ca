"""Refinement: what is tuned is what the file will hold, and it gets better on text that was kept aside."""

import dataclasses
import json

import numpy as np
import pytest

from mobie_export import cli, format, gguf_io, pipeline
from tests import models
from tests.test_parity import log_probabilities

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mobie_export import calibrate, calibrated, glas, refine, twin  # noqa: E402 (they need torch)


def some_packed(seed: int = 0, e: int = 3, rows: int = 64, cols: int = 128):
    g = torch.Generator().manual_seed(seed)
    shapes = {"gate": (e, rows, cols), "up": (e, rows, cols), "down": (e, cols, rows)}
    w = {p: torch.randn(s, generator=g) for p, s in shapes.items()}
    return w, {p: (v >= 0, v.abs().unflatten(-1, (-1, 64)).mean(-1)) for p, v in w.items()}


@pytest.mark.parametrize("free", [False, True])
def test_binary_experts_compute_what_the_file_says(free):
    w, packed = some_packed()
    experts = refine.BinaryExperts(packed, w, free)
    with torch.no_grad():
        for theta in experts.theta.values():
            theta.normal_(0, 0.3)
    x, index, p = torch.randn(40, 128), torch.randint(3, (40, 2)), torch.rand(40, 2)
    decoded = {}
    for projection, (signs, magnitudes) in experts.packed().items():
        stored = []
        for s, a in zip(signs.numpy(), magnitudes.double().numpy(), strict=True):
            scale, codes = format.encode_scales(a)
            stored.append(format.dequantize(format.pack(s, codes), scale))
        decoded[projection] = torch.from_numpy(np.stack(stored))
    truth = twin.Experts(**decoded)(x, index, p)
    torch.testing.assert_close(experts(x, index, p), truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))


def test_gradients_are_those_of_the_decoded_weights():
    x = torch.randn(20, 128, dtype=torch.double, requires_grad=True)
    v = torch.randn(64, 128, dtype=torch.double, requires_grad=True)
    a = torch.rand(64, 2, dtype=torch.double, requires_grad=True)
    dy = torch.randn(20, 64, dtype=torch.double)
    found = torch.autograd.grad(refine._Product.apply(x, v, a), (x, v, a), dy)
    w = (torch.where(v >= 0, 1.0, -1.0) * a.repeat_interleave(64, 1)).detach().requires_grad_()
    b = torch.where(v >= 0, 1.0, -1.0)
    dx, dw = torch.autograd.grad(x @ w.T, (x, w), dy)
    torch.testing.assert_close(found[0], dx)
    torch.testing.assert_close(found[1], dw * a.detach().repeat_interleave(64, 1))
    torch.testing.assert_close(found[2], (dw * b).unflatten(-1, (-1, 64)).sum(-1))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("refine") / "m.gguf"
    models.write_qwen3moe(path, seed=7)
    return path


@pytest.fixture
def short(monkeypatch):
    """Few steps: these are tests of the way, not of the quality."""
    monkeypatch.setattr(refine, "STREAMED", dataclasses.replace(refine.STREAMED, steps=12, batch_tokens=512))
    monkeypatch.setattr(
        refine, "END_TO_END", dataclasses.replace(refine.END_TO_END, steps=12, rate_signs=0.01, batch_tokens=512)
    )


ARGUMENTS = ["--samples", "40", "--seq-len", "64", "--threads", "1", "--quiet"]


def export(model, output, *more) -> None:
    assert cli.main([str(model), "-o", str(output), *ARGUMENTS, *more]) == 0


def divergence(original, path) -> float:
    tokens, _ = twin.tokenize(original, calibrate.read_text(None)[-4000:])
    chunks = tokens[:1024].reshape(2, 512)
    truth, found = (log_probabilities(p, chunks, one_by_one=False) for p in (original, path))
    return float((np.exp(truth) * (truth - found)).sum(-1).mean())


def test_every_step_brings_the_model_nearer(model, tmp_path, short, runtime_tools):
    kl, tuned = {}, {}
    assert cli.main([str(model), "-o", str(tmp_path / "sign.gguf"), "--quiet"]) == 0
    kl["sign"] = divergence(model, tmp_path / "sign.gguf")
    for refinement in ("none", "streamed", "end-to-end"):
        out = tmp_path / f"{refinement}.gguf"
        export(model, out, "--refine", refinement)
        kl[refinement] = divergence(model, out)
        assert cli.main(["verify", str(out), "-q"]) == 0
        with gguf_io.open_model(model) as a, gguf_io.open_model(out) as b:
            assert b.value("mobie.method") == ("glas" if refinement == "none" else f"glas+{refinement}")
            settings = json.loads(b.value("mobie.settings"))
            assert settings["calibration"] and settings["sequences"] == 40 and settings["seed"] == 0
            rest = [n for n in a.tensors if "_exps." not in n]
            tuned[refinement] = {n for n in rest if bytes(a.read(a.tensors[n])) != bytes(b.read(b.tensors[n]))}
    assert kl["sign"] > kl["none"] > 0 and kl["sign"] > kl["streamed"] > kl["end-to-end"] > 0
    both = {f"blk.{i}.{n}.weight" for i in range(models.N_LAYER) for n in ("ffn_gate_inp", "ffn_norm")}
    assert tuned["none"] == set() and tuned["streamed"] == both and tuned["end-to-end"] > both


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


def test_fused_experts_are_written_in_their_order(tmp_path, short):
    path, out = tmp_path / "m.gguf", tmp_path / "o.gguf"
    models.write_qwen3moe(path, fused=True)
    export(path, out, "--refine", "none")
    with gguf_io.open_model(path) as a, gguf_io.open_model(out) as b:
        before, after = twin.Twin(a), twin.Twin(b)
        for i in range(models.N_LAYER):
            for projection, w in before.experts(i).items():
                assert ((after.experts(i)[projection] >= 0) == (w >= 0)).double().mean() > 0.7


def test_packages_and_options_are_asked_for(model, tmp_path, monkeypatch, capsys):
    assert cli.main([str(model), "-o", str(tmp_path / "o"), "--method", "sign", "--samples", "4"]) == 2
    assert cli.main([str(model), "-o", str(tmp_path / "o"), "--calibration", str(tmp_path / "none.txt")]) == 3
    assert "none.txt" in capsys.readouterr().err
    plan = pipeline.plan(model, calibration=calibrated.Options())
    assert plan.work_size > 0
    assert not list(tmp_path.iterdir())


def test_sequences_kept_aside_are_not_tuned_on():
    train, aside = refine.held_out(100)
    assert len(train) + len(aside) == 100 and not set(train.tolist()) & set(aside.tolist()) and len(aside) == 6


def test_error_propagation_is_under_the_loss(model, tmp_path):
    """The quantizer's experts have a smaller loss-weighted error than plain signs, in every projection."""
    with gguf_io.open_model(model) as gguf:
        t = twin.Twin(gguf)
        work = calibrate.Work(tmp_path, t, calibrate.load(model, calibrate.read_text(None)[:40_000], 40, 64))
        calibrate.forward(work)
        _, s = next(calibrate.backward(work))
        for p, (signs, a) in calibrated.quantize_layer(s).items():
            w = s.weights[p]
            plain = (w >= 0, w.abs().unflatten(-1, (-1, 64)).mean(-1))
            H = torch.cat([s.second_moment(p, e, s.saliency[p]) for e in range(s.n_expert)])
            ours, theirs = (float(glas.error(w - glas.decoded(*x), H).sum()) for x in ((signs, a), plain))
            assert 0 < ours < 0.9 * theirs
