"""Does the installed runtime compute the right numbers on this machine?

Tiny models with random weights, one for every kind of weights that a MoBiE file may hold and for two kinds of
attention, are written to a temporary folder and run by llama.cpp: a prompt of 40 tokens, then 8 single ones. Truth is
the same model with its weights decoded to F32; the F32 model itself is held against logits that the project keeps
(data/selftest.json, from the torch implementation). All of it happens in a child process, since what is wrong may
crash: the part that was running is then known, and the others run in another child.

    python -m mobie_export.runtime.selftest FIRST [--gpu] [--only] [--PARAMETER=VALUE]
                                    # the child: parts from number FIRST on, a JSON line for each
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from mobie_export import gguf_io
from mobie_export.gguf_io import F32, STRING, U32, Entry, make_entry
from mobie_export.spec import block, layout

N_VOCAB, WIDTH, FF, N_EXPERT, N_USED = 64, 256, 256, 4, 2  # K-quants have blocks of 256
N_HEAD, HEAD = 4, 64
LATENT, ROPE = 256, 32  # of latent attention: the common vector, the rotated part of a head
PROMPT, SINGLE = 40, 8
TOKENS = [(7 * i + i * i) % N_VOCAB for i in range(PROMPT + SINGLE)]
KEPT = Path(__file__).resolve().parents[1] / "data" / "selftest.json"
TIMEOUT = 600  # seconds for a child; all parts together take a few

ATTENTIONS = ("plain", "latent")
WEIGHTS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "mobie", "second plane", "shared factors")
PARTS = tuple((attention, weights) for weights in WEIGHTS for attention in ATTENTIONS)

# Largest error of the logits at a position, in shares of their norm. Measured: below 0.005 where activations stay
# floats, below 0.034 where they are rounded to 8 bits; one wrong sign in 256 of one of the experts' projections: 0.11.
BOUND_FLOAT, BOUND_ROUNDED = 0.02, 0.08

CHILD = (sys.executable, "-m", "mobie_export.runtime.selftest")

# What could be at fault on a CPU, tried in this order when a part fails: its name, the environment and the parameter of
# llama_model_params without it, and the build option that leaves it out.
REPACK = "-DGGML_CPU_REPACK=OFF"
SUSPECTS: tuple[tuple[str, dict[str, str], tuple[str, ...], str], ...] = (
    ("our kernel for this CPU", {"MOBIE_ISA": "ref"}, (), ""),
    ("the buffers of repacked weights", {}, ("--use_extra_bufts=0",), REPACK),
    ("tiled products", {"GGML_CPU_TILED_MM": "0"}, (), ""),
)
GPUS = 1, 2  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU
GPU_TODO = "run with -ngl 0, or build without the GPU"


@dataclass(frozen=True)
class Failure:
    """A part that went wrong: what happened, and what to do about it."""

    part: str
    device: str  # "CPU" or "GPU"
    what: str
    todo: str

    def __str__(self) -> str:
        return f"self-test, {self.part} on the {self.device}: {self.what}; {self.todo}"


# ---- the parent ------------------------------------------------------------------------------------------------------


def run(command: Sequence[str] = CHILD) -> tuple[list[str], list[Failure]]:
    """(a line for every device that was tested, what went wrong). command: of the child, for tests."""
    facts, failures = [], []
    probed, died = _child(command, "--probe")
    if died:
        return [], [Failure("", "CPU", f"llama_cpp {died}", "run `mobie-export runtime build` again")]
    for device in ("CPU", "GPU") if probed[0]["gpu"] else ("CPU",):
        started = time.perf_counter()
        wrong = _run_on(device, command, amx=" AMX_INT8 = 1" in probed[0]["features"])
        seconds = time.perf_counter() - started
        facts.append(
            f"self-test   {len(PARTS) - len(wrong)} of {len(PARTS)} parts right on the {device}, {seconds:.0f} s"
        )
        failures += wrong
    return facts, failures


def _run_on(device: str, command: Sequence[str], amx: bool) -> list[Failure]:
    failures, number = [], 0
    where = ["--gpu"] if device == "GPU" else []
    while number < len(PARTS):
        results, died = _child(command, str(number), *where)
        wrong = [result["wrong"] for result in results]
        if died and number + len(wrong) < len(PARTS):  # in the part after the last one that is known
            wrong.append(died)
        elif len(wrong) < len(PARTS) - number:
            wrong.append("ended before its time")
        for attention_and_weights, what in zip(PARTS[number:], wrong, strict=False):
            if what:
                todo = GPU_TODO if where else _todo(command, PARTS.index(attention_and_weights), amx)
                failures.append(Failure(_part_name(*attention_and_weights), device, what, todo))
        number += len(wrong)
    return failures


def _todo(command: Sequence[str], number: int, amx: bool) -> str:
    """What leaves out what is at fault, found by running the part without it."""
    for name, environment, parameter, option in SUSPECTS:
        results, died = _child(command, str(number), "--only", *parameter, environment=environment)
        if died or not results or results[0]["wrong"]:
            continue
        if option == REPACK and amx:
            name, option = "AMX", "-DGGML_AMX_INT8=OFF"  # its weights lie in such a buffer, too
        if option:
            return f"without {name} it is right: CMAKE_ARGS={option} mobie-export runtime build"
        setting = " ".join(f"{key}={value}" for key, value in environment.items())
        return f"without {name} it is right: set {setting}, and please report it"
    return (
        "try CMAKE_ARGS=-DGGML_LLAMAFILE=OFF or -DGGML_NATIVE=OFF with `mobie-export runtime build`; please report it"
    )


def _child(
    command: Sequence[str], *arguments: str, environment: dict[str, str] | None = None
) -> tuple[list[dict], str]:
    """(its JSON lines; how it died, empty where it did not)"""
    env = {**os.environ, **(environment or {})}
    try:
        r = subprocess.run([*command, *arguments], env=env, capture_output=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as e:
        return _lines(e.stdout or b""), f"gave no answer within {TIMEOUT} s"
    found = _lines(r.stdout)
    if r.returncode < 0:
        return found, f"crashed ({signal.Signals(-r.returncode).name})"
    if r.returncode:
        last = r.stderr.decode("utf-8", "replace").strip().splitlines()
        return found, f"ended with exit code {r.returncode} ({last[-1] if last else 'no message'})"
    return found, ""


def _lines(output: bytes) -> list[dict]:
    return [json.loads(line) for line in output.splitlines() if line.startswith(b"{") and line.endswith(b"}")]


def _part_name(attention: str, weights_type: str) -> str:
    return f"weights in {weights_type} with {attention} attention"


# ---- the models ------------------------------------------------------------------------------------------------------

Matrices = dict[str, np.ndarray]  # GGUF name -> float32, slowest dimension first


def weights(attention: str) -> Matrices:
    """A random model of one layer. The stream of a RandomState is the same in every numpy."""
    random = np.random.RandomState(7)

    def matrix(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 0.7 / np.sqrt(shape[-1])).astype(np.float32)

    def norm(n: int) -> np.ndarray:
        return random.uniform(0.8, 1.2, n).astype(np.float32)

    embedding = (0.4 * random.standard_normal((N_VOCAB, WIDTH))).astype(np.float32)
    # Tokens choose their experts by a wide margin, so that rounding changes no choice.
    router = np.zeros((N_EXPERT, WIDTH), np.float32)
    for token in range(N_VOCAB):
        router[token % N_EXPERT] += embedding[token] / 100
        router[(token + 1) % N_EXPERT] += embedding[token] / 200
    layer = {"attn_norm.weight": norm(WIDTH), "ffn_norm.weight": norm(WIDTH), "ffn_gate_inp.weight": router}
    if attention == "plain":
        layer |= {f"attn_{x}.weight": matrix(N_HEAD * HEAD, WIDTH) for x in "qkv"}
        layer |= {f"attn_{x}_norm.weight": norm(HEAD) for x in "qk"}
        layer["attn_output.weight"] = matrix(WIDTH, N_HEAD * HEAD)
    else:
        layer |= {
            "attn_q_a.weight": matrix(WIDTH, WIDTH),
            "attn_q_a_norm.weight": norm(WIDTH),
            "attn_q_b.weight": matrix(N_HEAD * (HEAD + ROPE), WIDTH),
            "attn_kv_a_mqa.weight": matrix(LATENT + ROPE, WIDTH),
            "attn_kv_a_norm.weight": norm(LATENT),
            "attn_k_b.weight": matrix(N_HEAD, LATENT, HEAD),
            "attn_v_b.weight": matrix(N_HEAD, HEAD, LATENT),
            "attn_output.weight": matrix(WIDTH, N_HEAD * HEAD),
            "ffn_gate_shexp.weight": matrix(FF, WIDTH),
            "ffn_up_shexp.weight": matrix(FF, WIDTH),
            "ffn_down_shexp.weight": matrix(WIDTH, FF),
        }
    layer |= {
        "ffn_gate_exps.weight": matrix(N_EXPERT, FF, WIDTH),
        "ffn_up_exps.weight": matrix(N_EXPERT, FF, WIDTH),
        "ffn_down_exps.weight": 4 * matrix(N_EXPERT, WIDTH, FF),  # what experts add is as large as the rest
    }
    ends = {
        "token_embd.weight": embedding,
        "output_norm.weight": norm(WIDTH),
        "output.weight": matrix(N_VOCAB, WIDTH),
    }
    return ends | {f"blk.0.{name}": values for name, values in layer.items()}


def entries(attention: str) -> list[Entry]:
    """The metadata of a model without a tokenizer."""
    architecture = "qwen3moe" if attention == "plain" else "deepseek2"
    numbers = {
        "vocab_size": N_VOCAB,
        "block_count": 1,
        "context_length": 64,
        "embedding_length": WIDTH,
        "feed_forward_length": FF,
        "expert_feed_forward_length": FF,
        "expert_count": N_EXPERT,
        "expert_used_count": N_USED,
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_HEAD if attention == "plain" else 1,
        "attention.key_length": HEAD if attention == "plain" else LATENT + ROPE,
        "attention.value_length": HEAD if attention == "plain" else LATENT,
    }
    if attention == "latent":
        numbers |= {
            "leading_dense_block_count": 0,
            "expert_shared_count": 1,
            "attention.q_lora_rank": WIDTH,
            "attention.kv_lora_rank": LATENT,
            "attention.key_length_mla": HEAD + ROPE,
            "attention.value_length_mla": HEAD,
            "rope.dimension_count": ROPE,
        }
    return [
        make_entry("general.architecture", STRING, architecture),
        make_entry("general.quantization_version", U32, 2),
        *(make_entry(f"{architecture}.{key}", U32, value) for key, value in numbers.items()),
        make_entry(f"{architecture}.attention.layer_norm_rms_epsilon", F32, 1e-6),
        make_entry(f"{architecture}.rope.freq_base", F32, 10000.0),
        make_entry("tokenizer.ggml.model", STRING, "no_vocab"),
    ]


@dataclass(frozen=True)
class Stored:
    """A tensor as a file has it, and the values it stands for."""

    raw: np.ndarray  # uint8 [..., bytes of a row]
    type_id: int
    values: np.ndarray  # float32


def stored(attention: str, weights_type: str) -> dict[str, Stored]:
    """The model with its matrices, or its experts, in a type; what lies beside them in the file has `values` too."""
    float32 = weights(attention)
    ours = weights_type in ("mobie", "second plane", "shared factors")
    result: dict[str, Stored] = {}
    for name, values in float32.items():
        matrix = values.ndim > 1 and "token_embd" not in name and "gate_inp" not in name
        expert = "_exps" in name
        if ours and expert:
            result |= _binary(name, values, weights_type)
        elif matrix and not ours and weights_type != "F32" and fits(weights_type, values.shape[-1]):
            raw, type_id = quantized(values, weights_type)
            result[name] = Stored(raw, type_id, gguf_io.decode(raw, type_id))
        else:
            result[name] = Stored(values.view(np.uint8), gguf_io.TYPE_F32, values)
    return result


def fits(weights_type: str, columns: int) -> bool:
    return columns % gguf_io.block_size(type_id(weights_type))[0] == 0


def type_id(weights_type: str) -> int:
    return int(gguf.GGMLQuantizationType[weights_type])


def quantized(values: np.ndarray, weights_type: str) -> tuple[np.ndarray, int]:
    """(uint8 [..., bytes of a row], type id) of values near these. gguf-py writes no K-quants: their quants are random
    and their scales make the values as large."""
    kind = gguf.GGMLQuantizationType[weights_type]
    if weights_type not in ("Q4_K", "Q6_K"):
        return np.ascontiguousarray(gguf.quants.quantize(values, kind)).view(np.uint8), int(kind)
    random = np.random.RandomState(values.size % 1000)
    n, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.randint(0, 256, (values.size // n, size)).astype(np.uint8)
    spread = values.std()
    # A weight of Q4_K is d * scale (0 to 63) * quant (0 to 15) - dmin * min, of Q6_K d * scale (int8) * (quant - 32).
    if weights_type == "Q4_K":
        scales = np.array([spread / 32 / 4.6, spread / 32 * 7.5 / 4.6], np.float16)
        blocks[:, :4] = scales.view(np.uint8)
    else:
        blocks[:, -2:] = np.array([spread / 74 / 18.5], np.float16).view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1), int(kind)


def _binary(name: str, values: np.ndarray, weights_type: str) -> dict[str, Stored]:
    """An expert tensor in the MoBiE type and what lies beside it; its values have all of that in them."""
    n_expert, rows, cols = values.shape
    found, scales, meant = {}, np.empty(n_expert, "<f4"), np.empty_like(values)
    second = cols // 2 if weights_type == "second plane" else 0
    chosen = np.arange(second) if layout.is_down(name) else np.arange(cols)[::-1][:second].copy()
    blocks, more = [], []
    for e in range(n_expert):
        magnitudes = np.abs(values[e]).reshape(rows, -1, block.BLOCK_LEN).mean(-1)
        left = values[e] - np.where(values[e] >= 0, 1, -1) * magnitudes.repeat(block.BLOCK_LEN, 1)
        magnitudes2 = np.abs(left[:, chosen]).reshape(rows, -1, block.BLOCK_LEN).mean(-1)
        both = np.concatenate([magnitudes, magnitudes2], 1).astype(np.float64)
        scales[e], codes = block.encode_scales(both)
        n = magnitudes.shape[1]
        blocks.append(block.pack(values[e] >= 0, np.ascontiguousarray(codes[:, :n])))
        meant[e] = block.dequantize(blocks[-1], scales[e])
        if second:
            more.append(block.pack(left[:, chosen] >= 0, np.ascontiguousarray(codes[:, n:])))
            meant[e][:, chosen] += block.dequantize(more[-1], scales[e])
    if second:
        found[layout.residual_name(name)] = Stored(np.stack(more), block.TYPE_ID, meant[..., :0])
        if not layout.is_down(name):
            columns = chosen.astype("<i4")
            found[layout.columns_name(name)] = Stored(columns.view(np.uint8), gguf_io.TYPE_I32, columns)
    if weights_type == "shared factors":
        random = np.random.RandomState(11)
        factor = (np.eye(WIDTH) + random.standard_normal((WIDTH, WIDTH)) / 20).astype(np.float32)
        found[layout.shared_name(name)] = Stored(factor.view(np.uint8), gguf_io.TYPE_F32, factor)
        meant = factor @ meant if layout.is_down(name) else meant @ factor
    found[name] = Stored(np.stack(blocks), block.TYPE_ID, meant.astype(np.float32))
    found[layout.scale_name(name)] = Stored(scales.view(np.uint8), gguf_io.TYPE_F32, scales)
    return found


def write(path: Path, attention: str, tensors: dict[str, Stored], decoded: bool = False) -> None:
    """A GGUF of a model; decoded: with its values in F32, and without what lies beside the experts."""
    rows, data = [], []
    for name, tensor in tensors.items():
        if decoded and layout.kind(name) in layout.BESIDE_EXPERTS:
            continue
        kind = gguf_io.TYPE_F32 if decoded else tensor.type_id
        raw = tensor.values.view(np.uint8) if decoded else tensor.raw
        weights_per_block, block_bytes = gguf_io.block_size(kind)
        shape = (*raw.shape[:-1], raw.shape[-1] // block_bytes * weights_per_block)
        rows.append((name, shape[::-1], kind))
        data.append(np.ascontiguousarray(raw))
    with gguf_io.Writer(path, entries(attention), rows) as writer:
        for (name, _, _), raw in zip(rows, data, strict=True):
            writer.write(name, [raw])
        writer.finish()


# ---- the child -------------------------------------------------------------------------------------------------------


def logits(path: Path, gpu: bool, parameters: dict[str, bool]) -> np.ndarray:
    """float32 [PROMPT + SINGLE, N_VOCAB]: a prompt at once, then tokens one by one. RuntimeError where it will not."""
    import llama_cpp

    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 99 if gpu else 0
    for name, value in parameters.items():
        setattr(model_params, name, value)
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
    if not model:
        raise RuntimeError("cannot be loaded")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.n_threads, params.n_threads_batch = 1, 2  # threads that wait for each other are slow on a busy machine
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("no context can be made")
    result, batch = [], llama_cpp.llama_batch_init(PROMPT, 0, 1)
    for start, n in ((0, PROMPT), *((PROMPT + i, 1) for i in range(SINGLE))):
        batch.n_tokens = n
        for i in range(n):
            batch.token[i], batch.pos[i] = TOKENS[start + i], start + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, True
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("cannot be computed")
        for i in range(n):
            row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (N_VOCAB,))
            result.append(row.copy())
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return np.array(result)


def expected(attention: str) -> np.ndarray:
    """float64 [positions, N_VOCAB]: logits of the F32 model at the end of the prompt and at the last position."""
    data = json.loads(KEPT.read_text())
    return np.array(data[attention])


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest over positions, in shares of the norm; NaN where a number is none."""
    return float(np.max(np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)))


