"""What a user can get wrong about a calibration is said in the user's words before any work; what is right works."""

import dataclasses
import gzip
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobie_export import cli, gguf_io
from mobie_export.calibration.tokenizer import tokenize
from mobie_export.cli import Exit
from mobie_export.errors import BAD_INPUT, USAGE, MobieError
from mobie_export.exporting.effort import Effort
from mobie_export.methods.calibrated import Calibrated
from mobie_export.spec import layout as model_names
from tests import models

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mobie_export.calibration import own_text, passes, states  # noqa: E402 (they need torch)
from mobie_export.calibration.text import read_text  # noqa: E402 (they need torch)
from mobie_export.methods.calibrated import (  # noqa: E402 (they need torch)
    glas,
    options,
    refine,
    second_signs,
    steps,
)
from mobie_export.methods.calibrated.method import REFINEMENTS  # noqa: E402
from mobie_export.methods.calibrated.snapshots import Snapshots  # noqa: E402
from mobie_export.methods.paper import Paper  # noqa: E402
from mobie_export.models import twin  # noqa: E402 (they need torch)

CALIBRATED = ["--method", "calibrated"]
SHORT = ["--samples", "40", "--seq-len", "64", "--threads", "1", "--quiet"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("input") / "m.gguf"
    models.write_qwen3moe(path)
    return path


@pytest.fixture
def short(monkeypatch):
    """Few steps: these are tests of the way."""
    monkeypatch.setattr(refine, "LAYERWISE", dataclasses.replace(refine.LAYERWISE, steps=2, batch_tokens=512))
    monkeypatch.setattr(refine, "WHOLE", dataclasses.replace(refine.WHOLE, steps=2, batch_tokens=512))


@pytest.fixture
def refused(model, tmp_path, capsys):
    """Runs a command that must fail, before anything is written; returns what it says."""

    def run(code: int, *words, source: Path = model, output: str = "o.gguf") -> str:
        capsys.readouterr()
        before = sorted(p.name for p in tmp_path.iterdir())
        assert cli.main([str(source), "-o", str(tmp_path / output), *map(str, words)]) == code
        said = capsys.readouterr().err
        assert "internal error" not in said and "Traceback" not in said
        assert sorted(p.name for p in tmp_path.iterdir()) == before, "something was made or is gone"
        return said

    return run


# ---- options ---------------------------------------------------------------------------------------------------------

OPTIONS_OF_A_CALIBRATION = [
    *(["--refine", "none"], ["--bpw", "1.25"], ["--preset", "large"], ["--steps", "9"], ["--device", "cpu"]),
    *(["--calibration", "text of mine.txt"], ["--chat"], ["--samples", "64"], ["--seq-len", "64"], ["--seed", "1"]),
    *(["--no-tune-router"], ["--no-tune-norms"]),
]


@pytest.mark.parametrize("words", OPTIONS_OF_A_CALIBRATION, ids=lambda w: w[0])
def test_options_choose_no_method(refused, model, tmp_path, words):
    lacking = [("sign", ["--method", "sign"]), ("sign", ["--method=sign"])]
    if words[0].startswith("--no-tune"):
        lacking += [("ordered", []), ("ordered", ["--method", "ordered"])]
    else:  # the default has it too
        assert isinstance(cli._method(cli._parser()[0].parse_args(["export", str(model), *words])), Effort)
    for name, method in lacking:
        said = refused(Exit.USAGE, *method, *words)
        assert f"--method {name} has no such options" in said
        assert words[0] in said.splitlines()[1]
        (command,) = re.findall("next: +mobie-export (.*)", said)
        wanted = [str(model), "-o", str(tmp_path / "o.gguf"), *words, *CALIBRATED]
        assert shlex.split(command) == wanted
        args = cli._parser()[0].parse_args(["export", *wanted])
        if words != ["--chat"]:  # which needs a text besides
            assert isinstance(cli._method(args), Calibrated)


def test_options_of_every_method_are_accepted_by_each(model, tmp_path, refused):
    plan = ["plan", str(model), "-o", str(tmp_path / "o.gguf"), "--threads", "1", "--max-ram"]
    assert cli.main([*plan, "8G"]) == 0
    assert cli.main([*plan, "8G", "--method", "sign"]) == 0
    said = refused(Exit.NO_MEMORY, "--method", "sign", "--max-ram", "1M")
    assert "the export needs more memory" in said and "1.00 MiB" in said


def test_a_recipe_is_a_method(model):
    args = cli._parser()[0].parse_args(["export", str(model), "--method", "paper", "--samples", "64"])
    assert cli._method(args) == Paper(samples=64)


@pytest.mark.parametrize(
    "words,names",
    [
        (["--samples", "100000000"], ["100000000", "--samples 13144"]),  # what the bundled text has with this tokenizer
        (["--samples", "1"], ["--samples 1", "at least 2"]),
        (["--seq-len", "1"], ["--seq-len", "at least 2"]),
        (["--seq-len", "4097"], ["4097", "at most 4096"]),
        (["--seq-len", "1" + "0" * 30], ["at most 4096"]),
        (["--steps", "1000000000"], ["--steps", "at most 1000000"]),
        (["--seed", "-1"], ["--seed", "at least 0"]),
        (["--seed", "1" + "0" * 40], ["--seed", f"at most {2**63 - 1}"]),
        (["--bpw", "99"], ["99", "at most 2.2575"]),
        (["--bpw", "inf"], ["inf", "a number such as"]),
        (["--bpw", "nan"], ["nan", "a number such as"]),
        (["--bpw", "0"], ["--bpw"]),
        (["--bpw", "-3"], ["--bpw"]),
        (["--bpw", "1.1"], ["1.1", "at least 1.12"]),
        (["--device", "gpu"], ["gpu", "cuda:N"]),
        (["--device", "meta"], ["meta", "cuda:N"]),
        (["--device", ""], ["cuda:N"]),
    ],
    ids=lambda x: " ".join(x)[:24],
)
def test_values_without_sense_are_refused_with_those_that_have(refused, words, names, runtime_tools):
    said = refused(Exit.USAGE, *CALIBRATED, *words)
    assert all(n in said for n in names), said


def test_a_device_that_is_not_here(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda:1 is not here" in refused(Exit.UNSUPPORTED, *CALIBRATED, "--device", "cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "1 devices" in refused(Exit.UNSUPPORTED, *CALIBRATED, "--device", "cuda:1")
    Calibrated(device="cuda").check()


NUMBERS = st.one_of(st.integers(), st.sampled_from([0, 1, 2, 31, 32, 1024, 2**31, 2**63 - 1, 2**63, 2**64]))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "samples": NUMBERS,
            "seq_len": NUMBERS,
            "steps": NUMBERS,
            "seed": NUMBERS,
            "bpw": st.floats(),
            "device": st.text(max_size=8),
            "refine": st.sampled_from(REFINEMENTS),
        },
    )
)
def test_options_are_sound_or_refused(some):
    try:
        o = Calibrated(**some)
    except MobieError as e:
        assert e.kind == USAGE and "--" in e.what
        return
    assert o.samples >= (1 if o.refine == "none" else 2) and o.seq_len >= 2 and (o.bpw is None or 0 < o.bpw < math.inf)
    torch.Generator().manual_seed(o.seed)
    torch.device(o.device)
    if o.whole:
        assert o.whole.sequences(o.seq_len) >= 2, "one to tune on, one to keep aside"


