"""The torch twin computes what llama.cpp computes, and the streamed passes what plain autograd computes."""

from pathlib import Path

import numpy as np
import pytest

from mobie_export import errors, gguf_io
from mobie_export.calibration.tokenizer import tokenize
from tests import models
from tests.scoring import log_probabilities

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mobie_export.calibration import (  # noqa: E402 (they need torch)
    bundled,
    passes,
    states,
)
from mobie_export.calibration.statistics import LayerStatistics  # noqa: E402 (they need torch)
from mobie_export.calibration.text import Calibration, load  # noqa: E402 (they need torch)
from mobie_export.models import twin  # noqa: E402 (they need torch)

N, LENGTH = 6, 48


def fuse(tensors: models.Tensors) -> None:
    """Gate and up in one tensor, gate first."""
    models.as_f32(tensors)
    for i in range(models.N_LAYER):
        gate, up = (tensors.pop(f"blk.{i}.ffn_{p}_exps.weight")[0] for p in ("gate", "up"))
        tensors[f"blk.{i}.ffn_gate_up_exps.weight"] = np.concatenate([gate, up], 1), models.Type.F32


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("twin") / "m.gguf"
    models.write_qwen3moe(path, seed=3, change=models.as_f32)
    return path


def logits(model_twin, tokens):  # [n, length] -> [n, length, n_vocab]
    hidden = model_twin.embedding()[tokens]
    for i in range(model_twin.n_layers):
        hidden = model_twin.run(model_twin.layer(i), hidden)
    return model_twin.head()(hidden)


def test_logits_are_llama_cpps(model, runtime_tools):
    chunks = np.random.default_rng(0).integers(0, models.N_VOCAB, (2, 512))
    truth = log_probabilities(model, chunks, one_by_one=False)
    with gguf_io.open_model(model) as gguf, torch.no_grad():
        found = torch.log_softmax(logits(twin.Twin(gguf), torch.from_numpy(chunks)).double(), -1).flatten(0, 1)
    kl = (np.exp(truth) * (truth - found.numpy())).sum(-1).mean()
    assert abs(kl) < 1e-6
    assert np.abs(truth - found.numpy()).max() < 1e-2


def test_fused_experts_are_the_same_model(model, tmp_path):
    models.write_qwen3moe(tmp_path / "fused.gguf", seed=3, change=fuse)
    tokens = torch.arange(64).view(2, 32)
    with gguf_io.open_model(model) as a, gguf_io.open_model(tmp_path / "fused.gguf") as b, torch.no_grad():
        assert len(a.tensors) > len(b.tensors)
        assert torch.equal(logits(twin.Twin(a), tokens), logits(twin.Twin(b), tokens))


def test_tokens_are_the_models_own(model, runtime_tools):
    tokens, first = tokenize(model, b"at t")
    pieces = [*models.byte_tokens(), "Ġt"]
    assert [pieces[t] for t in tokens] == ["a", "t", "Ġt"] and first is None


def small(model: Path, folder: Path) -> tuple[gguf_io.Gguf, "states.Work"]:
    gguf = gguf_io.open_model(model)
    tokens = torch.randint(models.N_VOCAB, (N, LENGTH), generator=torch.Generator().manual_seed(1))
    return gguf, states.Work(folder, twin.Twin(gguf), Calibration(tokens, ""), torch.float32)


