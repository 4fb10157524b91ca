"""Exports of tiny models: what is written, what stays as it was, and every error before or during the work."""

import hashlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import mobie_export as mobie
from mobie_export import cli, errors, gguf_io, progress
from mobie_export.cli import Exit
from mobie_export.exporting import write
from mobie_export.methods.base import Outcome
from mobie_export.spec import block
from mobie_export.spec.verify import verify
from tests import models
from tools.assets import fabricate_gguf

pytestmark = pytest.mark.usefixtures("without_runtime")

EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def export(first, *more) -> int:
    """Uncalibrated unless `more` names another method: the last one counts."""
    return cli.main([str(first), "--method", "sign", *map(str, more), "--quiet"])


def mobie_weights(path: Path) -> dict[str, np.ndarray]:
    """Expert matrices as FORMAT.md defines them, float64 [n_expert, rows, cols]."""
    with gguf_io.open_model(path) as model:
        result = {}
        for name, t in model.tensors.items():
            if t.type_id == block.TYPE_ID:
                scale = model.read(model.tensors[name.replace(".weight", ".scale")]).view(np.float32)
                blocks = model.read(t).reshape(t.shape[2], t.shape[1], -1)
                result[name] = block.dequantize(blocks).astype(np.float64) * scale[:, None, None]
        return result


def block_means(weights: np.ndarray, importance: np.ndarray | float = 1.0) -> np.ndarray:
    """Least-squares magnitudes by the definition, [n_expert, rows, cols / 64]."""
    h = np.broadcast_to(importance, weights.shape).reshape(*weights.shape[:-1], -1, 64)
    w = np.abs(weights.astype(np.float64)).reshape(h.shape)
    return (h * w).sum(-1) / h.sum(-1)


def check_weights(source: np.ndarray, exported: np.ndarray, importance: np.ndarray | float = 1.0) -> None:
    """Signs are the source's; magnitudes are the best ones to half a step of the expert's scale."""
    wanted = block_means(source, importance)
    found = np.abs(exported).reshape(*wanted.shape, 64)
    assert (found == found[..., :1]).all(), "one magnitude per block"
    step = wanted.max(axis=(1, 2), keepdims=True) / 255
    assert (np.abs(found[..., 0] - wanted) <= 0.5001 * step).all()
    assert ((exported > 0) == (source >= 0))[exported != 0].all()


def everything(path: Path) -> dict[str, tuple[int, float]]:
    """Every file of a folder with its digest and time of change."""
    return {p.name: (hashlib.sha256(p.read_bytes()).digest(), p.stat().st_mtime_ns) for p in path.iterdir()}


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "MXFP4"])
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_experts_are_the_best_signs_and_magnitudes(tmp_path, kind, fused):
    source, out = tmp_path / "m.gguf", tmp_path / "m-mobie-uncalibrated.gguf"
    models.write_qwen3moe(source, experts=kind, fused=fused, seed=5)
    assert export(source) == 0
    before, after = models.decoded(source), mobie_weights(out)
    assert set(after) == {n for n in before if "_exps.weight" in n} and len(after) == (4 if fused else 6)
    for name, weights in after.items():
        check_weights(before[name], weights)
    assert cli.main(["verify", str(out), "-q"]) == 0