@pytest.mark.parametrize("n", [2, 3, 8, 15, 16, 17, 31, 32, 33, 144, 4096])
def test_something_is_always_kept_aside(n):
    train, aside = refine.held_out(n)
    assert len(train) and len(aside) and not set(train.tolist()) & set(aside.tolist())
    assert len(aside) == min(max(1, n // 16), 64)


# A step of one sequence, a batch of one sequence kept aside, none of 16 to keep aside.
@pytest.mark.parametrize(
    "samples,seq_len,refinement",
    [(8, 64, "layerwise"), (2, 16, "streamed"), (34, 513, "layerwise"), (40, 600, "end-to-end"), (144, 8, "streamed")],
)
def test_any_number_and_length_of_sequences_works(model, tmp_path, short, samples, seq_len, refinement, runtime_tools):
    words = [
        "--samples",
        samples,
        "--seq-len",
        seq_len,
        "--refine",
        refinement,
        "--steps",
        1,
        "--threads",
        1,
        "--quiet",
        "--allow-thin",
    ]
    assert cli.main([str(model), "-o", str(tmp_path / "o.gguf"), *CALIBRATED, *map(str, words)]) == 0
    assert cli.main(["verify", str(tmp_path / "o.gguf"), "-q"]) == 0


def test_states_are_read_by_one_index_as_by_several(tmp_path):
    kept = states.States(tmp_path / "hidden-1", (4, 3, 64))
    kept.write(slice(0, 4), torch.arange(4.0)[:, None, None].expand(4, 3, 64))
    for where in ([2], [2, 0]):
        found = kept.read(torch.tensor(where))
        assert found.shape == (len(where), 3, 64) and found[:, 0, 0].tolist() == where


@pytest.mark.parametrize("fused", [False, True])
def test_bits_allowed_are_not_exceeded(fused):
    """Gains of all kinds: up before gate, gate before up, both at once."""
    rng = random.Random(0)
    for _ in range(100):
        curves = {
            i: {p: sorted((rng.random() ** 4 * w for _ in range(5)), reverse=True) for p, w in gains.items()}
            for i in range(3)
            for gains in [{"gate": rng.random(), "up": rng.random(), "down": rng.random()}]
        }
        bits = {i: dict.fromkeys(("gate", "up", "down"), 900) for i in curves}
        budget = rng.uniform(0, 60_000)
        found = second_signs.allocate(curves, bits, budget, fused, numbers=2048)
        used = sum(n // 64 * bits[i][p] for i, k in found.items() for p, n in k.items())
        used += sum(32 * max(k["gate"], k["up"]) for k in found.values())
        assert used <= budget
        assert budget < 9000 or used > 0


def test_bits_are_not_exceeded_where_up_gains_more_than_gate(tmp_path, runtime_tools):
    def louder(tensors: models.Tensors) -> None:
        """up alone has weights of different size, for which a second sign pays"""
        for i in range(models.N_LAYER):
            for p, power in (("gate", 0), ("up", 4), ("down", 0)):
                w, kind = tensors[f"blk.{i}.ffn_{p}_exps.weight"]
                w = np.sign(w) * np.abs(w.astype(np.float32)) ** power
                tensors[f"blk.{i}.ffn_{p}_exps.weight"] = models.stored(w / np.sqrt((w**2).mean()) / 18, kind)

    path, out = tmp_path / "m.gguf", tmp_path / "o.gguf"
    models.write_qwen3moe(path, change=louder)
    with gguf_io.open_model(path) as g:
        weights = sum(x.n_weights for x in model_names.experts(g).values())
        # five times 64 columns of a projection, and nothing for their numbers
        bpw = (options.least_bits(g) + 5 * 72 * models.N_FF * models.N_EXPERT + 1) / weights
    words = ["--refine", "none", "--bpw", repr(bpw)]
    assert cli.main([str(path), "-o", str(out), *CALIBRATED, *SHORT, *words]) == 0
    with gguf_io.open_model(out) as g:
        k = {n: t.shape[0] for n, t in g.tensors.items() if n.endswith((".residual", ".columns"))}
        assert any(
            k.get(f"blk.{i}.ffn_up_exps.residual", 0) > k.get(f"blk.{i}.ffn_gate_exps.residual", 0) for i in (0, 1)
        )
        assert 1.25 < g.value("mobie.expert_bpw") <= bpw


# ---- packages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing,command",
    [("torch", ["plan"]), ("torch", ["export"]), ("transformers", ["export", "--dry-run"]), ("llama_cpp", ["export"])],
)
def test_a_missing_package_is_named_with_the_way_to_it(model, tmp_path, missing, command):
    """In a child without it; its children inherit the block by PYTHONPATH."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {missing!r}:\n"
        f"            raise ModuleNotFoundError('No module named {missing}', name={missing!r})\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path[:1], os.environ.get("PYTHONPATH", "")]),
    }
    words = [sys.executable, "-m", "mobie_export", *command, str(model), "-o", str(tmp_path / "o"), *CALIBRATED]
    child = subprocess.run(words, env=env, capture_output=True, text=True)
    assert child.returncode == Exit.UNSUPPORTED, child.stderr
    assert f"No module named {missing}" in child.stderr and "Traceback" not in child.stderr
    todo = "runtime build" if missing == "llama_cpp" else "pip install 'mobie-export[calibrate]'"
    assert todo in child.stderr
    assert [p.name for p in tmp_path.iterdir() if p.name[0] != "_"] == ["sitecustomize.py"]


def test_a_transformers_without_the_architecture_is_named(model, refused, monkeypatch):
    monkeypatch.delitem(sys.modules, "mobie_export.models.families.qwen", raising=False)
    monkeypatch.setitem(sys.modules, "transformers.models.qwen3_moe", None)
    said = refused(Exit.UNSUPPORTED, *CALIBRATED)
    assert "does not know qwen3moe" in said and "pip install" in said


# ---- the text --------------------------------------------------------------------------------------------------------

PROSE = "The old man looked at the sea, and the sea said nothing that he had not heard before.\n"


@pytest.mark.parametrize(
    "name,data,says",
    [
        ("text.txt.gz", gzip.compress(PROSE.encode() * 999), "gzip"),
        ("text.bin", random.Random(0).randbytes(100_000), "binary data"),
        ("text.noise", bytes(random.Random(0).choices(range(1, 256), k=100_000)), "binary data"),
        ("text.txt.xz", b"no xz at all", "cannot read"),
        ("text.utf16", b"\xff\xfe" + b"\x00\xd8" * 999, "UTF-16"),
        ("text.txt", b"", "too short"),
        ("text.txt", b"short", "too short"),
    ],
)
def test_what_is_no_text_is_refused_by_its_name(tmp_path, refused, name, data, says, runtime_tools):
    path = tmp_path / name
    path.write_bytes(data)
    said = refused(Exit.BAD_INPUT, *CALIBRATED, "--calibration", path)
    assert says in said and str(path) in said


def test_a_text_that_is_not_there(tmp_path, refused):
    """A mistyped name beside an existing output, which stays; a folder; a device without an end."""
    (tmp_path / "o.gguf").write_bytes(b"mine")
    for path in (tmp_path / "mistyped.txt", tmp_path, Path("/dev/zero"), Path("nul\0byte")):
        said = refused(Exit.BAD_INPUT, *CALIBRATED, "--overwrite", "--calibration", path)
        assert f"cannot read the calibration text {path}" in said
    assert (tmp_path / "o.gguf").read_bytes() == b"mine"


def test_the_text_is_refused_before_a_checkpoint_is_converted(tmp_path, refused, monkeypatch):

    monkeypatch.setattr("mobie_export.sources.find.find", lambda *a: pytest.fail("too late"))
    assert "mistyped" in refused(Exit.BAD_INPUT, *CALIBRATED, "--calibration", tmp_path / "mistyped.txt")


def noted(model, tmp_path, data: bytes, *words, code: int = 0) -> list[str]:
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    with gguf_io.open_model(model) as gguf:
        return list(steps.sequences(Calibrated(text=path, **dict(words)), gguf).notes)


def test_doubtful_texts_are_warned_of(model, tmp_path, runtime_tools):
    enough = PROSE * 5000
    assert noted(model, tmp_path, enough.encode()) == []
    assert noted(model, tmp_path, enough.encode() + "ü".encode()[:1]) == [], "a last character that was cut"
    (note,) = noted(model, tmp_path, enough.encode("utf-16"))
    assert "UTF-16" in note
    (note,) = noted(model, tmp_path, enough.replace("a", "ä").encode("latin-1"))
    assert "not in UTF-8" in note and "iconv" in note
    jsonl = "".join(json.dumps({"text": PROSE}) + "\n" for _ in range(5000)).encode()
    (note,) = noted(model, tmp_path, jsonl)
    assert "--chat" in note
    (note,) = noted(model, tmp_path, (PROSE * 150).encode())
    assert re.search(r"it has \d\d of 1024 sequences", note)


def test_utf16_is_read_as_the_text_it_is(tmp_path):
    for encoding in ("utf-16", "utf-32", "utf-8"):
        (tmp_path / encoding).write_text(PROSE + "ü→", encoding=encoding)
        assert read_text(tmp_path / encoding) == (PROSE + "ü→").encode()


def test_warnings_come_before_the_work_and_in_the_report(model, tmp_path, capsys, runtime_tools):
    text = tmp_path / "text.txt"
    text.write_bytes((PROSE * 40).encode())
    words = [str(model), "-o", str(tmp_path / "o.gguf"), *CALIBRATED, "--calibration", str(text), "--refine", "none"]
    words += ["--seq-len", "64", "--samples", "1000", "--threads", "1"]
    assert cli.main(["plan", *words]) == 0
    assert "note         the calibration text" in capsys.readouterr().out
    assert cli.main([*words, "--quiet"]) == 0
    said = capsys.readouterr()
    note = f"the calibration text {text} is short: it has 51 of 1000 sequences of 64 tokens"
    assert f"mobie-export: warning: {note}" in said.err and note in said.out


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def dying(tmp_path, monkeypatch, body: str) -> None:
    """A llama_cpp that does `body` when it tokenizes."""
    (tmp_path / "llama_cpp.py").write_text(
        "import ctypes, os, signal, sys, types\n"
        "def __getattr__(name):\n"
        "    return lambda *a: types.SimpleNamespace()\n"
        "llama_token_p = ctypes.POINTER(ctypes.c_int32)\n"
        "llama_log_callback = lambda f: f\n"
        f"def llama_tokenize(*a):\n    {body}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.parametrize(
    "body,says",
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("sys.stderr.write('terminate called: what(): regex_error\\n'); os.abort()", "SIGABRT; terminate called"),
        ("return -7", "7 tokens"),
        ("os._exit(0)", "exit code 0"),
        ("raise OSError('access violation')", "access violation"),
    ],
)
def test_a_tokenizer_that_dies_is_an_error(model, tmp_path, monkeypatch, body, says):
    dying(tmp_path, monkeypatch, body)
    with pytest.raises(MobieError, match="cannot take my text") as e:
        tokenize(model, b"some text", name="my text")
    assert e.value.kind == BAD_INPUT and says in e.value.found


def test_long_runs_are_tokens_or_an_error(model, runtime_tools):
    """Which of them depends on the pre-tokenizer and the stack; the process lives."""
    for text in (b"a" * 300_000, b" " * 300_000, random.Random(0).randbytes(100_000)):
        try:
            found, _ = tokenize(model, text)
        except MobieError as e:
            assert e.kind == BAD_INPUT
        else:
            assert len(found) > 0 and found.min() >= 0


def test_a_model_without_a_tokenizer(tmp_path, refused, monkeypatch, runtime_tools):
    path = tmp_path / "none.gguf"
    with monkeypatch.context() as m:
        for name in ("add_tokenizer_pre", "add_token_list", "add_token_types", "add_token_merges"):
            m.setattr(models.gguf.GGUFWriter, name, lambda *a: None)
        m.setattr(
            models.gguf.GGUFWriter,
            "add_tokenizer_model",
            lambda self, _: self.add_string("tokenizer.ggml.model", "none"),
        )
        models.write_qwen3moe(path, keys=lambda w: w.add_uint32("qwen3moe.vocab_size", models.N_VOCAB))
    said = refused(Exit.BAD_INPUT, *CALIBRATED, source=path)
    assert str(path) in said and "no tokenizer" in said and "--method sign" in said


# ---- the model -------------------------------------------------------------------------------------------------------

PLACES = [
    *("token_embd.weight", "output.weight", "output_norm.weight", "blk.0.attn_q.weight", "blk.1.attn_norm.weight"),
    *("blk.1.ffn_gate_inp.weight", "blk.1.ffn_norm.weight", "blk.0.attn_k_norm.weight", "blk.1.ffn_down_exps.weight"),
]


@pytest.mark.parametrize("method", ["calibrated", "ordered"])
@pytest.mark.parametrize("place,value", [*((p, math.nan) for p in PLACES), ("blk.0.attn_output.weight", math.inf)])
def test_a_weight_that_is_no_number_is_named(tmp_path, refused, method, place, value, runtime_tools, monkeypatch):
    """Before anything is computed, wherever it is, and before the model writes a text."""
    for module, name in ((passes, "forward"), (twin.Twin, "run"), (own_text, "write")):
        monkeypatch.setattr(module, name, lambda *a: pytest.fail("too late"))
    own = ["--calibration", "self"] if method == "ordered" else []

    def spoil(tensors: models.Tensors) -> None:
        array, kind = tensors[place]
        array.reshape(-1)[7] = value
        tensors[place] = array, kind

    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, change=spoil)
    said = refused(Exit.BAD_INPUT, "--method", method, *SHORT, "--refine", "none", *own, source=path)
    assert f"tensor {place} of {path}" in said and "1 infinite or NaN" in said


@pytest.mark.parametrize("method", ["calibrated", "ordered"])
def test_activations_that_overflow_are_named_with_their_layer(tmp_path, capsys, method, runtime_tools):
    def louder(tensors: models.Tensors) -> None:
        for name in ("blk.1.attn_v.weight", "blk.1.attn_output.weight"):
            values = models.gguf.quants.dequantize(*tensors[name]) * np.float32(1e20)
            tensors[name] = models.stored(values, models.Type.F32)

    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, change=louder)
    words = [str(path), "-o", str(tmp_path / "o.gguf"), "--method", method, *SHORT]
    assert cli.main(words) == Exit.BAD_INPUT
    said = capsys.readouterr().err
    assert "hidden states behind layer 1" in said and "no numbers" in said


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_second_moments_without_an_inverse_end(value):
    H = torch.eye(128).repeat(3, 1, 1)
    H[1, 5, 9] = H[1, 9, 5] = value
    with pytest.raises(glas.NotFactorized):
        glas.inverse_factor(H)
    with pytest.raises(MobieError, match="no numbers") as e, steps.numbers(7):
        glas.inverse_factor(H)
    assert "layer 7" in e.value.found


def test_a_binary_model_without_a_finite_loss_is_an_error(tmp_path):
    kept = Snapshots(tmp_path, refine.Layers([], lambda i: torch.nn.Identity(), lambda i, layer: []))
    with pytest.raises(MobieError, match="no numbers"):
        refine._optimize(refine.LAYERWISE, kept, torch.arange(4), 1, lambda *a: None, lambda: math.nan, lambda *a: None)


def shaped(name: str, *shape: int):
    def change(tensors: models.Tensors) -> None:
        tensors[name] = models.stored(np.ones(shape), models.Type.F32)

    return change


def without(*names: str):
    return lambda tensors: [tensors.pop(n) for n in list(tensors) if any(x in n for x in names)]


@pytest.mark.parametrize(
    "change,says",
    [
        (shaped("blk.1.attn_q.weight", 320, 256), "blk.1.attn_q.weight [256, 320], wanted [320, 256]"),
        (shaped("blk.1.ffn_norm.weight", 64), "blk.1.ffn_norm.weight [64], wanted [320]"),
        (shaped("blk.1.ffn_gate_inp.weight", 7, 320), "blk.1.ffn_gate_inp.weight"),
        (
            shaped("blk.1.ffn_up_exps.weight", 8, 128, 320),
            "blk.1.ffn_up_exps.weight [320, 128, 8], wanted [320, 192, 8]",
        ),
        (shaped("blk.1.ffn_down_exps.weight", 7, 320, 192), "blk.1.ffn_down_exps.weight"),
        (shaped("blk.0.ffn_down_exps.bias", 8, 320), "biases of down alone in layer 0"),
        (shaped("output.weight", 320, 64), "output.weight"),
        (without("token_embd"), "token_embd.weight"),
        (without("blk.1.ffn_gate_exps"), "blk.1.ffn_gate_exps.weight missing"),
        (without("blk.1.attn_k."), "blk.1.attn_k.weight"),
        (without("blk.0."), "blk.0."),
    ],
)
def test_layouts_that_no_twin_has_are_refused_by_name(tmp_path, refused, change, says):
    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, change=change)
    said = refused(Exit.UNSUPPORTED, *CALIBRATED, source=path)
    assert says in said and "--method sign" in said


def with_metadata(path: Path, name: str, kind: int, value, item: int | None = None) -> Path:
    """A model with one entry of its architecture set."""
    plain = path.with_suffix(".plain")
    models.write_qwen3moe(plain)
    with gguf_io.open_model(plain) as gguf:
        entry = gguf_io.make_entry(f"qwen3moe.{name}", kind, value, item)
        gguf_io.rewrite(gguf, path, entries=[entry])
    plain.unlink()
    return path


F32, U32, TEXT, ARRAY = gguf_io.F32, gguf_io.U32, gguf_io.STRING, gguf_io.ARRAY


@pytest.mark.parametrize(
    "entry,code",
    [
        (("rope.scale_linear", F32, 4.0), Exit.UNSUPPORTED),
        (("rope.scaling.factor", F32, 4.0), Exit.UNSUPPORTED),
        (("rope.scaling.type", TEXT, "longrope"), Exit.UNSUPPORTED),
        (("rope.scaling.attn_factor", F32, 2.0), Exit.UNSUPPORTED),
        (("rope.dimension_count", U32, 32), Exit.UNSUPPORTED),
        (("attention.causal", gguf_io.BOOL, False), Exit.UNSUPPORTED),
        (("attention.scale", F32, 0.5), Exit.UNSUPPORTED),
        (("expert_weights_scale", F32, 2.5), Exit.UNSUPPORTED),
        (("expert_group_count", U32, 4), Exit.UNSUPPORTED),
        (("swiglu_clamp_exp", ARRAY, [7.0, 7.0], F32), Exit.UNSUPPORTED),
        (("of_a_later_llama_cpp", U32, 1), Exit.UNSUPPORTED),
        (("expert_used_count", ARRAY, [2, 3], U32), Exit.UNSUPPORTED),
        (("expert_used_count", U32, 0), Exit.UNSUPPORTED),
        (("expert_used_count", U32, 9), Exit.UNSUPPORTED),
        (("expert_used_count", TEXT, "two"), Exit.BAD_INPUT),
        (("attention.head_count", U32, 0), Exit.UNSUPPORTED),
        (("attention.head_count", U32, 7), Exit.UNSUPPORTED),
        (("block_count", U32, 0), Exit.UNSUPPORTED),
        (("nextn_predict_layers", U32, 2), Exit.UNSUPPORTED),
        (("context_length", TEXT, "long"), Exit.BAD_INPUT),
        (("context_length", U32, 0), Exit.BAD_INPUT),
        (("embedding_length", U32, 64), Exit.UNSUPPORTED),
    ],
    ids=lambda x: f"{x[0]} {x[2]}" if isinstance(x, tuple) else "",
)
def test_metadata_that_changes_the_function_is_refused_by_name(tmp_path, refused, entry, code):
    source = with_metadata(tmp_path / "m.gguf", *entry)
    said = refused(code, *CALIBRATED, source=source)
    what = entry[0].split(".")[-1].replace("scale_linear", "linear").replace("scaling.factor", "linear")
    assert str(source) in said
    if entry[0] not in ("rope.scaling.factor", "attention.head_count", "block_count", "nextn_predict_layers"):
        assert what in said or entry[0] in ("embedding_length",), said


@pytest.mark.parametrize(
    "entry",
    [
        ("expert_used_count", ARRAY, [2, 2], U32),
        ("attention.head_count", ARRAY, [4, 4], U32),
        ("rope.scale_linear", F32, 1.0),
        ("rope.scaling.type", TEXT, "none"),
        ("rope.scaling.type", TEXT, "linear"),
        ("rope.dimension_count", U32, 64),
        ("expert_weights_scale", F32, 1.0),
        ("vocab_size", U32, 320),
    ],
    ids=lambda x: f"{x[0]} {x[2]}",
)
def test_metadata_that_changes_nothing_is_accepted(tmp_path, entry):
    tokens = torch.arange(32)[None]
    models.write_qwen3moe(tmp_path / "plain.gguf")
    found = []
    for path in (tmp_path / "plain.gguf", with_metadata(tmp_path / "m.gguf", *entry)):
        with gguf_io.open_model(path) as gguf, torch.no_grad():
            t = twin.Twin(gguf)
            hidden = t.embedding()[tokens]
            for i in range(t.n_layers):
                hidden = t.run(t.layer(i), hidden)
            found.append(t.head()(hidden))
    assert torch.equal(*found)
