"""Experts as Q1_0: the bytes are ggml's, the runtime computes what they say, and every method brings it nearer.

That an unpatched llama.cpp runs them as well is shown by tests/stock.py, which builds one.
"""

import ctypes
import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

import mobie_export as mobie
from mobie_export import gguf_io
from mobie_export.methods.sign.method import binarize
from mobie_export.runtime import libggml, loads
from mobie_export.spec import block, layout
from tests import exporting, q1_0_models, scoring

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mobie_export.calibration import bundled  # noqa: E402 (they need torch)
from mobie_export.calibration.tokenizer import tokenize  # noqa: E402
from mobie_export.methods.calibrated import Calibrated, refine  # noqa: E402
from mobie_export.methods.ordered import Ordered  # noqa: E402
from tests import converting, families  # noqa: E402

Q1_0 = block.Q1_0


def test_every_pattern_decodes_as_ggml_decodes_it(runtime_tools):
    library = ctypes.CDLL(str(libggml.base_library()))
    library.dequantize_row_q1_0.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    blocks = np.random.default_rng(0).integers(0, 256, (1 << 16, Q1_0.block_bytes), np.uint8)
    blocks[:, :2] = np.arange(1 << 16, dtype="<u2")[:, None].view(np.uint8)  # every scale, NaN and infinity too
    wanted = np.empty((len(blocks), Q1_0.length), np.float32)
    library.dequantize_row_q1_0(blocks.ctypes.data, wanted.ctypes.data, wanted.size)
    found = gguf_io.decode(blocks, Q1_0.type_id)
    assert np.isnan(wanted).any() and np.isinf(wanted).any()
    assert np.array_equal(found, wanted, equal_nan=True)


def test_signs_and_means_are_the_bytes_that_ggml_writes(runtime_tools):
    """Where its sums in float32 round to the same half; where not, the next one."""
    weights = np.random.default_rng(1).standard_normal((400, 512)).astype(np.float32)
    signs, magnitudes = binarize(weights, None, Q1_0.length)
    found = block.pack(signs, block.encode_scales(magnitudes, Q1_0)[1], Q1_0)
    theirs = libggml.Quantizers(libggml.base_library()).quantize(Q1_0.type_id, weights)
    assert found.shape == theirs.shape
    codes = [block.scales(x, Q1_0).view(np.int16).astype(int) for x in (found, theirs)]
    assert np.abs(codes[0] - codes[1]).max() <= 1 and (codes[0] == codes[1]).mean() > 0.99
    assert np.array_equal(block.unpack(found, Q1_0)[0], block.unpack(theirs, Q1_0)[0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return q1_0_models.trained(tmp_path_factory.mktemp("q1_0") / "trained.gguf")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(refine, "LAYERWISE", dataclasses.replace(refine.LAYERWISE, steps=12, batch_tokens=512))
    monkeypatch.setattr(refine, "WHOLE", dataclasses.replace(refine.WHOLE, rate_signs=0.01, batch_tokens=512))


def test_every_method_brings_the_model_nearer(trained, tmp_path, short, runtime_tools):
    tokens, _ = tokenize(trained, bundled.books()[-4000:])
    chunks = tokens[:1024].reshape(2, 512)
    truth = scoring.log_probabilities(trained, chunks, one_by_one=False)
    assert scoring.divergence(scoring.log_probabilities(q1_0_models.TRAINED, chunks, False), truth).kl < 1e-6
    few = {"samples": 48, "seq_len": 64}
    methods = {
        "sign": "sign",
        "calibrated": Calibrated(refine="none", **few),
        "layerwise": Calibrated(refine="layerwise", **few),
        "ordered": Ordered(**few),
        "refined": Ordered(refine="end-to-end", steps=12, **few),
    }
    kl = {}
    for name, method in methods.items():
        report = exporting.export(trained, tmp_path / f"{name}.gguf", method=method, type="q1_0", threads=1)
        assert report.expert_bpw == 1.125 and not loads.problem(report.output)
        mobie.verify(report.output)
        with gguf_io.open_model(report.output) as gguf:
            assert not [n for n in gguf.tensors if layout.kind(n) in layout.BESIDE_EXPERTS]
            assert {x.tensor.type_id for x in layout.experts(gguf).values()} == {Q1_0.type_id}
            if name != "sign":
                assert json.loads(gguf.value("mobie.settings"))["sequences"] == 48
        found = scoring.log_probabilities(report.output, chunks, one_by_one=False)
        kl[name] = scoring.divergence(truth, found).kl
    print(kl)
    assert kl["sign"] > 1.5 * kl["calibrated"] > 0 and kl["sign"] > kl["layerwise"] > 0
    assert kl["sign"] > 1.5 * kl["ordered"] and kl["ordered"] > kl["refined"] > 0


def test_the_same_command_gives_the_same_bytes_and_types_share_no_work(trained, tmp_path, monkeypatch, runtime_tools):
    """What an interrupted export of one type left is not taken for the other's."""
    method = Ordered(samples=16, seq_len=32)
    outputs = {}
    for name, type_name in (("a", "q1_0"), ("b", "mobie"), ("c", "q1_0")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ordered, "tune", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                exporting.export(trained, tmp_path / "x.gguf", method=method, type=type_name, threads=1)
        report = exporting.export(trained, tmp_path / "x.gguf", method=method, type=type_name, threads=1)
        mobie.verify(report.output)
        outputs[name] = report.output.read_bytes()
        report.output.unlink()
    assert outputs["a"] == outputs["c"] != outputs["b"]


@pytest.mark.parametrize("family", q1_0_models.WIDTHS)
def test_runtime_computes_what_the_file_says(family, tmp_path, runtime_tools):
    checkpoint, source, out, f32, q8 = (tmp_path / n for n in ("hf", "s.gguf", "q1_0.gguf", "f32.gguf", "q8_0.gguf"))
    families.save(family, checkpoint, **q1_0_models.WIDTHS[family])
    converting.convert(checkpoint, source, *families.FAMILIES[family].convert)
    exporting.export(source, out, type="q1_0")
    mobie.dequantize(out, f32)
    subprocess.run([runtime_tools / "llama-quantize", f32, q8, "Q8_0"], check=True, capture_output=True)
    chunks = np.random.default_rng(0).integers(0, 256, (2, 128))
    truth, ours, near = (scoring.log_probabilities(p, chunks, one_by_one=False) for p in (f32, out, q8))
    ours, near = scoring.divergence(truth, ours), scoring.divergence(truth, near)
    print(f"\nq1_0 {ours}\nq8_0 {near}")
    assert near.kl > 0, "the yardstick is not one"
    assert ours.kl <= 2 * near.kl + 1e-6 and ours.top1 <= 2 * near.top1 + 0.02
