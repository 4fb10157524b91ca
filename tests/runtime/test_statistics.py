"""What a calibration saves for others: the same bytes without the passes, and nothing of another model or text."""

import dataclasses
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

import mobie_export as mobie
from mobie_export import api, cli, disk, gguf_io
from mobie_export.cli import Exit
from mobie_export.exporting.effort import Effort
from mobie_export.spec import metadata
from tests import exporting, models, q1_0_models, ranked

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from safetensors import safe_open  # noqa: E402 (it comes with transformers)
from safetensors.torch import load_file  # noqa: E402

from mobie_export.calibration import bundled, saved  # noqa: E402 (they need torch)
from mobie_export.calibration.saved import Statistics  # noqa: E402
from mobie_export.methods.calibrated import Calibrated, refine  # noqa: E402
from mobie_export.methods.improve import Improve  # noqa: E402
from mobie_export.methods.ordered import Ordered  # noqa: E402
from mobie_export.methods.ordered import steps as ordered  # noqa: E402
from mobie_export.methods.paper import Paper  # noqa: E402

LENGTH = 32
PASSES = {"writing", "sensitivity", "targets"}

pytestmark = pytest.mark.usefixtures("runtime_tools", "without_runtime")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few steps, of few sequences."""
    monkeypatch.setattr(refine, "LAYERWISE", dataclasses.replace(refine.LAYERWISE, steps=2, batch_tokens=128))
    monkeypatch.setattr(refine, "WHOLE", dataclasses.replace(refine.WHOLE, steps=40, batch_tokens=128))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "m.gguf"
    models.write_qwen3moe(path, seed=7)
    return path


def export(source: Path, output: Path, method, **others) -> set[str]:
    """The phases that it took."""
    steps: list[mobie.Step] = []
    plan = mobie.plan(source, output, method=method, threads=1, **others)
    mobie.export(plan, progress=steps.append)
    return {step.phase for step in steps}


def settings(path: Path) -> dict:
    with gguf_io.open_model(path) as file:
        return metadata.settings(file)


def small(**options) -> Ordered:
    return Ordered(**{"samples": 36, "seq_len": LENGTH, "descents": 1, "allow_thin": True} | options)


@pytest.fixture(scope="module")
def kept(model, tmp_path_factory, runtime_tools) -> Path:
    """Of a refinement of 8 steps, which sees 35 sequences and more."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine, "WHOLE", dataclasses.replace(refine.WHOLE, steps=40, batch_tokens=128))
        method = small(samples=33, bpw=1.5, refine="end-to-end", steps=16, save_statistics=folder / "s")
        assert export(model, folder / "o.gguf", method) >= {"sensitivity", "targets"}
    return folder / "s"


# ---- the same bytes --------------------------------------------------------------------------------------------------


def test_a_text_that_the_model_wrote_and_what_the_layers_cost(tmp_path):
    """The same bytes without both passes; another size and another type."""
    model, kept, own = q1_0_models.trained(tmp_path / "m.gguf"), tmp_path / "s", {"text": Path("self"), "bpw": 1.5}
    assert export(model, tmp_path / "a.gguf", small(**own, save_statistics=kept)) >= {"writing", "sensitivity"}
    found = export(model, tmp_path / "b.gguf", small(bpw=1.5, statistics=kept))
    assert not found & PASSES
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    for options, name in (({"bpw": 1.25}, "c.gguf"), ({}, "d.gguf")):
        how = {} if options else {"type": "q1_0"}
        assert not export(model, tmp_path / name, small(statistics=kept, **options), **how) & PASSES
        assert settings(tmp_path / name)["calibration"] == settings(tmp_path / "a.gguf")["calibration"]
    columns = [settings(tmp_path / f"{n}.gguf")["second"] for n in "ac"]
    assert columns[0] != columns[1]
    with gguf_io.open_model(model) as gguf:
        tokens = load_file(kept)["tokens"]
        written = bundled.load(gguf, len(tokens), LENGTH, 0).tokens
        same = [bool(row) for row in (tokens == written).all(1)]
        assert [i for i in range(36) if not same[i]] == bundled.own_places(36) and all(same[36:])