def test_everything_else_is_copied_bit_for_bit(tmp_path):
    source, out = tmp_path / "m.gguf", tmp_path / "out.gguf"
    models.write_qwen3moe(source, keys=models.every_kind_of_entry, alignment=128)
    assert export("export", source, "-o", out) == 0
    with gguf_io.open_model(source) as a, gguf_io.open_model(out) as b:
        changed = {"general.file_type"}
        assert [e.raw for k, e in a.entries.items() if k not in changed] == [
            e.raw for k, e in b.entries.items() if k in a.entries and k not in changed
        ]
        assert list(b.entries)[: len(a.entries)] == list(a.entries), "order"
        wanted = []
        for name in a.tensors:
            wanted += [name, name.replace(".weight", ".scale")] if "_exps." in name else [name]
        assert list(b.tensors) == wanted
        data, lines = hashlib.sha256(), []
        for name, tensor in b.tensors.items():
            assert tensor.offset % 128 == 0
            data.update(b.read(tensor))
            lines.append((name, hashlib.sha256(b.read(tensor)).hexdigest()))
            if "_exps." not in name:
                assert tensor.shape == a.tensors[name].shape and tensor.type_id == a.tensors[name].type_id
                assert bytes(b.read(tensor)) == bytes(a.read(a.tensors[name]))

        def seal(of: str) -> str:
            return hashlib.sha256("".join(f"{d}  {n}\n" for n, d in sorted(lines) if of in n).encode()).hexdigest()

        new = {k: (b.entries[k].type, b.value(k)) for k in b.entries if k not in a.entries or k in changed}
        settings = new.pop("mobie.settings")
        assert settings[0] == gguf_io.STRING and json.loads(settings[1]) == {"imatrix": None}
        assert new.pop("mobie.runtime")[0] == gguf_io.STRING
        assert new == {
            "general.file_type": (gguf_io.U32, 200),
            "general.quantization_version": (gguf_io.U32, 2),
            "mobie.format_version": (gguf_io.U32, 1),
            "mobie.type_id": (gguf_io.U32, 200),
            "mobie.method": (gguf_io.STRING, "sign, uncalibrated"),
            "mobie.exporter": (gguf_io.STRING, "mobie-export 0.1.0"),
            "mobie.source.sha256": (gguf_io.STRING, hashlib.sha256(source.read_bytes()[: a.header_size]).hexdigest()),
            "mobie.data.sha256": (gguf_io.STRING, data.hexdigest()),
            "mobie.experts.sha256": (gguf_io.STRING, seal("_exps.")),
            "mobie.tensors.sha256": (gguf_io.STRING, seal("")),
            "mobie.expert_bpw": (gguf_io.F32, pytest.approx(1.125 + 32 / (models.N_EMBD * models.N_FF))),
        }


def test_same_command_same_bytes(tmp_path):
    """Whatever the number of threads, and the place."""
    source = tmp_path / "m.gguf"
    models.write_qwen3moe(source)
    outputs = []
    for i, threads in enumerate((1, 2, 5)):
        outputs.append(tmp_path / f"{i}.gguf")
        assert export(source, "-o", outputs[-1], "--threads", threads) == 0
    assert len({p.read_bytes() for p in outputs}) == 1


def test_split_source_gives_one_file(tmp_path):
    models.write_qwen3moe(tmp_path / "m.gguf")
    models.write_qwen3moe(tmp_path / "s.gguf", split=7)
    assert export(tmp_path / "m.gguf") == 0
    assert export(min(tmp_path.glob("s-*.gguf"))) == 0
    one, many = (
        gguf_io.open_model(tmp_path / "m-mobie-uncalibrated.gguf"),
        gguf_io.open_model(tmp_path / "s-mobie-uncalibrated.gguf"),
    )
    with one, many:
        assert not [k for k in many.entries if k.startswith("split.")]
        differ = [k for k in one.entries if one.entries[k].raw != many.entries[k].raw]
        assert differ == ["mobie.source.sha256"] and list(one.entries) == list(many.entries)
        assert list(one.tensors) == list(many.tensors)
        for name, tensor in one.tensors.items():
            assert bytes(one.read(tensor)) == bytes(many.read(many.tensors[name]))


def test_zero_experts_and_second_set_of_experts(tmp_path):
    def change(tensors):
        down = tensors["blk.0.ffn_down_exps.weight"][0]
        down[3] = 0
        down[4, 5:7] = 0
        for part in EXPERTS:
            small = tensors[f"blk.0.{part}.weight"][0][:2].copy()
            tensors[f"blk.0.{part.replace('exps', 'chexps')}.weight"] = small, Type.F16

    source, out = tmp_path / "m.gguf", tmp_path / "m-mobie-uncalibrated.gguf"
    models.write_qwen3moe(source, change=change)
    assert export(source) == 0
    weights = mobie_weights(out)
    assert len(weights) == 9 and weights["blk.0.ffn_up_chexps.weight"].shape[0] == 2
    with gguf_io.open_model(out) as model:
        scales = model.read(model.tensors["blk.0.ffn_down_exps.scale"]).view(np.float32)
        blocks = model.read(model.tensors["blk.0.ffn_down_exps.weight"]).reshape(models.N_EXPERT, models.N_EMBD, -1)
    assert scales[3] == 0 and (np.delete(scales, 3) > 0).all()
    assert not blocks[3].any() and not blocks[4, 5:7].any() and blocks[4, 7].any()


