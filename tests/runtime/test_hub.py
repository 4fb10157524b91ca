"""Models of the hub: advice from headers alone, downloads, which file is meant, and what is said where none is had.

The hub is a server on this machine (tests/hub.py).
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("huggingface_hub")
from huggingface_hub import HfFileSystem
from safetensors.torch import load_file, save_file

from mobie_export import cli, gguf_io
from mobie_export.cli import Exit
from mobie_export.exporting import advise
from mobie_export.methods.calibrated.options import PRESETS
from mobie_export.sources import hub as sources_hub
from tests import families, models
from tests import hub as hubs

pytestmark = pytest.mark.usefixtures("quick_probe")

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 7326560\n"
TRAINED = Path(__file__).resolve().parents[2] / "examples/tiny-moe/tiny-moe-f16.gguf"
BLOCK = 1 << 20  # bytes of a GGUF's header that are read at once


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    """org/...: one GGUF with a projector, several, one in shards, a checkpoint in shards, none, pointers."""
    org = tmp_path_factory.mktemp("hub") / "org"
    for name in ("One", "Many", "Shards", "Moe", "Card", "Pointer", "Pointers", "Projector"):
        (org / name).mkdir(parents=True)
        (org / name / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    models.write_qwen3moe(org / "One/one-F16.gguf")
    models.write_projector(org / "One/mmproj-one-F16.gguf")
    models.write_projector(org / "Projector/mmproj-one-F16.gguf")
    for kind in ("F16", "BF16", "Q8_0"):
        models.write_qwen3moe(org / f"Many/m-{kind}.gguf", experts=kind)
    (org / "Shards/BF16").mkdir()
    models.write_qwen3moe(org / "Shards/BF16/s-BF16.gguf", split=9)
    assert len(list((org / "Shards/BF16").iterdir())) == 3
    (org / "Pointer/p.gguf").write_bytes(POINTER)

    families.save("qwen3moe", org / "Moe")
    tensors = load_file(org / "Moe/model.safetensors")
    files = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    place = {n: files[i % 2] for i, n in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: t for n, t in tensors.items() if place[n] == file}, org / "Moe" / file, {"format": "pt"})
    (org / "Moe/model.safetensors").unlink()
    (org / "Moe/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    for path in (org / "Moe").iterdir():
        copy = org / "Pointers" / path.name
        copy.write_bytes(POINTER if path.suffix == ".safetensors" else path.read_bytes())
    return org.parent


@pytest.fixture
def hub(repositories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with hubs.asked(repositories, tmp_path / "cache") as found:
        yield found


def table(capsys) -> list[list[str]]:
    """The rows of advice without the estimated speed, which differs from run to run."""
    lines = capsys.readouterr().out.splitlines()
    return [x.split()[:-2] for x in lines if x.split()[:1] in ([c] for c in ("least", *PRESETS))]


def refused(capsys, code: int, words: list, *parts: str) -> None:
    assert cli.main([str(w) for w in words]) == code
    said = capsys.readouterr().err
    assert "mobie-export: error: " in said and "Traceback" not in said
    for part in parts:
        assert part in said, f"{part!r} not in {said}"


# ---- headers alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, files", [("One", ["one-F16.gguf"]), ("Shards", ["BF16/s-BF16-00001-of-00003.gguf"])])
def test_advice_on_a_gguf_reads_headers(hub, repositories, capsys, name, files):
    assert cli.main(["advise", f"org/{name}", "--ram", "8G"]) == Exit.OK
    remote = table(capsys)
    sizes = {n: p.stat().st_size for n, p in hub.files(f"org/{name}").items() if n.endswith(".gguf")}
    models_sizes = {n: s for n, s in sizes.items() if "mmproj" not in n}
    assert set(hub.served) == {f"org/{name}/{n}" for n in models_sizes}, "nothing but the model is asked for"
    for n, size in models_sizes.items():
        assert hub.served[f"org/{name}/{n}"] <= min(BLOCK, size)
    assert sum(hub.served.values()) < sum(sizes.values()) / 2
    assert cli.main(["advise", str(repositories / "org" / name / files[0]), "--ram", "8G"]) == Exit.OK
    assert remote and remote == table(capsys)


def test_a_long_header_is_read_to_its_end(hub, repositories, capsys):
    """Of a vocabulary that is larger than what is read at once."""
    folder = repositories / "org/Long"
    folder.mkdir(exist_ok=True)
    words = ["x" * 5000] * 600
    models.write_qwen3moe(folder / "long.gguf", keys=lambda w: w.add_array("x.words", words))
    assert cli.main(["advise", "org/Long", "--ram", "8G"]) == Exit.OK
    header = sum(map(len, words))
    assert header < hub.served["org/Long/long.gguf"] < header + 2 * BLOCK < (folder / "long.gguf").stat().st_size


def test_advice_on_a_checkpoint_reads_headers(hub, repositories, capsys):
    words = ["--ram", "8G", "--pre-tokenizer", "gpt-2"]
    assert cli.main(["advise", "org/Moe", *words]) == Exit.OK
    remote = table(capsys)
    for n, path in hub.files("org/Moe").items():
        weights = n.endswith(".safetensors")
        assert hub.served[f"org/Moe/{n}"] <= (sources_hub.FIRST if weights else path.stat().st_size)
        assert not weights or path.stat().st_size > 10 * sources_hub.FIRST
    assert cli.main(["advise", str(repositories / "org/Moe"), *words]) == Exit.OK
    assert remote and remote == table(capsys)


def test_what_is_advised_of_the_hub_is_accepted(hub, capsys, runtime_tools):
    assert cli.main(["advise", "org/Many:q8_0", "--ram", "8G"]) == Exit.OK
    program, *words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert program == "mobie-export" and words[0] == "org/Many:q8_0"
    assert cli.main(["plan", *words]) == Exit.OK


def test_the_endpoint_is_the_users(repositories, tmp_path):
    """HF_ENDPOINT, as huggingface_hub reads it."""
    with hubs.running(repositories) as found:
        command = [sys.executable, "-m", "mobie_export", "advise", "org/One", "--ram", "8G"]
        done = subprocess.run(command, env=os.environ | found.env(tmp_path), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert found.served["org/One/one-F16.gguf"] == BLOCK


@pytest.mark.parametrize("revision", ["v2", "refs/pr/1", "a/branch"])
def test_advice_on_a_revision(hub, capsys, revision):
    hub.revisions.add(revision)
    for name in ("One", "Shards"):
        assert cli.main(["advise", f"org/{name}", "--ram", "8G", "--revision", revision]) == Exit.OK
        assert capsys.readouterr().out.splitlines()[-1].endswith(f"--revision {revision}")


# ---- which file ------------------------------------------------------------------------------------------------------


def test_one_of_several_is_chosen_by_type_or_file(hub, capsys):
    for words in (["advise", "org/Many", "--ram", "8G"], ["org/Many", "--method", "sign"]):
        refused(capsys, Exit.BAD_INPUT, words, "3 models", "m-BF16.gguf, m-F16.gguf, m-Q8_0.gguf", "org/Many:TYPE")
    for which, file in (("F16", "m-F16.gguf"), ("bf16", "m-BF16.gguf"), ("m-Q8_0.gguf", "m-Q8_0.gguf")):
        hub.served.clear()
        assert cli.main(["advise", f"org/Many:{which}", "--ram", "8G"]) == Exit.OK
        assert set(hub.served) == {f"org/Many/{file}"}
    hub.served.clear()
    assert cli.main(["advise", "org/Shards:s-BF16-00001-of-00003.gguf", "--ram", "8G"]) == Exit.OK
    assert len(hub.served) == 3
    refused(capsys, Exit.BAD_INPUT, ["advise", "org/Many:Q2_K", "--ram", "8G"], "no model called Q2_K", "m-Q8_0.gguf")


def test_a_gguf_of_the_hub_is_exported_here(hub, tmp_path, capsys):
    assert cli.main(["org/Shards:BF16", "--method", "sign", "-q"]) == Exit.OK
    assert [p.name for p in tmp_path.glob("*.gguf")] == ["s-BF16-mobie-uncalibrated.gguf"]
    assert sum(n for f, n in hub.served.items() if "/s-BF16-" in f) == sum(
        p.stat().st_size for n, p in hub.files("org/Shards").items() if n.endswith(".gguf")
    )


def test_without_the_hub_what_was_downloaded_is_taken(hub, tmp_path, monkeypatch, capsys):
    command = ["org/One", "--method", "sign", "-q"]
    assert cli.main(command) == Exit.OK
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    HfFileSystem.clear_instance_cache()  # as in another process
    assert cli.main([*command, "--overwrite"]) == Exit.OK
    hub.served.clear()
    assert cli.main(["advise", "org/One", "--ram", "8G"]) == Exit.OK
    assert not hub.served
    refused(capsys, Exit.NOT_FETCHED, ["org/Many:F16", "--method", "sign"], "cannot be reached", "go online")


# ---- published files, as llama.cpp finds them ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """org/Tiny: one MoBiE file among others, whose bytes nobody should ask for; org/Split: one in shards."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("Tiny", "Split"):
        (folder / "org" / name).mkdir(parents=True)
        for other in ("A-imatrix-MOBIE.gguf", "A-F16.gguf", "mmproj-Tiny-MOBIE_.gguf", f"{name}-MOBIE_LARGE.gguf"):
            (folder / "org" / name / other).write_bytes(b"GGUF")
    command = [str(TRAINED), "--method", "sign", "-q", "-o"]
    assert cli.main([*command, str(folder / "org/Tiny/Tiny-MOBIE.gguf")]) == Exit.OK
    (folder / "org/Tiny/mobie").mkdir()
    (folder / "org/Tiny/mobie/other.gguf").write_bytes(b"GGUF")
    assert (
        cli.main(
            [
                "metadata",
                str(folder / "org/Tiny/Tiny-MOBIE.gguf"),
                "--split-max-size",
                "2M",
                "-q",
                "-o",
                str(folder / "org/Split/Split-MOBIE.gguf"),
            ]
        )
        == Exit.OK
    )
    return folder


