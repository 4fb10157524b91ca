"""Files that are well-formed and mean harm, or nothing: whatever reads them ends with a MobieError or a result.

`make test-more` tries many more of them: pytest --hypothesis-profile=more.
"""

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mobie_export as mobie
from mobie_export import gguf_io
from mobie_export.calibration import imatrix
from mobie_export.errors import MobieError
from mobie_export.exporting import advise
from mobie_export.methods.calibrated.options import PRESETS
from mobie_export.methods.imatrix import Importance
from mobie_export.runtime import doctor
from mobie_export.spec import block, inspect, layout, metadata
from tests import exporting, models

pytestmark = pytest.mark.usefixtures("without_runtime")


# ---- what is done with a file ----------------------------------------------------------------------------------------

out = "out.gguf"


def advised(path: Path) -> None:
    with gguf_io.open_model(path) as gguf:
        advise.choices(gguf, PRESETS, 512)


USES = {
    "inspect": lambda p: (
        json.dumps(dataclasses.asdict(mobie.inspect(p)), default=str) + inspect.render(mobie.inspect(p))
    ),
    "verify": mobie.verify,
    "plan": lambda p: mobie.plan(p, p.with_name(out), method="sign", overwrite=True),
    "export": lambda p: exporting.export(p, p.with_name(out), overwrite=True),
    "plan with its own importance": lambda p: mobie.plan(p, p.with_name(out), method=Importance(p), overwrite=True),
    "dequantize": lambda p: mobie.dequantize(p, p.with_name(out), type_name="f16", overwrite=True),
    "doctor": doctor.file_status,
    "imatrix": imatrix.load,
    "advise": advised,
}


