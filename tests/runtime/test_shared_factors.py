"""Factors shared by a layer's experts: the runtime applies them, the tools fold, count and check them."""

import dataclasses
import json

import numpy as np
import pytest

import mobie_export as mobie
from mobie_export import cli, gguf_io
from mobie_export.errors import MobieError
from mobie_export.methods.paper import Paper
from mobie_export.spec import layout
from mobie_export.spec.inspect import render
from tests import models
from tests.scoring import divergence, log_probabilities, logits
from tools.assets import fabricate_gguf as fab

N_VOCAB = 512


# ---- the runtime, every architecture ---------------------------------------------------------------------------------


def small(s: fab.Shape) -> fab.Shape:
    n_head = 256 // s.head
    kv = max(1, s.n_head_kv * n_head // s.n_head)
    few = {"n_layer": 2, "n_vocab": N_VOCAB, "n_expert": s.n_used + 1, "n_head": n_head, "n_head_kv": kv}
    wide = 384 if s.architecture == "deepseek2" else s.n_ff_shared  # two shared experts, by its metadata
    return dataclasses.replace(s, **few, n_embd=256, n_ff=192, n_ff_expert=192, n_ff_shared=wide)


def rewritten(source, output, changed: dict[str, np.ndarray], more: dict[str, np.ndarray]) -> None:
    """A copy of a GGUF with other F32 values in some tensors, and further tensors at the end."""
    with gguf_io.open_model(source) as gguf:
        tensors = {n: gguf_io.NewTensor.of(values.astype("<f4")) for n, values in (changed | more).items()}
        gguf_io.rewrite(gguf, output, tensors=tensors)


@pytest.mark.parametrize("name", fab.SHAPES)
def test_the_runtime_multiplies_by_them(runtime_tools, tmp_path, name):
    """Experts B with factors in the file against experts S_out B S_in without; biases, where a model has them, stay."""
    shape = small(fab.SHAPES[name])
    base, parts, folded = (tmp_path / n for n in ("base.gguf", "parts.gguf", "folded.gguf"))
    fab.fabricate(base, shape, "F32", "F32")
    rng = np.random.default_rng(0)
    inner, whole, factors = {}, {}, {}
    with gguf_io.open_model(base) as gguf:
        biases = [n for n in gguf.tensors if n.endswith("_exps.bias")]
        for n, item in layout.experts(gguf).items():
            B = rng.standard_normal((item.n_expert, item.rows, item.cols)) / np.sqrt(item.cols)
            S = factors.setdefault(layout.shared_name(n), rng.standard_normal((256, 256)) / 16)
            inner[n], whole[n] = B, S @ B if layout.is_down(n) else B @ S
    strong = {n: rng.standard_normal(t.shape[::-1]) for n, t in gguf.tensors.items() if n in biases}
    rewritten(base, parts, inner | strong, factors)
    rewritten(base, folded, whole | strong, {})
    rewritten(base, tmp_path / "without.gguf", inner | strong, {})
    truth = logits(folded, 64)
    spread = truth.std()
    assert np.abs(truth - logits(tmp_path / "without.gguf", 64)).max() > 0.1 * spread, "the factors do nothing"
    for n_batch in (1, 64):  # token by token, and all at once
        assert np.abs(truth - logits(parts, n_batch)).max() < 1e-3 * spread
    if biases:
        rewritten(base, tmp_path / "unbiased.gguf", whole, {})
        assert np.abs(truth - logits(tmp_path / "unbiased.gguf", 64)).max() > 0.1 * spread, "the biases do nothing"


def test_a_factor_of_another_shape_does_not_load(runtime_tools, tmp_path):
    from llama_cpp import Llama

    path, wrong = tmp_path / "m.gguf", tmp_path / "wrong.gguf"
    models.write_qwen3moe(path)
    rewritten(path, wrong, {}, {"blk.0.ffn_moe_in.weight": np.eye(models.N_EMBD)[:64]})
    with pytest.raises(ValueError, match="Failed to load"):
        Llama(str(wrong), verbose=False)


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("paper") / "m.gguf"
    models.write_qwen3moe(path, seed=5)
    return path


@pytest.fixture(scope="module")
def exported(source, runtime_tools):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    output = source.with_name("paper.gguf")
    arguments = ["--method", "paper", "--samples", "40", "--seq-len", "64", "--threads", "1", "--quiet"]
    assert cli.main([str(source), "-o", str(output), *arguments]) == 0
    return output


def test_everything_is_counted(source, exported):
    assert cli.main(["verify", str(exported), "-q"]) == 0
    info = mobie.inspect(exported)
    experts = models.N_LAYER * 3 * models.N_EXPERT * models.N_EMBD * models.N_FF
    factors = models.N_LAYER * 2 * models.N_EMBD**2 * 8.5
    assert {t.name: t.type for t in info.tensors if t.kind == "expert factor"} == {
        f"blk.{i}.ffn_moe_{end}.weight": "Q8_0" for i in range(models.N_LAYER) for end in ("in", "out")
    }
    blocks = experts * 1.125 + models.N_LAYER * 3 * models.N_EXPERT * 32
    second = sum(8 * t.bytes for t in info.tensors if t.kind in ("expert residual", "expert columns"))
    stored = blocks + second + factors
    assert info.expert_bpw == pytest.approx(stored / experts)
    share = models.N_USED / models.N_EXPERT
    assert info.active_bpw == pytest.approx(((blocks + second) * share + factors) / (experts * share))
    assert "bits read per active" in render(info)
    assert info.mobie["mobie.method"] == "paper"
    settings = json.loads(info.mobie["mobie.settings"])
    assert settings["recipe"] == "paper" and settings["paper"]["factor_bits"] == 8 and settings["calibration"]
    plan = mobie.plan(source, method=_options())
    assert plan.expert_bpw == pytest.approx(info.expert_bpw)
    assert plan.output_size == pytest.approx(exported.stat().st_size, rel=0.01)
    plain = mobie.inspect(source)
    assert plain.active_bpw == plain.expert_bpw == 16


def _options():

    return Paper()


def test_what_the_file_says_is_what_it_computes(exported, tmp_path):
    f32, q8 = tmp_path / "f32.gguf", tmp_path / "q8.gguf"
    assert cli.main(["dequantize", str(exported), "-o", str(f32), "-q"]) == 0
    with gguf_io.open_model(f32) as a:
        assert not [n for n in a.tensors if "ffn_moe" in n] and not [k for k in a.entries if k.startswith("mobie")]
        q8_values = {n: models.stored(_values(a, n), models.Type.Q8_0)[0] for n in layout.experts(a)}
        q8_tensors = {n: gguf_io.NewTensor.stored(a.tensors[n].shape, 8, data) for n, data in q8_values.items()}
        gguf_io.rewrite(a, q8, tensors=q8_tensors)
    chunks = np.random.default_rng(0).integers(0, models.N_VOCAB, (2, 512))
    truth, ours, scale = (log_probabilities(p, chunks, one_by_one=False) for p in (f32, exported, q8))
    ours, scale = divergence(truth, ours), divergence(truth, scale)
    print(f"\npaper {ours}\nq8_0  {scale}")
    assert scale.kl > 0
    assert ours.kl <= 3 * scale.kl + 1e-6  # two products more, in 8 bits, stand in every layer's way


def _values(gguf, name: str) -> np.ndarray:
    t = gguf.tensors[name]
    return gguf_io.decode(gguf.read(t).reshape(-1, t.n_bytes // (t.n_weights // t.shape[0])), t.type_id).reshape(
        t.shape[::-1]
    )


def test_dequantize_folds(exported, tmp_path):
    """Against the definition in FORMAT.md, one expert at a time."""
    out = tmp_path / "f32.gguf"
    assert cli.main(["dequantize", str(exported), "-o", str(out), "-q"]) == 0
    with gguf_io.open_model(exported) as a, gguf_io.open_model(out) as b:
        for name, item in layout.experts(a).items():
            scales = a.read(item.factor).view("<f4")
            S = _values(a, item.shared.name).astype(np.float64)
            for e in (0, item.n_expert - 1):
                W = _values(a, name)[e].astype(np.float64) * scales[e]
                if getattr(item, "residual", None) is not None:
                    W[:, : item.residual.shape[0]] += _values(a, item.residual.name)[e] * scales[e]
                wanted = S @ W if layout.is_down(name) else W @ S
                found = _values(b, name)[e]
                assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_it_is_nearer_than_plain_signs(source, exported, tmp_path):
    assert cli.main([str(source), "-o", str(tmp_path / "sign.gguf"), "--method", "sign", "--quiet"]) == 0
    chunks = np.random.default_rng(1).integers(0, models.N_VOCAB, (2, 512))
    truth, ours, sign = (log_probabilities(p, chunks, False) for p in (source, exported, tmp_path / "sign.gguf"))
    assert 0 < divergence(truth, ours).kl < divergence(truth, sign).kl


def damage(exported, output, name: str, change) -> str:
    """What `verify` says about a copy in which a tensor's bytes or shape are others."""
    with gguf_io.open_model(exported) as a:
        t = a.tensors[name]
        n, shape, values = change(t, a.read(t))
        new = {n: gguf_io.NewTensor.stored(shape, t.type_id, values)}
        gguf_io.rewrite(a, output, tensors=new, drop={name} - {n})
    with pytest.raises(MobieError) as e:
        mobie.verify(output)
    return str(e.value)


def test_verify_looks_at_them(exported, tmp_path):
    name, out = "blk.1.ffn_moe_out.weight", tmp_path / "x.gguf"
    row = models.N_EMBD // 32 * 34

    def cut(t, values):
        return t.name, (t.shape[0], 64), values[: 64 * row]

    def infinite(t, values):
        values = values.copy()
        values[:2] = (0, 0x7C)  # the first block's float16 scale
        return t.name, t.shape, values

    def elsewhere(t, values):
        return "blk.9.ffn_moe_out.weight", t.shape, values

    assert "wanted floats or a type of them [320, 320]" in damage(exported, out, name, cut)
    assert "32 NaN or infinite values" in damage(exported, out, name, infinite)
    assert "no experts in its layer" in damage(exported, out, name, elsewhere)


def test_options_that_exclude_each_other(source, tmp_path, capsys):
    for more in (["--refine", "streamed"], ["--no-tune-router"], ["--bpw", "1.5"]):
        assert cli.main([str(source), "-o", str(tmp_path / "o"), "--method", "paper", *more]) == 2
        said = capsys.readouterr().err
        assert "--method paper has no such options" in said and said.splitlines()[1].split() == ["found:", more[0]]
