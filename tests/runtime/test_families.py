"""Every family of Mixture-of-Experts models: converted, exported, run as its bytes say, calibrated.

The models are random and tiny (families.py). Truth is the F32 GGUF of the exported file's dequantized weights; both run
in the patched llama.cpp, and a Q8_0 copy of the truth says what a small difference is, as in test_parity.py.
"""

import contextlib
import dataclasses
import json
import shutil
import subprocess
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest

from mobie_export import dequantize, gguf_io, verify
from mobie_export.errors import MobieError
from mobie_export.spec import block, layout
from tests import converting
from tests.scoring import divergence, scored

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402 (they need torch)

from mobie_export.calibration import bundled  # noqa: E402 (they need torch)
from mobie_export.calibration.text import load  # noqa: E402 (they need torch)
from mobie_export.methods.calibrated import Calibrated, refine  # noqa: E402
from mobie_export.methods.ordered import Ordered  # noqa: E402
from mobie_export.models import architecture, runtime_twin, twin  # noqa: E402 (they need torch)
from mobie_export.reporting import layers  # noqa: E402
from tests import exporting, families, models  # noqa: E402

CONTEXT, N_CHUNKS = 128, 4
NAMES = list(families.FAMILIES)
CALIBRATED = [n for n in NAMES if families.FAMILIES[n].architecture in architecture.FAMILIES]


def converted(name: str, folder: Path) -> Path:
    """F32 GGUF of a tiny model, by way of a Hugging Face folder."""
    checkpoint, path = folder / "checkpoint", folder / "f32.gguf"
    families.save(name, checkpoint)
    converting.convert(checkpoint, path, *families.FAMILIES[name].convert)
    return path


def log_probabilities(path: Path, chunks: np.ndarray, one_by_one: bool = False) -> np.ndarray:
    """chunks int [n_chunks, length] -> float64 [n_chunks * length, n_vocab]"""
    from llama_cpp import Llama

    length = chunks.shape[1]
    # an F32 cache, for the comparison with another implementation
    llama = Llama(
        str(path),
        n_ctx=length,
        n_batch=length,
        n_threads=1,
        n_threads_batch=1,
        type_k=0,
        type_v=0,
        flash_attn=False,
        logits_all=True,
        verbose=False,
    )
    return scored(llama, chunks, one_by_one)


def chunks(seed: int = 0, n: int = N_CHUNKS) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, CONTEXT))


@pytest.fixture(scope="module", params=NAMES)
def exported(request, tmp_path_factory, runtime_tools) -> tuple[Path, Path, Path]:
    """(source, exported, dequantized) GGUF of one family."""
    folder = tmp_path_factory.mktemp(request.param)
    source, mobie, f32 = converted(request.param, folder), folder / "mobie.gguf", folder / "dequantized.gguf"
    exporting.export(source, mobie)
    dequantize(mobie, f32)
    yield source, mobie, f32
    shutil.rmtree(folder)


