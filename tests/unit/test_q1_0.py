"""Experts as Q1_0: what is written is a file of llama.cpp's own types; what has no place in it is refused at once."""

import importlib.util
import struct

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import mobie_export as mobie
from mobie_export import cli, gguf_io
from mobie_export.cli import Exit
from mobie_export.exporting import advise, card
from mobie_export.runtime import doctor, libggml
from mobie_export.sources.find import Source
from mobie_export.spec import block, layout
from mobie_export.spec.inspect import inspect
from tests import exporting, models

pytestmark = pytest.mark.usefixtures("without_runtime")
WIDTH, FF = 384, 128  # three blocks and one


@pytest.fixture(autouse=True)
def whole_blocks(monkeypatch):
    monkeypatch.setattr(models, "N_EMBD", WIDTH)
    monkeypatch.setattr(models, "N_FF", FF)


def written(folder, **how):
    """(source, exported file)"""
    source = folder / "m.gguf"
    models.write_qwen3moe(source, **how)
    assert cli.main([str(source), "--type", "q1_0", "--method", "sign", "-q"]) == 0
    return source, folder / "m-q1_0-uncalibrated.gguf"


@pytest.mark.parametrize("kind", ["F32", "BF16", "MXFP4"])
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_experts_are_the_best_signs_and_magnitudes(tmp_path, kind, fused):
    source, out = written(tmp_path, experts=kind, fused=fused, seed=5)
    before = models.decoded(source)
    with gguf_io.open_model(out) as model:
        experts = layout.experts(model)
        assert len(experts) == (4 if fused else 6)
        for name, x in experts.items():
            weights, found = before[name], gguf_io.decode(model.read(x.tensor).reshape(*before[name].shape[:2], -1), 41)
            magnitudes = np.abs(weights.astype(np.float64)).reshape(*weights.shape[:2], -1, 128).mean(-1)
            wanted = np.where(weights >= 0, 1, -1) * np.repeat(magnitudes.astype(np.float16), 128, -1)
            assert np.array_equal(found, wanted)


def test_nothing_needs_another_runtime(tmp_path):
    """Every tensor but the experts as it was, none beside them, and only types of llama.cpp."""
    source, out = written(tmp_path)
    with gguf_io.open_model(source) as a, gguf_io.open_model(out) as b:
        assert list(a.tensors) == list(b.tensors), "no scales of experts"
        for name, tensor in b.tensors.items():
            assert tensor.shape == a.tensors[name].shape
            if layout.kind(name) == "expert":
                assert tensor.type_id == Type.Q1_0
            else:
                assert tensor.type_id == a.tensors[name].type_id
                assert np.array_equal(b.read(tensor), a.read(a.tensors[name]))
        values = {k: b.value(k) for k in b.entries}
    assert (values["general.file_type"], values["mobie.type_id"], values["mobie.expert_bpw"]) == (40, 41, 1.125)
    assert values["mobie.method"] == "sign, uncalibrated" and "patched" not in values["mobie.runtime"]
    assert inspect(out).types["Q1_0"].tensors == 6
    seen = mobie.verify(out)
    assert (seen.expert_bpw, seen.blocks) == (1.125, 2 * 3 * models.N_EXPERT * WIDTH * FF // 128)


def test_a_factor_of_the_source_becomes_part_of_the_blocks(tmp_path):
    factors = np.linspace(0.5, 3, models.N_EXPERT, dtype=np.float32)
    name = "blk.1.ffn_down_exps"

    def change(tensors):
        tensors[f"{name}.scale"] = factors, Type.F32

    source, out = written(tmp_path, change=change)
    wanted = np.abs(models.decoded(source)[f"{name}.weight"]).mean((1, 2)) * factors
    with gguf_io.open_model(out) as model:
        x = layout.experts(model)[f"{name}.weight"]
        assert x.factor is None
        found = np.abs(gguf_io.decode(model.read(x.tensor).reshape(models.N_EXPERT, -1), 41)).mean(1)
    assert found == pytest.approx(wanted, rel=1e-3)


def test_dequantized_is_what_it_says(tmp_path):
    _, out = written(tmp_path)
    floats = mobie.dequantize(out, tmp_path / "f32.gguf").output
    decoded = models.decoded(floats)
    with gguf_io.open_model(out) as model, gguf_io.open_model(floats) as f32:
        assert not [k for k in f32.entries if k.startswith("mobie.")] and f32.value("general.file_type") == 0
        for name, x in layout.experts(model).items():
            wanted = gguf_io.decode(model.read(x.tensor).reshape(x.n_expert, x.rows, -1), 41)
            assert np.array_equal(decoded[name], wanted)


# ---- what has no place -----------------------------------------------------------------------------------------------


def refused(capsys, code: Exit, words: list, *said: str) -> None:
    assert cli.main([str(w) for w in words]) == code
    error = capsys.readouterr().err
    for text in said:
        assert text in error
    assert "next:" in error


def test_rows_that_are_no_whole_blocks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "N_FF", 192)
    models.write_qwen3moe(tmp_path / "m.gguf")
    command = [tmp_path / "m.gguf", "--type", "q1_0"]
    for more in (["--method", "sign"], *([[]] if importlib.util.find_spec("torch") else ())):
        refused(
            capsys,
            Exit.UNSUPPORTED,
            [*command, *more],
            "blk.0.ffn_down_exps.weight is no Q1_0",
            "rows of 192",
            "a multiple of 128",
            "--type mobie",
        )
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert cli.main(["plan", str(tmp_path / "m.gguf"), "--method", "sign"]) == 0


