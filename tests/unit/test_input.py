"""Odd inputs that are read, and others that are refused by name: metadata, types, values, names, the cache."""

import json
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import mobie_export as mobie
from mobie_export import cli, errors, gguf_io
from mobie_export.calibration import imatrix
from mobie_export.cli import Exit
from mobie_export.runtime import upstream
from mobie_export.spec import block
from tests import exporting, models

pytestmark = pytest.mark.usefixtures("without_runtime")


def refused(capsys, code: int, command: list, *parts: str) -> None:
    assert cli.main([str(c) for c in command]) == code
    said = capsys.readouterr().err
    assert said.startswith("mobie-export: error: ") and "Traceback" not in said
    for part in parts:
        assert part in said, f"{part!r} not in {said}"


# ---- metadata --------------------------------------------------------------------------------------------------------


def used(value):
    """A change of the writer: expert_used_count of another kind."""

    def keys(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0]["qwen3moe.expert_used_count"]
        if isinstance(value, list):
            writer.add_array("qwen3moe.expert_used_count", value)
        else:
            writer.add_string("qwen3moe.expert_used_count", value)

    return keys


def test_experts_used_may_be_a_number_per_layer(tmp_path, capsys):
    source, plain = tmp_path / "m.gguf", tmp_path / "plain.gguf"
    models.write_qwen3moe(source, keys=used([2, 6]))
    models.write_qwen3moe(plain)
    for words in (["plan", str(source)], [str(source), "-q"]):
        assert cli.main([*words, "--method", "sign"]) == Exit.OK
    assert cli.main(["inspect", str(tmp_path / "m-mobie-uncalibrated.gguf")]) == Exit.OK
    assert "[2, 6] used" in capsys.readouterr().out
    # every expert is stored alike, so the bits per active weight do not depend on how many are active
    assert mobie.inspect(source).active_bpw == pytest.approx(mobie.inspect(plain).active_bpw)
    models.write_qwen3moe(source, keys=used([2]))
    refused(capsys, Exit.BAD_INPUT, ["inspect", source], "qwen3moe.expert_used_count for 1 layers", "layer 1")


def test_metadata_of_a_wrong_type_is_named(tmp_path, capsys):
    source = tmp_path / "m.gguf"
    models.write_qwen3moe(source, keys=used("two"))
    refused(capsys, Exit.BAD_INPUT, ["inspect", source], "qwen3moe.expert_used_count", "string", "an integer")
    with gguf_io.open_model(source) as model:
        assert model.get("general.name", str) == "tiny" and model.get("no.such", int, 7) == 7
        with pytest.raises(errors.MobieError, match=r"general\.name"):
            model.get("general.name", int)
        with pytest.raises(errors.MobieError, match="array of string"):
            model.get_list("tokenizer.ggml.tokens", int)
        assert len(model.get_list("tokenizer.ggml.token_type", int)) == models.N_VOCAB


# ---- types -----------------------------------------------------------------------------------------------------------


def with_q2_0(path, name: str) -> None:
    """A file whose tensor `name` is in Q2_0: 64 weights in 18 bytes."""
    plain = path.with_suffix(".plain")
    models.write_qwen3moe(plain)
    with gguf_io.open_model(plain) as source:
        shape = source.tensors[name].shape
        data = np.random.default_rng(0).integers(0, 256, gguf_io.tensor_bytes(shape, 42), np.uint8)
        gguf_io.rewrite(source, path, tensors={name: gguf_io.NewTensor.stored(shape, 42, data)})
    plain.unlink()


def test_a_type_that_only_the_runtime_decodes_is_copied(tmp_path, capsys):
    source, out = tmp_path / "m.gguf", tmp_path / "m-mobie-uncalibrated.gguf"
    with_q2_0(source, "blk.1.attn_q.weight")
    assert cli.main([str(source), "--method", "sign", "-q"]) == Exit.OK
    with gguf_io.open_model(source) as a, gguf_io.open_model(out) as b:
        tensor = b.tensors["blk.1.attn_q.weight"]
        assert tensor.type_id == 42 and bytes(a.read(a.tensors[tensor.name])) == bytes(b.read(tensor))
    capsys.readouterr()
    command = [source, "--method", "sign", "-q", "-o", tmp_path / "o.gguf", "--tensor-type", "attn_q=f16"]
    refused(capsys, Exit.UNSUPPORTED, command, "blk.1.attn_q.weight", "Q2_0", "cannot be decoded")
    with_q2_0(source, "blk.1.ffn_up_exps.weight")
    command = [source, "--method", "sign", "-q", "--overwrite"]
    said = ["blk.1.ffn_up_exps.weight", "Q2_0", "cannot be decoded", "start from an F16, BF16 or Q8_0 version"]
    refused(capsys, Exit.UNSUPPORTED, command, *said)


# ---- values ----------------------------------------------------------------------------------------------------------


