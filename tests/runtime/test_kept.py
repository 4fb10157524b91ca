"""Nothing of the user's is replaced or removed, and what is ours does not stay: names, locks, `mobie-export clean`."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import mobie_export as mobie
from mobie_export import cli, disk, errors, gguf_io
from mobie_export.cli import Exit
from mobie_export.exporting import plan, write
from mobie_export.methods import base
from mobie_export.methods.calibrated import Calibrated
from mobie_export.progress import Progress
from mobie_export.sources.find import find
from mobie_export.spec import block, layout
from tests import models


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, seed=3)
    return path


def export(*arguments) -> int:
    """Uncalibrated; or `dequantize`."""
    method = [] if arguments[0] == "dequantize" else ["--method", "sign"]
    return cli.main([*map(str, arguments), *method, "--quiet"])


def looks_like_a_checkpoint(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")


def refused(capsys, arguments, *parts: str, code: int = Exit.BAD_OUTPUT) -> None:
    capsys.readouterr()
    assert export(*arguments) == code
    text = capsys.readouterr().err
    for part in parts:
        assert part in text, f"{part!r} not in {text}"


# ---- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_what_the_user_called_part_is_not_touched(source, tmp_path, folder):
    part = tmp_path / "m-mobie-uncalibrated.gguf.part"
    kept = part / "inside" if folder else part
    kept.parent.mkdir(exist_ok=True)
    kept.write_bytes(b"precious")
    assert export(source) == 0 and export(source, "--overwrite", "--split-max-size", "1M") == 0
    assert export("dequantize", tmp_path / "m-mobie-uncalibrated.gguf", "-o", tmp_path / "f.gguf") == 0
    assert kept.read_bytes() == b"precious"


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_an_output_that_is_no_plain_file_is_refused(source, tmp_path, capsys, kind):
    out, other = tmp_path / "o.gguf", tmp_path / "other"
    if kind == "pipe":
        os.mkfifo(out)
    elif kind == "folder":
        out.mkdir()
    else:
        if kind == "link":
            other.write_bytes(b"precious")
        out.symlink_to(other)
    before = out.lstat()
    refused(capsys, [source, "-o", out, "--overwrite"], f"the output is a {kind.split()[-1]}", str(out))
    assert out.lstat() == before and (kind != "link" or other.read_bytes() == b"precious")
    if kind != "folder":
        (tmp_path / "README.md").symlink_to(other)
        refused(capsys, [source, "--card", "--overwrite"], "README.md")


def test_a_name_that_is_too_long_is_an_error(source, tmp_path, capsys):
    refused(capsys, [source, "-o", tmp_path / ("x" * 300)], "File name too long")
    refused(capsys, [source, "-o", tmp_path / ("x" * 240), "--split-max-size", "1M"], "File name too long")
    longest = "x" * 255
    assert export(source, "-o", tmp_path / longest) == 0, "what the system takes is taken"
    assert {p.name for p in tmp_path.iterdir()} == {"m.gguf", longest}


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "a file system without"])
def test_a_file_that_comes_meanwhile_stays(source, tmp_path, capsys, monkeypatch, links):
    def comes(*args):
        (tmp_path / "o-00001-of-00002.gguf").write_bytes(b"precious")
        (tmp_path / "o.gguf").write_bytes(b"precious")

    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    assert export(source, "-o", tmp_path / "first.gguf") == 0
    monkeypatch.setattr(write, "_read_back", comes)
    for more in ([], ["--split-max-size", "1M"]):
        for name in ("o.gguf", "o-00001-of-00002.gguf"):
            (tmp_path / name).unlink(missing_ok=True)
        refused(capsys, [source, "-o", tmp_path / "o.gguf", *more], "exists already")
        assert (tmp_path / "o.gguf").read_bytes() == b"precious"
    assert {p.name for p in tmp_path.iterdir()} == {"m.gguf", "first.gguf", "o.gguf", "o-00001-of-00002.gguf"}


def test_shards_of_another_number_are_not_mixed(source, tmp_path, capsys):
    old = tmp_path / "o-00002-of-00007.gguf"
    old.write_bytes(b"precious")
    run = [source, "-o", tmp_path / "o.gguf", "--split-max-size", "1M", "--overwrite"]
    refused(capsys, run, "shards of another output", old.name)
    assert old.read_bytes() == b"precious" and len(list(tmp_path.iterdir())) == 2


def test_two_exports_to_one_output_exclude_each_other(source, tmp_path, capsys):
    out = tmp_path / "o.gguf"
    assert export(source) == 0
    before = set(tmp_path.iterdir())
    with write.claimed(out):
        refused(capsys, [source, "-o", out], "is being written by another process")
        refused(capsys, [source, "-o", out, "--split-max-size", "1M"], "is being written by another process")
        refused(
            capsys,
            ["dequantize", tmp_path / "m-mobie-uncalibrated.gguf", "-o", out],
            "is being written by another process",
        )
        assert export(source, "-o", tmp_path / "other.gguf") == 0
        assert export(source, "-o", out, "--dry-run") == 0
    assert set(tmp_path.iterdir()) == before | {tmp_path / "other.gguf"} and export(source, "-o", out) == 0


def test_a_checkpoint_claims_its_output_before_it_is_converted(source, tmp_path, capsys, monkeypatch):
    def header(source_, path, header_only=False, show_progress=False):  # for the plan
        assert header_only, "too early"
        path.write_bytes(source.read_bytes())

    checkpoint = tmp_path / "Tiny"
    checkpoint.mkdir()
    looks_like_a_checkpoint(checkpoint)
    monkeypatch.setattr("mobie_export.sources.convert.convert", header)
    with write.claimed(tmp_path / "Tiny-MOBIE-uncalibrated.gguf"):
        refused(capsys, [checkpoint], "is being written by another process")


def test_a_file_of_the_hubs_cache_is_exported_to_here(source, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--org--Tiny-MoE" / "snapshots" / "0123abc"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    source.rename(blobs / "1234")
    (snapshot / "t.gguf").symlink_to("../../blobs/1234")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert export(snapshot / "t.gguf") == 0
    assert [p.name for p in here.iterdir()] == ["t-mobie-uncalibrated.gguf"] and len(list(snapshot.iterdir())) == 1
    looks_like_a_checkpoint(snapshot)
    for folder in (snapshot, Path(os.path.relpath(snapshot))):
        found = find(str(folder))
        assert found.name == "Tiny-MoE" and found.hub == "org/Tiny-MoE"
        assert found.default_output() == Path("Tiny-MoE-MOBIE.gguf")


# ---- errors of the system --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number,code,advice",
    [(28, Exit.NO_SPACE, "free some space"), (5, Exit.BAD_OUTPUT, "-o"), (27, Exit.BAD_OUTPUT, "ulimit")],
    ids=["ENOSPC", "EIO", "EFBIG"],
)
def test_what_the_system_says_decides_the_error(source, tmp_path, capsys, monkeypatch, number, code, advice):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk, "reserve", fails)
    out = tmp_path / "o.gguf"
    refused(capsys, [source, "-o", out], f"cannot write {out}", os.strerror(number), advice, code=code)
    assert list(tmp_path.iterdir()) == [source]


def test_disk_is_taken_before_it_is_written(tmp_path):
    """Nothing is mapped, whose writing on a full disk is a signal."""
    module = pytest.importorskip("mobie_export.calibration.states")
    torch = module.torch
    states = module.States(tmp_path / "s", (64, 32, 512))
    (file,) = tmp_path.iterdir()
    assert file.stat().st_blocks * 512 >= 64 * 32 * 512 * 2
    values = torch.arange(64, dtype=torch.float32)[:, None, None].expand(64, 32, 512)
    for where in (slice(0, 40), slice(40, 64)):
        states.write(where, values[where])
    for where in (slice(3, 9), torch.tensor([63, 0, 7]), torch.tensor([5])):
        assert torch.equal(states.read(where), values[where])
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    states.finish()
    (tmp_path / "s").write_bytes(b"half")
    with pytest.raises(errors.MobieError, match="cannot read back"):
        module.States(tmp_path / "s", (64, 32, 512))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "signal"])
def test_what_interrupts_torch_is_not_hidden(tmp_path, error):
    states = pytest.importorskip("mobie_export.calibration.states")

    class Failing(io.BytesIO):
        def write(self, data):
            raise error

    with pytest.raises(type(error)):
        states.save(states.torch.zeros(1 << 16), Failing())


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_writing_holds_one_expert_at_a_time(tmp_path):
    """Six layers of 32 experts, 14 MB when written; signs take eight times as much when they are computed with."""
    steps = pytest.importorskip("mobie_export.methods.calibrated.steps")
    torch, Planes = steps.torch, pytest.importorskip("mobie_export.calibration.planes").Planes
    n, rows, cols, k = 32, 256, 512, 128
    rng, store = np.random.default_rng(0), steps.Store(tmp_path)

    def planes(rows: int, cols: int):
        signs = [torch.from_numpy(rng.integers(0, 2, (n, rows, x)).astype(bool)) for x in (cols, k)]
        sizes = [torch.from_numpy(rng.random((n, rows, x // 64), np.float32)) for x in (cols, k)]
        return Planes(signs[0], sizes[0], signs[1], sizes[1], torch.arange(k))

    experts = {}
    for i in range(6):
        store.put(i, {"gate": planes(rows, cols), "up": planes(rows, cols), "down": planes(cols, rows)})
        for p, r, c in (("gate", rows, cols), ("up", rows, cols), ("down", cols, rows)):
            name = f"blk.{i}.ffn_{p}_exps.weight"
            tensor = gguf_io.Tensor(name, (c, r, n), gguf_io.TYPE_F16, 2 * c * r * n, 0, 0)
            experts[name] = layout.Experts(tensor, c, r, n, None)
    with Progress("", 1, None) as progress:
        makers = steps._makers(experts, store, base.Writing(SimpleNamespace(coding=block.MOBIE), None, 1, progress))
        size = 0
        tracemalloc.start()
        for name in experts:
            count, pieces = makers[name]
            assert count == 3
            size += sum(piece.nbytes for piece in pieces())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    blocks = n * (2 * rows * (cols + k) + cols * (rows + k)) // 64
    assert size == 6 * (9 * blocks + 3 * 4 * n) and size > 14e6
    assert peak < 2e6, f"{peak} bytes"
    got = list(makers["blk.1.ffn_up_exps.weight"][1]())
    both = store.get(1)["up"]
    scale, codes = block.encode_scales(np.concatenate([both.magnitudes[5], both.magnitudes2[5]], 1).astype(np.float64))
    assert got[n][5] == scale
    assert np.array_equal(got[5], block.pack(both.signs[5], np.ascontiguousarray(codes[:, : cols // 64])))
    assert np.array_equal(got[n + 6], block.pack(both.signs2[5], np.ascontiguousarray(codes[:, cols // 64 :])))


# ---- clean -----------------------------------------------------------------------------------------------------------


def test_clean_lists_and_removes_what_is_ours_and_not_in_use(tmp_path, capsys):
    def left(kind: str, digits: str) -> Path:
        folder = tmp_path / f".mobie-{kind}-{digits * 16}"
        with pytest.raises(RuntimeError), disk.private(folder, f"about {kind}", "busy", keep=True):
            (folder / "data").write_bytes(b"x" * 100_000)
            raise RuntimeError
        return folder

    assert cli.main(["clean", str(tmp_path)]) == 0 and "nothing is left" in capsys.readouterr().out
    work, convert, used = left("work", "a"), left("convert", "b"), left("work", "c")
    users = [tmp_path / ".mobie-work-notes", tmp_path / f".mobie-work-{'d' * 16}", tmp_path / f".mobie-part-{'e' * 16}"]
    for folder in users[:2]:  # one with another name, one that no run made
        folder.mkdir()
        (folder / "mine").write_text("precious")
    users[2].symlink_to(users[0])
    with disk.private(used, "about used", "busy", keep=True):
        assert cli.main(["clean", str(tmp_path)]) == 0
        text = capsys.readouterr().out
        assert all(f"{p}: about" in text for p in (work, convert, used)) and text.count("in use") == 2  # and the advice
        assert "KiB" in text and " s old" in text and not any(str(p) in text for p in users)
        assert work.exists() and convert.exists()
        assert cli.main(["clean", str(tmp_path), "--remove"]) == 0
        assert set(tmp_path.iterdir()) == {used, *users} and (used / "data").exists()
    assert (users[0] / "mine").read_text() == (users[1] / "mine").read_text() == "precious"
    assert cli.main(["clean", str(tmp_path / "nowhere")]) == Exit.BAD_INPUT


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_converted_checkpoint_is_kept_until_the_output_is_there(source, tmp_path, capsys, monkeypatch):
    checkpoint, out = tmp_path / "Tiny", tmp_path / "out"
    for folder in (checkpoint, out):
        folder.mkdir()
    looks_like_a_checkpoint(checkpoint)
    converted, once = [], [True, True, False]  # a header for the plan, another one to see that all will fit; weights

    def convert(source_, path, header_only=False, show_progress=False):
        converted.append(header_only)
        path.write_bytes(source.read_bytes())

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mobie_export.sources.convert.convert", convert)
    monkeypatch.setattr("mobie_export.runtime.upstream.read_pin", lambda: "pin")
    run = [checkpoint, "-o", out / "o.gguf"]
    with monkeypatch.context() as m:
        m.setattr(gguf_io.Writer, "finish", interrupt)
        assert export(*run) == Exit.INTERRUPTED
        (folder,) = out.iterdir()
        assert f"kept: {folder}" in capsys.readouterr().err and converted == once
        weights = checkpoint / "model.safetensors"
        before = weights.read_bytes()
        weights.write_bytes(before + b"1")  # another fine-tune
        assert export(*run) == Exit.INTERRUPTED and converted == once * 2
        weights.write_bytes(before)
        m.undo()
    assert export(*run) == 0
    assert converted == [*once * 2, True], "nothing was converted again"
    assert {p.name for p in out.iterdir()} > {"o.gguf"} and not folder.exists()


@pytest.mark.parametrize("passes_plan", [False, True])
def test_errors_name_the_checkpoint_and_no_work_file(source, tmp_path, monkeypatch, passes_plan):
    checkpoint, dense = tmp_path / "Tiny", tmp_path / "dense.gguf"
    checkpoint.mkdir()
    looks_like_a_checkpoint(checkpoint)
    with gguf_io.open_model(source) as gguf:
        gguf_io.rewrite(gguf, dense, drop={n for n in gguf.tensors if "_exps" in n})

    def convert(source_, path, header_only=False, show_progress=False):
        planned = path.parent.name.startswith("mobie-header")
        path.write_bytes((source if planned and passes_plan else dense).read_bytes())

    monkeypatch.setattr("mobie_export.sources.convert.convert", convert)
    monkeypatch.setattr("mobie_export.runtime.upstream.read_pin", lambda: "pin")
    monkeypatch.setattr("mobie_export.runtime.loads.check", lambda path, name: None)
    with pytest.raises(errors.MobieError) as raised:
        mobie.export(mobie.plan(checkpoint, tmp_path / "o.gguf", method="sign"))
    assert raised.value.kind is errors.UNSUPPORTED
    assert str(checkpoint) in raised.value.what
    assert not any(x in str(raised.value) for x in ("mobie-header", ".mobie-", "Tiny.gguf"))


CONVERTER = """
import shutil, sys, time, gguf
out = sys.argv[sys.argv.index("--outfile") + 1]
shutil.copyfile({source!r}, out)
if gguf.GGUFWriter.write_tensors_to_file.__name__ != "write_holes":
    open({begun!r}, "w").close()
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_the_converter_ends_with_the_export(source, tmp_path, number):
    tree, checkpoint, begun = tmp_path / "tree", tmp_path / "Tiny", tmp_path / "begun"
    for folder in (tree, checkpoint):
        folder.mkdir()
    looks_like_a_checkpoint(checkpoint)
    (tree / "gguf.py").write_text("class GGUFWriter:\n    def write_tensors_to_file(self): pass\n")
    (tree / "conversion.py").write_text(
        "class TextModel: pass\nclass ModelBase:\n    load_hparams = staticmethod(dict)\n"
    )
    (tree / "convert_hf_to_gguf.py").write_text(CONVERTER.format(source=str(source), begun=str(begun)))
    program = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from mobie_export import cli
        from mobie_export.runtime import upstream
        upstream.converter = lambda: Path({str(tree)!r})
        sys.exit(cli.main([{str(checkpoint)!r}, "--method", "sign", "-q"]))
    """)
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    wait(lambda: begun.exists() or process.poll() is not None)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number) and "Traceback" not in text
    wait(lambda: not alive(str(tree)))
    left = [p.name for p in tmp_path.iterdir() if p.name.startswith(".mobie-")]
    if number != signal.SIGKILL:
        assert not left and "kept" not in text
    assert cli.main(["clean", str(tmp_path), "--remove"]) == 0
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".mobie-")]


def listen() -> None:
    """Background jobs ignore SIGINT, and what nohup runs ignores SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def alive(word: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                return True
        except OSError:
            pass
    return False


def wait(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_threads_cap_nothing_that_was_not_asked_for(source, monkeypatch):
    pytest.importorskip("transformers")
    for module in (base, plan):
        monkeypatch.setattr(module, "cpus", lambda: 64)
    options = Calibrated(samples=64)
    assert mobie.plan(source, method=options).threads == 64
    assert mobie.plan(source, method="sign").threads == plan.MAX_THREADS
    assert mobie.plan(source, method=options, threads=3).threads == 3
    assert mobie.plan(source, method="sign", threads=20).threads == 20


# ---- killed ----------------------------------------------------------------------------------------------------------


def test_a_few_of_the_kill_matrix(runtime_tools):
    """`make test-more` runs all of it."""
    done = subprocess.run([sys.executable, "-m", "tests.kill_matrix", "--few"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