def test_targets(model, kept, tmp_path):
    """Of a refinement, and of a further one of the export: fewer steps take the first of them, more none."""
    first = kept.parent / "o.gguf"
    method = small(samples=33, bpw=1.5, refine="end-to-end", steps=16, statistics=kept)
    assert not export(model, tmp_path / "a.gguf", method) & PASSES
    assert (tmp_path / "a.gguf").read_bytes() == first.read_bytes()
    for steps, missing in ((15, set()), (20, {"targets"})):  # whole batches, so that the last one is the same
        further = {"start": first, "steps": steps, "samples": 33, "seq_len": LENGTH}
        assert export(model, tmp_path / "b.gguf", Improve(**further), overwrite=True) & PASSES == {"targets"}
        found = export(model, tmp_path / "c.gguf", Improve(**further, statistics=kept), overwrite=True)
        assert found & PASSES == missing
        assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes(), steps


@pytest.mark.parametrize(("method", "more"), [(Calibrated, {"steps": 4}), (Paper, {})])
def test_other_methods_take_the_text(tmp_path, method, more):
    how = {"samples": 36, "seq_len": LENGTH, "allow_thin": True} | more
    (tmp_path / "m.txt").write_bytes(bundled.books()[:20_000])
    models.write_qwen3moe(tmp_path / "m.gguf")
    export(
        tmp_path / "m.gguf",
        tmp_path / "a.gguf",
        method(text=tmp_path / "m.txt", save_statistics=tmp_path / "s", **how),
    )
    (tmp_path / "m.txt").unlink()
    export(tmp_path / "m.gguf", tmp_path / "b.gguf", method(statistics=tmp_path / "s", **how))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_what_was_there_and_what_came_newly(model, kept, tmp_path):
    """Saved again: with more targets, with what this run did not need, with the same text."""
    text, more, most = (tmp_path / n for n in ("text", "more", "most"))
    export(model, tmp_path / "a.gguf", small(save_statistics=text))
    assert load_file(text).keys() == {"tokens"}
    export(model, tmp_path / "b.gguf", small(bpw=1.5, statistics=text, save_statistics=more))
    assert load_file(more).keys() == {"tokens", "sensitivity", "sensitivity_layers"}
    further = {"start": kept.parent / "o.gguf", "steps": 16, "samples": 33}
    export(model, tmp_path / "c.gguf", Improve(**further, statistics=more, save_statistics=most))
    found, wanted = load_file(most), load_file(kept)
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in found if n != "sensitivity")
    export(model, tmp_path / "d.gguf", small(statistics=most, save_statistics=tmp_path / "again"))
    assert all(torch.equal(t, load_file(tmp_path / "again")[n]) for n, t in found.items())
    assert Statistics(tmp_path / "again").about == Statistics(most).about


def test_the_file_is_what_it_says(model, kept):
    found = load_file(kept)
    assert {n: t.dtype for n, t in found.items()} == {
        "tokens": torch.int32,
        "sensitivity": torch.float64,
        "sensitivity_layers": torch.int32,
        "targets": torch.bfloat16,
    }
    n = refine.together("end-to-end", 16, 0).sequences(LENGTH)
    assert found["targets"].shape[:2] == (n, LENGTH) and n > 33
    assert len(found["tokens"]) == refine.WHOLE.sequences(LENGTH) > n, "enough for a refinement as it is by default"
    with safe_open(kept, "pt") as file:
        about = json.loads(file.metadata()[saved.KEY])
    with gguf_io.open_model(model) as gguf:
        assert about["source"] == gguf.content()
        assert about["text_sha256"] == bundled.load(gguf, 1, LENGTH, 0).sha256
    assert (about["format"], about["seed"], about["text"], about["own"]) == (1, 0, bundled.NAME, False)
    assert about["made"]["targets"]["torch"] == torch.__version__


