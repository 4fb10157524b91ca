"""A calibration that was killed goes on where it stopped, and ends in the same bytes."""

import pytest

from mobie_export import calibrated, cli, errors, gguf_io
from tests import models

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mobie_export import calibrate, recipe, refine  # noqa: E402 (they need torch)

ARGUMENTS = ["--samples", "40", "--seq-len", "64", "--threads", "1", "--quiet"]
CALIBRATED = ["--method", "calibrated"]


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("resume") / "m.gguf"
    models.write_qwen3moe(path, seed=11)
    return path


@pytest.fixture(autouse=True)
def kept(monkeypatch, runtime_tools):
    """As if the process were gone at once: nobody cleans up, and the lock is let go of."""
    remove = calibrated.shutil.rmtree
    state = {"keep": False}
    monkeypatch.setattr(calibrated.shutil, "rmtree", lambda *a, **k: None if state["keep"] else remove(*a, **k))
    return state


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


# Where it is killed: in the forward pass, between the layers of the backward one, in the refinement.
PLACES = {
    "forward": (calibrate.States, "write", 5, [*CALIBRATED, "--refine", "none"]),
    "backward": (calibrated, "quantize_layer", 2, [*CALIBRATED, "--refine", "none"]),
    "paper": (recipe, "layer", 2, ["--recipe", "paper"]),
    "second signs": (calibrated, "quantize_layer", 2, [*CALIBRATED, "--refine", "none", "--bpw", "1.3"]),
    "refinement": (refine, "_tuned", 2, [*CALIBRATED, "--refine", "layerwise"]),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_bytes_are_the_same(model, tmp_path, monkeypatch, kept, place):
    owner, name, call, more = PLACES[place]
    monkeypatch.setattr(refine, "LAYERWISE", calibrated.replace(refine.LAYERWISE, steps=4, batch_tokens=512))
    whole, resumed = tmp_path / "a" / "o.gguf", tmp_path / "b" / "o.gguf"
    for path in (whole, resumed):
        path.parent.mkdir()
    with monkeypatch.context() as m:
        full = killed_at(m, owner, name, 10**9)
        assert export(model, whole, *more) == 0
    kept["keep"] = True
    with monkeypatch.context() as m, pytest.raises(Killed):
        killed_at(m, owner, name, call)
        export(model, resumed, *more)
    (folder,) = [p for p in resumed.parent.iterdir() if p.is_dir()]
    assert folder.name.startswith(".mobie-work-") and not resumed.exists()
    kept["keep"] = False
    with monkeypatch.context() as m:
        again = killed_at(m, owner, name, 10**9)
        assert export(model, resumed, *more) == 0
    if place != "refinement":
        assert 0 < again[0] < full[0], "nothing was taken over"
    assert whole.read_bytes() == resumed.read_bytes()
    assert [p.name for p in resumed.parent.iterdir()] == ["o.gguf"]


def test_other_settings_do_not_go_on_from_it(model, tmp_path):
    options = calibrated.Options(samples=40)
    with gguf_io.open_model(model) as gguf:
        names = set()
        for o in (options, *(calibrated.replace(options, **x) for x in ({"seed": 1}, {"samples": 41}, {"chat": True}))):
            with calibrated.work_folder(tmp_path, gguf, o) as folder:
                names.add(folder.name)
        with calibrated.work_folder(tmp_path, gguf, calibrated.replace(options, max_ram=1 << 40)) as folder:
            names.add(folder.name)  # has no influence on the bytes
    assert len(names) == 4 and not list(tmp_path.iterdir())


def test_two_of_the_same_at_once_are_refused(model, tmp_path):
    options = calibrated.Options()
    with (
        gguf_io.open_model(model) as gguf,
        calibrated.work_folder(tmp_path, gguf, options),
        pytest.raises(errors.MobieError, match="running already") as e,
        calibrated.work_folder(tmp_path, gguf, options),
    ):
        pass
    assert e.value.code == errors.BAD_OUTPUT


def test_interrupted_leaves_nothing(model, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrated, "quantize_layer", interrupt)
    assert export(model, tmp_path / "o.gguf", *CALIBRATED, "--refine", "none") == errors.INTERRUPTED
    assert not list(tmp_path.iterdir())
