"""Hugging Face folders with something missing, unknown or dangerous: said before anything long begins."""

import json
import shutil
import struct
from pathlib import Path

import pytest

from mobie_export import cli, errors
from mobie_export.cli import Exit
from mobie_export.gguf_io import first_bytes
from mobie_export.runtime import upstream
from mobie_export.sources.checkpoint import Tower
from mobie_export.sources.find import find
from tests import converting, hub, models

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402 (it needs torch)

from tests import families  # noqa: E402

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 15651296\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "Tiny-MoE"
    families.save("qwen3moe", folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "Tiny-MoE"))


def refused(folder: Path, *parts: str, kind: errors.Kind = errors.BAD_INPUT, **options) -> None:
    with pytest.raises(errors.MobieError) as e:
        find(str(folder), **options)
    assert e.value.kind == kind, e.value
    for part in parts:
        assert part in str(e.value), f"{part!r} not in {e.value}"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_is_named(folder, name):
    (folder / name).write_bytes(POINTER)
    refused(folder, name, "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("option", [(), ("--method", "imatrix", "--imatrix")])
def test_a_pointer_in_place_of_a_gguf_is_named(tmp_path, capsys, option):
    model, pointer = tmp_path / "m.gguf", tmp_path / "pointer.gguf"
    models.write_qwen3moe(model)
    pointer.write_bytes(POINTER)
    assert cli.main([*([str(model), *option] if option else []), str(pointer), "-q"]) == Exit.BAD_INPUT
    assert "Git LFS pointer" in (said := capsys.readouterr().err) and "git lfs pull" in said
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".gguf"] == []


@pytest.mark.parametrize(
    "data, what",
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html><head><title>404</title></head></html>", "a web page"),
        (b"PK\x03\x04" + bytes(100), "a PyTorch file"),
        (struct.pack("<Q", 10) + b'{"a":{}}  ', "a safetensors file"),
        (b"\x1f\x8b\x08" + bytes(100), "a compressed file"),
    ],
)
def test_other_files_are_named(tmp_path, data, what):
    (tmp_path / "m.gguf").write_bytes(data)
    assert what in str(first_bytes.other(tmp_path / "m.gguf", "a GGUF file", "?"))


def test_weights_that_were_cut_off_are_found(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for size, what in ((len(data) - 1, "truncated"), (1000, "truncated"), (5, "is not a safetensors file")):
        path.write_bytes(data[:size])
        refused(folder, "model.safetensors", what)
    path.write_bytes(data[:8] + b"{" + b"x" * (len(data) - 9))
    refused(folder, "model.safetensors", "damaged")


def test_shards_that_are_missing_are_named(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00003.safetensors")
    refused(folder, "not complete", "model-00002-of-00003.safetensors, model-00003-of-00003.safetensors")
    (folder / "model-00001-of-00003.safetensors").rename(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}))
    refused(folder, "not there: other.safetensors")
    index.write_text("[1")
    refused(folder, "model.safetensors.index.json", "damaged")


@pytest.mark.parametrize(
    "change, name",
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"quant_method": "auto-round"}}, "auto-round"),
        ({"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64}}, "mlx"),
    ],
)
def test_quantized_checkpoints_are_refused_by_name(folder, change, name):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    refused(folder, name, "quantized from", kind=errors.UNSUPPORTED)


def test_without_weights_or_tokenizer(folder):
    (folder / "model.safetensors").rename(folder.parent / "x")
    refused(folder, "has no weights")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "adapter")
    (folder.parent / "x").rename(folder / "model.safetensors")
    (folder / "tokenizer.json").unlink()
    refused(folder, "has no tokenizer")
    (folder / "config.json").write_text('"text"')
    refused(folder, "config.json is damaged")


def test_an_unknown_pre_tokenizer_is_refused_at_once(folder):
    refused(folder, "no pre-tokenizer qwen22", "qwen2", kind=errors.USAGE, pre_tokenizer="qwen22")
    assert {"gpt-2", "qwen2", "llama-bpe", "kimi-k2"} <= set(upstream.pre_tokenizers())


def test_a_vision_tower_is_counted(folder, capsys):
    tensors = {"model.visual.blocks.0.attn.qkv.weight": torch.zeros(3, 5), "audio_tower.conv1.weight": torch.zeros(7)}
    save_file({"lm_head.weight": torch.zeros(8)} | tensors, folder / "model.safetensors")
    source = find(str(folder))
    assert source.towers == (Tower("vision", 15, 30), Tower("audio", 7, 30))
    said = "\n".join(source.left_out())
    assert "the vision part, 15 of 30 weights" in said and "the audio part" in said and "--mmproj" in said


# ---- code of a checkpoint --------------------------------------------------------------------------------------------


def with_code(folder: Path) -> Path:
    """Its tokenizer becomes a Python file, its configuration one that transformers does not know; returns what the
    file writes where it is executed."""
    mark = folder.parent / "executed"
    (folder / "own.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "own"}))
    return mark


def test_nothing_of_a_checkpoint_is_executed(folder, capsys, tmp_path):
    mark = with_code(folder)
    command = [str(folder), "--pre-tokenizer", "gpt-2", "-q", "--dry-run", "-o", str(tmp_path / "o.gguf")]
    code = cli.main(command)
    assert not mark.exists()
    assert code == Exit.UNSUPPORTED
    assert "--trust-remote-code" in capsys.readouterr().err


def test_unless_the_user_allows_it(folder, tmp_path):
    mark = with_code(folder)
    converting.convert(folder, tmp_path / "o.gguf", "--header-only", "--trust-remote-code")
    assert mark.exists()


def test_downloads_leave_code_out(folder, tmp_path):
    (folder / "code.py").write_text("")
    (tmp_path / "hub/org").mkdir(parents=True)
    (tmp_path / "hub/org/Tiny-MoE").symlink_to(folder)
    with hub.asked(tmp_path / "hub", tmp_path / "cache"):
        for trusted in (False, True):
            found = find("org/Tiny-MoE", trust_remote_code=trusted)
            assert (found.checkpoint / "code.py").exists() == trusted