def test_numbers_made_otherwise_are_said(model, kept, tmp_path):
    """They decide the bytes, and nothing else in the settings would say so."""
    method = small(samples=33, bpw=1.5, refine="end-to-end", steps=16, statistics=kept)
    mobie.export(mobie.plan(model, tmp_path / "a.gguf", method=method, threads=2))
    other = {"threads": 1}
    assert settings(tmp_path / "a.gguf")["statistics"] == {"sensitivity": other, "targets": other}
    assert "statistics" not in settings(kept.parent / "o.gguf")


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--calibration", "text.txt"], "--calibration"),
        (["--calibration", "self", "--writer", "w.gguf"], "--calibration, --writer"),
        (["--chat"], "--chat"),
        (["--seq-len", "64"], f"{LENGTH}, or none"),
        (["--seed", "7"], "0, or none"),
    ],
)
def test_the_text_is_that_of_the_statistics(model, kept, tmp_path, capsys, words, says):
    command = [str(model), "-o", str(tmp_path / "o.gguf"), "--statistics", str(kept), *words, "-q"]
    assert cli.main(command) == Exit.USAGE
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_there_are_no_more_sequences_than_in_the_file(model, tmp_path, capsys):
    """None is counted on that the model did not write, where it wrote the text."""
    own, other = tmp_path / "own", tmp_path / "other"
    how = {"method": "ordered", "--samples": "36", "--seq-len": str(LENGTH), "--descents": "1", "--threads": "1"}
    words = [str(model), "-q", "--allow-thin", *(w for k, v in how.items() for w in ("--" + k.lstrip("-"), v))]
    assert cli.main([*words, "-o", str(tmp_path / "a.gguf"), "--calibration", "self", saved.OPTION, str(own)]) == 0
    assert cli.main([*words, "-o", str(tmp_path / "b.gguf"), saved.OPTION, str(other)]) == 0
    for path, has in ((own, 36), (other, refine.WHOLE.sequences(LENGTH))):
        capsys.readouterr()
        ask = ["plan", str(model), "-o", str(tmp_path / "c.gguf"), "--statistics", str(path)]
        assert cli.main([*ask, "--method", "ordered", "--samples", str(has + 1)]) == Exit.USAGE
        assert f"at most {has}" in capsys.readouterr().err
        assert cli.main([*ask, "--method", "ordered", "--samples", str(has)]) == 0
        assert cli.main([*ask, "--effort", "best"]) == 0
        said = capsys.readouterr().out
        assert f"--statistics {path}" in said and "--calibration" not in said
        assert f"--samples {min(has, 512)}" in said or has == 256
        assert Ordered(statistics=path).samples == min(has, 256)
    for effort in ("normal", "best"):
        assert (
            api.plan(model, tmp_path / "c.gguf", method=Effort(effort, options={"statistics": own})).method.text is None
        )


def test_the_plan_counts_what_is_left_to_do(model, kept, tmp_path):
    how = {"samples": 33, "bpw": 1.5, "refine": "end-to-end", "steps": 16}
    plans = [
        api.plan(model, tmp_path / "o.gguf", method=small(**how, **more))
        for more in ({}, {"statistics": kept}, {"save_statistics": tmp_path / "s"})
    ]
    before, after, saving = (p.seconds for p in plans)
    assert before.keys() - after.keys() == {"sensitivity"} and saving.keys() == before.keys()
    assert plans[1].work_size < plans[0].work_size
    targets = 2 * load_file(kept)["targets"].numel()
    assert plans[2].work_size - plans[0].work_size >= targets + 4 * load_file(kept)["tokens"].numel()
    written = small(text=Path("self"), save_statistics=tmp_path / "s")
    assert "writing" in api.plan(model, tmp_path / "o.gguf", method=written).seconds


# ---- files -----------------------------------------------------------------------------------------------------------


def refused(capsys, code: int, *words) -> str:
    capsys.readouterr()
    assert cli.main([*map(str, words), "--method", "ordered", "--bpw", "1.5", "--threads", "1", "-q"]) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said and "next:" in said
    return said


def test_another_model_is_refused(kept, tmp_path, capsys):
    other = tmp_path / "m.gguf"
    models.write_qwen3moe(other, seed=7)
    with gguf_io.open_model(other) as gguf:
        name = "output_norm.weight"
        values = gguf.read(gguf.tensors[name]).view("<f4") * np.float32(0.5)
        gguf_io.rewrite(gguf, tmp_path / "n.gguf", tensors={name: gguf_io.NewTensor.of(values)})
    said = refused(capsys, Exit.BAD_INPUT, tmp_path / "n.gguf", "--statistics", kept)
    assert "are of another model" in said
    assert exporting.names(tmp_path) == {"m.gguf", "n.gguf"}


def changed(kept: Path, path: Path, change) -> Path:
    """A copy with other metadata or another tensor table: change(header, about)."""
    data = kept.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header["__metadata__"][saved.KEY])
    change(header, about)
    if saved.KEY in header["__metadata__"]:
        header["__metadata__"][saved.KEY] = json.dumps(about)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return path