def test_streamed_gradients_and_moments_are_autograds(model, tmp_path, monkeypatch):
    monkeypatch.setattr("mobie_export.calibration.text.BATCH_TOKENS", 2 * LENGTH)  # several batches
    gguf, work = small(model, tmp_path)
    groups = 2
    passes.forward(work)
    found = dict(passes.backward(work, groups=groups))

    # plain: the whole model at once
    t = work.twin
    layers = [t.layer(i) for i in range(t.n_layers)]
    seen = []
    for layer in layers:
        t.experts_of(layer).tap = seen.append
    tokens = work.calibration.tokens
    hidden = [t.embedding()[tokens].requires_grad_()]
    for layer in layers:
        hidden.append(t.run(layer, hidden[-1]))
    loss = torch.nn.functional.cross_entropy(t.head()(hidden[-1])[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    inner = [x for s in seen for x in (s.gate, s.up, s.down)]
    grads = torch.autograd.grad(loss, [*hidden, *inner])
    for i in range(t.n_layers + 1):
        torch.testing.assert_close(work.hidden[i].read(slice(None)), hidden[i].detach(), rtol=1e-4, atol=1e-5)
        small_part = 1e-4 * float(grads[i].abs().max())  # sums in another order
        torch.testing.assert_close(work.gradient[i].read(slice(None)), grads[i], rtol=1e-3, atol=small_part)
    for i, s in enumerate(seen):
        stats = found[i]
        assert stats.counts.sum() == N * LENGTH * models.N_USED
        rows = {"gate": s.x[s.order // models.N_USED], "down": torch.nn.functional.silu(s.gate) * s.up}
        rows["up"] = rows["gate"]
        for j, projection in enumerate(twin.PROJECTIONS):
            g2 = grads[t.n_layers + 1 + 3 * i + j].double().square()
            scale = g2.mean()
            for expert in (0, models.N_EXPERT - 1):
                mine = s.index.flatten()[s.order] == expert
                x = rows[projection][mine].detach().double()
                moments = stats.second_moment(projection, expert, stats.saliency[projection], shrink=False)
                for g in range(groups):
                    half = g2.shape[1] // groups
                    weight = g2[mine, g * half : (g + 1) * half].mean(1) / scale
                    wanted = x.T @ (weight[:, None] * x)
                    assert wanted.abs().max() > 0
                    torch.testing.assert_close(moments[g].double(), wanted, rtol=1e-3, atol=float(1e-4 * wanted.max()))
    gguf.close()


def test_bfloat16_states_change_moments_little(model, tmp_path):
    gguf, work = small(model, tmp_path)
    rough = states.Work(tmp_path / "rough", work.twin, work.calibration)
    rough.folder.mkdir()
    moments = []
    for w in (work, rough):
        passes.forward(w)
        stats = dict(passes.backward(w))
        moments.append(torch.stack([stats[0].second_moment("up", e, stats[0].saliency["up"])[0] for e in range(8)]))
    assert 0 < (moments[0] - moments[1]).norm() < 0.1 * moments[0].norm()
    gguf.close()


def test_experts_without_tokens_take_the_layers_moments():
    torch.manual_seed(0)
    weights = {p: torch.randn(3, 64, 64) for p in twin.PROJECTIONS}
    x, index = torch.randn(500, 64), torch.zeros(500, 1, dtype=torch.long)
    index[::50] = 1  # expert 1: 10 tokens, expert 2: none
    s = torch.rand(500, 1) + 0.5
    stats = LayerStatistics(x, index, {p: s for p in twin.PROJECTIONS}, weights, {})
    layer = x.T @ x / 500 * s.mean()
    own = x[::50].T @ (s[::50] * x[::50])
    torch.testing.assert_close(stats.second_moment("gate", 2, s)[0], 64 * layer)
    torch.testing.assert_close(stats.second_moment("gate", 1, s)[0], own + 54 * layer)
    rest = index.flatten() == 0
    torch.testing.assert_close(
        stats.second_moment("gate", 0, s)[0], x[rest].T @ (s[rest] * x[rest]), rtol=1e-4, atol=1e-4
    )
    assert torch.linalg.matrix_rank(stats.second_moment("down", 2, s)[0]) == 64


def test_tokens_without_an_expert_are_no_silent_zeros():
    w = torch.ones(2, 64, 64)
    experts = twin.Experts(w, w, w)
    with pytest.raises(AssertionError):
        experts(torch.ones(3, 64), torch.tensor([[0], [1], [2]]), torch.ones(3, 1))


def change_architecture(path: Path, scaling: str) -> None:
    models.write_qwen3moe(path, keys=lambda w: w.add_string("qwen3moe.rope.scaling.type", scaling))


def test_models_the_twin_does_not_know_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    change_architecture(path, "longrope")
    with gguf_io.open_model(path) as gguf, pytest.raises(errors.MobieError) as e:
        twin.Twin(gguf)
    assert e.value.kind == errors.UNSUPPORTED and "longrope" in str(e.value)
    models.write_qwen3moe(
        path, change=lambda t: t.update({"blk.0.attn_sinks.weight": models.stored(np.ones(4), models.Type.F32)})
    )
    with gguf_io.open_model(path) as gguf, pytest.raises(errors.MobieError) as e:
        twin.Twin(gguf)
    assert "attn_sinks" in str(e.value)


def test_missing_metadata_is_said_with_what_to_do(model, tmp_path):
    path = tmp_path / "m.gguf"
    with gguf_io.open_model(model) as gguf:
        gguf_io.rewrite(gguf, path, drop=["qwen3moe.attention.head_count"])
    with gguf_io.open_model(path) as gguf, pytest.raises(errors.MobieError) as e:
        twin.Twin(gguf)
    assert e.value.kind == errors.BAD_INPUT and "qwen3moe.attention.head_count" in e.value.found
    assert "qwen3moe" in e.value.wanted and "--method sign" in e.value.todo


def test_calibration_text_is_there_and_long_enough(model, runtime_tools):
    text = bundled.books()
    assert 2_500_000 < len(text) < 3_500_000
    made = load(model, text[:20_000], n_samples=40, seq_len=64, seed=1)
    assert made.tokens.shape == (40, 64)
    other = load(model, text[:20_000], n_samples=40, seq_len=64, seed=2)
    assert not torch.equal(made.tokens, other.tokens)
    with pytest.raises(errors.MobieError, match="too short"):
        load(model, text[:500], seq_len=64)


def test_a_text_is_tokenized_once(tmp_path, monkeypatch):
    """By one model: another text, model or reading of special tokens is another matter."""
    asked = []

    def tokens(*args):
        asked.append(args)
        return np.arange(4000, dtype=np.int32), None

    monkeypatch.setattr("mobie_export.calibration.text.tokenize", tokens)
    model = tmp_path / "m.gguf"
    model.write_bytes(b"1")
    first = load(model, b"some text", seq_len=64)
    assert torch.equal(load(model, b"some text", seq_len=64).tokens, first.tokens) and len(asked) == 1
    load(model, b"another text", seq_len=64)
    load(model, b"another text", seq_len=64, special=True)
    model.write_bytes(b"12")
    load(model, b"another text", seq_len=64, special=True)
    assert len(asked) == 4