@pytest.mark.parametrize("name", ["Tiny:MOBIE", "Tiny:mobie", "Split:MOBIE"])
def test_llama_cpp_finds_what_is_called_so(published, tmp_path, runtime_tools, name):
    with hubs.running(published) as found:
        command = [runtime_tools / "llama-completion", "-hf", f"org/{name}", "-t", "1", "-no-cnv"]
        command += ["-p", "The old", "-n", "2"]
        env = os.environ | found.env(tmp_path)
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = published / "org" / name.split(":")[0]
    wanted = {p for p in folder.glob("*-MOBIE*.gguf") if p.stat().st_size > 4}
    assert len(wanted) == (1 if "Tiny" in name else 3)
    assert found.served == {f"org/{folder.name}/{p.name}": p.stat().st_size for p in wanted}


# ---- projectors ------------------------------------------------------------------------------------------------------


def test_a_projector_passes_by(repositories, tmp_path, capsys):
    """In a folder the model is meant; a projector itself needs no export."""
    folder = tmp_path / "Folder"
    folder.mkdir()
    model, projector = folder / "m.gguf", folder / "vision.gguf"  # its metadata say what it is
    model.symlink_to(repositories / "org/One/one-F16.gguf")
    models.write_projector(projector)
    assert cli.main([str(folder), "--method", "sign", "-q"]) == Exit.OK
    assert (folder / "m-mobie-uncalibrated.gguf").exists()
    assert cli.main([str(folder), "--method", "sign", "-q", "--overwrite"]) == Exit.OK, "an export is no source"
    parts = ["vision or audio part", "needs no export", f"--mmproj {projector}"]
    for words in ([projector, "--method", "sign"], ["plan", projector], ["advise", projector, "--ram", "8G"]):
        refused(capsys, Exit.UNSUPPORTED, words, *parts)
    plain = tmp_path / "clip.gguf"  # as converters wrote it before there was general.type
    models.write_projector(plain, kind=None)
    refused(capsys, Exit.UNSUPPORTED, ["plan", plain, "--method", "sign"], *parts[:2], "architecture clip")