def use(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model-00001-of-00002.gguf"  # a name that lets it claim to be a shard
        path.write_bytes(data)
        for run in USES.values():
            with contextlib.suppress(MobieError), np.errstate(all="ignore"):
                run(path)


# ---- well-formed files with odd values -------------------------------------------------------------------------------

ARCHITECTURES = ("qwen3moe", "deepseek2", "clip", "")
KEYS = (
    *("general.architecture", "general.alignment", "general.name", "general.type", "general.file_type"),
    *("split.no", "split.count", "split.tensors.count", "qwen3moe.expert_used_count", "qwen3moe.block_count"),
    *("qwen3moe.nextn_predict_layers", "qwen3moe.expert_count", "qwen3moe.embedding_length", "tokenizer.ggml.tokens"),
    *("qwen3moe.attention.head_count", "qwen3moe.attention.head_count_kv", "qwen3moe.attention.kv_lora_rank"),
    *(key.name for key in metadata.KEYS),
)
INTEGERS = {gguf_io.U8: 8, gguf_io.I8: 7, gguf_io.U16: 16, gguf_io.I16: 15, gguf_io.U32: 32, gguf_io.I32: 31}
INTEGERS |= {gguf_io.U64: 64, gguf_io.I64: 63}


def values(kind: int):
    if kind == gguf_io.STRING:
        return st.one_of(st.sampled_from(("", "qwen3moe", "{}", "[]", "imatrix", "0" * 64)), st.text(max_size=8))
    if kind == gguf_io.BOOL:
        return st.booleans()
    if kind in INTEGERS:
        most = 2 ** INTEGERS[kind] - 1
        least = -most - 1 if gguf_io.KV_TYPE_NAMES[kind].startswith("i") else 0
        return st.one_of(st.integers(0, 4), st.sampled_from((least, most)))
    return st.floats(width=32 if kind == gguf_io.F32 else 64)


@st.composite
def entries(draw) -> gguf_io.Entry:
    key, kind = draw(st.sampled_from(KEYS)), draw(st.sampled_from(range(13)))
    if kind != gguf_io.ARRAY:
        return gguf_io.make_entry(key, kind, draw(values(kind)))
    item = draw(st.sampled_from([k for k in range(13) if k != gguf_io.ARRAY]))
    return gguf_io.make_entry(key, kind, draw(st.lists(values(item), max_size=3)), item)


NAMES = (
    *(
        f"blk.{i}.ffn_{p}_exps.{w}"
        for i in (0, 1)
        for p in ("gate_up", "down")
        for w in ("weight", "scale", "residual")
    ),
    *("blk.0.ffn_exps.columns", "blk.0.ffn_moe_in.weight", "blk.0.ffn_moe_out.weight", "blk.0.ffn_gate_inp.weight"),
    *("token_embd.weight", "blk.0.ffn_down_exps.weight.in_sum2", "blk.0.ffn_down_exps.weight.counts", "x"),
)
TYPES = (gguf_io.TYPE_F32, gguf_io.TYPE_F16, gguf_io.TYPE_I32, 8, 41, 42, block.TYPE_ID, block.TYPE_ID)
SHAPES = st.lists(st.sampled_from((0, 1, 2, 3, 64, 64, 128)), max_size=4).filter(lambda s: np.prod(s) < 1 << 14)


@st.composite
def rows(draw) -> tuple[str, tuple[int, ...], int]:
    kind, shape = draw(st.sampled_from(TYPES)), draw(SHAPES)
    if shape and shape[0] % gguf_io.block_size(kind)[0]:
        shape[0] = max(64, gguf_io.block_size(kind)[0])
    return draw(st.sampled_from(NAMES)), tuple(shape), kind


@st.composite
def files(draw) -> bytes:
    more = {e.key: e for e in draw(st.lists(entries(), max_size=6))}
    named = gguf_io.make_entry("general.architecture", gguf_io.STRING, draw(st.sampled_from(ARCHITECTURES)))
    table = list({r[0]: r for r in draw(st.lists(rows(), max_size=8))}.values())
    # twice in three a shape that fits, so that what lies behind the first check is reached as well
    if draw(st.integers(0, 2)):
        table = [
            ("blk.0.ffn_down_exps.weight", (64, 2, 3), block.TYPE_ID),
            *(r for r in table if "down_exps.w" not in r[0]),
        ]
        more.setdefault("mobie.format_version", gguf_io.make_entry("mobie.format_version", gguf_io.U32, 1))
    header = gguf_io.make_header([more.pop(named.key, named), *more.values()], table, 32)
    size = gguf_io.data_size(table, 32)
    return header + np.random.default_rng(draw(st.integers(0, 3))).bytes(size)


@given(files())
def test_well_formed_files_are_read_or_refused(data):
    use(data)


# ---- a sound file with changed bytes ---------------------------------------------------------------------------------


Parts = tuple[dict[str, gguf_io.Entry], dict[str, tuple[tuple[int, ...], int, bytes]]]


def sound() -> Parts:
    """Entries, and shape, type and bytes of the tensors, of a MoBiE file with second planes and columns."""
    with tempfile.TemporaryDirectory() as folder:
        plain, path = Path(folder) / "plain.gguf", Path(folder) / "mobie.gguf"
        models.write_qwen3moe(plain)
        exporting.export(plain, path)
        with gguf_io.open_model(path) as gguf:
            tensors = {}
            for name, t in gguf.tensors.items():
                tensors[name] = t.shape, t.type_id, gguf.read(t).tobytes()
                if layout.kind(name) == "expert":
                    shape = (64, *t.shape[1:])
                    size = gguf_io.tensor_bytes(shape, block.TYPE_ID)
                    tensors[layout.residual_name(name)] = shape, block.TYPE_ID, bytes(size)
                    chosen = np.arange(64, dtype="<i4").tobytes()
                    tensors[layout.columns_name(name)] = (64,), gguf_io.TYPE_I32, chosen
            return gguf.entries, tensors


def put_together(entries: dict, tensors: dict) -> bytes:
    table = [(name, shape, kind) for name, (shape, kind, _) in tensors.items()]
    parts = [gguf_io.make_header(entries.values(), table, 32)]
    for name, shape, kind in table:
        size, data = gguf_io.tensor_bytes(shape, kind), tensors[name][2]
        parts.append(data[:size] + bytes(gguf_io.align(size, 32) - min(size, len(data))))
    return b"".join(parts)


ENTRIES, TENSORS = sound()
SOUND = put_together(ENTRIES, TENSORS)


def test_the_sound_file_reaches_everything(tmp_path):
    """What the tests below change is read to its end when it is not changed."""
    path = tmp_path / "sound.gguf"
    path.write_bytes(SOUND)
    for name in ("inspect", "dequantize", "doctor"):
        USES[name](path)
    with pytest.raises(MobieError, match=r"mobie\.data\.sha256") as e:
        mobie.verify(path)
    assert "and " not in str(e.value), "nothing but what the file before says of its bits and data"


@given(st.lists(entries(), min_size=1, max_size=2))
def test_sound_file_with_odd_metadata(changes):
    use(put_together(ENTRIES | {e.key: e for e in changes}, TENSORS))


@given(st.sampled_from([n for n in TENSORS if layout.kind(n) != "other"]), rows(), st.booleans())
def test_sound_file_with_an_odd_tensor(name, row, gone):
    changed = dict(TENSORS)
    if gone:
        del changed[name]
    else:
        changed[name] = row[1], row[2], TENSORS[name][2]
    use(put_together(ENTRIES, changed))


@given(st.lists(st.tuples(st.integers(0, 15_000), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 60))
def test_sound_file_with_changed_bytes(changes, cut):
    """In metadata and tensor table; and some of them shorter."""
    data = bytearray(SOUND)
    for at, byte in changes:
        data[at] = byte
    use(bytes(data[: len(data) - 1000 * max(0, cut - 50)]))
