"""What an export does where no method is named: the most effort that fits, said beforehand as a command."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mobie_export import api, cli, gguf_io  # noqa: E402
from mobie_export.calibration import bundled, own_text, passes  # noqa: E402
from mobie_export.cli import Exit  # noqa: E402
from mobie_export.errors import NO_SPACE, MobieError  # noqa: E402
from mobie_export.exporting import effort  # noqa: E402
from mobie_export.methods.calibrated import estimate, steps  # noqa: E402
from mobie_export.methods.ordered import Ordered  # noqa: E402
from mobie_export.methods.ordered import steps as ordered  # noqa: E402
from mobie_export.models import twin  # noqa: E402
from mobie_export.runtime import loads  # noqa: E402
from tests import models, scoring  # noqa: E402

TINY = Path(__file__).resolve().parents[2] / "examples/tiny-moe/tiny-moe-f16.gguf"


@pytest.fixture
def slow(monkeypatch):
    """A machine of so many operations a second."""

    def at(products: float) -> None:
        monkeypatch.setattr(estimate, "speed", lambda *_: estimate.Speed(products, 1e30, 1e30))

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
    (note,) = normal.notes
    assert note.startswith("best is left out: it takes about")
    assert planned(tmp_path, "best").effort == "best", "what is named takes as long as it takes"
    assert planned(tmp_path, None, 10 * 3600.0).effort == "best"


def test_what_does_not_fit_is_refused_with_what_would(tmp_path, slow, capsys, runtime_tools):
    slow(1.0)
    words = ["plan", str(TINY), "-o", str(tmp_path / "m.gguf")]
    assert cli.main(words) == Exit.USAGE
    said = capsys.readouterr().err
    assert "no calibration fits" in said and "fast: it takes about" in said and "--method sign" in said
    assert cli.main([*words, "--samples", "100000000"]) == Exit.USAGE
    assert "the calibration text is too short" in capsys.readouterr().err
    assert cli.main([*words, "--effort", "fast", "--max-disk", "1K"]) == Exit.NO_SPACE
    assert cli.main([*words, "--max-ram", "1M"]) == Exit.NO_MEMORY
    with pytest.raises(SystemExit) as e:
        cli.main([*words, "--time", "soon"])
    assert e.value.code == Exit.USAGE and "8h" in capsys.readouterr().err
    assert cli.main([*words, "--method", "ordered", "--effort", "fast"]) == Exit.USAGE


def test_the_plan_is_a_command_that_gives_the_same_bytes(tmp_path, capsys, runtime_tools):
    out, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    short = ["--seq-len", "32", "--samples", "16", "--threads", "1"]
    assert cli.main([str(TINY), "-o", str(out), "--effort", "fast", *short]) == 0
    shown = capsys.readouterr().out
    (line,) = [x for x in shown.splitlines() if x.startswith("effort")]
    program, *words = shlex.split(line.partition(": ")[2])
    given = [str(TINY), "-o", str(out), *short, "--method", "ordered", "--bpw", "1.25", "--descents", "4"]
    assert program == "mobie-export" and words == given, "what was given stays, the method stands for the effort"
    assert shown.index("effort") < shown.index("written"), "before the work"
    (said,) = re.findall(r"all layers: KL divergence from the original (\S+) nats", shown)
    with gguf_io.open_model(TINY) as gguf:
        text = bundled.load(gguf, 16, 32, 0).tokens[:8].numpy()
    original, found = (scoring.log_probabilities(path, text, one_by_one=False) for path in (TINY, out))
    kl = scoring.divergence(original, found).kl  # with activations of eight bits
    assert float(said) == pytest.approx(kl, rel=0.1)
    assert ("of little use" in shown) == (float(said) > 1)
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


# ---- text that the model writes --------------------------------------------------------------------------------------

SELF = ["--method", "ordered", "--calibration", "self", "--samples", "40", "--seq-len", "32", "--threads", "1", "-q"]


def test_what_the_model_wrote_is_kept_and_decides_the_bytes(tmp_path, monkeypatch, runtime_tools):
    """A round that is there is not written again; the same command gives the same file, another seed another one."""
    started, write = [], own_text.subprocess.Popen

    def popen(command, *more, **named):
        started.extend([command] if own_text.__file__ in command else [])
        return write(command, *more, **named)

    monkeypatch.setattr(own_text.subprocess, "Popen", popen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordered, "encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main([str(TINY), "-o", str(tmp_path / "a.gguf"), *SELF]) == Exit.INTERRUPTED
    assert len(started) == 1
    assert cli.main([str(TINY), "-o", str(tmp_path / "a.gguf"), *SELF]) == 0 and len(started) == 1
    assert cli.main([str(TINY), "-o", str(tmp_path / "b.gguf"), *SELF]) == 0 and len(started) == 2
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert cli.main([str(TINY), "-o", str(tmp_path / "c.gguf"), *SELF, "--seed", "1"]) == 0
    with gguf_io.open_model(tmp_path / "a.gguf") as a, gguf_io.open_model(tmp_path / "c.gguf") as c:
        texts = [json.loads(g.value("mobie.settings"))["calibration"] for g in (a, c)]
        assert texts[0] != texts[1] != bundled.load(a, 40, 32, 0).sha256


@pytest.fixture
def interrupted():
    """An export that is interrupted when its text is written."""

    def run(*words) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ordered, "encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            return cli.main([*map(str, words)])

    return run


def test_text_of_another_writer_is_not_taken(tmp_path, interrupted, runtime_tools):
    """One with the same header and other weights in its place; the same bytes under another name are the same."""
    first, same, other, out = (tmp_path / f"{n}.gguf" for n in ("first", "same", "other", "o"))
    first.write_bytes(TINY.read_bytes())
    same.write_bytes(TINY.read_bytes())
    with gguf_io.open_model(TINY) as gguf:
        name = "output_norm.weight"
        values = gguf.read(gguf.tensors[name]).view("<f4") * np.float32(0.5)
        gguf_io.rewrite(gguf, other, tensors={name: gguf_io.NewTensor.of(values)})
    with gguf_io.open_model(first) as a, gguf_io.open_model(other) as b:
        assert a.sha256 == b.sha256
    assert interrupted(TINY, "-o", out, *SELF, "--writer", first) == Exit.INTERRUPTED
    other.replace(first)
    for writer in (first, same):
        assert interrupted(TINY, "-o", out, *SELF, "--writer", writer) == Exit.INTERRUPTED
    folders = [p for p in tmp_path.iterdir() if p.name.startswith(".mobie-work")]
    texts = {(p / "own-0.tokens").read_bytes() for p in folders}
    assert len(folders) == len(texts) == 2


def test_a_text_that_was_damaged_is_said(tmp_path, capsys, interrupted, runtime_tools):
    out = tmp_path / "o.gguf"
    assert interrupted(TINY, "-o", out, *SELF) == Exit.INTERRUPTED
    (text,) = tmp_path.glob(".mobie-work-*/own-0.tokens")
    text.write_bytes(text.read_bytes()[:-3])
    capsys.readouterr()
    assert cli.main([str(TINY), "-o", str(out), *SELF]) == Exit.BAD_INPUT
    said = capsys.readouterr().err
    assert f"cannot read back {text}" in said and "mobie-export clean" in said


def test_no_more_tokens_are_counted_than_were_asked_for(tmp_path, runtime_tools):
    """Rounds are whole, and the last one has more; so too where they are there already."""
    for _ in range(2):
        counted: list[int] = []
        found = own_text.write(TINY, "", 40, 4, 0, 1, tmp_path, lambda n, what, to=counted: to.append(n))
        assert found.shape == (40, 4) and sum(counted) == 40 * 4


def test_a_full_disk_stops_the_text(tmp_path, monkeypatch, runtime_tools):
    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MobieError, match="cannot write") as e:
        own_text.write(TINY, "", 4, 4, 0, 1, tmp_path)
    assert e.value.kind is NO_SPACE and not list(tmp_path.glob("*.tokens"))


def test_a_writer_that_talks_or_dies_is_said(tmp_path, monkeypatch, runtime_tools):
    """More than a pipe holds on stderr; the signal that ended it."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nhead -c 1000000 /dev/zero | tr '\\0' x >&2\nkill -KILL $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(MobieError, match="cannot write its own text") as e:
        own_text.write(TINY, "", 4, 4, 0, 1, tmp_path)
    assert e.value.found == "SIGKILL"


