"""What an export does where no method is named: the most effort that fits, said beforehand as a command."""

import shlex
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from mobie_export import api, cli, gguf_io
from mobie_export.calibration import bundled
from mobie_export.cli import Exit
from mobie_export.exporting import effort
from mobie_export.methods.calibrated import estimate
from mobie_export.methods.ordered import Ordered

TINY = Path(__file__).resolve().parents[2] / "examples/tiny-moe/tiny-moe-f16.gguf"


@pytest.fixture
def slow(monkeypatch):
    """A machine of so many operations a second."""

    def at(products: float) -> None:
        monkeypatch.setattr(estimate, "speed", lambda *_: estimate.Speed(products, 1e30))

    return at


def planned(tmp_path, *words):
    return api.plan(TINY, tmp_path / "m.gguf", method=effort.Effort(*words))


def test_the_best_that_a_night_has_room_for(tmp_path, slow, runtime_tools):
    with gguf_io.open_model(TINY) as gguf:
        levels = Ordered.efforts(gguf)
    slow(1e30)
    best = planned(tmp_path)
    assert (best.effort, best.method) == ("best", Ordered(**levels["best"][0])) and not best.notes
    operations = sum(best.seconds.values()) * 1e30
    slow(operations / (1.1 * effort.NIGHT))
    normal = planned(tmp_path)
    assert (normal.effort, normal.method) == ("normal", Ordered(**levels["normal"][0]))
    assert any(note.startswith("best is left out: it takes about 8 h 48") for note in normal.notes)
    assert planned(tmp_path, "best").effort == "best", "what is named takes as long as it takes"
    assert planned(tmp_path, None, 10 * 3600.0).effort == "best"


def test_what_does_not_fit_is_refused_with_what_would(tmp_path, slow, capsys, runtime_tools):
    slow(1.0)
    words = ["plan", str(TINY), "-o", str(tmp_path / "m.gguf")]
    assert cli.main(words) == Exit.USAGE
    said = capsys.readouterr().err
    assert "no calibration fits" in said and "fast: it takes about" in said and "--method sign" in said
    assert cli.main([*words, "--effort", "fast", "--max-disk", "1K"]) == Exit.NO_SPACE
    assert cli.main([*words, "--max-ram", "1M"]) == Exit.NO_MEMORY
    assert cli.main([*words, "--time", "soon"]) == Exit.USAGE
    assert cli.main([*words, "--method", "ordered", "--effort", "fast"]) == Exit.USAGE


def test_the_plan_is_a_command_that_gives_the_same_bytes(tmp_path, capsys, runtime_tools):
    out, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    short = ["--seq-len", "32", "--samples", "16", "--threads", "1"]
    assert cli.main([str(TINY), "-o", str(out), "--effort", "fast", *short]) == 0
    shown = capsys.readouterr().out
    (line,) = [x for x in shown.splitlines() if x.startswith("effort")]
    program, *words = shlex.split(line.partition(": ")[2])
    assert program == "mobie-export" and "--effort" not in words and words[1:3] == ["--method", "ordered"]
    assert shown.index("effort") < shown.index("written"), "before the work"
    assert cli.main([*words, "-o", str(again), "--threads", "1", "-q"]) == 0
    assert out.read_bytes() == again.read_bytes()


def test_the_text_is_of_many_kinds(runtime_tools):
    with gguf_io.open_model(TINY) as gguf:
        found = bundled.load(gguf, 90, 64, 0)
        assert found.tokens.shape == (90, 64)
        other = bundled.load(gguf, 90, 64, 1)
        assert not found.tokens.equal(other.tokens) and found.sha256 == other.sha256
        every = bundled.load(gguf, 10**6, 64, 0)  # all of both parts, none twice
        assert len(every.tokens.unique(dim=0)) > 0.98 * len(every.tokens) > 5000