def check(attention: str, weights_type: str, folder: Path, gpu: bool, parameters: dict[str, bool]) -> str:
    """What is wrong with a part, or nothing."""
    tensors = stored(attention, weights_type)
    path, truth = folder / "part.gguf", folder / "truth.gguf"
    write(path, attention, tensors)
    found = logits(path, gpu, parameters)
    if weights_type == "F32":
        off, bound = error(found[[PROMPT - 1, -1]], expected(attention)), BOUND_FLOAT
    else:
        write(truth, attention, tensors, decoded=True)
        off = error(found, logits(truth, False, {}))
        bound = BOUND_FLOAT if weights_type in ("F16", "BF16") else BOUND_ROUNDED
    return "" if off <= bound else f"wrong numbers, off by {off:.3g} of their size (at most {bound})"


def _has_gpu() -> bool:
    """llama_supports_gpu_offload() says yes wherever RPC is compiled in."""
    from llama_cpp.llama_cpp import _lib

    _lib.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    return any(_lib.ggml_backend_dev_by_type(kind) for kind in GPUS)


def main(arguments: Sequence[str]) -> int:
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    if arguments[0] == "--probe":
        features = llama_cpp.llama_print_system_info().decode()
        print(json.dumps({"gpu": _has_gpu(), "features": features}))
        return 0
    first, gpu = int(arguments[0]), "--gpu" in arguments
    end = first + 1 if "--only" in arguments else len(PARTS)
    parameters = {a[2:].split("=")[0]: a.endswith("=1") for a in arguments if "=" in a}
    with tempfile.TemporaryDirectory(prefix="mobie-selftest-") as folder:
        for part in PARTS[first:end]:
            try:
                wrong = check(*part, Path(folder), gpu, parameters)
            except RuntimeError as e:
                wrong = str(e)
            print(json.dumps({"part": part, "wrong": wrong}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
