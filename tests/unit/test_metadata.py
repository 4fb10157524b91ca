"""`mobie-export metadata`: other entries, the same tensors, and `verify` agrees."""

import pytest

from mobie_export import cli, gguf_io, verify
from mobie_export.cli import Exit
from tests import exporting, models

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }} ü → {% endfor %}"


pytestmark = pytest.mark.usefixtures("without_runtime")


@pytest.fixture(scope="module")
def mobie(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metadata")
    models.write_qwen3moe(folder / "m.gguf", keys=models.every_kind_of_entry)
    return exporting.export(folder / "m.gguf", folder / "mobie.gguf").output


def edit(path, out, *options) -> int:
    return cli.main(["metadata", str(path), "-o", str(out), "-q", *map(str, options)])


def test_a_template_is_exchanged_and_the_file_stays_sound(mobie, tmp_path):
    out, template = tmp_path / "out.gguf", tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    options = ("--set-file", f"tokenizer.chat_template={template}", "--set", "general.name=a=b", "--remove", "x.u8")
    assert edit(mobie, out, *options) == Exit.OK
    verify(out)
    with gguf_io.open_model(mobie) as a, gguf_io.open_model(out) as b:
        changed = {"tokenizer.chat_template", "general.name"}
        assert b.value("tokenizer.chat_template") == TEMPLATE and b.value("general.name") == "a=b"
        assert list(b.entries) == [k for k in a.entries if k != "x.u8"], "order"
        assert all(b.entries[k].raw == a.entries[k].raw for k in b.entries if k not in changed)
        assert list(a.tensors) == list(b.tensors)
        assert all(bytes(a.read(t)) == bytes(b.read(b.tensors[n])) for n, t in a.tensors.items())


def test_entries_keep_their_types(mobie, tmp_path):
    out = tmp_path / "out.gguf"
    values = {
        "x.i8": -7,
        "x.u64": 2**64 - 1,
        "x.f64": 0.1,
        "x.bool": False,
        "x.bools": [False],
        "x.strings": ["a", "1"],
    }
    texts = {"x.i8": "-7", "x.u64": "0xffffffffffffffff", "x.f64": "0.1", "x.bool": "false", "x.bools": "[false]"}
    values["x.strings"] = ["a", "1"]
    texts["x.strings"] = '["a", "1"]'
    options = [o for k, t in texts.items() for o in ("--set", f"{k}={t}")]
    assert edit(mobie, out, *options, "--set", "new.text=1", "--set", "new.number:u32=1") == Exit.OK
    with gguf_io.open_model(mobie) as a, gguf_io.open_model(out) as b:
        for key, value in values.items():
            assert b.value(key) == value and b.entries[key].type_name == a.entries[key].type_name
        assert b.value("new.text") == "1" and b.value("new.number") == 1 and list(b.entries)[-1] == "new.number"


@pytest.mark.parametrize(
    "option",
    [
        ("--set", "mobie.method=x"),
        ("--set", "general.alignment=64"),
        ("--remove", "mobie.data.sha256"),
        ("--set", "x.u8=256"),
        ("--set", "x.u8=text"),
        ("--set", "x.bool=1"),
        ("--set", "x.floats=1"),
        ("--set", "x.floats=["),
        ("--set", "x.new:array=[1]"),
        ("--set", "no-equals"),
        ("--set", "x:type=1"),
        (),
    ],
)
def test_what_makes_no_sense_is_refused(mobie, tmp_path, capsys, option):
    assert edit(mobie, tmp_path / "out.gguf", *option) == Exit.USAGE
    assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "out.gguf").exists()


def test_what_is_not_there_is_said(mobie, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    assert edit(mobie, out, "--remove", "no.such") == Exit.BAD_INPUT
    assert edit(mobie, out, "--set-file", f"general.name={tmp_path / 'no.file'}") == Exit.BAD_INPUT
    assert edit(mobie, mobie, "--set", "general.name=x") == Exit.BAD_OUTPUT, "the input is never replaced"
    assert not out.exists()


def test_damage_is_not_covered(mobie, tmp_path):
    """The digests are the file's own: a damaged file does not become a sound one by being copied."""
    with gguf_io.open_model(mobie) as gguf:
        at = gguf.tensors["blk.0.attn_q.weight"].offset
    data = bytearray(mobie.read_bytes())
    data[at] ^= 1
    (tmp_path / "damaged.gguf").write_bytes(data)
    assert edit(tmp_path / "damaged.gguf", tmp_path / "out.gguf", "--set", "general.name=x") == Exit.VERIFY_FAILED
    assert not (tmp_path / "out.gguf").exists()


def test_any_gguf_and_its_shards(tmp_path):
    models.write_qwen3moe(tmp_path / "s.gguf", split=7)
    out = tmp_path / "out.gguf"
    assert edit(min(tmp_path.glob("s-*.gguf")), out, "--set", "general.name=x", "--split-max-size", "1M") == Exit.OK
    with gguf_io.open_model(min(tmp_path.glob("out-*.gguf"))) as gguf:
        assert gguf.value("general.name") == "x" and len(gguf.paths) > 1
