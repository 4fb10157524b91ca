"""The exported file in the patched runtime computes what its bytes say.

Truth is the same runtime on an F32 GGUF of the dequantized weights. What remains is the rounding of activations to 8
bits; a Q8_0 copy of that F32 file, which rounds activations and weights to 8 bits, sets the scale of what is small.
Both are measured over the same positions, for a prompt processed in batches and for tokens decoded one by one.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mobie_export import gguf_io
from mobie_export.methods.base import cpus
from tests import models
from tests.scoring import CONTEXT, divergence, load, log_probabilities

REPO = Path(__file__).resolve().parents[2]
TRAINED = REPO / "examples/tiny-moe/tiny-moe-f16.gguf"
DIGEST = REPO / "tools/release/logits_digest.py"
TEXT = Path(__file__).parents[2] / "mobie_export/data/held-out.txt"
N_CHUNKS = 8  # 8 * 512 = 4096 positions


def write_q8_0(source: Path, to: Path) -> None:
    """What llama-quantize writes; from the library, for a build of the libraries alone (`make bump`, --quick)."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(to).encode(), ctypes.byref(params)) == 0


@pytest.fixture(scope="module", params=["random", "trained", "second"])
def files(request, tmp_path_factory, runtime_tools):
    """(mobie, f32, q8_0, token chunks) of a random and of the trained model, and of a random one with second signs."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "trained":
        source = TRAINED
    else:
        source = folder / "random.gguf"
        models.write_qwen3moe(source, experts="F16", seed=1)
    mobie, f32, q8 = folder / "mobie.gguf", folder / "f32.gguf", folder / "q8_0.gguf"
    command, options = [sys.executable, "-m", "mobie_export"], ["--method", "sign"]
    if request.param == "second":
        options = [
            "--method",
            "calibrated",
            "--bpw",
            "1.6",
            "--refine",
            "none",
            "--samples",
            "40",
            "--seq-len",
            "64",
            "--threads",
            "1",
            "--quiet",
        ]
    subprocess.run([*command, str(source), "-o", str(mobie), *options], check=True)
    if request.param == "second":
        with gguf_io.open_model(mobie) as g:
            k = {n: t.shape[0] for n, t in g.tensors.items() if n.endswith((".residual", ".columns"))}
        assert all(any(part in n for n in k) for part in ("gate", "down", "columns")), "nothing to test"
        assert all(0 < n < (models.N_FF if "down" in name else models.N_EMBD) for name, n in k.items())
    subprocess.run([*command, "dequantize", str(mobie), "-o", str(f32)], check=True)
    write_q8_0(f32, q8)

    llama = load(source)
    if request.param == "trained":
        tokens = llama.tokenize(TEXT.read_bytes(), add_bos=False)
    else:
        tokens = np.random.default_rng(0).integers(0, llama.n_vocab(), N_CHUNKS * CONTEXT).tolist()
    llama.close()
    assert len(tokens) >= N_CHUNKS * CONTEXT
    n = N_CHUNKS // 4 if request.param == "second" else N_CHUNKS
    return mobie, f32, q8, np.asarray(tokens[: n * CONTEXT]).reshape(n, CONTEXT)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["prompt", "token-by-token"])
def test_runtime_computes_what_the_file_says(files, one_by_one, record_property):
    mobie, f32, q8, chunks = files
    truth = log_probabilities(f32, chunks, one_by_one)
    ours = divergence(truth, log_probabilities(mobie, chunks, one_by_one))
    scale = divergence(truth, log_probabilities(q8, chunks, one_by_one))
    record_property("mobie", str(ours))
    record_property("q8_0", str(scale))
    print(f"\nmobie {ours}\nq8_0  {scale}")
    assert scale.kl > 0, "the yardstick is not one"
    assert ours.kl <= 2 * scale.kl + 1e-6
    assert ours.top1 <= 2 * scale.top1 + 0.005


def test_logits_do_not_depend_on_threads(files):
    mobie, _, _, chunks = files
    from llama_cpp import Llama

    logits = []
    for threads in (1, 2, cpus() + 1):  # with more of them than processors those that wait sleep
        llama = Llama(
            str(mobie), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False
        )
        for piece in np.array_split(chunks[0], 8):
            llama.eval(piece.tolist())
        logits.append(np.array(llama.scores[:CONTEXT]))
        llama.close()
    assert np.array_equal(logits[0], logits[1]) and np.array_equal(logits[0], logits[2])


def test_weights_applied_in_the_product_give_the_same_bits(files):
    """The product with down and the multiplication by the experts' weights behind it, fused and one by one."""
    mobie, *_ = files
    digests = []
    for disabled in ("0", "1"):
        env = {**os.environ, "GGML_CPU_DISABLE_FUSION": disabled}
        r = subprocess.run([sys.executable, DIGEST, mobie], env=env, capture_output=True, text=True, check=True)
        digests.append(r.stdout.split())
    assert digests[0] == digests[1] and len(digests[0]) == 1