def test_converted_as_the_family_it_is(exported, request):
    source, mobie, _ = exported
    family = families.FAMILIES[request.node.callspec.params["exported"]]
    with gguf_io.open_model(source) as a, gguf_io.open_model(mobie) as b:
        assert a.architecture == b.architecture == family.architecture
        experts = layout.experts(b)
        assert experts and all(x.tensor.type_id == block.TYPE_ID for x in experts.values())
        assert any(x.cols // 64 % 2 for x in experts.values())
        kept = [t for n, t in a.tensors.items() if n not in experts]
        assert len(kept) > 10
        for tensor in kept:
            assert np.array_equal(a.read(tensor), b.read(b.tensors[tensor.name])), tensor.name


def original_log_probabilities(name: str, tokens: np.ndarray) -> np.ndarray:
    """As transformers computes them."""
    with torch.no_grad():
        logits = families.model(families.FAMILIES[name])(torch.from_numpy(tokens)).logits
    found = torch.log_softmax(logits.double(), -1).flatten(0, 1).numpy()
    assert found.std() > 0.5, "logits too flat to tell models apart"
    return found


@pytest.mark.parametrize("exported", [n for n in NAMES if n not in CALIBRATED], indirect=True)
def test_converted_file_computes_what_the_original_does(exported, request):
    """Families with a twin have this from the twin's test."""
    source, _, _ = exported
    tokens = chunks(n=2)
    truth = original_log_probabilities(request.node.callspec.params["exported"], tokens)
    assert divergence(truth, log_probabilities(source, tokens)).kl < 1e-9


@pytest.mark.parametrize("one_by_one", [False, True], ids=["prompt", "token-by-token"])
def test_runtime_computes_what_the_file_says(exported, runtime_tools, one_by_one):
    _, mobie, f32 = exported
    q8 = f32.with_name("q8_0.gguf")
    if not q8.exists():
        subprocess.run([runtime_tools / "llama-quantize", f32, q8, "Q8_0"], check=True, capture_output=True)
    tokens = chunks(n=1) if one_by_one else chunks()
    truth = log_probabilities(f32, tokens, one_by_one)
    ours = divergence(truth, log_probabilities(mobie, tokens, one_by_one))
    scale = divergence(truth, log_probabilities(q8, tokens, one_by_one))
    print(f"\nmobie {ours}\nq8_0  {scale}")
    assert scale.kl > 0, "the yardstick is not one"
    assert ours.kl <= 2 * scale.kl + 1e-6
    assert ours.top1 <= 2 * scale.top1 + 0.01


def test_scales_of_experts_are_applied(exported, tmp_path):
    """With one tensor's scales changed, the model is another, and still the one its bytes say."""
    _, mobie, _ = exported
    tokens = chunks(1, 1)
    before = log_probabilities(mobie, tokens)
    with gguf_io.open_model(mobie) as gguf:
        scales = [t for n, t in gguf.tensors.items() if layout.kind(n) == "expert scale"]
        last = max(layout.layer(t.name) for t in scales)
        values = {t.name: gguf.read(t).view("<f4") for t in scales}
    assert all((v > 0).all() and (abs(v - 1) > 0.1).all() for v in values.values()), "scales near one prove nothing"
    assert {t.name.split(".")[2] for t in scales} >= {"ffn_down_exps"}
    for tensor in [t for t in scales if layout.layer(t.name) == last]:
        changed, truth = tmp_path / "changed.gguf", tmp_path / "truth.gguf"
        shutil.copyfile(mobie, changed)
        with open(changed, "r+b") as file:
            file.seek(tensor.offset)
            file.write((values[tensor.name] * np.linspace(0.5, 3, tensor.n_weights, dtype="<f4")).tobytes())
        dequantize(changed, truth, overwrite=True)
        wanted, found = log_probabilities(truth, tokens), log_probabilities(changed, tokens)
        difference = divergence(wanted, before).kl
        assert difference > 1e-4, "the scales have no influence"
        assert divergence(wanted, found).kl < 0.3 * difference, f"{tensor.name} is not applied"


# ---- torch twins -----------------------------------------------------------------------------------------------------


def twin_log_probabilities(path: Path, tokens: np.ndarray) -> np.ndarray:
    with gguf_io.open_model(path) as gguf:
        return through_all_layers(twin.Twin(gguf), tokens)


def through_all_layers(t: twin.Twin, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        hidden = t.embedding()[torch.from_numpy(tokens)]
        for i in range(t.n_layers):
            hidden = t.run(t.layer(i), hidden)
        return torch.log_softmax(t.head()(hidden.flatten(0, 1)).double(), -1).numpy()


@pytest.mark.parametrize("exported", CALIBRATED, indirect=True)
def test_twin_computes_what_llama_cpp_and_transformers_compute(exported, request):
    source, _, _ = exported
    tokens = chunks(n=2)
    found = twin_log_probabilities(source, tokens)
    truth = original_log_probabilities(request.node.callspec.params["exported"], tokens)
    assert divergence(truth, found).kl < 1e-9
    theirs = log_probabilities(source, tokens)
    print(f"\nllama.cpp {divergence(theirs, found)}")
    assert divergence(theirs, found).kl < 1e-6


def test_layers_that_llama_cpp_runs_are_the_whole_model(exported):
    """Of every family, with a torch twin or without."""
    source, _, _ = exported
    tokens = chunks(n=2)
    with gguf_io.open_model(source) as gguf, contextlib.closing(runtime_twin.RuntimeTwin(gguf)) as found:
        found.prepare()
        ours = through_all_layers(found, tokens)
    theirs = log_probabilities(source, tokens)
    print(f"\nllama.cpp {divergence(theirs, ours)}")
    assert divergence(theirs, ours).kl < 1e-6


def from_source(source: Path, *files: Path) -> list[float]:
    """KL divergence of each on the bundled books."""
    tokens = load(source, bundled.books(), 32, CONTEXT, seed=7).tokens.numpy()[:8]
    truth = log_probabilities(source, tokens)
    return [divergence(truth, log_probabilities(path, tokens)).kl for path in files]


@pytest.mark.parametrize("exported", ["granitehybrid", "lfm2moe", "minimax-m2", "nemotronh"], indirect=True)
def test_calibration_works_without_a_torch_twin(exported, tmp_path):
    source, mobie, _ = exported
    better, again = tmp_path / "ordered.gguf", tmp_path / "again.gguf"
    options = Ordered(samples=96, seq_len=64, bpw=1.3)
    assert exporting.export(source, better, method=options, threads=1).outcome.lines
    verify(better)
    signs, ours = from_source(source, mobie, better)
    print(f"\nsigns {signs:.4f}, in order {ours:.4f}")
    assert ours < 0.8 * signs
    with gguf_io.open_model(better) as a, gguf_io.open_model(source) as b:
        assert not any("refine" in options for options in Ordered.efforts(b)["best"])
        found = layers.compare(a, b, bundled.books(), 1, True, lambda n, what: None)["layers"]
    with_experts = [row for row in found if "experts_error" in row]
    assert with_experts and all(0.1 < row["experts_error"] < 0.9 for row in with_experts)
    assert all(row["routing_alone"] == 1 for row in with_experts), "the source's own routers on its own stream"
    exporting.export(source, again, method=options, threads=1)
    assert again.read_bytes() == better.read_bytes()
    with pytest.raises(MobieError, match="cannot be calibrated"):
        exporting.export(source, tmp_path / "no.gguf", method=dataclasses.replace(options, refine="end-to-end"))


def test_llama_cpp_runs_the_layers_of_models_that_the_torch_twin_does_not_know(tmp_path, runtime_tools):
    path, plain, tokens = tmp_path / "m.gguf", tmp_path / "plain.gguf", chunks(n=2)
    for made, factor in ((path, 4.0), (plain, 1.0)):
        keys = partial(gguf.GGUFWriter.add_float32, key="qwen3moe.rope.scale_linear", val=factor)
        models.write_qwen3moe(made, change=models.as_f32, keys=keys)
    with gguf_io.open_model(path) as file:
        with pytest.raises(MobieError):
            twin.Twin(file)
        with contextlib.closing(Ordered().twin(file)) as found:
            found.prepare()
            ours = through_all_layers(found, tokens)
    theirs = log_probabilities(path, tokens)
    assert divergence(theirs, ours).kl < 1e-6
    assert divergence(theirs, log_probabilities(plain, tokens)).kl > 1e-4, "it changes nothing"


@pytest.mark.parametrize("exported", ["deepseek2", "deepseek2-lite", "deepseek3"], indirect=True)
def test_twin_of_a_file_converted_before_attention_was_absorbed(exported, tmp_path):
    """One kv_b for keys and values, and lengths of heads under their plain names: the same model."""
    source, _, _ = exported
    path, tokens = tmp_path / "old.gguf", chunks(n=1)
    with gguf_io.open_model(source) as gguf:
        heads = gguf.get("deepseek2.attention.head_count", int)
        lengths = {x: gguf.get(f"deepseek2.attention.{x}_mla", int) for x in ("key_length", "value_length")}
        changes = {"head_count_kv": heads} | lengths
        entries = [gguf_io.make_entry(f"deepseek2.attention.{k}", gguf_io.U32, value) for k, value in changes.items()]
        drop, tensors = {f"deepseek2.attention.{x}_mla" for x in lengths}, {}
        for name in [n for n in gguf.tensors if n.endswith("attn_k_b.weight")]:
            other = name.replace("attn_k_b", "attn_v_b")
            k, v = (gguf.read(gguf.tensors[n]).view("<f4").reshape(gguf.tensors[n].shape[::-1]) for n in (name, other))
            kv = np.concatenate([k.transpose(0, 2, 1), v], 1).reshape(-1, k.shape[1])
            data = np.frombuffer(np.ascontiguousarray(kv).tobytes(), np.uint8)
            drop |= {name, other}
            whole = gguf_io.NewTensor.stored(kv.shape[::-1], gguf.tensors[name].type_id, data)
            tensors[name.replace("attn_k_b", "attn_kv_b")] = whole
        gguf_io.rewrite(gguf, path, tensors=tensors, entries=entries, drop=drop)
    found = twin_log_probabilities(path, tokens)
    assert divergence(twin_log_probabilities(source, tokens), found).kl < 1e-9
    assert divergence(log_probabilities(path, tokens), found).kl < 1e-6


@pytest.mark.parametrize("exported", ["qwen2moe", "deepseek2", "gpt-oss", "qwen3next"], indirect=True)
def test_calibration_works_with_the_family(exported, tmp_path, monkeypatch):
    """Error propagation and a few steps of refinement bring the model nearer to the original than signs alone."""
    source, mobie, _ = exported
    monkeypatch.setattr(refine, "LAYERWISE", refine.Settings(steps=6, free_signs=0.0))
    options = Calibrated(samples=96, seq_len=64, steps=6)
    better = tmp_path / "calibrated.gguf"
    report = exporting.export(source, better, method=options, threads=1)
    assert report.outcome.lines
    verify(better)
    signs, ours = from_source(source, mobie, better)
    print(f"\nsigns {signs:.4f}, calibrated {ours:.4f}")
    assert ours < 0.9 * signs


@pytest.mark.parametrize("ff", [320, families.WIDTH // 2], ids=["by-shape", "square"])
def test_packed_experts_as_published_and_as_transformers_5_writes_them(tmp_path, ff, runtime_tools):
    """Qwen3-VL: [n_expert, inputs, outputs] then, [n_expert, outputs, inputs] now."""
    made = families.vision_model(ff)
    tokens = chunks(n=2)
    with torch.no_grad():
        truth = torch.log_softmax(made(torch.from_numpy(tokens)).logits.double(), -1).flatten(0, 1).numpy()
    for name, version in (("written", "5.0.0"), ("published", "4.57.0")):
        folder, path = tmp_path / name, tmp_path / f"{name}.gguf"
        made.save_pretrained(folder)
        families.save_tokenizer(folder)
        settings = json.loads((folder / "config.json").read_text()) | {"transformers_version": version}
        (folder / "config.json").write_text(json.dumps(settings))
        if name == "published":
            (weights,) = folder.glob("*.safetensors")
            tensors = load_file(weights)
            turned = {n: t.mT.contiguous() if ".experts." in n else t for n, t in tensors.items()}
            assert any(turned[n].shape != t.shape or not torch.equal(turned[n], t) for n, t in tensors.items())
            save_file(turned, weights, {"format": "pt"})
        converting.convert(folder, path)
        assert divergence(truth, log_probabilities(path, tokens)).kl < 1e-9, name


@pytest.mark.parametrize("exported", ["glm4moe"], indirect=True)
def test_layers_that_predict_further_tokens_are_left_to_signs(exported, tmp_path):
    """A copy of the last layer stands in for one: transformers writes none."""
    source, mobie, _ = exported
    path, out = tmp_path / "nextn.gguf", tmp_path / "out.gguf"
    with gguf_io.open_model(source) as gguf:
        changes = {"glm4moe.block_count": 3, "glm4moe.nextn_predict_layers": 1}
        entries = [gguf_io.make_entry(k, gguf_io.U32, value) for k, value in changes.items()]
        further = {n.replace("blk.1.", "blk.2."): t for n, t in gguf.tensors.items() if n.startswith("blk.1.")}
        tensors = {n: gguf_io.NewTensor.stored(t.shape, t.type_id, gguf.read(t)) for n, t in further.items()}
        gguf_io.rewrite(gguf, path, tensors=tensors, entries=entries)
    exporting.export(path, out, method=Calibrated(samples=32, seq_len=32, refine="none"), threads=1)
    with gguf_io.open_model(out) as a, gguf_io.open_model(mobie) as b:
        for p in ("gate", "up", "down"):
            signs = b.read(b.tensors[f"blk.1.ffn_{p}_exps.weight"])
            assert np.array_equal(a.read(a.tensors[f"blk.2.ffn_{p}_exps.weight"]), signs)
            assert not np.array_equal(a.read(a.tensors[f"blk.1.ffn_{p}_exps.weight"]), signs)
