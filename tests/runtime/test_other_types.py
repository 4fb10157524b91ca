"""--tensor-type: bytes as llama-quantize writes them, and what cannot be."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mobie_export import gguf_io
from mobie_export.cli import Exit
from tests import models
from tests.unit.test_export import export, imatrix_entries, refused, write_imatrix

TINY = Path(__file__).resolve().parents[2] / "examples/tiny-moe/tiny-moe-f16.gguf"


def tensors(path: Path) -> dict[str, tuple[int, bytes]]:
    with gguf_io.open_model(path) as model:
        return {n: (t.type_id, model.read(t).tobytes()) for n, t in model.tensors.items()}


@pytest.mark.parametrize("with_importance", [False, True], ids=["plain", "imatrix"])
def test_bytes_are_those_of_llama_quantize(tmp_path, runtime_tools, with_importance):
    rules = {"attn_q": "q4_K", "attn_(k|v)": "q8_0", "attn_output": "iq4_nl", "token_embd": "q6_K"}
    if with_importance:
        rules["attn_k"] = "iq2_xs"
    source, ours, theirs = tmp_path / "tiny.gguf", tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    shutil.copy(TINY, source)
    importance = []
    if with_importance:
        importance = ["--imatrix", tmp_path / "imatrix.gguf"]
        text = Path(__file__).parents[2] / "mobie_export/data/held-out.txt"
        command = [runtime_tools / "llama-imatrix", "-m", source, "-f", text, "-o", importance[1], "-c", 128]
        subprocess.run([*map(str, command), "--chunks", "4"], check=True, capture_output=True)
    given = [x for pattern, kind in reversed(rules.items()) for x in ("--tensor-type", f"{pattern}={kind}")]
    method = ["--method", "imatrix"] if with_importance else []
    assert export(source, "-o", ours, *method, *importance, *given) == 0
    command = [runtime_tools / "llama-quantize", *importance, *given, "--token-embedding-type", rules["token_embd"]]
    done = subprocess.run([*map(str, command), source, theirs, "Q8_0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    before, wanted, found = tensors(source), tensors(theirs), tensors(ours)
    changed = {n for n, x in found.items() if n in before and x != before[n] and "_exps." not in n}
    assert changed == {n for n in before if n.startswith("token_embd") or ("attn_" in n and "norm" not in n)}
    for name in changed:
        assert found[name] == wanted[name], name
    assert {gguf_io.type_name(found[n][0]) for n in changed} == {k.upper() for k in rules.values()}
    with gguf_io.open_model(ours) as model:
        assert json.loads(model.value("mobie.settings"))["tensor_types"][-1] == "attn_q=Q4_K"


def test_float_types_and_first_match(tmp_path):
    source, out = tmp_path / "m.gguf", tmp_path / "m-mobie-uncalibrated.gguf"
    models.write_qwen3moe(source)
    assert export(source, "--tensor-type", "output=bf16", "--tensor-type", ".=f32") == 0
    types = {n: gguf_io.type_name(kind) for n, (kind, _) in tensors(out).items()}
    values = models.decoded(source)
    for name, kind in types.items():
        if "_exps" in name:
            continue
        assert kind == ("BF16" if name == "output.weight" or name.endswith("attn_output.weight") else "F32"), name
        if kind == "F32":
            assert np.frombuffer(tensors(out)[name][1], "<f4").tobytes() == values[name].tobytes()


def test_what_cannot_be(tmp_path, capsys):
    source = tmp_path / "m.gguf"
    models.write_qwen3moe(source)  # 320 wide
    one = ["--tensor-type", "ffn_down_exps=q8_0"]
    refused(capsys, tmp_path, Exit.USAGE, [source, *one], "ffn_down_exps=Q8_0 has no effect", "experts keep")
    one = ["--tensor-type", "attn_q=q8_0", "--tensor-type", "blk.1.attn_q=q4_0"]
    refused(capsys, tmp_path, Exit.USAGE, [source, *one], "an earlier --tensor-type")
    one = ["--tensor-type", "attn_q.weight=q4_K"]
    refused(capsys, tmp_path, Exit.UNSUPPORTED, [source, *one], "rows of 320", "a multiple of 256")
    one = ["--tensor-type", "attn_output=iq2_xs"]
    refused(capsys, tmp_path, Exit.UNSUPPORTED, [source, *one], "needs an importance matrix", "attn_output")
    write_imatrix(tmp_path / "imatrix.gguf", imatrix_entries(np.random.default_rng(0)))
    one += ["--method", "imatrix", "--imatrix", tmp_path / "imatrix.gguf"]  # of experts only
    refused(capsys, tmp_path, Exit.UNSUPPORTED, [source, *one], "none for blk.0.attn_output.weight")
    for wrong in ("attn_q", "=q8_0", "attn_q=q9_0", "attn_(=q8_0"):
        with pytest.raises(SystemExit) as exit:
            export(source, "--tensor-type", wrong)
        assert exit.value.code == Exit.USAGE
        assert "Traceback" not in capsys.readouterr().err


def test_weights_that_are_no_numbers(tmp_path, capsys):
    source = tmp_path / "m.gguf"

    def spoil(tensors) -> None:
        tensors["output.weight"][0][3, 5] = np.nan

    models.write_qwen3moe(source, change=spoil)
    one = [source, "--tensor-type", "output=q8_0"]
    refused(capsys, tmp_path, Exit.BAD_INPUT, one, "output.weight", "1 infinite or NaN weights")


def test_without_the_library(tmp_path, capsys, monkeypatch):
    source = tmp_path / "m.gguf"
    models.write_qwen3moe(source)
    monkeypatch.setattr("mobie_export.runtime.installed.site", lambda: tmp_path / "nowhere")
    one = [source, "--tensor-type", "output=q8_0"]
    refused(capsys, tmp_path, Exit.NO_RUNTIME, one, "needs llama.cpp's library", "pip install llama-cpp-python")
