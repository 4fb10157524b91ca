"""What the runtime refuses rather than computing something else, and what it leaves as it is."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from mobie_export import gguf_io
from mobie_export.spec import block as mobie
from tests import models
from tests.scoring import logits

TYPE_I32 = gguf.GGMLQuantizationType.I32.value
TINY = Path(__file__).resolve().parents[2] / "examples/tiny-moe/tiny-moe-f16.gguf"


def extended(source: Path, output: Path, more: dict[str, tuple[tuple[int, ...], int, np.ndarray]]) -> None:
    """A copy of a GGUF with tensors added or replaced: name -> (shape in GGUF's order, type id, bytes)."""
    with gguf_io.open_model(source) as model:
        gguf_io.rewrite(model, output, tensors={n: gguf_io.NewTensor.stored(*new) for n, new in more.items()})


def second_plane(columns=range(64), layer: int = 0) -> dict:
    """Random second signs for 64 columns of a layer's experts."""
    rng, parts = np.random.default_rng(0), {}
    for part, rows in (("gate", models.N_FF), ("up", models.N_FF), ("down", models.N_EMBD)):
        shape = (64, rows, models.N_EXPERT)
        blocks = rng.integers(0, 256, (models.N_EXPERT, rows, mobie.BLOCK_BYTES), dtype=np.uint8)
        parts[f"blk.{layer}.ffn_{part}_exps.residual"] = (shape, mobie.TYPE_ID, blocks)
    named = np.asarray(columns, "<i4")
    return parts | {f"blk.{layer}.ffn_exps.columns": (named.shape, TYPE_I32, named)}


def factors() -> dict:
    shape = (models.N_EMBD, models.N_EMBD)
    return {f"blk.0.ffn_moe_{end}.weight": (shape, 0, np.eye(models.N_EMBD, dtype="<f4")) for end in ("in", "out")}


def adapter(path: Path, names: dict[str, tuple[int, ...]]) -> Path:
    """A random LoRA of rank 4 on tensors of these shapes, in GGUF's order."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for name, (cols, rows, *experts) in names.items():
        a, b = rng.standard_normal((*experts, 4, cols)), rng.standard_normal((*experts, rows, 4))
        writer.add_tensor(f"{name}.lora_a", (a / np.sqrt(cols)).astype(np.float32))
        writer.add_tensor(f"{name}.lora_b", (b / 2).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


EXPERTS = {
    f"blk.{i}.ffn_{part}_exps.weight": (cols, rows, models.N_EXPERT)
    for i in range(models.N_LAYER)
    for part, cols, rows in (
        ("gate", models.N_EMBD, models.N_FF),
        ("up", models.N_EMBD, models.N_FF),
        ("down", models.N_FF, models.N_EMBD),
    )
}
ATTENTION = {f"blk.{i}.attn_q.weight": (models.N_EMBD, models.N_HEAD * models.HEAD) for i in range(models.N_LAYER)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    source, output = folder / "f16.gguf", folder / "mobie.gguf"
    models.write_qwen3moe(source, seed=4)
    command = [sys.executable, "-m", "mobie_export", source, "-o", output, "--method", "sign", "-q"]
    subprocess.run(command, check=True)
    return output


def loads(tools: Path, model: Path, *options: object) -> subprocess.CompletedProcess:
    command = [tools / "llama-completion", "-m", model, "-p", "a", "-n", "1", "-no-cnv", "-t", "1", *options]
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
    )


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["second plane", "factors"])
def test_no_adapter_on_rearranged_experts(runtime_tools, tmp_path, plain, what):
    """Only layer 0 is: an adapter on the experts of layer 1 alone fits, and so does one on attention."""
    from llama_cpp import Llama

    model = tmp_path / "m.gguf"
    extended(plain, model, second_plane() if what == "second plane" else factors())
    assert loads(runtime_tools, model).returncode == 0
    for name, shape in EXPERTS.items():
        lora = adapter(tmp_path / f"{name}.gguf", {name: shape})
        fits = name.startswith("blk.1.")
        found = loads(runtime_tools, model, "--lora", lora)
        assert (found.returncode == 0) == fits, found.stderr
        assert fits or f"LoRA tensor '{name}' does not fit" in found.stderr
    with pytest.raises(RuntimeError, match="LoRA"):
        Llama(str(model), lora_path=str(adapter(tmp_path / "all.gguf", EXPERTS)), verbose=False)
    lora = adapter(tmp_path / "attention.gguf", ATTENTION)
    assert np.abs(logits(model, 64) - logits(model, 64, lora)).max() > 0.1, "an adapter on attention does nothing"


def test_an_adapter_on_plain_experts_does_what_it_does_to_the_weights_they_stand_for(runtime_tools, tmp_path, plain):
    f32 = tmp_path / "f32.gguf"
    subprocess.run([sys.executable, "-m", "mobie_export", "dequantize", plain, "-o", f32, "-q"], check=True)
    lora = adapter(tmp_path / "lora.gguf", EXPERTS)
    for n_batch in (1, 64):
        truth, ours = (logits(m, n_batch, lora) - logits(m, n_batch) for m in (f32, plain))
        assert truth.std() > 0.1
        assert np.corrcoef(truth.ravel(), ours.ravel())[0, 1] > 0.99


# ---- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "read"])
@pytest.mark.parametrize("wrong", [-1, models.N_EMBD, 7, 2**31 - 1])
def test_columns_are_checked_at_loading(runtime_tools, tmp_path, plain, wrong, mapped):
    model, options = tmp_path / "m.gguf", [] if mapped else ["--load-mode", "none"]
    columns = np.arange(64)[::-1].copy()
    extended(plain, model, second_plane(columns))
    assert loads(runtime_tools, model, *options).returncode == 0
    columns[3] = wrong  # 7 is there already
    extended(plain, model, second_plane(columns))
    found = loads(runtime_tools, model, *options)
    assert found.returncode == 1
    assert f"'blk.0.ffn_exps.columns' names column {wrong}" in found.stderr


def test_types_that_do_not_fit_are_refused_at_loading(runtime_tools, tmp_path, plain):
    shape = (models.N_EMBD, models.N_EMBD)
    wrong = {
        "blk.0.ffn_moe_in.weight": (shape, TYPE_I32, np.zeros(shape, "<i4")),
        "blk.0.ffn_moe_out.weight": (shape, mobie.TYPE_ID, np.zeros(mobie.BLOCK_BYTES * shape[0] ** 2 // 64, np.uint8)),
    }
    wrong["blk.1.ffn_up_exps.scale"] = ((models.N_EXPERT,), 1, np.ones(models.N_EXPERT, "<f2"))
    norm = np.zeros(mobie.BLOCK_BYTES * shape[0] // 64, np.uint8)  # ggml would abort where it multiplies by it
    wrong["blk.0.attn_norm.weight"] = (shape[:1], mobie.TYPE_ID, norm)
    for name, tensor in wrong.items():
        extended(plain, tmp_path / "m.gguf", {name: tensor})
        found = loads(runtime_tools, tmp_path / "m.gguf")
        assert found.returncode == 1 and re.search(f"'{name}' (cannot have|has) type", found.stderr)


# ---- llama-quantize --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [["--tensor-type", "exps=mobie"], ["--output-tensor-type", "mobie"], ["mobie"], ["200"]]
)
def test_llama_quantize_does_not_write_the_type(runtime_tools, tmp_path, how):
    source, output = tmp_path / "f16.gguf", tmp_path / "out.gguf"
    models.write_qwen3moe(source)
    options, kind = (how, "Q8_0") if len(how) > 1 else ([], how[0])
    command = [runtime_tools / "llama-quantize", *options, source, output, kind]
    found = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert found.returncode == 1 and "mobie-export writes it" in found.stdout + found.stderr
    assert not output.exists()


@pytest.mark.parametrize("options", [["Q4_0"], ["--pure", "Q4_0"], ["--allow-requantize", "Q8_0"], ["COPY"]])
def test_llama_quantize_leaves_what_belongs_to_experts(runtime_tools, tmp_path, plain, options):
    model, output = tmp_path / "m.gguf", tmp_path / "out.gguf"
    extended(plain, model, second_plane() | factors())
    command = [runtime_tools / "llama-quantize", *options[:-1], model, output, options[-1]]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    with gguf_io.open_model(model) as a, gguf_io.open_model(output) as b:
        assert set(a.tensors) == set(b.tensors)
        same = {n for n, t in a.tensors.items() if a.read(t).tobytes() == b.read(b.tensors[n]).tobytes()}
    ours = {n for n in a.tensors if "_exps." in n or "ffn_moe_" in n}
    assert ours <= same and len(ours) == 2 * 6 + 4 + 2
    assert ("blk.0.attn_q.weight" in same) == (options == ["COPY"])


# ---- backends --------------------------------------------------------------------------------------------------------


class Reg(ctypes.Structure):
    """ggml_backend_reg: the first member of its interface, and room for the others."""

    _fields_ = [("version", ctypes.c_int), ("get_name", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p))]
    _fields_ += [("others", ctypes.c_void_p * 4)]


class Device(ctypes.Structure):
    """ggml_backend_device: the tenth function of its interface answers which operations it supports."""

    _fields_ = [("before", ctypes.c_void_p * 9)]
    _fields_ += [("supports_op", ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p))]
    _fields_ += [("after", ctypes.c_void_p * 5), ("reg", ctypes.POINTER(Reg)), ("context", ctypes.c_void_p)]


def test_only_backends_with_kernels_are_asked_for_the_type(runtime_tools):
    """A device that says yes to everything, under the names of several backends. RPC answers for its servers."""
    library = ctypes.CDLL(str(next(runtime_tools.parent.glob("*/libggml-base.so"))))
    pointer = ctypes.c_void_p
    library.ggml_init.restype = library.ggml_new_tensor_3d.restype = library.ggml_mul_mat_id.restype = pointer
    library.ggml_get_rows.restype = library.ggml_cpy.restype = library.ggml_view_1d.restype = pointer
    library.ggml_backend_dev_supports_op.restype = ctypes.c_bool

    class Params(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("buffer", pointer), ("no_alloc", ctypes.c_bool)]

    context = pointer(library.ggml_init(Params(1 << 20, None, True)))

    def tensor(kind: int, *shape: int) -> ctypes.c_void_p:
        return pointer(library.ggml_new_tensor_3d(context, kind, *(ctypes.c_int64(n) for n in shape)))

    ids = tensor(TYPE_I32, 2, 5, 1)
    operations = {}
    for kind in (mobie.TYPE_ID, gguf.GGMLQuantizationType.Q8_0.value):
        w, x, y = tensor(kind, 64, 64, 4), tensor(0, 64, 1, 5), tensor(0, 64, 64, 4)
        operations[kind] = [
            library.ggml_mul_mat_id(context, w, x, ids),
            library.ggml_get_rows(context, tensor(kind, 64, 64, 1), tensor(TYPE_I32, 3, 1, 1)),
            library.ggml_cpy(context, w, y),
            library.ggml_cpy(context, y, w),
            library.ggml_view_1d(context, w, ctypes.c_int64(64), ctypes.c_size_t(0)),
        ]
    everything = Device._fields_[1][1](lambda device, op: True)
    backends = ["ROCm", "MUSA", "MTL", "SYCL", "OpenCL", "WebGPU", "BLAS", "CANN", "ZenDNN"]
    asked = {}
    asked_for = ["CPU", "CUDA", "RPC", "Vulkan"]
    for name in [*asked_for, *backends, None]:
        text = ctypes.create_string_buffer(str(name).encode())
        get_name = Reg._fields_[1][1](lambda reg, text=text: ctypes.addressof(text))
        reg = ctypes.pointer(Reg(1, get_name)) if name else None
        device = Device(supports_op=everything, reg=reg)
        for kind, ops in operations.items():
            asked[name, kind] = {library.ggml_backend_dev_supports_op(ctypes.byref(device), pointer(op)) for op in ops}
    for (name, kind), answers in asked.items():
        assert answers == {kind != mobie.TYPE_ID or name in asked_for}, name


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_llama_perplexity_prints_its_last_line(runtime_tools):
    """Written by a thread that nobody waited for, it was lost in some runs."""
    text = Path(__file__).parents[2] / "mobie_export/data/held-out.txt"
    command = [runtime_tools / "llama-perplexity", "-m", TINY, "-f", text, "-c", "64", "--chunks", "2", "-t", "1"]
    for _ in range(10):
        found = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
        assert "Final estimate: PPL" in found.stdout + found.stderr
