"""In by any door: folders, the hub, shards out, cards; and source formats of experts that are not floats."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import mobie_export as mobie
from mobie_export import cli, errors, gguf_io
from mobie_export.cli import Exit
from mobie_export.sources.convert import convert
from mobie_export.sources.find import Source, find
from mobie_export.sources.hf_convert import completed
from mobie_export.spec import block, layout
from tests import models

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402 (they need torch)

from tests import exporting, families, hub  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "Tiny-MoE"
    families.save("qwen3moe", folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Tiny\n")
    return folder


def arrays(path: Path) -> dict[str, np.ndarray]:
    with gguf_io.open_model(path) as gguf:
        return {n: gguf.read(t) for n, t in gguf.tensors.items()}


# ---- finding ---------------------------------------------------------------------------------------------------------


def test_words_on_the_command_line_mean(tmp_path, checkpoint):
    assert find("some/where/model.gguf").gguf == Path("some/where/model.gguf")
    assert find("nowhere").gguf == Path("nowhere"), "the exporter says that there is no such file"
    found = find(str(checkpoint))
    assert found.checkpoint == checkpoint and found.default_output() == checkpoint.parent / "Tiny-MoE-MOBIE.gguf"
    (tmp_path / "hub/org").mkdir(parents=True)
    (tmp_path / "hub/org/Tiny-MoE").symlink_to(checkpoint)
    with hub.asked(tmp_path / "hub", tmp_path / "cache") as server:
        server.revisions.add("v2")
        found = find("org/Tiny-MoE", revision="v2")
    assert found.hub == "org/Tiny-MoE" and found.default_output() == Path("Tiny-MoE-MOBIE.gguf")
    assert {p.name: p.read_bytes() for p in found.checkpoint.iterdir()} == {
        p.name: p.read_bytes() for p in checkpoint.iterdir()
    }


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(errors.MobieError, match="no Hugging Face checkpoint") as e:
        find(str(tmp_path))
    assert e.value.kind == errors.BAD_INPUT
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(errors.MobieError, match="no weights"):
        find(str(tmp_path))


def test_offline_is_said(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(["org/No-Such-Model-Here"]) == Exit.NOT_FETCHED
    message = capsys.readouterr().err
    assert "org/No-Such-Model-Here could not be downloaded" in message and "next:" in message


def test_configurations_get_the_names_the_converter_looks_for():
    assert completed({"num_local_experts": 4})["num_experts"] == 4
    assert completed({"num_experts": 4, "num_local_experts": 8})["num_experts"] == 4
    v3 = {"architectures": ["DeepseekV3ForCausalLM"]}
    assert completed(v3)["scoring_func"] == "sigmoid"
    assert completed(v3 | {"scoring_func": "softmax"})["scoring_func"] == "softmax"
    dense = {"mlp_layer_types": ["dense", "dense", "sparse"]}
    assert completed(dense)["first_k_dense_replace"] == 2
    assert completed({"text_config": dense})["text_config"]["first_k_dense_replace"] == 2
    assert completed(dense | {"first_k_dense_replace": 1})["first_k_dense_replace"] == 1
    assert "first_k_dense_replace" not in completed({"mlp_layer_types": ["dense", "sparse", "dense"]})
    layers = {"layer_types": ["linear_attention", "full_attention"]}
    granite = completed({"architectures": ["GraniteMoeHybridForCausalLM"]} | layers)
    assert granite["layer_types"] == ["mamba", "attention"] == completed(granite)["layer_types"]
    assert completed({"architectures": ["Qwen3NextForCausalLM"]} | layers)["layer_types"] == layers["layer_types"]


# ---- converting ------------------------------------------------------------------------------------------------------


def test_a_folder_is_converted_exported_and_cleaned_up(checkpoint, capsys):
    command = [str(checkpoint), "--method", "sign", "--pre-tokenizer", "gpt-2", "--card", "-q"]
    assert cli.main([*command, "--dry-run"]) == Exit.OK
    assert "qwen3moe, 2 layers of 8 experts" in capsys.readouterr().out
    assert not list(checkpoint.parent.glob("*.gguf"))

    assert cli.main([*command, "--split-max-size", "1M"]) == Exit.OK
    names = ["Tiny-MoE-MOBIE-uncalibrated-00001-of-00002.gguf", "Tiny-MoE-MOBIE-uncalibrated-00002-of-00002.gguf"]
    assert {p.name for p in checkpoint.parent.iterdir()} == {"Tiny-MoE", "README.md", *names}
    mobie.verify(checkpoint.parent / names[1])
    card = (checkpoint.parent / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert {"license: apache-2.0", "language: en", "pipeline_tag: text-generation"} <= set(front.splitlines())
    assert "# Tiny-MoE-MOBIE-uncalibrated\n" in body and "1.125" in body and "Uncalibrated" in body
    assert cli.main(command) == Exit.BAD_OUTPUT, "nothing is replaced unasked"


def test_shards_load(tmp_path, runtime_tools):
    from llama_cpp import Llama

    source = tmp_path / "m.gguf"
    models.write_qwen3moe(source)
    report = exporting.export(source, tmp_path / "out.gguf", split_max_size=500_000)
    assert report.output.name.startswith("out-00001-of-0000")
    whole = exporting.export(source, tmp_path / "whole.gguf").output
    scores = []
    for path in (report.output, whole):
        llama = Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
        llama.eval([1, 2, 3])
        scores.append(np.array(llama.scores[:3]))
        llama.close()
    assert np.array_equal(*scores)
    a, b = arrays(report.output), arrays(whole)
    assert list(a) == list(b) and all(np.array_equal(a[n], b[n]) for n in a)
    with gguf_io.open_model(report.output) as x, gguf_io.open_model(whole) as y:
        assert [e.raw for e in x.entries.values()] == [e.raw for e in y.entries.values()]


def test_shards_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    source, out = tmp_path / "m.gguf", tmp_path / "out.gguf"
    models.write_qwen3moe(source)
    written = []
    finish = gguf_io.Writer.finish

    def corrupt(self):
        finish(self)
        written.extend(self.paths)
        with open(self.paths[-1], "r+b") as file:
            file.seek(-40, 2)
            file.write(b"x" * 40)

    monkeypatch.setattr(gguf_io.Writer, "finish", corrupt)
    with pytest.raises(errors.MobieError) as e:
        exporting.export(source, out, split_max_size=500_000)
    assert e.value.kind == errors.VERIFY_FAILED and len(written) > 1
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    monkeypatch.undo()
    first = exporting.export(source, out, split_max_size=500_000).output
    with pytest.raises(errors.MobieError, match="exists already"):
        exporting.export(source, out, split_max_size=500_000)
    before = arrays(first)
    exporting.export(source, out, split_max_size=500_000, overwrite=True)
    after = arrays(first)
    assert all(np.array_equal(before[n], after[n]) for n in before)


def test_an_unknown_tokenizer_is_said_before_anything_is_written(checkpoint, tmp_path, capsys):
    assert cli.main([str(checkpoint), "--method", "sign", "-q", "-o", str(tmp_path / "o.gguf")]) == Exit.UNSUPPORTED
    assert "--pre-tokenizer" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_the_converter_cannot_read_is_said(checkpoint, tmp_path, capsys):
    broken = tmp_path / "Broken"
    shutil.copytree(checkpoint, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.3.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert cli.main([str(broken), "--method", "sign", "-q", "--pre-tokenizer", "gpt-2"]) == Exit.CONVERT_FAILED
    assert "Unprocessed experts" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["Broken"]


def test_a_file_that_the_converter_lacks_is_named(tmp_path, capsys):
    """A dense model will do: the vocabulary is read before anybody looks for experts."""
    folder = tmp_path / "Gemma"
    gemma = families.Family("gemma", "Gemma", {"intermediate_size": 64, "num_key_value_heads": 4})
    families.model(gemma).save_pretrained(folder)
    families.save_tokenizer(folder)
    assert cli.main([str(folder), "--method", "sign", "-q"]) == Exit.BAD_INPUT
    message = capsys.readouterr().err
    assert f"no {folder / 'tokenizer.model'}\n" in message and "download tokenizer.model" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    "family,key", [("dots1", "first_k_dense_replace"), ("qwen3moe", "num_hidden_layers")], ids=["one", "one of several"]
)
def test_a_key_that_the_configuration_lacks_is_named(tmp_path, capsys, family, key):
    families.save(family, tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text()) | {"model_type": "unknown"}  # transformers would fill it in
    del values[key]
    path.write_text(json.dumps(values))
    command = [str(tmp_path), "-o", str(tmp_path / "o.gguf"), "--method", "sign", "-q", "--pre-tokenizer", "gpt-2"]
    assert cli.main(command) == Exit.CONVERT_FAILED
    message = capsys.readouterr().err
    assert key in message and "config.json" in message and "Traceback" not in message


# ---- experts that are no floats --------------------------------------------------------------------------------------


def with_quantization(folder: Path, tensors: dict, config: dict) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))


def exported_experts(folder: Path, tmp_path: Path, wanted_type: str) -> tuple[dict, dict]:
    """(experts as converted, float32; experts as exported, dequantized) by GGUF name"""
    source = Source("x", checkpoint=folder, pre_tokenizer="gpt-2")
    path, before = tmp_path / "converted.gguf", {}
    convert(source, path)
    with gguf_io.open_model(path) as gguf:
        for n, x in layout.experts(gguf).items():
            assert gguf_io.type_name(x.tensor.type_id) == wanted_type
            raw = gguf.read(x.tensor).reshape(x.n_expert * x.rows, -1)
            before[n] = gguf_io.decode(raw, x.tensor.type_id).reshape(x.n_expert, x.rows, -1)
    out = exporting.export(path, tmp_path / "out.gguf").output
    with gguf_io.open_model(out) as gguf:
        after = {}
        for n, x in layout.experts(gguf).items():
            blocks = block.dequantize(gguf.read(x.tensor).reshape(x.n_expert, x.rows, -1))
            after[n] = blocks * gguf.read(x.factor).view("<f4")[:, None, None]
    return before, after


def assert_signs_and_means(before: dict, after: dict) -> None:
    for n in before:
        assert np.array_equal((before[n] >= 0)[after[n] != 0], (after[n] > 0)[after[n] != 0])
        blocks = np.abs(before[n]).reshape(*before[n].shape[:2], -1, 64).mean(-1)
        found = np.abs(after[n]).reshape(*before[n].shape[:2], -1, 64)[..., 0]
        assert np.abs(blocks - found).max() <= found.max() / 255


def test_fp8_checkpoints(tmp_path):
    """Expert weights in float8 with a scale for every 128 x 128 of them."""
    folder = tmp_path / "FP8"
    families.save("qwen3moe", folder, seed=5)
    tensors, values = load_file(folder / "model.safetensors"), {}
    for name in [n for n in tensors if ".experts." in n]:
        w = tensors[name]
        scale = torch.rand(-(-w.shape[0] // 128), -(-w.shape[1] // 128)) * 0.01 + 0.001
        wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: w.shape[0], : w.shape[1]]
        tensors[name] = (w / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale
        values[name] = (tensors[name].float() * wide).bfloat16().float().numpy()
    tensors = {n: t.bfloat16() if t.dtype == torch.float32 and "scale" not in n else t for n, t in tensors.items()}
    with_quantization(folder, tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    before, after = exported_experts(folder, tmp_path, "BF16")
    for layer in range(2):
        for p in ("gate", "up", "down"):
            wanted = np.stack([values[f"model.layers.{layer}.mlp.experts.{e}.{p}_proj.weight"] for e in range(8)])
            assert np.array_equal(before[f"blk.{layer}.ffn_{p}_exps.weight"], wanted)
    assert_signs_and_means(before, after)


def test_mxfp4_checkpoints(tmp_path):
    """GPT-OSS as published: 4-bit floats with a power of two for every 32, rows of gate and up in turns."""
    folder = tmp_path / "MXFP4"
    families.save("gpt-oss", folder, seed=6)
    tensors, values = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        n_expert, cols, rows = tensors.pop(name).shape
        packed = torch.randint(256, (n_expert, rows, cols // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 124, (n_expert, rows, cols // 32), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = packed, scales
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
        w = (table[codes] * torch.exp2(scales.float() - 127).unsqueeze(-1)).flatten(-2).numpy()
        layer = name.split(".")[2]
        if "gate_up" in name:
            values[f"blk.{layer}.ffn_gate_exps.weight"] = w[:, ::2]
            values[f"blk.{layer}.ffn_up_exps.weight"] = w[:, 1::2]
        else:
            values[f"blk.{layer}.ffn_down_exps.weight"] = w
    with_quantization(folder, tensors, {"quant_method": "mxfp4"})
    before, after = exported_experts(folder, tmp_path, "MXFP4")
    assert before.keys() == values.keys()
    for n in values:
        assert np.array_equal(before[n], values[n])
    assert_signs_and_means(before, after)
