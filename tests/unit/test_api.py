"""The package from Python, as docs/api.md shows it; and that the command line is the same thing."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import mobie_export as mobie
from mobie_export import cli, errors, methods
from mobie_export.cli import Exit
from mobie_export.errors import Kind
from mobie_export.exporting.options import Keywords
from mobie_export.exporting.requantize import parse
from mobie_export.progress import Shown
from tests import models
from tests.exporting import names, phases, refused

pytestmark = pytest.mark.usefixtures("without_runtime")


def test_a_plan_writes_nothing_and_shows_what_will_be_done(source, tmp_path):
    made = mobie.plan(source, method="sign", threads=2, tensor_types=(parse("attn_v=f32"),))
    assert names(tmp_path) == {"m.gguf"}
    assert made.output == made.asked == tmp_path / "m-mobie-uncalibrated.gguf" and made.source.gguf == source
    assert made.settings == {"method": "sign"} and made.options.threads == made.threads == 2
    assert made.architecture == "qwen3moe" and made.expert_types == {"F16": 6}
    assert (made.n_layers, made.n_expert) == (models.N_LAYER, models.N_EXPERT)
    assert 1 < made.expert_bpw < 1.2 < made.bpw < made.source_bpw and made.output_size < made.source_size
    assert made.peak_memory > 0 and made.disk_free > made.output_size and not made.work_size and not made.seconds


def test_what_is_planned_is_what_is_written(source, tmp_path):
    """Beside the source, or where a plan or the call of `export` says; the same bytes as the command line's."""
    made = mobie.plan(source, method="sign")
    report = mobie.export(made)
    assert report.output == made.output == tmp_path / "m-mobie-uncalibrated.gguf" and not report.not_loaded
    assert report.output_size == made.output_size == made.output.stat().st_size
    assert report.expert_bpw == pytest.approx(made.expert_bpw) and report.bpw == pytest.approx(made.bpw)
    assert mobie.export(made, tmp_path / "other.gguf").output == tmp_path / "other.gguf"
    assert cli.main([str(source), "-o", str(tmp_path / "third.gguf"), "--method", "sign", "-q"]) == 0
    assert made.output.read_bytes() == (tmp_path / "other.gguf").read_bytes() == (tmp_path / "third.gguf").read_bytes()
    assert names(tmp_path) == {"m.gguf", "m-mobie-uncalibrated.gguf", "other.gguf", "third.gguf"}


def test_paths_may_be_texts(source, tmp_path):
    out, floats = str(tmp_path / "o.gguf"), str(tmp_path / "f.gguf")
    assert mobie.export(mobie.plan(str(source), method="sign"), out).output == Path(out)
    assert mobie.dequantize(out, floats).output == Path(floats)
    assert mobie.verify(out).expert_tensors == 6 and mobie.inspect(floats).architecture == "qwen3moe"


def test_shards_and_an_output_that_is_there(source, tmp_path):
    made = mobie.plan(source, tmp_path / "o.gguf", method="sign", split_max_size=500_000)
    assert made.asked == tmp_path / "o.gguf" and made.output.name.startswith("o-00001-of-")
    first = mobie.export(made).output
    assert first == made.output and mobie.verify(first).blocks > 0
    with pytest.raises(mobie.MobieError, match="exists already") as e:
        mobie.export(made)
    assert e.value.kind == errors.BAD_OUTPUT
    before = first.read_bytes()
    made = mobie.plan(source, tmp_path / "o.gguf", method="sign", split_max_size=500_000, overwrite=True)
    again = mobie.export(made)
    assert again.output == first and first.read_bytes() == before


# ---- progress --------------------------------------------------------------------------------------------------------


def test_progress_is_told_until_every_phase_ends(source, tmp_path):
    steps: list[mobie.Step] = []
    out = mobie.export(mobie.plan(source, method="sign"), progress=steps.append).output
    assert phases(steps) == ["export", "verify"]
    assert steps[0].unit == "B" and {s.what for s in steps} > {"blk.0.ffn_up_exps.weight", "output.weight"}
    for call, found in (
        (lambda tell: mobie.verify(out, progress=tell), ["verify"]),
        (lambda tell: mobie.dequantize(out, tmp_path / "f.gguf", progress=tell), ["dequantize"]),
    ):
        steps.clear()
        call(steps.append)
        assert phases(steps) == found


def test_a_bar_for_every_phase(source, tmp_path, monkeypatch):
    """`verify` begins before `export` is over, as it must be for the file to get its name."""
    shown: list[tuple[str, str]] = []

    class Bar:
        def __init__(self, desc, **_):
            self.desc = desc
            shown.append((desc, "begins"))

        def close(self):
            shown.append((self.desc, "ends"))

        def set_postfix_str(self, *_, **__): ...

        def update(self, n):
            assert n >= 0

    monkeypatch.setattr("tqdm.tqdm", Bar)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    mobie.export(mobie.plan(source, method="sign"), progress=Shown())
    assert shown == [(p, x) for p in ("export", "verify") for x in ("begins", "ends")]


def test_a_callback_may_stop_the_work(source, tmp_path):
    def stop(_: mobie.Step) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        mobie.export(mobie.plan(source, method="sign"), progress=stop)
    assert names(tmp_path) == {"m.gguf"}


# ---- files -----------------------------------------------------------------------------------------------------------