def test_values_that_do_not_fit_into_f16_are_refused(tmp_path, capsys):
    source, mobie, out = tmp_path / "m.gguf", tmp_path / "m-mobie-uncalibrated.gguf", tmp_path / "out.gguf"

    def large(tensors):
        array, kind = tensors["blk.1.ffn_up_exps.weight"]
        tensors["blk.1.ffn_up_exps.weight"] = array * np.float32(1e8), kind
        array, _ = tensors["blk.0.attn_q.weight"]
        tensors["blk.0.attn_q.weight"] = models.stored(array.astype(np.float32) * 1e8, Type.F32)

    models.write_qwen3moe(source, experts="F32", change=large)
    assert cli.main([str(source), "--method", "sign", "-q"]) == Exit.OK
    command = ["dequantize", mobie, "-o", out, "-q"]
    refused(capsys, Exit.UNSUPPORTED, [*command, "--type", "f16"], "blk.1.ffn_up_exps", "F16", "bf16 or f32")
    assert not out.exists()
    assert cli.main([str(c) for c in [*command, "--type", "bf16"]]) == Exit.OK
    assert np.isfinite(models.decoded(out)["blk.1.ffn_up_exps.weight"]).all()
    command = [source, "--method", "sign", "-q", "-o", tmp_path / "o.gguf", "--tensor-type", "attn_q=f16"]
    refused(capsys, Exit.UNSUPPORTED, command, "blk.0.attn_q.weight", "bf16 or f32")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_importance_of_other_tensors_is_checked_as_well(tmp_path, value):
    path, source = tmp_path / "imatrix.gguf", tmp_path / "m.gguf"
    models.write_qwen3moe(source)
    sums = np.ones((1, models.N_EMBD), np.float32)
    sums[0, 3] = value
    writer = gguf.GGUFWriter(path, "none")
    writer.add_type("imatrix")
    writer.add_tensor("blk.0.attn_v.weight.in_sum2", sums)
    writer.add_tensor("blk.0.attn_v.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with gguf_io.open_model(source) as model:
        with pytest.raises(errors.MobieError, match=r"blk\.0\.attn_v\.weight"):
            imatrix.load(path).columns(model.tensors["blk.0.attn_v.weight"])
        assert imatrix.load(path).columns(model.tensors["blk.0.attn_k.weight"]) is None


# ---- names and places ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["n" * 300, "n" * 300 + ".gguf", "a/" * 3000 + "m.gguf"], ids=["long", "gguf", "deep"])
def test_names_that_no_system_takes(tmp_path, capsys, name, monkeypatch):
    source = tmp_path / "m.gguf"
    models.write_qwen3moe(source)
    monkeypatch.chdir(tmp_path)
    for command in (
        [name, "--method", "sign"],
        ["inspect", name],
        ["doctor", name],
        ["verify", name],
        [source, "--method", "imatrix", "--imatrix", name],
    ):
        refused(capsys, Exit.BAD_INPUT, command)
    for command in ([source, "--method", "sign"], ["metadata", source, "--set", "general.name=x"]):
        assert cli.main([*map(str, command), "-q", "-o", name]) in (Exit.BAD_INPUT, Exit.BAD_OUTPUT)
        assert "internal error" not in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_name_that_llama_cpp_does_not_take(tmp_path, capsys):
    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, change=lambda t: t.update({"x" * 64: models.stored(np.ones(4), Type.F32)}))
    refused(capsys, Exit.BAD_INPUT, ["inspect", path], "names of at most 63 bytes")


def test_what_is_no_file_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    refused(capsys, Exit.BAD_INPUT, [tmp_path / "pipe", "--method", "sign"], "a device or pipe")
    refused(capsys, Exit.BAD_INPUT, ["inspect", "/dev/zero"], "a device or pipe")


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOBIE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(errors.MobieError, match="set MOBIE_CACHE") as e:
        upstream.cache_dir()
    assert e.value.kind == errors.BAD_OUTPUT


@pytest.mark.parametrize("kind", ["mmproj", "adapter", "imatrix"])
def test_a_gguf_that_is_no_model_is_named(tmp_path, capsys, kind):
    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, keys=lambda writer: writer.add_type(kind))
    wanted = {"mmproj": "vision or audio part", "adapter": "LoRA adapter", "imatrix": "importance matrix"}
    refused(capsys, Exit.UNSUPPORTED, [path, "--method", "sign", "-q"], wanted[kind])


def test_any_text_can_be_shown(tmp_path, capsys, monkeypatch):
    """Names of what is in the file are text; values may be anything and are printed in any locale."""
    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.attn_q.weight", b"blk.1.attn_\x1b.weight"))
    refused(capsys, Exit.BAD_INPUT, ["inspect", path], "x1b", "a name in UTF-8")
    made = exporting.export(rewritten(path, data), tmp_path / "o.gguf").output
    capsys.readouterr()
    assert cli.main(["inspect", str(made), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"]


def test_what_a_terminal_would_obey_is_not_printed(tmp_path):
    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path)
    path.write_bytes(path.read_bytes().replace(b"tiny", b"\x1b\xc3\xbcy"))
    command = [sys.executable, "-m", "mobie_export", "inspect", str(path)]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"qwen3moe (\\ufffd\\xfcy)" in done.stdout


def rewritten(path, data: bytes):
    path.write_bytes(data.replace(b"tiny", b"t\xff\x1by"))
    return path


def test_the_type_is_registered_once():
    gguf_io.register_types()
    assert gguf_io.type_name(42) == "Q2_0" and gguf_io.type_name(block.TYPE_ID) == "mobie"
    assert gguf_io.block_size(42) == (64, 18)


def test_settings_without_an_end_are_no_settings(tmp_path):
    """JSON as deep as no program goes."""
    source, path = tmp_path / "m.gguf", tmp_path / "m-mobie-uncalibrated.gguf"
    models.write_qwen3moe(source)
    exporting.export(source, path)
    with gguf_io.open_model(path) as model:
        deep = gguf_io.make_entry("mobie.settings", gguf_io.STRING, "[" * 200_000)
        rows = [(t.name, t.shape, t.type_id) for t in model.tensors.values()]
        with gguf_io.Writer(tmp_path / "deep.gguf", (model.entries | {deep.key: deep}).values(), rows) as writer:
            for tensor in model.tensors.values():
                writer.write(tensor.name, model.chunks(tensor))
            writer.finish()
    with pytest.raises(errors.MobieError, match=r"mobie\.settings is no JSON object"):
        mobie.verify(tmp_path / "deep.gguf")