def test_factors_beside_the_source_are_part_of_its_weights(tmp_path):
    factors = np.linspace(-0.5, 3, models.N_EXPERT).astype(np.float32)
    name = "blk.1.ffn_up_exps"

    def change(tensors):
        tensors[f"{name}.scale"] = factors, Type.F32

    source, out = tmp_path / "m.gguf", tmp_path / "m-mobie-uncalibrated.gguf"
    models.write_qwen3moe(source, experts="F32", change=change)
    assert export(source) == 0
    before = models.decoded(source)[f"{name}.weight"] * factors[:, None, None]
    check_weights(before, mobie_weights(out)[f"{name}.weight"])
    with gguf_io.open_model(out) as model:
        assert [t for t in model.tensors if t.startswith(name)] == [f"{name}.weight", f"{name}.scale"]


def test_dequantize_gives_the_weights_as_floats(tmp_path):
    source, out = tmp_path / "m.gguf", tmp_path / "m-mobie-uncalibrated.gguf"
    models.write_qwen3moe(source)
    assert export(source) == 0
    wanted = mobie_weights(out)
    for kind, tolerance in (("f32", 2**-23), ("f16", 2**-10), ("bf16", 2**-7)):
        floats = tmp_path / f"{kind}.gguf"
        assert cli.main(["dequantize", str(out), "-o", str(floats), "--type", kind, "-q"]) == 0
        decoded = models.decoded(floats)
        with gguf_io.open_model(source) as a, gguf_io.open_model(floats) as b:
            assert list(a.tensors) == list(b.tensors)
            assert not [k for k in b.entries if k.startswith("mobie.")]
            for name, tensor in b.tensors.items():
                if name in wanted:
                    assert tensor.type_id == Type[kind.upper()]
                    np.testing.assert_allclose(decoded[name], wanted[name], rtol=tolerance, atol=1e-7)
                else:
                    assert bytes(b.read(tensor)) == bytes(a.read(a.tensors[name]))


# ---- importance ------------------------------------------------------------------------------------------------------


