"""The block: laws of mobie_export/spec/block.py, FORMAT.md's worked example, and the golden vectors."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import mobie_export as mobie
from mobie_export import cli, gguf_io
from mobie_export.cli import Exit
from mobie_export.spec import block as fmt
from mobie_export.spec import metadata
from tests import exporting, models
from tools.assets import make_vectors

ROOT = Path(__file__).resolve().parents[2]
VECTORS = ROOT / "tests" / "vectors"


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize(
    ("coding", "shape"),
    [(fmt.MOBIE, s) for s in ((64,), (3, 192), (2, 5, 2880))]
    + [(fmt.Q1_0, s) for s in ((128,), (3, 384), (2, 5, 2944))],
)
def test_pack_unpack_round_trip(rng, coding, shape):
    signs = rng.random(shape) < 0.5
    codes = rng.integers(1, 256, (*shape[:-1], shape[-1] // coding.length)).astype(coding.scale)
    blocks = fmt.pack(signs, codes, coding)
    assert blocks.dtype == np.uint8
    assert blocks.shape == (*shape[:-1], shape[-1] // coding.length * coding.block_bytes)
    got_signs, got_codes = fmt.unpack(blocks, coding)
    assert np.array_equal(got_signs, signs) and np.array_equal(got_codes, codes)
    assert got_codes.dtype == coding.scale and np.array_equal(fmt.scales(blocks, coding), codes)
    assert np.array_equal(fmt.pack(got_signs, got_codes, coding), blocks)
    wanted = np.where(signs, 1, -1) * np.repeat(codes.astype(np.float64) * coding.unit, coding.length, -1)
    assert np.array_equal(fmt.dequantize(blocks, coding=coding), wanted)


def test_zero_blocks_are_zero_bytes(rng):
    codes = rng.integers(0, 2, (50, 3), dtype=np.uint8)
    blocks = fmt.pack(np.ones((50, 192), bool), codes).reshape(50, 3, 9)
    assert (codes == 0).any() and not blocks[codes == 0].any() and blocks[codes == 1].all(axis=-1).all()


def test_bit_order():
    for j in range(64):
        block = fmt.pack(np.arange(64) == j, np.array([1], np.uint8))
        assert int.from_bytes(block[1:].tobytes(), "little") == 1 << j
        assert block[1 + j // 8] == 1 << j % 8


def test_every_pattern_decodes_exactly(rng):
    blocks = rng.integers(0, 256, (1000, 9), dtype=np.uint8)
    blocks[:256, 0] = np.arange(256)
    weights = fmt.dequantize(blocks)
    assert weights.dtype == np.float32 and np.isfinite(weights).all() and np.abs(weights).max() == 255 / 128
    for block, row in zip(blocks, weights, strict=True):
        bits = int.from_bytes(block[1:].tobytes(), "little")
        want = [(1 if bits >> j & 1 else -1) * int(block[0]) / 128 for j in range(64)]
        assert row.tolist() == want
    assert np.array_equal(weights.astype(np.float16).astype(np.float32), weights)
    assert (weights.view(np.uint32) & 0xFFFF == 0).all()  # bfloat16
    assert not np.signbit(weights[blocks[:, 0] == 0]).any()


def test_dequantize_multiplies_by_the_expert_scale(rng):
    blocks = rng.integers(0, 256, (3, 2, 18), dtype=np.uint8)
    scale = np.array([0.5, 0.1, 3.0], np.float32)
    want = fmt.dequantize(blocks) * scale[:, None, None]
    assert np.array_equal(fmt.dequantize(blocks, scale[:, None, None]), want)
    assert np.array_equal(fmt.dequantize(blocks[1], scale[1]), want[1])


def test_encode_scales(rng):
    a = rng.random((40, 3)) ** 4
    scale, codes = fmt.encode_scales(a)
    assert scale.dtype == np.float32 and codes.dtype == np.uint8 and codes.max() == 255
    decoded = codes * fmt.SCALE_UNIT * np.float64(scale)
    assert np.abs(decoded - a).max() <= np.float64(scale) * fmt.SCALE_UNIT * 0.50001
    again, codes_again = fmt.encode_scales(decoded)
    assert np.array_equal(codes_again, codes) and again == pytest.approx(scale, rel=2**-23)

    # Halves to even, at an expert scale of exactly 1.
    scale, codes = fmt.encode_scales(np.array([255, 2.5, 3.5, 0.5]) / 128)
    assert scale == 1 and codes.tolist() == [255, 2, 4, 0]


@pytest.mark.parametrize("largest", [0.0, 1e-300, 2.0**-149, 1e-40, 1e38])
def test_encode_scales_at_the_ends_of_the_range(largest):
    scale, codes = fmt.encode_scales(np.array([0.0, largest]))
    assert np.isfinite(scale) and codes[0] == 0 and (codes[1] > 0) == (scale > 0)


@pytest.mark.parametrize("bad", [-1e-9, np.nan, np.inf, 1e300])
def test_encode_scales_refuses(bad):
    with pytest.raises(ValueError):
        fmt.encode_scales(np.array([1.0, bad]))


def test_scales_of_q1_0_are_the_nearest_halves(rng):
    a = rng.random((40, 3)) ** 8
    a[0] = [0, 65504, 2.0**-24]
    scale, codes = fmt.encode_scales(a, fmt.Q1_0)
    assert scale == 1 and codes.dtype == np.float16 and np.array_equal(codes[0], a[0])
    for neighbour in (np.nextafter(codes[1:], np.float16(np.inf)), np.nextafter(codes[1:], np.float16(-np.inf))):
        near, far = (np.abs(x.astype(np.float64) - a[1:]) for x in (codes[1:], neighbour))
        assert (near <= far).all()
    for bad, words in (([1.0, 65520.0], "too large"), ([1e30], "too large"), ([0.0, 2.0**-18], "too small")):
        with pytest.raises(fmt.OutOfRange, match=words):
            fmt.encode_scales(np.array(bad), fmt.Q1_0)
    assert not fmt.encode_scales(np.zeros(3), fmt.Q1_0)[1].any()


def test_pack_and_dequantize_refuse():
    with pytest.raises(ValueError, match="multiple of 64"):
        fmt.pack(np.ones(100, bool), np.ones(1, np.uint8))
    with pytest.raises(ValueError, match="wanted uint8"):
        fmt.pack(np.ones(128, bool), np.ones(1, np.uint8))
    with pytest.raises(ValueError, match="wanted uint8"):
        fmt.pack(np.ones(64, bool), np.ones(1))
    with pytest.raises(ValueError, match="multiple of 128"):
        fmt.pack(np.ones(192, bool), np.ones(1, np.float16), fmt.Q1_0)
    with pytest.raises(ValueError, match="wanted float16"):
        fmt.pack(np.ones(128, bool), np.ones(1, np.uint8), fmt.Q1_0)
    with pytest.raises(ValueError, match="multiple of 9"):
        fmt.dequantize(np.zeros(10, np.uint8))


def test_worked_example_of_format_md():
    text = (ROOT / "FORMAT.md").read_text()
    example = text.split("### Worked example")[1].split("\n## ")[0]
    block = np.frombuffer(bytes.fromhex(re.search(r"^ {4}([0-9a-f ]+)$", example, re.M)[1]), np.uint8)
    magnitude, code = re.search(r"Scale ([\d.]+) = (\d+) \* 2\^-7", example).groups()
    plus = [int(i) for i in re.search(r"weights ([\d, and]+) are plus", example)[1].replace(" and", ",").split(",")]
    want = np.where(np.isin(np.arange(64), plus), np.float32(magnitude), -np.float32(magnitude))
    assert np.array_equal(fmt.dequantize(block), want)
    assert np.array_equal(fmt.pack(want >= 0, np.array([int(code)], np.uint8)), block)


def test_constants_of_format_md():
    text = (ROOT / "FORMAT.md").read_text()
    assert f"Format version **{fmt.FORMAT_VERSION}**" in text
    assert f"type id **{fmt.TYPE_ID}**, type name `{fmt.TYPE_NAME}`" in text
    assert 8 * fmt.BLOCK_BYTES / fmt.BLOCK_LEN == 1.125
    assert fmt.MOBIE.block_bytes == fmt.BLOCK_BYTES and fmt.Q1_0.block_bytes == 18


# --- golden vectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", make_vectors.FILES)
def test_vectors_are_fresh(name):
    assert (VECTORS / name).read_text() == make_vectors.text_of(name), "run tools/assets/make_vectors.py"


def test_decode_vectors():
    for name, case in make_vectors.read(VECTORS / "decode.txt").items():
        got = fmt.dequantize(np.frombuffer(case["blocks"], np.uint8))
        assert got.astype("<f4").tobytes() == case["floats"], name


def test_quantize_vectors_decode_to_the_nearest():
    """Where nothing clamps, the stored scale is the one nearest to the mean magnitude, and signs follow the weights."""
    for name, case in make_vectors.read(VECTORS / "quantize.txt").items():
        x = np.frombuffer(case["floats"], "<f4").reshape(-1, 64)
        signs, codes = fmt.unpack(np.frombuffer(case["blocks"], np.uint8))
        mean = np.abs(x.astype(np.float64)).mean(axis=1)
        assert (np.abs(np.minimum(mean * 128, 255) - codes) <= 0.5).all(), name
        assert np.array_equal(signs.reshape(-1, 64)[codes > 0], (x >= 0)[codes > 0]), name


def test_product_vectors_match_matrix_product():
    """Sums and results against a plain double-precision product of decoded weights and decoded activations."""
    for name, case in make_vectors.read(VECTORS / "product.txt").items():
        x = np.frombuffer(case["activations"], "<f4").astype(np.float64)
        n = len(x)
        weights = fmt.dequantize(np.frombuffer(case["blocks"], np.uint8).reshape(-1, n // 64 * 9)).astype(np.float64)
        q = np.frombuffer(case["quantized"], np.int8, n).astype(np.float64)
        scales = np.frombuffer(case["quantized"], make_vectors.ACT_GROUP, -(-n // 256), offset=n)["scale"]
        d = np.repeat(scales, 256)[:n].astype(np.float64)
        sums = np.frombuffer(case["sums"], "<i4").reshape(len(weights), -1)
        starts = np.arange(0, n, 256)
        assert np.array_equal(np.add.reduceat(weights * 128 * q, starts, axis=-1), sums), name
        assert np.abs(sums).max() < 2**23, name
        result = np.frombuffer(case["result"], "<f4")
        if not np.isfinite(x).all():
            assert np.isnan(result).all(), name
            continue
        assert (np.abs(x - d * q) <= 0.50001 * d + 2.0**-100).all(), name
        bound = (
            np.abs(np.add.reduceat(weights * q * d, starts, axis=-1)).sum(axis=-1) * (len(starts) + 1) * 1.1 * 2.0**-24
        )
        assert (np.abs(weights @ (q * d) - result) <= bound).all(), name


def test_the_keys_are_those_of_the_document():
    rows = re.findall(
        r"^\| `((?:mobie|general)\.\S+)` \| (u32|f32|string) \| (.*) \|$", (ROOT / "FORMAT.md").read_text(), re.M
    )
    assert len(rows) == 13
    assert [(k.name, gguf_io.KV_TYPE_NAMES[k.type]) for k in metadata.KEYS] == [(name, kind) for name, kind, _ in rows]
    for key, (_, _, text) in zip(metadata.KEYS, rows, strict=True):
        assert key.optional == text.startswith("optional")
        assert key.value is None or re.match(rf"{key.value}\b", text)


# ---- what later versions keep ----------------------------------------------------------------------------------------


@pytest.fixture
def export(tmp_path, without_runtime):
    source, path = tmp_path / "m.gguf", tmp_path / "m-mobie.gguf"
    models.write_qwen3moe(source)
    exporting.export(source, path)
    return path


def changed(path: Path, entries: dict[str, tuple[int, object]], drop=()) -> Path:
    out = path.with_name("changed.gguf")
    with gguf_io.open_model(path) as gguf:
        made = [gguf_io.make_entry(key, kind, value) for key, (kind, value) in entries.items()]
        gguf_io.rewrite(gguf, out, entries=made, drop=drop)
    return out


def test_what_a_later_version_1_may_add_is_ignored(export):
    with gguf_io.open_model(export) as gguf:
        settings = metadata.settings(gguf)
    more = {
        "mobie.future": (gguf_io.STRING, "?"),
        "mobie.future.count": (gguf_io.U64, 1 << 40),
        "mobie.settings": (gguf_io.STRING, json.dumps({**settings, "future": [1, {"a": None}]}, sort_keys=True)),
        "mobie.method": (gguf_io.STRING, "a method of tomorrow"),
    }
    path = changed(export, more)
    assert mobie.verify(path) == mobie.verify(export)
    assert mobie.inspect(path).mobie["mobie.method"] == "a method of tomorrow"
    for name, file in (("a", export), ("b", path)):
        mobie.dequantize(file, export.with_name(f"{name}.gguf"))
    assert export.with_name("a.gguf").read_bytes() == export.with_name("b.gguf").read_bytes()


def test_optional_entries_may_be_missing(export):
    optional = [key.name for key in metadata.KEYS if key.optional]
    assert optional and mobie.verify(changed(export, {}, drop=optional)) == mobie.verify(export)


@pytest.mark.parametrize("command", ["verify", "dequantize", "report"])
def test_a_later_version_is_refused_with_advice(export, tmp_path, capsys, command):
    path, out = changed(export, {"mobie.format_version": (gguf_io.U32, 2)}), tmp_path / "out.gguf"
    more = {"verify": [], "dequantize": ["-o", str(out)], "report": ["--against", str(tmp_path / "m.gguf")]}
    assert cli.main([command, str(path), *more[command]]) == Exit.UNSUPPORTED
    said = capsys.readouterr().err
    assert "mobie.format_version 2" in said and "install a newer mobie-export" in said
    assert not out.exists()