def test_several_models_in_a_folder(tmp_path, capsys):
    for name in ("a", "b"):
        models.write_qwen3moe(tmp_path / f"{name}.gguf")
    refused(capsys, Exit.BAD_INPUT, ["plan", tmp_path, "--method", "sign"], "2 models", "a.gguf, b.gguf", "a.gguf")


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["advise", "--ram", "8G"], ["--method", "sign"]], ids=["advise", "export"])
def test_what_the_hub_refuses_is_said(hub, capsys, words):
    def said(name: str, code: int, *parts: str, more: tuple = ()) -> None:
        refused(capsys, code, [*words, *more, name], *parts)

    said("org/Nowhere", Exit.NOT_FETCHED, "org/Nowhere could not be downloaded", "no such model", "hf auth login")
    said("org/One", Exit.NOT_FETCHED, "no such revision", more=("--revision", "v2"))
    for code in (401, 403):
        hub.gated = {"org/One": code, "org/Moe": code}
        for name in hub.gated:
            said(name, Exit.NOT_FETCHED, "terms accepted", "hf auth login")
    said("org/Card", Exit.BAD_INPUT, "org/Card is no Hugging Face checkpoint", "no config.json and no GGUF")
    said("org/Projector", Exit.BAD_INPUT, "org/Projector", "no config.json and no GGUF")
    said("org/Pointer", Exit.BAD_INPUT, "p.gguf", "Git LFS pointer")
    said("org/Pointers", Exit.BAD_INPUT, ".safetensors", "Git LFS pointer")
    assert not any(n.endswith((".gguf", ".safetensors")) for n in hub.served if "Pointer" not in n)