def imatrix_entries(rng, fused: bool = False) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name -> (sums of squares [n_expert, cols], tokens [n_expert])"""
    entries = {}
    for layer in range(models.N_LAYER):
        for part in ("ffn_gate_up_exps", "ffn_down_exps") if fused else EXPERTS:
            cols = models.N_FF if "down" in part else models.N_EMBD
            counts = rng.integers(1, 50, models.N_EXPERT).astype(np.float32)
            sums = (rng.gamma(0.3, size=(models.N_EXPERT, cols)) * counts[:, None]).astype(np.float32)
            entries[f"blk.{layer}.{part}.weight"] = sums, counts
    return entries


def write_imatrix(path: Path, entries) -> None:
    writer = gguf.GGUFWriter(path, "none")
    del writer.kv_data[0]["general.architecture"]
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", counts.reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_dat(path: Path, entries) -> None:
    data = struct.pack("<i", len(entries))
    for name, (sums, counts) in entries.items():
        values = (sums / counts[:, None] * 7).astype("<f4")
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 7, values.size) + values.tobytes()
    path.write_bytes(data + struct.pack("<ii", 7, 4) + b"text")


@pytest.mark.parametrize("layout", [write_imatrix, write_dat], ids=["gguf", "dat"])
def test_imatrix_weights_the_columns(tmp_path, layout):
    source, out, file = tmp_path / "m.gguf", tmp_path / "m-mobie-uncalibrated.gguf", tmp_path / "imatrix"
    models.write_qwen3moe(source)
    entries = imatrix_entries(np.random.default_rng(1))
    layout(file, entries)
    assert export(source, "--method", "imatrix", "--imatrix", file) == 0
    before = models.decoded(source)
    for name, weights in mobie_weights(out).items():
        sums, counts = (x.astype(np.float64) for x in entries[name])
        check_weights(before[name], weights, (sums / counts[:, None])[:, None, :])
        with pytest.raises(AssertionError):  # and it matters
            check_weights(before[name], weights)
    with gguf_io.open_model(out) as model:
        assert json.loads(model.value("mobie.settings")) == {"imatrix": hashlib.sha256(file.read_bytes()).hexdigest()}


def test_experts_without_tokens_get_the_layers_mean(tmp_path, capsys):
    source, out, file = tmp_path / "m.gguf", tmp_path / "m-mobie-uncalibrated.gguf", tmp_path / "imatrix.gguf"
    models.write_qwen3moe(source)
    entries = imatrix_entries(np.random.default_rng(2))
    name, empty = "blk.1.ffn_down_exps.weight", "blk.0.ffn_up_exps.weight"
    for e in (2, 5):
        entries[name][0][e], entries[name][1][e] = 0, 0
    entries[empty][0][:], entries[empty][1][:] = 0, 0
    write_imatrix(file, entries)
    assert export(source, "--method", "imatrix", "--imatrix", file) == 0
    printed = capsys.readouterr().out
    assert "10 experts without tokens" in printed and f"{name}: 2, 5\n" in printed and f"{empty}: 0, 1, 2," in printed
    sums, counts = (x.astype(np.float64) for x in entries[name])
    h = sums / np.maximum(counts, 1)[:, None]
    h[[2, 5]] = sums.sum(0) / counts.sum()
    before, after = models.decoded(source), mobie_weights(out)
    check_weights(before[name], after[name], h[:, None, :])
    check_weights(before[empty], after[empty])


def test_blocks_without_importance_get_the_plain_mean(tmp_path):
    source, out, file = tmp_path / "m.gguf", tmp_path / "m-mobie-uncalibrated.gguf", tmp_path / "imatrix.gguf"
    models.write_qwen3moe(source)
    entries = imatrix_entries(np.random.default_rng(3))
    name = "blk.0.ffn_gate_exps.weight"
    entries[name][0][:, 64:128] = 0
    write_imatrix(file, entries)
    assert export(source, "--method", "imatrix", "--imatrix", file) == 0
    h = entries[name][0].astype(np.float64) / entries[name][1][:, None]
    h[:, 64:128] = 1
    check_weights(models.decoded(source)[name], mobie_weights(out)[name], h[:, None, :])


def test_imatrix_without_the_layers_that_predict_further_tokens(tmp_path, capsys):
    """llama-imatrix runs over text and never meets them: they are quantized without it, and that is said."""
    source, out = tmp_path / "m.gguf", tmp_path / "m-mobie-uncalibrated.gguf"
    plain, importance = tmp_path / "plain.gguf", tmp_path / "imatrix.gguf"

    def further(writer):
        writer.add_uint32("qwen3moe.nextn_predict_layers", 1)

    models.write_qwen3moe(source, keys=further)  # its last layer is one
    entries = imatrix_entries(np.random.default_rng(7))
    write_imatrix(importance, {n: v for n, v in entries.items() if n.startswith("blk.0.")})
    assert export(source, "--method", "imatrix", "--imatrix", importance) == 0
    said = capsys.readouterr().out
    assert said.count("predicts further tokens") == 3 and "blk.1.ffn_up_exps.weight" in said
    shutil.copy(out, tmp_path / "with.gguf")
    assert export(source, "-o", plain) == 0
    a, b = mobie_weights(tmp_path / "with.gguf"), mobie_weights(plain)
    assert all(np.array_equal(a[n], b[n]) == n.startswith("blk.1.") for n in a)
    models.write_qwen3moe(source)
    run = [source, "--method", "imatrix", "--imatrix", importance, "--overwrite"]
    refused(capsys, tmp_path, Exit.BAD_INPUT, run, "of another model")


def test_imatrix_of_split_experts_serves_fused_ones(tmp_path):
    source, out, file = tmp_path / "m.gguf", tmp_path / "m-mobie-uncalibrated.gguf", tmp_path / "imatrix.gguf"
    models.write_qwen3moe(source, fused=True)
    entries = imatrix_entries(np.random.default_rng(4))
    write_imatrix(file, entries)
    assert export(source, "--method", "imatrix", "--imatrix", file) == 0
    sums, counts = entries["blk.0.ffn_gate_exps.weight"]
    name = "blk.0.ffn_gate_up_exps.weight"
    h = sums.astype(np.float64) / counts[:, None]
    check_weights(models.decoded(source)[name], mobie_weights(out)[name], h[:, None, :])


# ---- errors ----------------------------------------------------------------------------------------------------------


def refused(capsys, folder: Path, code: int, arguments: list, *parts: str) -> None:
    """The command ends with the code, says the parts, and changes nothing in the folder."""
    before = everything(folder)
    capsys.readouterr()
    assert export(*arguments) == code
    text = capsys.readouterr().err
    assert text.startswith("mobie-export: error: ") and "Traceback" not in text
    for part in parts:
        assert part in text, f"{part!r} not in {text}"
    assert everything(folder) == before


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path)
    return path


def test_not_a_gguf(tmp_path, capsys):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" * 100)
    refused(capsys, tmp_path, Exit.BAD_INPUT, [path], "is not a GGUF", "a PyTorch file")
    refused(capsys, tmp_path, Exit.BAD_INPUT, [tmp_path / "no.gguf"], "cannot read", "No such file")


def test_truncated(source, tmp_path, capsys):
    source.write_bytes(source.read_bytes()[:-5000])
    refused(capsys, tmp_path, Exit.BAD_INPUT, [source], "truncated", "at least", "finish the download")


def test_missing_shard(tmp_path, capsys):
    models.write_qwen3moe(tmp_path / "m.gguf", split=20)
    (tmp_path / "m-00002-of-00002.gguf").rename(tmp_path / "elsewhere")
    first = tmp_path / "m-00001-of-00002.gguf"
    refused(capsys, tmp_path, Exit.BAD_INPUT, [first], "1 of 2", "m-00002-of-00002.gguf")


def test_dense_model(tmp_path, capsys):
    def change(tensors):
        for name in [n for n in tensors if "_exps" in n or "gate_inp" in n]:
            del tensors[name]

    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, change=change)
    refused(capsys, tmp_path, Exit.UNSUPPORTED, [path], "not a Mixture-of-Experts model", "llama-quantize")


def test_old_expert_layout(tmp_path, capsys):
    def change(tensors):
        for name in [n for n in tensors if "_exps" in n]:
            array, kind = tensors.pop(name)
            tensors[name.replace("_exps.", ".0.")] = array[0].copy(), kind

    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, change=change)
    refused(capsys, tmp_path, Exit.UNSUPPORTED, [path], "one tensor per expert", "convert the model again")


def test_already_mobie(source, tmp_path, capsys):
    assert export(source) == 0
    refused(
        capsys, tmp_path, Exit.UNSUPPORTED, [tmp_path / "m-mobie-uncalibrated.gguf"], "MoBiE file already", "6 tensors"
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("name", "kind"), [("blk.1.ffn_norm.weight", "F32"), ("output.weight", "F16"), ("blk.0.attn_v.weight", "Q8_0")]
)
def test_non_finite_weights_beside_the_experts(tmp_path, capsys, bad, name, kind):
    def change(tensors):
        tensors[name] = array, _ = models.stored(np.ones(models.qwen3moe()[name][0].shape), Type[kind])
        array.reshape(-1)[-array.shape[-1] :].view(np.uint8).view("<f4" if kind == "F32" else "<f2")[0] = bad

    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, change=change)
    n = 32 if kind == "Q8_0" else 1
    refused(capsys, tmp_path, Exit.BAD_INPUT, [path], f"tensor {name}", f"{n} infinite or NaN weights")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_non_finite_weights(tmp_path, capsys, bad, kind):
    def change(tensors):
        array, _ = tensors["blk.1.ffn_up_exps.weight"]
        raw = models.stored(np.full(32, bad), Type[kind])[0]
        array[6, 100, : 3 * raw.size // 32] = raw.reshape(-1)[: 3 * raw.size // 32]
        array[6, 180, -raw.size // 32 :] = raw.reshape(-1)[: raw.size // 32]

    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, experts=kind, change=change)
    parts = ["blk.1.ffn_up_exps.weight", "4 infinite or NaN weights in expert 6"]
    refused(capsys, tmp_path, Exit.BAD_INPUT, [path], *parts)
    entries = imatrix_entries(np.random.default_rng(0))
    for sums, _ in entries.values():  # a weight of no importance must be a number as well
        sums[:, :3] = sums[:, -1] = 0
    write_imatrix(tmp_path / "imatrix", entries)
    run = [path, "--method", "imatrix", "--imatrix", tmp_path / "imatrix"]
    refused(capsys, tmp_path, Exit.BAD_INPUT, run, *parts)


def test_non_finite_quantized_weights(tmp_path, capsys):
    def change(tensors):
        tensors["blk.0.ffn_gate_exps.weight"][0][2, 0, :2] = np.array([np.inf], "<f2").view(np.uint8)  # a Q8_0 scale

    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, experts="Q8_0", change=change)
    refused(capsys, tmp_path, Exit.BAD_INPUT, [path], "blk.0.ffn_gate_exps.weight", "weights in expert 2")


def test_width_no_multiple_of_the_block(tmp_path, capsys):
    def change(tensors):
        tensors["blk.0.ffn_down_exps.weight"] = np.zeros((8, 320, 160), np.float16), Type.F16

    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, change=change)
    refused(capsys, tmp_path, Exit.UNSUPPORTED, [path], "blk.0.ffn_down_exps.weight", "rows of 160", "a multiple of 64")


def test_type_without_decoder(tmp_path, capsys):
    def change(tensors):
        tensors["blk.0.ffn_down_exps.weight"] = np.zeros((8, 320, 192), np.int32), Type.I32

    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, change=change)
    refused(capsys, tmp_path, Exit.UNSUPPORTED, [path], "blk.0.ffn_down_exps.weight", "type I32")


def test_activation_scales(tmp_path, capsys):
    def change(tensors):
        tensors["blk.0.ffn_down_exps.input_scale"] = np.ones(8, np.float32), Type.F32

    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, change=change)
    refused(capsys, tmp_path, Exit.UNSUPPORTED, [path], "blk.0.ffn_down_exps.input_scale")


def test_existing_output(source, tmp_path, capsys):
    out = tmp_path / "m-mobie-uncalibrated.gguf"
    out.write_bytes(b"precious")
    refused(capsys, tmp_path, Exit.BAD_OUTPUT, [source], "exists already", "--overwrite")
    assert export(source, "--overwrite") == 0
    assert out.read_bytes()[:4] == b"GGUF"


def test_existing_output_survives_a_failed_overwrite(tmp_path, capsys):
    def change(tensors):
        tensors["blk.1.ffn_down_exps.weight"][0][7, 3, 9] = np.nan

    path, out = tmp_path / "m.gguf", tmp_path / "m-mobie-uncalibrated.gguf"
    out.write_bytes(b"precious")
    models.write_qwen3moe(path, change=change)
    refused(capsys, tmp_path, Exit.BAD_INPUT, [path, "--overwrite"], "expert 7")


def test_output_places(source, tmp_path, capsys):
    code = Exit.BAD_OUTPUT
    refused(capsys, tmp_path, code, [source, "-o", tmp_path / "no/out.gguf"], "folder of the output does not exist")
    refused(capsys, tmp_path, code, [source, "-o", tmp_path], "is a folder")
    refused(capsys, tmp_path, code, [source, "-o", source, "--overwrite"], "would replace an input")
    link = tmp_path / "link.gguf"
    os.link(source, link)
    refused(capsys, tmp_path, code, [source, "-o", link, "--overwrite"], "would replace an input")


def test_too_little_disk(source, tmp_path, capsys, monkeypatch):
    usage = write.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    refused(capsys, tmp_path, Exit.NO_SPACE, [source], "not enough space", "976.56 KiB free", "1.7")


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs file size limits")
def test_disk_full_while_writing(source, tmp_path):
    """A write that fails half way: an error, nothing left. The limit on file sizes stands for a full disk."""
    code = (
        "import resource, signal, sys; from mobie_export import cli\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
        f"sys.exit(cli.main([{str(source)!r}, '--method', 'sign']))"
    )
    before = everything(tmp_path)
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == Exit.BAD_OUTPUT and "cannot write" in r.stderr and "File too large" in r.stderr
    assert everything(tmp_path) == before


def test_imatrix_errors(source, tmp_path, capsys):
    file = tmp_path / "imatrix.gguf"
    run, code = [source, "--method", "imatrix", "--imatrix", file], Exit.BAD_INPUT
    refused(capsys, tmp_path, code, run, "cannot read", "imatrix.gguf")
    file.write_bytes(b"some text that is no imatrix")
    refused(capsys, tmp_path, code, run, "is not an imatrix", "llama-imatrix -m")
    file.write_bytes(source.read_bytes())
    refused(capsys, tmp_path, code, run, "is not an imatrix", "a GGUF of general.type")
    entries = imatrix_entries(np.random.default_rng(0))
    write_imatrix(file, {k: v for k, v in entries.items() if "down" not in k})
    refused(capsys, tmp_path, code, run, "imatrix of another model", "blk.0.ffn_down_exps.weight")
    name = "blk.1.ffn_up_exps.weight"
    write_imatrix(file, entries | {name: (entries[name][0][:, :256], entries[name][1])})
    refused(capsys, tmp_path, code, run, "imatrix of another model", name, "2048 values", "8 experts of 320 columns")
    bad = entries[name][0].copy()
    bad[3, 7] = np.nan
    write_imatrix(file, entries | {name: (bad, entries[name][1])})
    refused(capsys, tmp_path, code, run, "damaged", name)


def test_disk_that_does_not_keep_what_is_written(source, tmp_path, capsys, monkeypatch):
    finish = gguf_io.Writer.finish

    def corrupt(self):
        finish(self)
        with open(self.paths[0], "r+b") as f:
            f.seek(-40, os.SEEK_END)
            byte = f.read(1)
            f.seek(-1, os.SEEK_CUR)
            f.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(gguf_io.Writer, "finish", corrupt)
    refused(capsys, tmp_path, Exit.VERIFY_FAILED, [source], "not those that were written")


def test_usage(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["inspect"])
    assert e.value.code == Exit.USAGE
    with pytest.raises(SystemExit) as e:
        cli.main(["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    for code in Exit:
        assert f"{code:d}  {code.meaning}" in text
    assert {kind.name for kind in errors.Kind} < {code.name for code in Exit}


# ---- interruption ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file of 600 MB, most of it experts."""
    path = tmp_path_factory.mktemp("large") / "large.gguf"
    shape = fabricate_gguf.replace(fabricate_gguf.SHAPES["qwen3-30b-a3b"], n_layer=1, n_vocab=512)
    fabricate_gguf.fabricate(path, fabricate_gguf.replace(shape, n_expert=64), "F16")
    yield path
    path.unlink()