def test_more_bits_and_shared_factors(tmp_path, capsys):
    pytest.importorskip("torch")
    models.write_qwen3moe(tmp_path / "m.gguf")
    command = [tmp_path / "m.gguf", "--type", "q1_0", "--samples", 16, "--seq-len", 32]
    for more in (["--bpw", 1.25], ["--preset", "small"], ["--method", "calibrated", "--bpw", 1.5]):
        refused(capsys, Exit.USAGE, [*command, *more], "no second ones", "1.125", "--type mobie")
    refused(capsys, Exit.USAGE, [*command, "--bpw", 1], "so few bits", "1.1250")
    refused(capsys, Exit.USAGE, [*command, "--method", "paper"], "no place", "--type mobie")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    with pytest.raises(mobie.MobieError, match="no such type"):
        mobie.plan(tmp_path / "m.gguf", method="sign", type="q2_0")


@pytest.mark.parametrize(("factor", "words"), [(1e7, "too large"), (1e-7, "too small")])
def test_magnitudes_that_half_precision_does_not_hold(tmp_path, capsys, factor, words):
    def change(tensors):
        values, kind = tensors["blk.1.ffn_up_exps.weight"]
        tensors["blk.1.ffn_up_exps.weight"] = values * np.float32(factor), kind

    models.write_qwen3moe(tmp_path / "m.gguf", experts="F32", change=change)
    command = [tmp_path / "m.gguf", "--method", "sign", "-q"]
    refused(capsys, Exit.UNSUPPORTED, [*command, "--type", "q1_0"], "blk.1.ffn_up_exps.weight", words, "--type mobie")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert cli.main([*map(str, command)]) == 0, "the other type holds them"


def test_it_is_not_exported_again(tmp_path, capsys):
    _, out = written(tmp_path)
    refused(capsys, Exit.UNSUPPORTED, ["plan", out, "--method", "sign"], "MoBiE file already", "original model")


# ---- checking --------------------------------------------------------------------------------------------------------


