"""Advice on presets: memory is what llama.cpp takes, and the best that fits is named as a command that is accepted."""

import math
import shlex
from pathlib import Path

import pytest

from mobie_export import cli, gguf_io
from mobie_export.cli import Exit
from mobie_export.exporting import advise
from mobie_export.methods.calibrated.options import PRESETS
from tests import models

pytestmark = pytest.mark.usefixtures("quick_probe")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("advise") / "m.gguf"
    models.write_qwen3moe(path)
    return path


def choices(model: Path, n_ctx: int) -> list[advise.Choice]:
    with gguf_io.open_model(model) as g:
        return advise.choices(g, PRESETS, n_ctx)


def test_what_a_preset_takes(model):
    every = choices(model, 1000)
    sign, *found = [c for c in every if c.rest is None]
    assert [c.preset for c in found] == ["small", "medium", "large"] and sign.preset == advise.LEAST
    with gguf_io.open_model(model) as g:
        rest = sum(t.n_bytes for n, t in g.tensors.items() if "_exps." not in n)
        experts = sum(t.n_weights for n, t in g.tensors.items() if "_exps." in n)
    assert found[0].weights == rest + int(1.13 * experts / 8)
    assert sign.weights == rest + experts // 64 * 9 + 4 * models.N_EXPERT * 3 * models.N_LAYER
    assert found[0].context == models.N_LAYER * 2 * models.N_HEAD_KV * models.HEAD * 1000 * 2  # float16 keys and values
    totals = [c.total for c in found]
    assert totals == sorted(totals) and advise.best(found, totals[1]) == found[1]
    assert advise.best(found, totals[2] + 1) == found[2] and advise.best(found, totals[0] - 1) is None


def test_the_rest_in_smaller_types(model, tmp_path):
    found, names = choices(model, 1000), ("least", "small", "medium", "large")
    order = [(p, r) for p in names for r in ("q8_0", None)]
    assert [(c.preset, c.rest) for c in found] == [(p, "q4_0") for p in names] + order
    out = tmp_path / "m.gguf"
    assert cli.main([str(model), "-o", str(out), "--method", "sign", "--tensor-type", ".=q8_0", "-q"]) == 0
    (sign,) = [c for c in found if (c.preset, c.rest) == ("least", "q8_0")]
    assert out.stat().st_size == pytest.approx(sign.weights, rel=0.03)  # header and padding beside the weights


def advised(model, ram, capsys) -> list[str]:
    """Words of the command that is advised."""
    assert cli.main(["advise", str(model), "--ram", str(ram), "-c", "1000"]) == 0
    program, *words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert program == "mobie-export"
    return words


def test_what_is_advised_is_accepted(model, tmp_path, capsys, runtime_tools):
    found = choices(model, 1000)
    for c in (found[1], found[3], found[-1]):
        best = advise.best(found, c.total)
        words = advised(model, c.total, capsys)
        method = ["--bpw", f"{math.ceil(1e4 * best.bpw) / 1e4:.4f}"]
        method = method if best.preset == advise.LEAST else ["--preset", best.preset]
        assert words == [str(model), *method, *(["--tensor-type", f".={best.rest}"] if best.rest else [])]
        assert cli.main(["plan", *words, "-o", str(tmp_path / "o.gguf")]) == 0
        out = capsys.readouterr().out
        assert "time         about" in out and "effort       " in out


def test_a_model_that_cannot_be_calibrated_gets_signs(tmp_path, capsys):
    plain, path = tmp_path / "plain.gguf", tmp_path / "m.gguf"
    models.write_qwen3moe(plain)
    entry = gguf_io.make_entry("qwen3moe.expert_used_count", gguf_io.ARRAY, [2, 3], gguf_io.U32)
    with gguf_io.open_model(plain) as gguf:
        gguf_io.rewrite(gguf, path, entries=[entry])
    words = advised(path, 8 << 30, capsys)
    assert words == [str(path), "--method", "sign"]
    assert cli.main(["plan", *words]) == 0
    assert cli.main(["advise", str(path), "--ram", "8G"]) == 0
    out = capsys.readouterr().out
    assert "for every layer" in out and "preset" not in out and "medium" not in out


def test_costs_are_named(model, capsys):
    assert cli.main(["advise", str(model), "--ram", "8G"]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("  --effort")]
    assert [x.split()[1] for x in lines] == ["fast", "normal", "best"]
    assert all("of disk and" in x and "of memory" in x for x in lines)


def test_too_little_and_odd_values(model, tmp_path, capsys):
    assert cli.main(["advise", str(model), "--ram", "1M"]) == Exit.UNSUPPORTED
    with pytest.raises(SystemExit) as e:
        cli.main(["advise", str(model), "--ram", "much"])
    assert e.value.code == Exit.USAGE
    odd = tmp_path / "odd.gguf"
    models.write_qwen3moe(odd, keys=lambda w: w.add_string("qwen3moe.attention.kv_lora_rank", "many"))
    assert cli.main(["advise", str(odd), "--ram", "8G"]) == Exit.BAD_INPUT
    assert "attention.kv_lora_rank" in capsys.readouterr().err


def test_a_checkpoint_is_advised_on(tmp_path, capsys, runtime_tools):
    families = pytest.importorskip("tests.families")
    families.save("qwen3moe", tmp_path / "Model")
    assert cli.main(["advise", str(tmp_path / "Model"), "--ram", "8G", "--pre-tokenizer", "gpt-2"]) == 0
    _, *command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:3] == [str(tmp_path / "Model"), "--preset", "large"]
    assert cli.main(["plan", *command]) == 0, "text and model are checked on a header"
    assert [p.name for p in tmp_path.iterdir()] == ["Model"]