def test_an_interrupted_overwrite_loses_nothing(large, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    command = [sys.executable, "-m", "mobie_export", str(large), "-o", str(out), "--method", "sign"]
    command += ["--overwrite", "--threads", "1"]
    part = write.part_path(out)

    def begun() -> subprocess.Popen:
        # a shell's background jobs ignore SIGINT, and so would what the tests start from there
        listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, preexec_fn=listen, **pipes)
        deadline = time.monotonic() + 120
        while not (part / out.name).exists():
            assert process.poll() is None and time.monotonic() < deadline, "too fast or stuck"
            time.sleep(0.002)
        return process

    process = begun()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == Exit.INTERRUPTED and err.strip().endswith("interrupted") and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"] and out.read_bytes() == b"precious"

    process = begun()
    process.kill()
    process.communicate()
    assert out.read_bytes() == b"precious" and part.is_dir()
    assert subprocess.run([*command, "-q"], capture_output=True).returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    assert cli.main(["verify", str(out), "-q"]) == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's resident memory figures")
def test_memory_does_not_grow_with_the_file(large, tmp_path):
    """Resident memory, as the kernel counts it, stays under the plan's figure and far under the file."""
    code = (
        "import mobie_export as mobie\n"
        f"r = mobie.export(mobie.plan({str(large)!r}, {str(tmp_path / 'out.gguf')!r}, method='sign', threads=2))\n"
        "print(r.peak_memory)"
    )
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    planned = mobie.plan(large, tmp_path / "other.gguf", method="sign", threads=2)
    assert planned.source_size > 600e6
    assert planned.output_size == (tmp_path / "out.gguf").stat().st_size
    assert peak < planned.peak_memory < 300e6


