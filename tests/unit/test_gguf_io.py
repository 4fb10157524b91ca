"""Reading and writing GGUF, with gguf-py's own reader and writer as the independent side."""

import re

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from mobie_export import gguf_io
from mobie_export.errors import BAD_INPUT, UNSUPPORTED, Kind, MobieError
from mobie_export.spec import block
from tests import models


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.gguf"
    models.write_qwen3moe(path, keys=models.every_kind_of_entry)
    return path


def test_reads_what_gguf_py_wrote(tiny):
    reader = gguf.GGUFReader(tiny)
    with gguf_io.open_model(tiny) as model:
        wanted = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        assert {k: e.value for k, e in model.entries.items()} == wanted
        assert list(model.entries) == list(wanted), "order"
        assert len(model.tensors) == len(reader.tensors)
        for t in reader.tensors:
            ours = model.tensors[t.name]
            assert ours.shape == tuple(t.shape.tolist())
            assert (ours.type_id, ours.n_bytes, ours.offset) == (t.tensor_type, t.n_bytes, t.data_offset)
            assert bytes(model.read(ours)) == t.data.tobytes()


def test_gguf_py_reads_what_we_write(tmp_path):
    path = tmp_path / "ours.gguf"
    entries = [
        gguf_io.make_entry("general.architecture", gguf_io.STRING, "llama"),
        gguf_io.make_entry("general.alignment", gguf_io.U32, 64),
        gguf_io.make_entry("x.f32", gguf_io.F32, 0.1),
        gguf_io.make_entry("x.array", gguf_io.ARRAY, ["a", "ü"], gguf_io.STRING),
    ]
    blocks = np.random.default_rng(0).integers(0, 256, (3, 4, 18), dtype=np.uint8)
    floats = np.arange(5, dtype=np.float32)
    with gguf_io.Writer(path, entries, [("a", (128, 4, 3), block.TYPE_ID), ("b", (5,), gguf_io.TYPE_F32)], 64) as w:
        w.write("a", [blocks[:1], blocks[1:]])
        w.write("b", [floats])
        w.finish()
    reader = gguf.GGUFReader(path)
    assert reader.alignment == 64
    assert reader.fields["x.array"].contents() == ["a", "ü"]
    assert reader.fields["x.f32"].contents() == np.float32(0.1)
    a, b = reader.tensors
    assert a.tensor_type == block.TYPE_ID and a.tensor_type.name == "MOBIE" and np.array_equal(a.data, blocks)
    assert b.data_offset % 64 == 0 and np.array_equal(b.data, floats)


