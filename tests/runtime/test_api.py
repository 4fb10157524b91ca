"""What tests/unit/test_api.py leaves out: plans and exports that read a text, for which llama.cpp tokenizes."""

import dataclasses

import pytest

import mobie_export as mobie
from mobie_export import errors, methods
from mobie_export.exporting import write
from mobie_export.methods.calibrated import refine
from tests.exporting import names, phases, refused

pytestmark = pytest.mark.usefixtures("runtime_tools")


def test_a_plan_shows_every_option_of_a_method(source, tmp_path):
    method = mobie.Calibrated(samples=64, seq_len=32, bpw=1.3)
    made = mobie.plan(source, tmp_path / "o.gguf", method=method)
    assert made.settings == {"method": "calibrated"} | {
        f.name: getattr(method, f.name) for f in dataclasses.fields(mobie.Calibrated)
    }
    assert made.settings["bpw"] == 1.3 and made.settings["refine"] == "streamed" and made.settings["steps"] is None
    assert made.work_size > 0 and sum(made.seconds.values()) > 0 and names(tmp_path) == {"m.gguf"}


def test_progress_of_a_calibration(source, tmp_path):
    steps: list[mobie.Step] = []
    made = mobie.plan(source, method=mobie.Calibrated(samples=40, seq_len=32, refine="none"), threads=1)
    report = mobie.export(made, progress=steps.append)
    wanted = ["digest of the source", "check of the weights", "forward", "backward", "export", "verify"]
    assert phases(steps) == wanted
    assert report.outcome.thin and names(tmp_path) == {"m.gguf", "m-mobie.gguf"}


def test_a_plan_counts_what_only_the_calibration_decides(source, monkeypatch):
    """Which experts see few tokens, which tensors are tuned, and the like: what the metadata say of it."""
    monkeypatch.setattr(refine, "LAYERWISE", dataclasses.replace(refine.LAYERWISE, steps=1, batch_tokens=64))
    method = mobie.Calibrated(samples=34, seq_len=16, refine="streamed", steps=1)
    made = mobie.plan(source, method=method, threads=1)
    report = mobie.export(made)
    assert report.outcome.thin
    assert report.output_size <= made.output_size <= report.output_size + 4096


def test_a_small_disk_is_said_with_what_the_work_takes(source, monkeypatch):
    usage = write.shutil.disk_usage(source.parent)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    e = refused(mobie.plan, source, method=mobie.Calibrated(samples=34, seq_len=16))
    assert e.kind == errors.NO_SPACE and "for the output and " in e.wanted and "for unfinished work" in e.wanted


def test_a_method_may_be_given_by_its_name(source, tmp_path):
    out = tmp_path / "o.gguf"
    assert mobie.plan(source, out, method="sign").options == mobie.ExportOptions(method=mobie.Sign())
    assert mobie.plan(source, out, method="paper").options.method == mobie.Paper()
    e = refused(mobie.plan, source, out, method="magic")
    assert e.kind == errors.USAGE and "magic" in e.what
    assert (
        e.wanted.split(", ")
        == list(methods.known())
        == ["calibrated", "imatrix", "improve", "ordered", "paper", "sign"]
    )
