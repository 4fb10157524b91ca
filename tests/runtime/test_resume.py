"""A calibration that did not finish goes on where it stopped, and ends in the same bytes."""

import errno
import os
from dataclasses import replace

import pytest

from mobie_export import cli, disk, errors, gguf_io, progress
from mobie_export.cli import Exit
from mobie_export.exporting import write
from mobie_export.methods.base import Needs, Run
from tests import models

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mobie_export.calibration import states  # noqa: E402
from mobie_export.calibration.store import Store  # noqa: E402
from mobie_export.calibration.text import Calibration  # noqa: E402
from mobie_export.methods.calibrated import Calibrated, refine, steps  # noqa: E402
from mobie_export.methods.ordered import steps as ordered  # noqa: E402
from mobie_export.methods.paper import Paper, recipe  # noqa: E402

ARGUMENTS = ["--samples", "40", "--seq-len", "64", "--threads", "1", "--quiet"]
CALIBRATED = ["--method", "calibrated"]
OPTIONS = Calibrated(samples=40)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory, runtime_tools):
    path = tmp_path_factory.mktemp("resume") / "m.gguf"
    models.write_qwen3moe(path, seed=11)
    return path


def export(model, output, *more) -> int:
    return cli.main([str(model), "-o", str(output), *ARGUMENTS, *more])


def killed_at(monkeypatch, owner, name: str, call: int) -> list[int]:
    """The function raises at its n-th call; the list counts calls."""
    calls, function = [0], getattr(owner, name)

    def wrapped(*args, **more):
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return function(*args, **more)

    monkeypatch.setattr(owner, name, wrapped)
    return calls


ORDERED = ["--method", "ordered", "--descents", "1"]
TOGETHER = [*ORDERED, "--steps", "8", "--refine"]