def test_the_writer_ends_with_its_export(tmp_path, runtime_tools):
    program = f"""
import sys
from pathlib import Path
from mobie_export.calibration import own_text
own_text.write(Path({str(TINY)!r}), "", 10**6, 256, 0, 1, Path({str(tmp_path)!r}))
"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    if not children.exists():
        pytest.skip("needs Linux")
    while not (found := children.read_text().split()):
        assert parent.poll() is None
        time.sleep(0.05)
    time.sleep(3)  # into its work
    parent.kill()
    parent.wait()
    for _ in range(400):
        stat = Path(f"/proc/{found[0]}/stat")
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                break
        except OSError:
            break
        time.sleep(0.05)
    else:
        os.kill(int(found[0]), signal.SIGKILL)
        pytest.fail("it lives on")


def test_an_opening_may_be_long_and_a_path_in_any_encoding(tmp_path, runtime_tools):
    """Longer than an argument of a program may be; a name that is no UTF-8."""
    path = tmp_path / os.fsdecode(b"m\xe9\xff.gguf")
    path.write_bytes(TINY.read_bytes())
    assert own_text.write(path, "a b " * 50_000, 2, 4, 0, 1, tmp_path).shape == (2, 4)
    with gguf_io.open_model(path) as gguf:
        assert len(bundled.load(gguf, 4, 64, 0).tokens) == 4
    assert loads.problem(path) == ""


def test_logits_that_are_no_numbers_are_said(tmp_path, runtime_tools):
    broken = tmp_path / "broken.gguf"
    with gguf_io.open_model(TINY) as gguf:
        name = "output_norm.weight"
        values = np.full_like(gguf.read(gguf.tensors[name]).view("<f4"), np.nan)
        gguf_io.rewrite(gguf, broken, tensors={name: gguf_io.NewTensor.of(values)})
    with pytest.raises(MobieError, match="cannot write its own text") as e:
        own_text.write(broken, "", 4, 4, 0, 1, tmp_path)
    assert "infinite or NaN" in e.value.found


def test_it_is_text_that_the_model_expects(tmp_path, runtime_tools):
    """Its own text surprises the model less than the books do; every other sequence begins with the opening."""
    with gguf_io.open_model(TINY) as gguf:
        found = own_text.write(TINY, "The ", 32, 64, 0, 1, tmp_path)
        words = gguf.get_list("tokenizer.ggml.tokens", str)
        books = bundled.load(gguf, 32, 64, 0).tokens
        surprise = [loss(gguf, torch.from_numpy(found)), loss(gguf, books)]
    assert found.shape == (32, 64) and len({tuple(x) for x in found.tolist()}) == 32
    assert len({int(x) for x in found[1::2, 0]}) == 1 and words[found[1, 0]].startswith("The")
    assert len({int(x) for x in found[::2, 0]}) > 10
    assert surprise[0] < surprise[1]


def loss(gguf, tokens) -> float:
    """Mean negative log likelihood of all but the first tokens, in nats."""
    model = twin.Twin(gguf)
    with torch.no_grad():
        hidden = model.embedding()[tokens]
        for i in range(model.n_layers):
            hidden = model.run(model.layer(i), hidden)
        return float(passes.loss(model.head(), hidden, tokens)) / tokens[:, 1:].numel()


def test_another_model_cannot_write_it(tmp_path, capsys, monkeypatch, runtime_tools):
    other = tmp_path / "other.gguf"
    models.write_qwen3moe(other)
    command = ["plan", str(TINY), "-o", str(tmp_path / "o.gguf"), *SELF[:-1]]
    assert cli.main([*command, "--writer", str(other)]) == Exit.BAD_INPUT
    assert "is another model" in capsys.readouterr().err
    assert cli.main([*command[:-8], "--writer", str(other)]) == Exit.USAGE
    assert cli.main([*command, "--writer", str(TINY)]) == 0
    monkeypatch.setattr(steps, "available_memory", lambda: 1 << 20)
    assert cli.main(command) == Exit.NO_MEMORY and "--writer" in capsys.readouterr().err


def test_long_sequences_have_enough_text(runtime_tools):
    """Of some parts not one: the books go on where these end."""
    with gguf_io.open_model(TINY) as gguf:
        for length in (2048, 4096, 32768):
            assert bundled.load(gguf, 20, length, 0).tokens.shape == (20, length)
