"""What the documents show is run."""

import re
import runpy
import shutil
from pathlib import Path

import pytest

import mobie_export as mobie
from mobie_export import methods

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples/tiny-moe/tiny-moe-f16.gguf"


def test_the_api_document_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")  # for the report
    shutil.copy(MODEL, tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for code in blocks:
        exec(compile(code, "docs/api.md", "exec"), names)
    printed = capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {
        *("model.gguf", "out.gguf", "f32.gguf", "second.gguf"),
        *("out-report.html", "out-report.json"),
    }
    assert "export done" in printed and "there-is-none.gguf" in printed


@pytest.fixture
def custom(monkeypatch):
    """The class of the example, registered for the time of a test."""
    monkeypatch.setattr(methods, "_registered", {})
    return runpy.run_path(str(ROOT / "examples/custom_method.py"))["RowMean"]


def test_a_custom_method_is_used_by_name(custom, tmp_path):
    out = tmp_path / "out.gguf"
    mobie.export(mobie.plan(MODEL, out, method="row-mean"))
    mobie.verify(out)
    assert mobie.plan(MODEL, tmp_path / "o", method="row-mean").settings == {"method": "row-mean", "shrink": 1.0}
    mobie.dequantize(out, tmp_path / "f32.gguf")
    from tests import models

    original, found = models.decoded(MODEL), models.decoded(tmp_path / "f32.gguf")
    name = "blk.0.ffn_up_exps.weight"
    W, Q = original[name], found[name]
    assert ((Q >= 0) == (W >= 0)).all()
    mean = abs(W).mean(-1)
    assert (abs(Q).std(-1) < 1e-6).all(), "one magnitude for a row"
    assert (abs(abs(Q).mean(-1) - mean) <= mean.max(-1, keepdims=True) / 255).all()


def test_its_options_are_on_the_command_line(custom, tmp_path, capsys):
    from mobie_export import cli

    words = [str(MODEL), "-o", str(tmp_path / "o.gguf"), "-q", "--method", "row-mean", "--shrink"]
    assert cli.main([*words, "0.5"]) == 0
    assert mobie.inspect(tmp_path / "o.gguf")
    assert cli.main([str(MODEL), "-o", str(tmp_path / "p.gguf"), "--shrink", "0.5"]) == 2
    assert "--method row-mean" in capsys.readouterr().err
    with pytest.raises(ValueError, match="row-mean"):
        mobie.register(type("Another", (custom,), {}))