def test_memory_does_not_grow_with_the_output(tmp_path):
    """Arrays and all else that Python allocates, for two layers and for ten."""
    sizes, peaks = [], []
    for n_layer in (2, 10):
        path = tmp_path / f"{n_layer}.gguf"
        shape = fabricate_gguf.replace(
            fabricate_gguf.SHAPES["qwen3-30b-a3b"],
            **{"n_layer": n_layer, "n_embd": 512, "n_ff_expert": 256, "n_expert": 32, "n_vocab": 512},
            **{"n_head": 8, "n_head_kv": 2, "head": 64},
        )
        fabricate_gguf.fabricate(path, shape, "F16", sparse=True)
        planned = mobie.plan(path, method="sign", threads=1)
        tracemalloc.start()
        try:
            report = mobie.export(planned)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        sizes.append(report.output_size)
    assert sizes[1] - sizes[0] > 20e6
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 10, f"{peaks} bytes"


# ---- looking ---------------------------------------------------------------------------------------------------------


def test_plan_writes_nothing_and_tells_the_size(source, tmp_path, capsys):
    before = everything(tmp_path)
    assert cli.main(["plan", str(source), "--method", "sign"]) == 0
    first = capsys.readouterr().out
    assert cli.main([str(source), "--method", "sign", "--dry-run"]) == 0
    free = re.compile("of .* free")  # other programs use the disk as well
    assert free.sub("", capsys.readouterr().out) == free.sub("", first)
    assert everything(tmp_path) == before
    assert export(source) == 0
    assert progress.size_text((tmp_path / "m-mobie-uncalibrated.gguf").stat().st_size) in first


