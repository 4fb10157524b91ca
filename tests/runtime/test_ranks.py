"""A calibration by several processes: sums as by one, the same bytes every time, nothing lost where one dies."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mobie_export import cli, disk, gguf_io, verify
from mobie_export.cli import Exit
from tests import models
from tests.scoring import divergence, log_probabilities

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mobie_export.calibration import bundled  # noqa: E402 (they need torch)
from mobie_export.calibration.tokenizer import tokenize  # noqa: E402
from tests import ranked  # noqa: E402

TINY = Path(__file__).resolve().parents[2] / "examples/tiny-moe/tiny-moe-f16.gguf"
FEW = ["--method", "ordered", "--samples", "36", "--seq-len", "32", "--threads", "1", "--allow-thin"]


@pytest.fixture(scope="module")
def ranks():
    with ranked.started() as found:
        yield found


def test_two_compute_the_sums_that_one_computes(tmp_path, ranks):
    """Float32 sums of n terms are off by n u of the sum of their sizes at most, u = 2^-24, which for second moments is
    below the root of the product of two diagonal elements; the terms, made of sums over `width`, by as much again in
    both factors. Gradients went through all layers: what is lost or counted twice there is as large as they are."""
    done = ranks.run(2, "sums", TINY, tmp_path / "two.pt")
    assert done.codes == [0, 0], done.stderr[-3000:]
    (tmp_path / "one").mkdir()
    one, two = ranked.computed(TINY, tmp_path / "one"), torch.load(tmp_path / "two.pt")
    assert one.keys() == two.keys() and all(torch.isfinite(x.double()).all() for x in (*one.values(), *two.values()))
    assert torch.equal(one["counts"], two["counts"]) and int(one["counts"].min()) < 256 < int(one["counts"].max())
    width = one["target"].shape[1]
    bound = 2 * 2**-24 * (ranked.SEQUENCES * ranked.LENGTH + 2 * width)
    seen = set()
    for name, x in one.items():
        kind, off = name.split()[0], (x - two[name]).abs()
        seen.add(kind)
        if kind == "moment":
            assert (off <= bound * (x.diagonal()[:, None] * x.diagonal()).sqrt() + 1e-30).all(), name
            assert x.diagonal().max() > 0
        elif kind in ("energy", "target", "p", "losses"):
            assert float(off.max()) <= bound * float(x.abs().max()), name
        elif kind == "gradient":
            assert float(off.norm()) <= 1e-2 * float(x.norm()) and float(x.norm()) > 0, name
    assert seen == {"counts", "target", "p", "moment", "energy", "gradient", "losses"}


@pytest.fixture(scope="module")
def made(tmp_path_factory, runtime_tools, ranks) -> dict[str, Path]:
    """Exports of the trained model, with second signs: by one process, by two that torchrun starts, by two of which one
    died on the way."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = {name: folder / f"{name}.gguf" for name in ("one", "two", "again")}
    more = [*FEW, "--bpw", "1.25"]
    assert cli.main([str(TINY), "-o", str(paths["one"]), *more, "-q"]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["mobie_export", str(TINY), "-o", str(paths["two"]), *more]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written") == 1
    arguments = ["export", TINY, "-o", paths["again"], *more]
    died = ranks.run(2, *arguments, MOBIE_TEST_DIES="1:2")
    assert died.codes == [Exit.RANK_LOST, -signal.SIGKILL], died.stderr[-3000:]
    left = disk.left(folder)
    assert len(left) == 2 and all("rank" in x.about and x.size for x in left), died.stderr[-3000:]
    assert "(rank 0 of 2): error: another process" in died.stderr and "kept: " in died.stderr
    for work in (x.path for x in left):
        assert (work / "planes-1.npz").exists() and (work / "original-2").exists() and (work / "binary-2").exists()
    assert not paths["again"].exists()
    done = ranks.run(2, *arguments)
    assert done.codes == [0, 0], done.stderr[-3000:]
    assert not disk.left(folder)
    return paths


def test_the_same_number_gives_the_same_bytes_also_after_one_died(made):
    assert made["two"].read_bytes() == made["again"].read_bytes()
    for path in made.values():
        verify(path)
    with gguf_io.open_model(made["two"]) as two, gguf_io.open_model(made["one"]) as one:
        settings = [json.loads(gguf.value("mobie.settings")) for gguf in (one, two)]
        assert settings[1].pop("ranks") == 2 and settings[0].keys() == settings[1].keys()
        assert settings[0]["sequences"] == settings[1]["sequences"] == 36


def test_two_come_as_near_as_one(made):
    """Signs that nearly did not matter fall otherwise where sums are rounded otherwise; the model is as good."""
    tokens, _ = tokenize(TINY, bundled.books()[-4000:])
    chunks = np.asarray(tokens[:1024]).reshape(2, 512)
    truth, one, two = (log_probabilities(p, chunks, False) for p in (TINY, made["one"], made["two"]))
    one, two = divergence(truth, one), divergence(truth, two)
    print(one, two)
    assert 0.8 * one.kl < two.kl < 1.25 * one.kl


def test_a_refinement_by_two_repeats_and_gains(tmp_path, runtime_tools, ranks):
    paths = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for path in paths:
        words = [*FEW, "--refine", "end-to-end", "--steps", "4", "--calibration", "self"]
        done = ranks.run(2, "export", TINY, "-o", path, *words)
        assert done.codes == [0, 0], done.stderr[-3000:]
        before, after = map(float, done.stdout.split("kept aside ")[1].split(" nats")[0].split(" -> "))
        assert after < before
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_ranks_with_different_models_say_so(tmp_path, runtime_tools, ranks):
    model, other, out = (tmp_path / f"{n}.gguf" for n in ("m", "other", "out"))
    models.write_qwen3moe(model, seed=1)
    models.write_qwen3moe(other, seed=2)
    done = ranks.run(2, "export", model, "-o", out, *FEW, MOBIE_TEST_OTHER=f"1:{other}")
    assert done.codes == [Exit.BAD_INPUT] * 2 and not out.exists()
    assert "do not have the same weights" in done.stderr and not disk.left(tmp_path)


@pytest.mark.parametrize(
    ("words", "processes", "says"),
    [
        (["--method", "sign"], 2, "--method sign runs in one process"),
        ([*FEW], 9, "more processes than work"),
        ([*FEW, "--refine", "end-to-end", "--seq-len", "512", "--samples", "40"], 5, "step of the refinement"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    tmp_path, runtime_tools, monkeypatch, capsys, words, processes, says
):
    models.write_qwen3moe(tmp_path / "m.gguf")
    started(monkeypatch, processes)
    assert cli.main([str(tmp_path / "m.gguf"), *words, "-q"]) == Exit.USAGE
    assert says in capsys.readouterr().err


def test_a_checkpoint_is_refused(tmp_path, monkeypatch):
    from mobie_export import api
    from mobie_export.errors import MobieError
    from mobie_export.sources.find import Source

    models.write_qwen3moe(tmp_path / "m.gguf")
    plan = api.plan(tmp_path / "m.gguf", method="sign")
    started(monkeypatch, 2)
    object.__setattr__(plan, "source", Source("m", checkpoint=tmp_path))
    with pytest.raises(MobieError, match="start from a GGUF"):
        api.export(plan)


def started(monkeypatch, processes: int) -> None:
    """As torchrun would start the first of so many."""
    values = {"WORLD_SIZE": processes, "RANK": 0, "LOCAL_WORLD_SIZE": processes, "LOCAL_RANK": 0}
    for name, value in ({"TORCHELASTIC_RUN_ID": "test"} | values).items():
        monkeypatch.setenv(name, str(value))