# Where it is killed: in the forward pass, between the layers of the backward one, in the refinement.
PLACES = {
    "forward": (states.States, "write", 5, [*CALIBRATED, "--refine", "none"]),
    "backward": (steps, "quantize_layer", 2, [*CALIBRATED, "--refine", "none"]),
    "paper": (recipe, "layer", 2, ["--method", "paper"]),
    "second signs": (steps, "quantize_layer", 2, [*CALIBRATED, "--refine", "none", "--bpw", "1.3"]),
    "ordered": (ordered, "binarized", 2, ORDERED),
    "ordered, more bits": (ordered, "binarized", 2, [*ORDERED, "--bpw", "1.3"]),
    "layerwise": (refine, "_tuned", 2, [*CALIBRATED, "--refine", "layerwise"]),
    "layerwise, in a layer": (refine.Layers, "update", 7, [*CALIBRATED, "--refine", "layerwise"]),
    "end-to-end": (refine.Layers, "update", 11, [*TOGETHER, "end-to-end"]),
    "magnitudes": (refine.Layers, "update", 11, [*TOGETHER, "magnitudes"]),
    "streamed, after layerwise": (refine.Layers, "update", 11, [*CALIBRATED, "--refine", "streamed", "--steps", "8"]),
    "streamed, all steps done": (Store, "put_refined", 2, [*TOGETHER, "streamed"]),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_bytes_are_the_same(model, tmp_path, monkeypatch, place):
    owner, name, call, more = PLACES[place]
    monkeypatch.setattr(refine, "LAYERWISE", replace(refine.LAYERWISE, steps=4, batch_tokens=512))
    monkeypatch.setattr(refine, "WHOLE", replace(refine.WHOLE, batch_tokens=128))
    whole, resumed = tmp_path / "a" / "o.gguf", tmp_path / "b" / "o.gguf"
    for path in (whole, resumed):
        path.parent.mkdir()
    with monkeypatch.context() as m:
        full = killed_at(m, owner, name, 10**9)
        assert export(model, whole, *more) == 0
    with monkeypatch.context() as m, pytest.raises(Killed):
        killed_at(m, owner, name, call)
        export(model, resumed, *more)
    (folder,) = [p for p in resumed.parent.iterdir() if p.is_dir()]
    assert folder.name.startswith(".mobie-work-") and not resumed.exists()
    with monkeypatch.context() as m:
        again = killed_at(m, owner, name, 10**9)
        assert export(model, resumed, *more) == 0
    assert 0 < again[0] < full[0] or place.endswith("all steps done"), "nothing was taken over"
    assert whole.read_bytes() == resumed.read_bytes()
    assert [p.name for p in resumed.parent.iterdir()] == ["o.gguf"]


def begun(gguf, tmp_path, options=OPTIONS, text="", threads=None):
    """The work of a calibration on a text with this digest."""
    needs = Needs(sequences=Calibration(torch.zeros(40, 256, dtype=torch.long), text))
    return options.workspace(Run(gguf, {}, tmp_path / "o.gguf", needs, threads, None, None))


def key(path, tmp_path, *options, **more) -> str:
    with gguf_io.open_model(path) as gguf, begun(gguf, tmp_path, *options, **more) as work:
        return work.files.folder.name


def test_other_settings_do_not_go_on_from_it(model, tmp_path):
    assert key(model, tmp_path) != key(model, tmp_path, text="another")
    dialogues = replace(OPTIONS, text=tmp_path / "text")  # of which the digest says more
    more = (OPTIONS, replace(OPTIONS, seed=1), replace(OPTIONS, samples=41), replace(dialogues, chat=True))
    more += (Paper(samples=40),)
    keys = {key(model, tmp_path, options) for options in more} | {key(model, tmp_path, threads=1)}
    assert len(keys) == len(more) + 1  # threads: the order of float sums
    assert key(model, tmp_path, dialogues) == key(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_same_content_is_the_same_source_whatever_its_name_and_time(model, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(model.read_bytes())
    os.utime(other, (1, 1))
    assert key(other, tmp_path) == key(model, tmp_path)


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.attn_norm.weight", "blk.0.ffn_up_exps.weight"])
def test_one_other_weight_is_another_source(model, tmp_path, name):
    """The header, the size and nearly all data are those of the model, as of another fine-tune of it."""
    other = tmp_path / "other.gguf"
    other.write_bytes(model.read_bytes())
    with gguf_io.open_model(other) as gguf, open(other, "r+b") as file:
        tensor = gguf.tensors[name]
        file.seek(tensor.offset + tensor.n_bytes // 3)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    assert key(other, tmp_path) != key(model, tmp_path)


def test_two_of_the_same_at_once_are_refused(model, tmp_path):
    with (
        gguf_io.open_model(model) as gguf,
        begun(gguf, tmp_path),
        pytest.raises(errors.MobieError, match="running already") as e,
        begun(gguf, tmp_path),
    ):
        pass
    assert e.value.kind == errors.BAD_OUTPUT


def interrupt(*_):
    raise KeyboardInterrupt


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def unsound(*_):
    raise errors.MobieError(errors.VERIFY_FAILED, "other bytes")


def large():
    return 1 << 50


STOPS = {  # exit code, where, what happens there
    "interrupted": (Exit.INTERRUPTED, gguf_io.Writer, "finish", interrupt),
    "disk full": (Exit.NO_SPACE, disk, "reserve", no_space),
    "not what was written": (Exit.VERIFY_FAILED, write, "_read_back", unsound),
    "memory": (Exit.NO_MEMORY, progress, "peak_memory", large),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_finished_calibration_is_kept_until_the_output_is_there(model, tmp_path, monkeypatch, capsys, stop):
    """What stops it comes when everything is computed; the second run computes nothing anew."""
    code, owner, name, happens = STOPS[stop]
    more = [*CALIBRATED, "--refine", "none", "--max-ram", "1T"]
    produce = write.produce
    with monkeypatch.context() as m:

        def late(*args):
            m.setattr(owner, name, happens)
            return produce(*args)

        m.setattr(write, "produce", late)
        assert export(model, tmp_path / "o.gguf", *more) == code
    (folder,) = tmp_path.iterdir()
    said = capsys.readouterr().err
    assert f"kept: {folder} (" in said and "the same command goes on from it" in said and "mobie-export clean" in said
    layers = killed_at(monkeypatch, steps, "quantize_layer", 10**9)
    assert export(model, tmp_path / "o.gguf", *more) == 0
    assert layers == [0] and [p.name for p in tmp_path.iterdir()] == ["o.gguf"]


def test_nothing_is_kept_where_nothing_was_computed(model, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("too short")
    assert export(model, tmp_path / "o.gguf", *CALIBRATED, "--calibration", str(text)) == Exit.BAD_INPUT
    assert [p.name for p in tmp_path.iterdir()] == ["text"] and "kept:" not in capsys.readouterr().err


def test_a_damaged_store_is_named(model, tmp_path, monkeypatch, capsys):
    more = [*CALIBRATED, "--refine", "none"]
    with monkeypatch.context() as m:
        m.setattr(gguf_io.Writer, "finish", interrupt)
        assert export(model, tmp_path / "o.gguf", *more) == Exit.INTERRUPTED
    (planes,) = tmp_path.glob("*/planes-1.npz")
    planes.write_bytes(planes.read_bytes()[:1000])
    assert export(model, tmp_path / "o.gguf", *more) == Exit.BAD_INPUT
    assert f"cannot read back {planes}" in capsys.readouterr().err