def test_inspect(source, tmp_path, capsys):
    assert export(source) == 0
    capsys.readouterr()
    for path, experts in ((source, 16.0), (tmp_path / "m-mobie-uncalibrated.gguf", 1.125 + 32 / (320 * 192))):
        assert cli.main(["inspect", str(path), "--json"]) == 0
        info = json.loads(capsys.readouterr().out)
        assert info["architecture"] == "qwen3moe" and info["experts"] == 8 and info["experts_used"] == 2
        assert info["expert_bpw"] == pytest.approx(experts)
        reader = gguf.GGUFReader(path)
        assert sum(t["bytes"] for t in info["tensors"]) == sum(t.n_bytes for t in reader.tensors)
        scales = [t for t in reader.tensors if t.name.endswith(".scale")]
        weights = sum(int(t.n_elements) for t in reader.tensors) - sum(int(t.n_elements) for t in scales)
        assert info["bpw"] == pytest.approx(8 * sum(t.n_bytes for t in reader.tensors) / weights)
        assert cli.main(["inspect", str(path)]) == 0
        text = capsys.readouterr().out
        assert all(t.name in text for t in reader.tensors) and f"{experts:.4f}" in text


def test_verify_finds_damage(source, tmp_path, capsys):
    assert export(source) == 0
    out = tmp_path / "m-mobie-uncalibrated.gguf"
    good = out.read_bytes()
    with gguf_io.open_model(out) as model:
        scale, blocks = model.tensors["blk.1.ffn_up_exps.scale"], model.tensors["blk.0.ffn_down_exps.weight"]
        attention = model.tensors["blk.1.attn_v.weight"]
        entry = model.entries["mobie.format_version"].raw

    def found(data: bytes, *parts: str) -> None:
        out.write_bytes(data)
        capsys.readouterr()
        assert cli.main(["verify", str(out), "-q"]) == Exit.VERIFY_FAILED
        text = capsys.readouterr().err
        for part in parts:
            assert part in text

    def put(at: int, data: bytes) -> bytes:
        return good[:at] + data + good[at + len(data) :]

    for value in (float("nan"), float("inf"), -1.0):
        found(put(scale.offset + 4 * 3, struct.pack("<f", value)), scale.name, "expert 3 has scale")
    found(put(blocks.offset, b"\x00" + b"\xff" * 8), blocks.name, "expert 0 has signs in blocks of scale 0")
    one = blocks.n_bytes // models.N_EXPERT
    codes = np.frombuffer(good, np.uint8, one, blocks.offset + 2 * one).reshape(-1, 9)
    largest = [blocks.offset + 2 * one + 9 * int(i) for i in np.flatnonzero(codes[:, 0] == 255)]
    data = bytearray(good)
    for at in largest:
        data[at] = 254
    found(bytes(data), "expert 2's largest block scale is 254, wanted 255")
    found(good.replace(entry, entry[:-4] + b"\0\0\0\0"), "mobie.format_version is 0, wanted 1")
    found(good.replace(b"mobie.settings", b"mobie.sxttings"), "mobie.settings is missing")
    found(good.replace(b"blk.1.ffn_up_exps.scale", b"blk.1.ffn_up_exps.scalx"), "blk.1.ffn_up_exps.scale is missing")
    for at in (blocks.offset + 1, attention.offset + 7):  # one bit, in a sign and in a tensor that was copied
        found(put(at, bytes([good[at] ^ 16])), "mobie.data.sha256", "changed or damaged")
    out.write_bytes(source.read_bytes())
    assert cli.main(["verify", str(out), "-q"]) == Exit.VERIFY_FAILED
    assert "is not a MoBiE file" in capsys.readouterr().err


@pytest.mark.parametrize("does", ["import mobie_export", "from mobie_export import cli; cli._parser()"])
def test_help_is_quick(does):
    """Nothing heavy is imported for it."""
    code = f"import sys; {does}; print(*sorted({{'torch', 'transformers', 'llama_cpp'}} & set(sys.modules)))"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert r.stdout.split() == []


def test_files_of_before_the_experts_had_a_digest_verify(source, tmp_path):
    path, old = tmp_path / "m-mobie-uncalibrated.gguf", tmp_path / "old.gguf"
    assert export(source, "-o", path) == 0
    with gguf_io.open_model(path) as model:
        gguf_io.rewrite(model, old, drop=["mobie.experts.sha256"])
    assert verify(old).requantized is None


def test_few_experts_are_named_at_the_end(capsys):
    """A large model has hundreds that saw few tokens: those that saw fewest; all are in the file."""
    few, many = {7: 3}, {e: 1000 - e for e in range(300)}
    cli._print_outcome(Outcome(thin={0: few, 5: many}))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("layer 0") and first.endswith(" 7 (3)")
    assert "299 (701)" in second and f"and {300 - cli.NAMED} more" in second and len(second) < 400
