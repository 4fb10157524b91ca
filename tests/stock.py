"""Does a llama.cpp that nobody patched run what `--type q1_0` writes, and what becomes of files of our own type?

    python -m tests.stock           # make test-stock; builds the pinned release without the patches

Random models of several families, and the bundled trained one with wider experts, are exported; every file is then run
by the libraries of that build. Truth is the F32 file of its dequantized weights in the same build, and a Q8_0 copy of
it says what a small difference is, as in tests/runtime/test_families.py; the installed runtime runs the copy, since
upstream's products of Q8_0 crash on some CPUs with AMX. A build without the patches is known by what it refuses: a file
of our own type, and over RPC its tensors.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from mobie_export import dequantize, verify
from mobie_export.runtime import cmake, installed
from tests import converting, exporting, rpc
from tests.scoring import divergence
from tests.scoring import scored as log_probabilities
from tools.release.check_upstream import concluded, pristine_home

CONTEXT, N_CHUNKS = 128, 2


def stock(jobs: int | None) -> Path:
    """The folder of the unpatched build's libraries and its RPC server."""
    return cmake.compile_targets(pristine_home(), ("llama", "ggml-rpc-server"), jobs, folder="build-stock")


def run(binaries: Path | None, module: str, *words: str | Path) -> subprocess.CompletedProcess:
    """A module in a process of its own, with the libraries of a build and no others; None: the installed ones."""
    environment = os.environ | ({"LLAMA_CPP_LIB_PATH": str(binaries)} if binaries else {})
    return subprocess.run([sys.executable, "-m", module, *words], env=environment, capture_output=True, text=True)


def scored(binaries: Path | None, path: Path, one_by_one: bool) -> np.ndarray:
    """Log probabilities by the libraries of a build."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scores.npy"
        done = run(binaries, "tests.stock", "--score", path, out, *(["--one-by-one"] if one_by_one else []))
        assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
        return np.load(out)


def score(path: Path, out: Path, one_by_one: bool) -> None:
    from llama_cpp import Llama

    chunks = np.random.default_rng(0).integers(0, 256, (N_CHUNKS, CONTEXT))
    options = {"n_ctx": CONTEXT, "n_batch": CONTEXT, "n_threads": 1, "n_threads_batch": 1, "flash_attn": False}
    llama = Llama(str(path), logits_all=True, verbose=False, **options)
    np.save(out, log_probabilities(llama, chunks[: 1 if one_by_one else None], one_by_one))


def check(binaries: Path, name: str, source: Path, folder: Path, **options) -> list[str]:
    """What is wrong with one export, a line each."""
    out, f32, q8 = (folder / f"{kind}.gguf" for kind in ("q1_0", "f32", "q8_0"))
    exporting.export(source, out, type="q1_0", threads=1, **options)
    verify(out)
    dequantize(out, f32)
    quantize = installed.site() / "llama_cpp" / "bin" / "llama-quantize"
    subprocess.run([quantize, f32, q8, "Q8_0"], check=True, capture_output=True)
    problems = []
    for one_by_one in (False, True):
        truth, ours = (scored(binaries, p, one_by_one) for p in (f32, out))
        near = scored(None, q8, one_by_one)
        ours, near = divergence(truth, ours), divergence(truth, near)
        how = "token by token" if one_by_one else "prompt"
        print(f"  {name:<12} {how:<14} q1_0 {ours.kl:.3g} nats, q8_0 {near.kl:.3g}", flush=True)
        if not (near.kl > 0 and ours.kl <= 2 * near.kl + 1e-6 and ours.top1 <= 2 * near.top1 + 0.02):
            problems.append(f"{name}, {how}: {ours}, q8_0 {near}")
    return problems


def refused(binaries: Path, source: Path, folder: Path) -> list[str]:
    """A file of our own type is not loaded."""
    out = exporting.export(source, folder / "mobie.gguf").output
    done = run(binaries, "mobie_export.runtime.loads", out)
    print(f"  a file of type mobie: {done.stdout.strip().splitlines()[:1]}", flush=True)
    said = "invalid ggml type" in done.stdout
    return [] if done.returncode and said else [f"the build reads type mobie (exit {done.returncode}): it is patched"]


def over_rpc(binaries: Path, source: Path, folder: Path) -> list[str]:
    """The installed runtime with an unpatched server: it has no tensor of our type, and all of another model's. Made
    to believe that it runs the type, it hangs up."""
    tools, ours = installed.site() / "llama_cpp" / "bin", exporting.export(source, folder / "rpc.gguf").output
    with rpc.servers(binaries, 1) as (address,):
        problems = rpc.problems_of_another(tools, ours, address, folder)
        other = rpc.perplexity(tools, source, "--rpc", address, "-ngl", "99")
        if other.returncode or rpc.weights(other.stdout)[f"RPC0[{address}]"] < 1:
            problems.append(f"a model of other types does not run on it: {other.stdout[-2000:]}")
        with rpc.saying(address, rpc.OURS) as believed:
            done = rpc.perplexity(tools, ours, "--rpc", believed, "-ngl", "99")
            if "server crashed or returned malformed response" not in done.stdout or "Final estimate" in done.stdout:
                problems.append(f"it took a tensor of type mobie: {done.stdout[-2000:]}")
    print(f"  an unpatched RPC server: {problems or 'no tensor of type mobie goes there, and it is said'}", flush=True)
    return problems


def main() -> int:
    from mobie_export.methods.ordered import Ordered
    from tests import families, q1_0_models

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, help="parallel compilations (default: all cores)")
    parser.add_argument("--score", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one-by-one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.score:
        score(*args.score, args.one_by_one)
        return 0
    binaries, problems = stock(args.jobs), []
    print(f"unpatched libraries: {binaries}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained = q1_0_models.trained(folder / "trained.gguf")
        problems += refused(binaries, trained, folder) + over_rpc(binaries, trained, folder)
        calibrated = Ordered(samples=32, seq_len=64)
        problems += check(binaries, "trained", trained, folder, method=calibrated)
        for family, widths in q1_0_models.WIDTHS.items():
            with tempfile.TemporaryDirectory() as one:
                checkpoint, source = Path(one) / "checkpoint", Path(one) / "source.gguf"
                families.save(family, checkpoint, **widths)
                converting.convert(checkpoint, source, *families.FAMILIES[family].convert)
                problems += check(binaries, family, source, Path(one))
    return concluded(problems, "stock llama.cpp runs them all")


if __name__ == "__main__":
    sys.exit(main())