CHANGES = {
    "foreign": (lambda h, a: h["__metadata__"].clear(), "holds no statistics"),
    "a later format": (lambda h, a: a.update(format=2), "have another format"),
    "no tokens": (lambda h, a: h.pop("tokens"), "are damaged"),
    "an unknown tensor": (lambda h, a: h.update(other=h["tokens"]), "are damaged"),
    "another type": (lambda h, a: h["tokens"].update(dtype="F32"), "are damaged"),
    "another shape": (lambda h, a: h["tokens"].update(shape=[1, 2]), "are damaged"),
    "a negative shape": (lambda h, a: h["tokens"].update(shape=[-2, -3]), "is damaged"),
    "data before the file": (lambda h, a: h["tokens"].update(data_offsets=[-8, 0]), "is damaged"),
    "data behind the file": (lambda h, a: h["tokens"].update(data_offsets=[0, 1 << 62]), "is truncated"),
    "no seed": (lambda h, a: a.pop("seed"), "are damaged"),
    "a seed that is none": (lambda h, a: a.update(seed=True), "are damaged"),
    "a seed beyond": (lambda h, a: a.update(seed=1 << 70), "are damaged"),
    "samples beyond": (lambda h, a: a.update(samples=1 << 40), "are damaged"),
    "more": (lambda h, a: a.update(more=1), "are damaged"),
    "no digests": (lambda h, a: a.update(sha256=[]), "are damaged"),
    "nothing made": (lambda h, a: a.update(made={}), "are damaged"),
    "another layer": (lambda h, a: h["sensitivity_layers"].update(h["sensitivity_layers"]), ""),
}


@pytest.mark.parametrize("name", [n for n in CHANGES if CHANGES[n][1]])
def test_headers_that_no_export_writes(model, kept, tmp_path, capsys, name):
    change, says = CHANGES[name]
    path = changed(kept, tmp_path / "s", change)
    assert says in refused(capsys, Exit.BAD_INPUT, model, "-o", tmp_path / "o.gguf", "--statistics", path)
    assert exporting.names(tmp_path) == {"s"}


@pytest.mark.parametrize("tensor", ["tokens", "sensitivity", "sensitivity_layers", "targets"])
def test_bytes_that_were_damaged_are_found(model, kept, tmp_path, capsys, tensor):
    path, data = tmp_path / "s", bytearray(kept.read_bytes())
    data[Statistics(kept).tensors[tensor].start + 3] ^= 1
    path.write_bytes(data)
    words = ["-o", tmp_path / "o.gguf", "--statistics", path, "--samples", 33, "--allow-thin", "--descents", 1]
    said = refused(capsys, Exit.BAD_INPUT, model, *words, "--refine", "end-to-end", "--steps", 16)
    assert f"other bytes of {tensor.partition('_')[0]}" in said and not (tmp_path / "o.gguf").exists()


def test_tokens_that_the_model_does_not_have(model, kept, tmp_path, capsys):
    """With the digest that they should have."""
    data, tensor = bytearray(kept.read_bytes()), Statistics(kept).tensors["tokens"]
    struct.pack_into("<i", data, tensor.start, 1 << 20)
    (tmp_path / "t").write_bytes(data)
    digest = saved.hashlib.sha256(data[tensor.start : tensor.start + tensor.n_bytes]).hexdigest()
    path = changed(tmp_path / "t", tmp_path / "s", lambda h, a: a["sha256"].update(tokens=digest))
    assert "of a vocabulary of" in refused(capsys, Exit.BAD_INPUT, model, "--statistics", path)


def test_what_is_no_file_of_statistics(model, tmp_path, capsys):
    cut = tmp_path / "cut"
    cut.write_bytes(b"\x40\0\0\0\0\0\0\0{")
    for path, says in ((tmp_path / "none", "cannot read"), (model, "a GGUF file"), (cut, "is truncated")):
        found = cli.main([str(model), "--statistics", str(path), "-q"])
        assert found == Exit.BAD_INPUT and says in capsys.readouterr().err