def test_gguf_py_writes_our_type(tmp_path):
    path = tmp_path / "theirs.gguf"
    blocks = np.zeros((2, 9), np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a", blocks, raw_dtype=Type(block.TYPE_ID))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with gguf_io.open_model(path) as model:
        assert model.tensors["a"].shape == (64, 2) and model.tensors["a"].type_id == block.TYPE_ID


def test_writer_refuses_wrong_tensors(tmp_path):
    with gguf_io.Writer(tmp_path / "x", [], [("a", (4,), gguf_io.TYPE_F32)]) as w:
        with pytest.raises(ValueError, match="in place of a"):
            w.write("b", [])
        with pytest.raises(ValueError, match="8 bytes written, 16 wanted"):
            w.write("a", [np.zeros(2, np.float32)])


def test_split_is_read_as_one(tmp_path):
    models.write_qwen3moe(tmp_path / "one.gguf")
    models.write_qwen3moe(tmp_path / "many.gguf", split=7)
    shards = sorted(tmp_path.glob("many-*.gguf"))
    assert len(shards) > 2
    with gguf_io.open_model(tmp_path / "one.gguf") as one:
        for first in shards:  # any shard will do
            with gguf_io.open_model(first) as many:
                assert list(many.tensors) == list(one.tensors)
                assert [e.raw for e in many.entries.values()] == [e.raw for e in one.entries.values()]
                for name, tensor in one.tensors.items():
                    assert bytes(one.read(tensor)) == bytes(many.read(many.tensors[name]))


HALVES = np.arange(1 << 16, dtype=np.uint16)


def test_float16_is_decoded_exactly():
    """Every finite half, and non-finite ones stay non-finite."""
    with np.errstate(invalid="ignore"):
        wanted = HALVES.view(np.float16).astype(np.float32)
    finite = np.isfinite(wanted)
    fast = gguf_io.decode(HALVES[finite].view(np.uint8), Type.F16)  # the vector path: finite values only
    assert np.array_equal(fast.view(np.uint32), wanted[finite].view(np.uint32))
    mixed = gguf_io.decode(HALVES.view(np.uint8), Type.F16)
    assert np.array_equal(np.isfinite(mixed), finite)
    for bad in (0x7C00, 0xFC00, 0x7C01, 0xFFFF):
        assert not np.isfinite(gguf_io.decode(np.array([0, bad], np.uint16).view(np.uint8), Type.F16)[1])


def test_bfloat16_is_decoded_exactly():
    wanted = (HALVES.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(gguf_io.decode(HALVES.view(np.uint8), Type.BF16).view(np.uint32), wanted.view(np.uint32))


def test_types_without_decoder_are_known():
    assert gguf_io.can_decode(Type.Q8_0) and gguf_io.can_decode(Type.Q4_K) and gguf_io.can_decode(Type.MXFP4)
    assert not gguf_io.can_decode(Type.I32) and not gguf_io.can_decode(77)


# ---- damage ----------------------------------------------------------------------------------------------------------


def error_of(path, kind: Kind, *parts: str) -> None:
    with pytest.raises(MobieError) as e:
        gguf_io.open_model(path)
    assert e.value.kind == kind
    for part in parts:
        assert re.search(part, str(e.value)), f"{part!r} not in {e.value}"


def test_every_truncation_is_found(tiny, tmp_path):
    """A file cut anywhere is refused, and never with another exception."""
    data = tiny.read_bytes()
    with gguf_io.open_model(tiny) as model:
        header, end = model.header_size, max(t.offset + t.n_bytes for t in model.tensors.values())
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 400, 7), *range(400, header, 997), header, end - 1]:
        cut.write_bytes(data[:size])
        error_of(cut, BAD_INPUT, "not a GGUF" if size < 4 else "truncated")
    cut.write_bytes(data[:end])
    gguf_io.open_model(cut)


def test_truncation_names_sizes(tiny, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:100_000])
    error_of(cut, BAD_INPUT, "cut.gguf is truncated", "found:  100000 bytes", r"at least \d{7} bytes", "next: ")


def test_random_damage_is_refused_or_harmless(tiny, tmp_path):
    """Bytes of the header overwritten at random: refused with a MobieError, or all that is promised can be read."""
    rng, data = np.random.default_rng(0), bytearray(tiny.read_bytes())
    with gguf_io.open_model(tiny) as model:
        header = model.header_size
    broken, refused = tmp_path / "broken.gguf", 0
    for _ in range(150):
        copy = bytearray(data)
        for at in rng.integers(0, header, 4):
            copy[at] = rng.integers(256)
        broken.write_bytes(copy)
        try:
            model = gguf_io.open_model(broken)
        except MobieError as e:
            refused += 1
            assert e.kind in (BAD_INPUT, UNSUPPORTED) and "broken.gguf" in str(e)
            continue
        with model:
            for t in model.tensors.values():
                assert model.header_size <= t.offset and t.offset + t.n_bytes <= len(data), t
                assert len(bytes(model.read(t))) == t.n_bytes
    assert 0 < refused < 150


