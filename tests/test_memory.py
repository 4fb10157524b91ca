"""`--max-ram` is a promise: refused beforehand, kept, or broken off."""

import re
import subprocess
import sys

import pytest

from mobie_export import calibrate, calibrated, cli, errors, pipeline
from mobie_export.progress import size_text
from tests import models

pytest.importorskip("transformers")


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
    needed = pipeline.plan(model, tmp_path / "o", calibration=calibrated.Options(samples=9000)).peak_memory
    arguments = [str(model), "-o", str(tmp_path / "o"), "--method", "calibrated", "--samples", "9000", "--max-ram"]
    assert cli.main([*arguments, str(needed - 1), "--dry-run"]) == errors.NO_MEMORY
    text = capsys.readouterr().err
    assert size_text(needed) in text
    fewer = int(re.search(r"--samples (\d+), which fits", text)[1])
    less = pipeline.plan(model, tmp_path / "o", calibration=calibrated.Options(samples=fewer)).peak_memory
    assert less < needed
    assert cli.main([*arguments, str(needed), "--dry-run"]) == 0
    assert cli.main([*arguments, "1M", "--dry-run"]) == errors.NO_MEMORY
    assert "--method sign" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_broken_promise_is_an_error(monkeypatch):
    options = calibrated.Options(max_ram=1 << 30)
    monkeypatch.setattr(calibrated, "peak_memory", lambda: 2 << 30)
    with pytest.raises(errors.MobieError, match="took more memory") as e:
        calibrated.check_memory(options)
    assert e.value.code == errors.NO_MEMORY
    monkeypatch.setattr(calibrated, "peak_memory", lambda: 1 << 30)
    calibrated.check_memory(options)


def test_the_plan_is_kept(model, tmp_path, runtime_tools):
    """In a process of its own: this one's peak has other reasons."""
    arguments = [
        "--method",
        "calibrated",
        "--samples",
        "64",
        "--seq-len",
        "64",
        "--threads",
        "1",
        "--refine",
        "none",
        "--quiet",
    ]
    command = [sys.executable, "-m", "mobie_export", str(model), "-o", str(tmp_path / "o.gguf"), *arguments]
    options = calibrated.Options(samples=64, seq_len=64, refine="none")
    planned = pipeline.plan(model, tmp_path / "o.gguf", calibration=options, threads=1).peak_memory
    done = subprocess.run([*command, "--max-ram", str(planned)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_states_do_not_stay_in_memory(tmp_path):
    """64 MiB of hidden states written and read: the mapped pages are given back."""

    def resident() -> int:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssFile"))

    torch = pytest.importorskip("torch")
    states = calibrate.States(tmp_path / "s", (256, 256, 512))
    before = resident()
    for i in range(0, 256, 8):
        states.write(slice(i, i + 8), torch.full((8, 256, 512), float(i)))
    assert all((states.read(slice(i, i + 8)) == i).all() for i in range(0, 256, 8))
    assert resident() - before < 16 << 20