def test_no_file_is_replaced(model, kept, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.write_bytes(b"precious")
    copy = Path(shutil.copy(kept, tmp_path / "copy"))
    command = [model, "-o", tmp_path / "o.gguf", "--samples", 36, "--seq-len", LENGTH, "--allow-thin"]
    for path, says in ((mine, "exists already"), (tmp_path, "a folder"), (tmp_path / "no" / "s", "does not exist")):
        said = refused(capsys, Exit.BAD_OUTPUT, *command, saved.OPTION, path)
        assert says in said and f"with {saved.OPTION}" in said and "with -o" not in said
    for more in ([saved.OPTION, model], [saved.OPTION, tmp_path / "o.gguf"]):
        assert "would replace" in refused(capsys, Exit.BAD_OUTPUT, *command, *more, "--overwrite")
    both = ["--statistics", copy, saved.OPTION, copy, "--overwrite"]
    assert "would replace" in refused(capsys, Exit.BAD_OUTPUT, *command[:3], *both)
    assert mine.read_bytes() == b"precious" and copy.read_bytes() == kept.read_bytes()
    assert exporting.names(tmp_path) == {"mine", "copy"}
    export(model, tmp_path / "o.gguf", small(save_statistics=mine), overwrite=True)
    assert Statistics(mine).n > 36


def test_a_file_that_came_meanwhile_stays(model, tmp_path, monkeypatch):
    plan = mobie.plan(model, tmp_path / "o.gguf", method=small(save_statistics=tmp_path / "s"), threads=1)
    write = saved.write

    def comes(path, *more):
        path.write_bytes(b"precious")
        write(path, *more)

    monkeypatch.setattr(saved, "write", comes)
    assert exporting.refused(mobie.export, plan).what.endswith("exists already")
    assert (tmp_path / "s").read_bytes() == b"precious"
    assert not [left for left in disk.left(tmp_path) if "calibration" not in left.about]


# ---- going on --------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted():
    """An export that is interrupted when all is ready for its first layer."""

    def run(source: Path, output: Path, method) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ordered, "encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                mobie.export(mobie.plan(source, output, method=method, threads=1))

    return run


def test_the_same_command_goes_on_after_the_statistics_were_saved(model, tmp_path, interrupted):
    path, out = tmp_path / "s", tmp_path / "o.gguf"
    interrupted(model, out, small(save_statistics=path))
    was = path.stat().st_mtime_ns, path.read_bytes()
    interrupted(model, out, small(save_statistics=path))
    assert (path.stat().st_mtime_ns, path.read_bytes()) == was
    path.write_bytes(b"precious")
    plan = exporting.refused(mobie.plan, model, out, method=small(save_statistics=path), threads=1)
    assert plan.what.endswith("exists already")
    export(model, out, small(save_statistics=tmp_path / "other"))
    assert (tmp_path / "other").read_bytes() == was[1] and path.read_bytes() == b"precious"
    assert not disk.left(tmp_path), "where they are saved decides nothing"


def test_work_is_named_by_what_is_in_the_statistics(model, kept, tmp_path, interrupted):
    """Not by their name; other ones have another folder, and so has a text that the model writes."""
    out, same = tmp_path / "o.gguf", Path(shutil.copy(kept, tmp_path / "same"))
    for path in (kept, same):
        interrupted(model, out, small(bpw=1.5, samples=33, statistics=path))
    (folder,) = (left.path for left in disk.left(tmp_path))
    other = changed(kept, tmp_path / "other", lambda h, a: a["made"]["sensitivity"].update(threads=9))
    interrupted(model, out, small(bpw=1.5, samples=33, statistics=other))
    assert len(disk.left(tmp_path)) == 2
    disk.remove(folder)


def test_work_on_the_package_s_text_is_not_that_on_its_own(model, tmp_path, interrupted):
    for text in (None, Path("self")):
        interrupted(model, tmp_path / "o.gguf", small(text=text))
    assert len(disk.left(tmp_path)) == 2


# ---- several processes -----------------------------------------------------------------------------------------------


def test_several_processes_read_and_do_not_write(model, kept, tmp_path):
    few = ["--method", "ordered", "--samples", "33", "--threads", "1", "--allow-thin", "--descents", "1"]
    few += ["--refine", "end-to-end", "--steps", "1", "--bpw", "1.5"]  # which reads what is in the file
    said = []
    with ranked.started() as ranks:
        done = ranks.run(2, "export", model, "-o", tmp_path / "o.gguf", *few, saved.OPTION, tmp_path / "s")
        assert done.codes == [Exit.USAGE] * 2 and saved.OPTION in done.stderr
        for name, words in (("a", ["--seq-len", LENGTH]), ("b", ["--statistics", kept])):
            done = ranks.run(2, "export", model, "-o", tmp_path / f"{name}.gguf", *few, *words)
            assert done.codes == [0, 0], done.stderr[-3000:]
            said.append(float(done.stdout.split("kept aside ")[1].split(" -> ")[0]))
    assert said[0] == pytest.approx(said[1], rel=0.05)
    found = settings(tmp_path / "b.gguf")
    assert {n: how["ranks"] for n, how in found["statistics"].items()} == {"sensitivity": 1, "targets": 1}