def test_counts_beyond_the_file_are_refused(tiny, tmp_path):
    """Numbers of tensors, of keys, of characters and of dimensions: nothing is reserved for what cannot be there."""
    data, broken = tiny.read_bytes(), tmp_path / "broken.gguf"
    with gguf_io.open_model(tiny) as model:
        name = next(iter(model.tensors)).encode()
    at = data.index(len(name).to_bytes(8, "little") + name)  # a tensor's entry: its name, then n_dims
    for where, size in ((8, 8), (16, 8), (24, 8), (at, 8), (at + 8 + len(name), 4)):
        for count in (2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2**31):
            broken.write_bytes(data[:where] + count.to_bytes(size, "little") + data[where + size :])
            error_of(broken, BAD_INPUT, "broken.gguf")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x00" * 4096)
    error_of(path, BAD_INPUT, "not a GGUF", "convert_hf_to_gguf")
    error_of(tmp_path / "missing.gguf", BAD_INPUT, "cannot read .*missing.gguf", "No such file")
    error_of(tmp_path, BAD_INPUT, "cannot read", "directory")


@pytest.mark.parametrize(
    "version, code, text",
    [(1, BAD_INPUT, "version 1"), (9, BAD_INPUT, "version 9"), (3 << 24, UNSUPPORTED, "big-endian")],
)
def test_versions(tiny, version, code, text):
    data = bytearray(tiny.read_bytes())
    data[4:8] = version.to_bytes(4, "little")
    tiny.write_bytes(data)
    error_of(tiny, code, text)


def test_unknown_tensor_type(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_io.make_header([], [("a", (32,), gguf_io.TYPE_F32)], 32) + bytes(128))
    data = path.read_bytes()
    at = data.index(b"a", 24) + 1
    patched = bytearray(data)
    patched[at + 12 : at + 16] = (99).to_bytes(4, "little")  # after n_dims u32 and one dimension u64
    path.write_bytes(patched)
    error_of(path, UNSUPPORTED, "tensor a ", "type id 99")


def test_missing_and_foreign_shards(tmp_path):
    models.write_qwen3moe(tmp_path / "m.gguf", split=10)
    shards = sorted(tmp_path.glob("m-*.gguf"))
    second = shards[1].read_bytes()
    shards[1].unlink()
    error_of(shards[0], BAD_INPUT, "shards are missing", shards[1].name)
    shards[1].write_bytes(shards[2].read_bytes())
    error_of(shards[0], BAD_INPUT, f"{shards[1].name} is not the shard", "split.no 2", "split.no 1")
    shards[1].write_bytes(second)
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(shards[0].read_bytes())
    error_of(renamed, BAD_INPUT, "one of 3 shards", "NAME-00001-of-00003.gguf")


def test_rewrite_changes_what_it_is_given_and_keeps_the_rest(tiny, tmp_path):
    out = tmp_path / "out.gguf"
    with gguf_io.open_model(tiny) as a:
        first, second, *_, last = a.tensors
        values = np.arange(6, dtype=np.float32).reshape(3, 2)
        size = gguf_io.make_entry("general.name", gguf_io.STRING, "other")
        new = {first: gguf_io.NewTensor.of(values), "more": gguf_io.NewTensor.of(np.arange(4, dtype=np.int32))}
        gguf_io.rewrite(a, out, tensors=new, entries=[size], drop=[second, "general.architecture"])
        with gguf_io.open_model(out) as b:
            assert list(b.tensors) == [n for n in a.tensors if n != second] + ["more"]
            assert [k for k in b.entries if k != "general.name"] == [
                k for k in a.entries if k not in ("general.architecture", "general.name")
            ]
            assert b.get("general.name", str) == "other" and b.alignment == a.alignment
            assert b.tensors[first].shape == (2, 3) and (b.read(b.tensors[first]).view("<f4") == values.ravel()).all()
            assert b.read(b.tensors["more"]).view("<i4").tolist() == [0, 1, 2, 3]
            assert (b.read(b.tensors[last]) == a.read(a.tensors[last])).all()
        before = tiny.read_bytes()
        with pytest.raises(MobieError, match="replace an input"):
            gguf_io.rewrite(a, tiny, entries=[size])
        assert tiny.read_bytes() == before
        wrong = gguf_io.NewTensor((8,), gguf_io.TYPE_F32, lambda: [np.zeros(3, np.float32)])
        with pytest.raises(ValueError, match="12 bytes written, 32 wanted"):
            gguf_io.rewrite(a, out, tensors={first: wrong})