def test_no_hub_at_all(repositories, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with hubs.asked(repositories, tmp_path / "cache"):
        pass
    with hubs.asked(repositories, tmp_path / "cache") as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens
        refused(capsys, Exit.NOT_FETCHED, ["advise", "org/One", "--ram", "8G"], "cannot be reached", "go online")
        assert not found.served


# ---- the estimate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_per_token(tmp_path, tied):
    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, change=(lambda t: t.pop("output.weight")) if tied else None)
    with gguf_io.open_model(path) as g:
        (least,) = [c for c in advise.choices(g, PRESETS, 100) if c.preset == advise.LEAST and c.rest is None]
        rest = sum(t.n_bytes for n, t in g.tensors.items() if "_exps." not in n)
        table = 0 if tied else g.tensors["token_embd.weight"].n_bytes
        experts = sum(t.n_weights for n, t in g.tensors.items() if "_exps." in n) * models.N_USED // models.N_EXPERT
    keys_and_values = models.N_LAYER * 2 * models.N_HEAD_KV * models.HEAD * 100 * 2
    assert least.per_token == rest - table + int(least.bpw * experts / 8) + keys_and_values


def test_no_estimate_without_the_number_of_experts_in_use(tmp_path, capsys):
    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, keys=lambda w: w.kv_data[0].pop("qwen3moe.expert_used_count"))
    with gguf_io.open_model(path) as g:
        assert {c.per_token for c in advise.choices(g, PRESETS, 100)} == {None}


def test_bandwidth_is_measured_within_the_memory_that_there_is():
    for threads in (1, 3):
        found = advise.bandwidth(threads, 64 << 20)
        assert 1e6 < found < 1e14