def test_damage_is_found(tmp_path, capsys):
    _, out = written(tmp_path)
    with gguf_io.open_model(out) as model:
        offset = model.tensors["blk.0.ffn_up_exps.weight"].offset
    whole = out.read_bytes()
    for scale, words in (
        (0x7E00, "NaN, infinite or negative"),
        (0x7C00, "NaN, infinite or negative"),
        (0xBC00, "NaN, infinite or negative"),
        (0, "signs in blocks of scale 0"),
    ):
        out.write_bytes(whole[:offset] + struct.pack("<H", scale) + whole[offset + 2 :])
        with pytest.raises(mobie.MobieError) as e:
            mobie.verify(out)
        assert words in e.value.found and "mobie.data.sha256" in e.value.found


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (("mobie.type_id", 200), "is of type Q1_0, wanted mobie"),
        (("mobie.type_id", 8), "mobie.type_id is 8, wanted 200 or 41"),
        (("general.file_type", 200), "general.file_type is 200, wanted 40"),
    ],
)
def test_metadata_that_says_something_else(tmp_path, entry, words):
    _, out = written(tmp_path)
    with gguf_io.open_model(out) as model:
        gguf_io.rewrite(model, tmp_path / "x.gguf", entries=[gguf_io.make_entry(entry[0], gguf_io.U32, entry[1])])
    with pytest.raises(mobie.MobieError) as e:
        mobie.verify(tmp_path / "x.gguf")
    assert words in e.value.found


def test_what_stock_llama_cpp_would_refuse(tmp_path):
    _, out = written(tmp_path)
    residual = np.zeros(block.BLOCK_BYTES * FF * models.N_EXPERT, np.uint8)
    more = {"blk.0.ffn_up_exps.residual": gguf_io.NewTensor.stored((64, FF, models.N_EXPERT), block.TYPE_ID, residual)}
    with gguf_io.open_model(out) as model:
        gguf_io.rewrite(model, tmp_path / "x.gguf", tensors=more)
    with pytest.raises(mobie.MobieError) as e:
        mobie.verify(tmp_path / "x.gguf")
    assert "stock llama.cpp refuses" in e.value.found


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_doctor_wants_no_patched_runtime_for_it(tmp_path, monkeypatch):
    source, out = written(tmp_path)
    ours = exporting.export(source, tmp_path / "ours.gguf").output
    monkeypatch.setattr(doctor, "kernel_names", list)
    monkeypatch.setattr(libggml, "kernel_names", list)
    monkeypatch.setattr(doctor.installed, "binding_version", lambda: "0.3.36")
    assert doctor.doctor(out) and not doctor.doctor(ours) and not doctor.doctor()
    facts, problems, patched = doctor.file_status(out)
    assert not problems and not patched and any("experts in Q1_0" in line for line in facts)


def test_doctor_reads_a_file_once(tmp_path, monkeypatch):
    _, out = written(tmp_path)
    opened = []
    monkeypatch.setattr(doctor, "open_model", lambda path: opened.append(path) or gguf_io.open_model(path))
    monkeypatch.setattr(doctor, "kernel_names", list)
    doctor.doctor(out)
    assert opened == [out]


def test_the_card_says_how_it_is_run(tmp_path):
    models.write_qwen3moe(tmp_path / "m.gguf")
    report = exporting.export(tmp_path / "m.gguf", tmp_path / "out.gguf", type="q1_0")
    text = card.text(report.output, Source("m", gguf=tmp_path / "m.gguf"), report.source_size)
    assert "one 16-bit scale per 128" in text and "Every llama.cpp that knows the type Q1_0" in text
    assert "refuses" not in text and "doctor" not in text


def test_advice_names_the_type_and_no_preset(tmp_path, capsys):
    pytest.importorskip("torch")
    models.write_qwen3moe(tmp_path / "m.gguf")
    with gguf_io.open_model(tmp_path / "m.gguf") as model:
        found = advise.choices(model, {"large": 1.5}, 512, block.Q1_0)
        assert {(c.preset, c.bpw) for c in found} == {(advise.LEAST, 1.125)}
    assert cli.main(["advise", str(tmp_path / "m.gguf"), "--ram", "8G", "--type", "q1_0"]) == 0
    out = capsys.readouterr().out
    assert "--effort normal" in out and "--type q1_0" in out.splitlines()[-1] and "--bpw" not in out.splitlines()[-1]
