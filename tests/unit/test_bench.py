"""Speed as a row to share: what llama-bench prints becomes the cells of docs/community/README.md."""

import json
import math
from pathlib import Path

import pytest

import mobie_export as mobie
from mobie_export import cli
from mobie_export.cli import Exit
from mobie_export.reporting import bench, machine, tools
from mobie_export.runtime import libggml
from tests import models

COMMUNITY = Path(__file__).resolve().parents[2] / "docs/community/README.md"
RATES = [(512, 0, [100.0, 90.0, 98.0]), (0, 64, [20.0, 21.5, 20.5])]


def printed(change=None) -> str:
    rows = [
        {"n_prompt": p, "n_gen": n, "samples_ts": s, "avg_ts": sum(s) / len(s), "backends": "CPU", "gpu_info": ""}
        | {"n_gpu_layers": -1}
        for p, n, s in RATES
    ]
    for row in rows:
        row.update(change or {})
    return f"loading [a, b]\n{json.dumps(rows, indent=2)}\nbye\n"


@pytest.fixture
def llama_bench(monkeypatch):
    """What llama-bench was asked for; it answers with RATES."""
    asked = []
    monkeypatch.setattr(tools, "run", lambda name, arguments: asked.append([name, *map(str, arguments)]) or printed())
    monkeypatch.setattr(libggml, "kernel_names", lambda: ["ref", "avx2"])
    return asked


@pytest.fixture
def model(tmp_path) -> Path:
    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, keys=lambda w: w.add_string("general.basename", "x"))
    return path


def cells(row: str) -> list[str]:
    assert row.startswith("| ") and row.endswith(" |") and "\n" not in row
    return [c.strip() for c in row[1:-1].split("|")]


def test_a_row_has_what_was_measured(model, llama_bench, capsys):
    assert cli.main(["bench", str(model), "--threads", "3", "-p", "512", "-n", "64", "-r", "3"]) == Exit.OK
    date, where, build, what, prompt, generation = cells(capsys.readouterr().out.strip())
    assert prompt == "98.0 (90.0 to 100.0)" and generation == "20.5 (20.0 to 21.5)"
    assert len(date) == 10 and "3 threads" in where and f"{machine.machine()['cores']} cores" in where
    assert mobie.__version__ in build and build.endswith("avx2")
    assert what.startswith("tiny: qwen3moe, 2 layers") and "8 experts, 2 used" in what
    assert "experts F16 at 16.000 bits" in what
    (asked,) = llama_bench
    assert " ".join(asked) == f"llama-bench -m {model} -p 512 -n 64 -r 3 -t 3 -o json"


def test_other_lengths_are_named(model, llama_bench, monkeypatch):
    shorter = printed({"n_prompt": 0, "n_gen": 8})
    monkeypatch.setattr(tools, "run", lambda *_: shorter)
    assert cells(mobie.bench(model, generated=8).row)[-1].startswith("tg8: ")


def test_json_has_everything(model, llama_bench, capsys):
    assert cli.main(["bench", str(model), "--json"]) == Exit.OK
    data = json.loads(capsys.readouterr().out)
    assert data["speed"]["pp512"]["samples"] == RATES[0][2] and data["speed"]["tg64"]["median"] == 20.5
    assert data["model"]["bytes"] == model.stat().st_size and data["model"]["expert_types"] == ["F16"]
    assert data["machine"]["cores"] == data["threads"] and data["machine"]["memory"] > 1 << 28
    assert data["build"]["kernels"] == "avx2"


def test_what_is_no_number_is_no_row(model, llama_bench, monkeypatch):
    monkeypatch.setattr(tools, "run", lambda *_: printed({"samples_ts": [1.0, math.nan]}))
    with pytest.raises(mobie.MobieError, match="no number"):
        mobie.bench(model)


def test_a_name_does_not_break_the_table(tmp_path, llama_bench):
    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, keys=lambda w: w.kv_data[0].pop("general.name"))
    named = path.rename(tmp_path / "a|b.gguf")
    assert len(cells(mobie.bench(named).row)) == len(bench.HEAD)


def test_the_table_is_made_of_such_rows():
    rows = [line for line in COMMUNITY.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    head = rows.index(f"| {' | '.join(bench.HEAD)} |")
    table = [r for r in rows[head + 1 :] if r.startswith("| 20")]
    assert table and all(len(cells(r)) == len(bench.HEAD) for r in table)
    assert [cells(r)[0] for r in table] == sorted(cells(r)[0] for r in table)


def test_what_cannot_be_measured_is_said(tmp_path, capsys):
    assert cli.main(["bench", str(tmp_path / "none.gguf")]) == Exit.BAD_INPUT
    (tmp_path / "m.gguf").write_text("nothing")
    assert cli.main(["bench", str(tmp_path / "m.gguf")]) == Exit.BAD_INPUT
    assert "is not a GGUF file" in capsys.readouterr().err
