"""`--max-ram` is a promise: refused beforehand, kept, or broken off."""

import dataclasses
import re
import subprocess
import sys
import time

import pytest

import mobie_export as mobie
from mobie_export import cli, disk, gguf_io, progress
from mobie_export.cli import Exit
from mobie_export.methods.calibrated import Calibrated
from mobie_export.methods.ordered import Ordered
from mobie_export.progress import size_text
from tests import models

pytest.importorskip("transformers")
refine = pytest.importorskip("mobie_export.methods.calibrated.refine")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "m.gguf"
    models.write_qwen3moe(path)
    return path


@pytest.mark.parametrize(
    "text,size", [("8G", 8 << 30), ("900M", 900 << 20), ("1.5GiB", 3 << 29), ("512kb", 512 << 10), ("123", 123)]
)
def test_sizes(text, size):
    assert cli._size(text) == size


@pytest.mark.parametrize("text", ["8X", "G", "-1G", "0", ""])
def test_what_is_no_size(text):
    with pytest.raises(Exception, match="is not a size"):
        cli._size(text)


def test_too_little_is_refused_beforehand(model, tmp_path, capsys):
    needed = mobie.plan(model, tmp_path / "o", method=Calibrated(samples=9000)).peak_memory
    arguments = [str(model), "-o", str(tmp_path / "o"), "--method", "calibrated", "--samples", "9000", "--max-ram"]
    assert cli.main([*arguments, str(needed - 1), "--dry-run"]) == Exit.NO_MEMORY
    text = capsys.readouterr().err
    assert size_text(needed) in text
    fewer = int(re.search(r"--samples (\d+), which fits", text)[1])
    less = mobie.plan(model, tmp_path / "o", method=Calibrated(samples=fewer)).peak_memory
    assert less < needed
    assert cli.main([*arguments, str(needed), "--dry-run"]) == 0
    assert cli.main([*arguments, "1M", "--dry-run"]) == Exit.NO_MEMORY
    assert "--method sign" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


PHASES = (
    "digest of the source",
    "check of the weights",
    "forward",
    "backward",
    "error propagation",
    "layerwise refinement",
    "targets",
    "streamed refinement",
    "export",
    "verify",
)


def test_a_promise_is_checked_in_every_phase(model, tmp_path, monkeypatch, capsys, runtime_tools):
    """Broken in one of them it is an error; the next run goes on to the next phase."""
    pytest.importorskip("torch")
    monkeypatch.setattr(
        "mobie_export.methods.calibrated.refine.LAYERWISE", dataclasses.replace(refine.LAYERWISE, steps=1)
    )
    now, broken, seen = [""], [""], []
    begin, peak = progress.Progress.__init__, progress.peak_memory

    def begun(self, label, *more, **named):
        now[0] = label
        seen.append(label)
        begin(self, label, *more, **named)

    monkeypatch.setattr(progress.Progress, "__init__", begun)
    monkeypatch.setattr(progress, "peak_memory", lambda: 2 << 40 if now[0] == broken[0] else peak())
    out = tmp_path / "o.gguf"
    arguments = [
        str(model),
        "-o",
        str(out),
        *["--samples", "40", "--seq-len", "16", "--threads", "1", "-q", "--bpw", "1.3", "--steps", "5"],
    ]
    arguments += ["--method", "calibrated", "--refine", "streamed", "--max-ram"]
    for phase in PHASES:
        broken[0] = phase
        assert cli.main([*arguments, "1T"]) == Exit.NO_MEMORY, phase
        assert "took more memory than --max-ram allows" in capsys.readouterr().err and not out.exists()
    assert tuple(dict.fromkeys(seen)) == PHASES
    assert cli.main([*arguments, "3T"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_it_holds_for_signs_as_well(model, tmp_path, capsys):
    """What needs no calibration is refused beforehand too, and does not become one."""
    planned = mobie.plan(model, tmp_path / "o", method="sign", threads=1).peak_memory
    run = [str(model), "-o", str(tmp_path / "o.gguf"), "--method", "sign", "--threads", "1", "-q", "--max-ram"]
    assert cli.main([*run, str(planned - 1)]) == Exit.NO_MEMORY
    assert "needs more memory" in capsys.readouterr().err and not list(tmp_path.iterdir())
    done = subprocess.run([sys.executable, "-m", "mobie_export", *run, str(planned)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with gguf_io.open_model(tmp_path / "o.gguf") as gguf:
        assert gguf.value("mobie.method") == "sign, uncalibrated"


@pytest.mark.parametrize(
    "method",
    [
        Calibrated(samples=64, seq_len=64, refine="none"),
        Ordered(samples=64, seq_len=64),
        Ordered(samples=300, seq_len=256, bpw=1.3),
    ],
    ids=["calibrated", "ordered", "ordered, much text"],
)
def test_the_plan_is_kept(model, tmp_path, runtime_tools, method):
    """Of memory and of disk. In a process of its own: this one's peak has other reasons."""
    arguments = ["--method", method.name, "--samples", str(method.samples), "--seq-len", str(method.seq_len)]
    arguments += ["--threads", "1", "--quiet"]
    arguments += ["--refine", "none"] if isinstance(method, Calibrated) else []
    arguments += ["--bpw", str(method.bits)] if method.bits else []
    command = [sys.executable, "-m", "mobie_export", str(model), "-o", str(tmp_path / "o.gguf"), *arguments]
    planned, most = mobie.plan(model, tmp_path / "o.gguf", method=method, threads=1), 0
    command += ["--max-ram", str(planned.peak_memory)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            most = max(most, sum(disk.size_of(path) for path in tmp_path.glob(f".mobie-{disk.WORK}-*")))
            time.sleep(0.005)
        assert child.stderr is not None
        assert child.returncode == 0, child.stderr.read()
    parts_of_blocks = 4096 * 16  # the files' last ones
    assert 0.7 * planned.work_size < most < planned.work_size + parts_of_blocks, (most, planned.work_size)
