"""Going on from an export: its signs, magnitudes and tuned tensors are where the refinement begins."""

import dataclasses

import numpy as np
import pytest

from mobie_export import cli, gguf_io
from mobie_export.cli import Exit
from mobie_export.exporting import card
from mobie_export.sources.find import Source
from mobie_export.spec import layout, metadata
from mobie_export.spec.verify import verify
from tests import exporting, models, q1_0_models

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mobie_export.methods.calibrated import refine  # noqa: E402 (it needs torch)

TEXT = ["--samples", "40", "--seq-len", "64", "--threads", "1", "--quiet"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("improve") / "m.gguf"
    models.write_qwen3moe(path, seed=7)
    return path


def settled(monkeypatch, **rates):
    """Few steps, with rates of nothing unless they are given."""
    nothing = dict.fromkeys(("rate_signs", "rate_magnitudes", "rate_router", "rate_norm"), 0.0)
    changed = {"batch_tokens": 512} | nothing | rates
    monkeypatch.setattr(refine, "WHOLE", dataclasses.replace(refine.WHOLE, **changed))


def export(source, output, *more):
    assert cli.main([str(source), "-o", str(output), "--method", "ordered", *TEXT, *more]) == Exit.OK
    return output


def tensors(path):
    with gguf_io.open_model(path) as file:
        return {n: file.read(t).tobytes() for n, t in file.tensors.items()}


def experts(path):
    return {n: data for n, data in tensors(path).items() if layout.kind(n) in ("expert", *layout.BESIDE_EXPERTS)}


@pytest.mark.parametrize(
    "how", [["--bpw", "1.5"], [], ["--type", "q1_0"]], ids=["second signs", "one sign", "stock type"]
)
def test_what_is_not_changed_is_written_as_it_was(source, tmp_path, monkeypatch, how):
    if "q1_0" in how:
        source = q1_0_models.trained(tmp_path / "m.gguf")
    first = export(source, tmp_path / "first.gguf", *how)
    settled(monkeypatch)
    again = tmp_path / "first-improved.gguf"
    asked = [str(first), "--against", str(source), "--steps", "2"]
    assert cli.main(["improve", *asked, *TEXT]) == Exit.OK
    found, wanted = experts(again), experts(first)
    for name, data in wanted.items():
        if layout.kind(name) == "expert scale":  # magnitudes are tuned by their logarithms
            np.testing.assert_allclose(np.frombuffer(found.pop(name), "<f4"), np.frombuffer(data, "<f4"), rtol=1e-6)
        else:
            assert found.pop(name) == data, name
    assert not found
    verify(again)
    with gguf_io.open_model(again) as file, gguf_io.open_model(first) as before:
        assert metadata.METHOD.of(file) == "ordered+end-to-end"
        assert metadata.settings(file)["start"] == {"method": "ordered", "settings": metadata.settings(before)}


def test_it_begins_at_the_earlier_loss_and_goes_on_from_it(source, tmp_path, monkeypatch, capsys):
    first = tmp_path / "first.gguf"  # uncalibrated: from calibrated signs a few steps may lessen nothing
    asked = [str(source), "-o", str(first), "--method", "sign", "--tensor-type", "attn_q=q8_0"]
    assert cli.main(asked) == Exit.OK
    settled(monkeypatch, rate_signs=0.005, rate_magnitudes=0.02, rate_router=0.003, rate_norm=0.005)

    def improve(file, output, steps):
        capsys.readouterr()
        asked = [str(file), "--against", str(source), "-o", str(output), "--steps", str(steps)]
        assert cli.main(["improve", *asked, *TEXT]) == Exit.OK
        line = next(x for x in capsys.readouterr().out.splitlines() if "kept aside" in x)
        before, after = (float(x) for x in line.split("aside ")[1].split(" nats")[0].split(" -> "))
        return before, after

    before, after = improve(first, tmp_path / "second.gguf", 12)
    assert after < 0.9 * before
    again, more = improve(tmp_path / "second.gguf", tmp_path / "third.gguf", 12)
    assert again == pytest.approx(after, rel=0.02), "the file holds what was tuned, routers and norms as well"
    assert more <= again
    with gguf_io.open_model(tmp_path / "third.gguf") as file:
        assert file.tensors["blk.0.attn_q.weight"].type_id == 8, "other tensors keep the types that they have in it"
        assert metadata.METHOD.of(file) == "sign+end-to-end"
    said = card.text(tmp_path / "third.gguf", Source("m", gguf=source), 1)
    assert "Calibrated: signs of the weights, then refinement of all layers together; on 40 sequences" in said


def test_magnitudes_alone_are_the_whole_model_with_its_signs_as_they_are(source, tmp_path, monkeypatch):
    first = export(source, tmp_path / "first.gguf", "--bpw", "1.5")
    settled(monkeypatch, rate_magnitudes=0.02, rate_router=0.003, rate_norm=0.002, free_signs=0.0)
    for name in ("end-to-end", "magnitudes"):
        asked = [str(first), "--against", str(source), "-o", str(tmp_path / name), "--refine", name, "--steps", "12"]
        assert cli.main(["improve", *asked, *TEXT]) == Exit.OK
    found = [tensors(tmp_path / name) for name in ("end-to-end", "magnitudes")]
    assert found[0] == found[1] != tensors(first)


def test_another_source_is_refused(source, tmp_path, capsys):
    other = tmp_path / "other.gguf"
    models.write_qwen3moe(other, seed=8)
    for how in ([], ["--bpw", "1.5"]):
        first = export(source, tmp_path / f"first{len(how)}.gguf", *how)
        assert cli.main(["improve", str(first), "--against", str(other), "--steps", "2", *TEXT]) == Exit.BAD_INPUT
        error = capsys.readouterr().err
        assert "was not made from this source" in error and "layer 0, expert 0" in error
        assert not (tmp_path / f"first{len(how)}-improved.gguf").exists()


def test_what_is_no_export_is_refused(source, tmp_path, capsys):
    assert cli.main(["improve", str(source), "--against", str(source), "--steps", "2", *TEXT]) == Exit.BAD_INPUT
    assert "is no export" in capsys.readouterr().err


def test_a_later_format_is_refused(source, tmp_path, capsys):
    first, later = tmp_path / "first.gguf", tmp_path / "later.gguf"
    exporting.export(source, first)
    with gguf_io.open_model(first) as file:
        gguf_io.rewrite(file, later, entries=[gguf_io.make_entry("mobie.format_version", gguf_io.U32, 2)])
    assert cli.main(["improve", str(later), "--against", str(source), "--steps", "2", *TEXT]) == Exit.UNSUPPORTED
    assert "install a newer mobie-export" in capsys.readouterr().err


def test_time_decides_the_steps_and_the_command_says_them(source, tmp_path, capsys):
    first = export(source, tmp_path / "first.gguf")
    asked = ["improve", str(first), "--against", str(source), "--calibration", str(source), "--time", "1h", "--dry-run"]
    assert cli.main(asked) != Exit.OK, "a model is no text"
    capsys.readouterr()
    asked = ["improve", str(first), "--against", str(source), "--time", "8h", "--dry-run", "--samples", "40"]
    assert cli.main(asked) == Exit.OK
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("effort"))
    assert f"mobie-export improve {first} --against {source}" in line and "--steps 1000" in line
    assert "--method" not in line and "--start" not in line and "--time" not in line