def test_files_are_checked_looked_at_and_dequantized(source, tmp_path):
    out = mobie.export(mobie.plan(source, method="sign")).output
    seen = mobie.verify(out)
    n = models.N_LAYER * 3 * models.N_EXPERT * models.N_EMBD * models.N_FF
    assert seen.expert_tensors == 6 and seen.blocks == n // 64 and seen.requantized is None
    assert mobie.inspect(source).expert_bpw == 16.0 and mobie.inspect(out).expert_bpw == seen.expert_bpw
    report = mobie.dequantize(out, tmp_path / "f.gguf", type_name="f16")
    assert mobie.inspect(report.output).expert_bpw == report.expert_bpw == 16.0
    before, after = models.decoded(source), models.decoded(report.output)
    for name, weights in after.items():
        same = weights >= 0 if "_exps" in name else weights
        assert np.array_equal(same, before[name] >= 0 if "_exps" in name else before[name]), name


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_errors_say_what_was_found_and_wanted_and_what_to_do(source, tmp_path):
    out = mobie.export(mobie.plan(source, method="sign")).output
    for call, code in (
        (lambda: mobie.plan(tmp_path / "none.gguf", method="sign"), Kind.BAD_INPUT),
        (lambda: mobie.plan(source, method="sign"), Kind.BAD_OUTPUT),
        (lambda: mobie.plan(source, tmp_path / "o.gguf", method="sign", max_ram=1), Kind.NO_MEMORY),
        (lambda: mobie.plan(out, method="sign"), Kind.UNSUPPORTED),
        (lambda: mobie.verify(source), Kind.VERIFY_FAILED),
        (lambda: mobie.dequantize(source, tmp_path / "f.gguf"), Kind.UNSUPPORTED),
    ):
        e = refused(call)
        assert e.kind == code and e.what and isinstance(e, Exception)
        assert all(isinstance(x, str) for x in (e.what, e.found, e.wanted, e.todo))
    e = refused(mobie.plan, source, tmp_path / "o.gguf", method="sign", max_ram=1)
    assert (e.found.endswith("MiB"), e.wanted, bool(e.todo)) == (True, "1 B", True)
    assert names(tmp_path) == {"m.gguf", "m-mobie-uncalibrated.gguf"}


@pytest.mark.parametrize("name", ["split_max_size", "max_ram", "threads"])
@pytest.mark.parametrize("value", [0, -1])
def test_options_out_of_range_are_refused_when_they_are_made(name, value):
    e = refused(mobie.ExportOptions, **{name: value})
    assert e.kind == errors.USAGE and name in e.what and e.found == str(value) and "positive" in e.wanted
    assert refused(mobie.plan, "no such file", **{name: value}).what == e.what, "before the model is looked for"


@pytest.mark.parametrize(
    "method,wrong",
    [
        (mobie.Calibrated, {"samples": 0}),
        (mobie.Calibrated, {"seq_len": 1}),
        (mobie.Calibrated, {"bpw": float("nan")}),
        (mobie.Calibrated, {"refine": "much"}),
        (mobie.Calibrated, {"device": "abacus"}),
        (mobie.Calibrated, {"chat": True}),
        (mobie.Paper, {"seed": -1}),
        (mobie.Importance, {}),
    ],
    ids=str,
)
def test_a_method_with_options_without_sense_is_not_made(method, wrong):
    assert refused(method, **wrong).kind == Kind.USAGE


# ---- options and methods ---------------------------------------------------------------------------------------------


def test_keywords_are_the_fields_of_the_options():
    assert sorted(Keywords.__annotations__) == sorted(f.name for f in dataclasses.fields(mobie.ExportOptions))


def test_options_of_another_method_are_refused_with_the_command_that_takes_them(source, capsys):
    def said(*words: str) -> str:
        assert cli.main([str(source), *words, "-q"]) == Exit.USAGE
        return capsys.readouterr().err

    text = said("--imatrix", "i.gguf")
    assert "--method ordered has no such options" in text and "--imatrix" in text.splitlines()[1]
    assert f"mobie-export {source} --imatrix i.gguf -q --method imatrix" in text
    text = said("--method", "paper", "--bpw", "1.3", "--seed", "1")
    assert "--method paper has no such options" in text and text.splitlines()[1].split() == ["found:", "--bpw"]
    text = said("--method=calibrated", "--imatrix", "i.gguf", "--bpw", "1.3")
    assert "options of one method" in text and "next:" not in text
    with pytest.raises(SystemExit) as e:
        cli.main([str(source), "--method", "magic"])
    assert e.value.code == Exit.USAGE and "calibrated" in capsys.readouterr().err


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(methods, "_registered", {})


def test_a_method_of_ones_own(source, registered):
    """One function, and it is there: for `plan`, in files, on the command line."""

    @mobie.register
    @dataclasses.dataclass(frozen=True)
    class Ones(mobie.MatrixMethod):
        name = "ones"
        summary = "plus for everything"

        def quantize(self, weights, importance, block_len):
            return np.ones(weights.shape, bool), np.ones((weights.shape[0], weights.shape[1] // block_len))

    out = mobie.export(mobie.plan(source, method="ones")).output
    mobie.verify(out)
    decoded = models.decoded(mobie.dequantize(out, out.with_name("f.gguf")).output)
    assert all((w == 1).all() for n, w in decoded.items() if "_exps" in n)
    assert cli.main([str(source), "--method", "ones", "--overwrite", "-q"]) == 0
    with pytest.raises(ValueError, match="sign"):

        @mobie.register
        class Other(Ones):
            name = "sign"
