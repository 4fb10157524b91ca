"""Does a runtime that is built with Vulkan compute on its device what the CPU computes?

    python -m tests.vulkan          # make test-vulkan; compiles the patched tree in a folder of its own (long)

Where no GPU has a driver for Vulkan, Mesa's software device is taken (Debian: mesa-vulkan-drivers); ggml uses such a
one only when it is named. Four steps: every shader against the CPU, bit for bit (kernels_cpp/tests/check_vulkan.cpp);
upstream's test-backend-ops for the type; doctor's self-test, which has second planes and shared factors; and tiny-moe
with everything on the device against the CPU, a prompt at once and token by token.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from mobie_export.errors import MobieError
from mobie_export.runtime import cmake, patching, processes, selftest, upstream
from tests import exporting
from tests.scoring import divergence, scored

REPO = Path(__file__).resolve().parents[1]
TINY = REPO / "examples/tiny-moe/tiny-moe-f16.gguf"
CHECK = REPO / "kernels_cpp/tests/check_vulkan.cpp"
SOFTWARE = {"GGML_VK_VISIBLE_DEVICES": "0"}
NO_DEVICE = 3  # exit code of check_vulkan
OPERATIONS = ("MUL_MAT", "MUL_MAT_ID", "GET_ROWS")

# Nats per token between the device and the CPU. The experts are the same bits; attention and the other products are the
# device's, with activations in F16, which chooses another expert at times. Measured: 6e-4 (docs/measured/vulkan.md).
BOUND = 2e-3


def built(jobs: int | None) -> Path:
    """The folder of libraries and programs."""
    flags = cmake.vulkan_flags()
    targets = ("llama", "mtmd", "llama-completion", "test-backend-ops")
    return cmake.compile_targets(patching.prepare(), targets, jobs, flags, folder="build-vulkan-tests")


def compiled(binaries: Path, folder: Path) -> Path:
    """check_vulkan, against these libraries."""
    program, include = folder / "check_vulkan", patching.home() / "src" / upstream.LLAMA / "ggml/include"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", str(CHECK), "-o", str(program), f"-I{include}"]
    command += [f"-L{binaries}", f"-Wl,-rpath,{binaries}", "-lggml", "-lggml-cpu", "-lggml-base"]
    processes.run(command, "compiling check_vulkan failed")
    return program


def check_shaders(binaries: Path, folder: Path) -> tuple[list[str], dict[str, str]]:
    """(what is wrong, the environment in which there is a device)"""
    program = compiled(binaries, folder)
    for environment in ({}, SOFTWARE):
        r = subprocess.run([program], env=os.environ | environment, stdout=subprocess.PIPE, text=True)
        if r.returncode != NO_DEVICE:
            print(r.stdout, end="", flush=True)
            return [f"check_vulkan: exit {r.returncode}"] if r.returncode else [], environment
    raise processes.unavailable(
        "no Vulkan device, and no software one",
        todo="a driver for the GPU, or Debian, Ubuntu: apt install mesa-vulkan-drivers",
    )


def check_operations(binaries: Path, environment: dict[str, str]) -> list[str]:
    """One process per operation: what Mesa 22.3's software device keeps of buffers that are gone ends with it."""
    problems = []
    for operation in OPERATIONS:
        command = [binaries / "test-backend-ops", "test", "-b", "Vulkan0", "-o", operation, "-p", "type(_a)?=mobie"]
        r = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        lines = [line for line in r.stdout.splitlines() if "tests passed" in line]
        print(f"  {operation:<12} exit {r.returncode}  {lines[0].strip() if lines else r.stderr[-300:]}", flush=True)
        if r.returncode or not lines or lines[0].split("/")[0].strip() == "0":
            problems.append(f"test-backend-ops {operation}: exit {r.returncode}")
    return problems


def check_selftest() -> list[str]:
    """Only its parts with experts of the type: the others are upstream's, and slow on a software device."""
    first = selftest.PARTS.index(("plain", "mobie"))
    command = [sys.executable, "-m", "mobie_export.runtime.selftest", str(first), "--gpu"]
    r = subprocess.run(command, capture_output=True, text=True)
    found = [json.loads(line) for line in r.stdout.splitlines()]
    for result in found:
        print(f"  self-test    {' attention, '.join(result['part']):<32} {result['wrong'] or 'right'}", flush=True)
    problems = [f"self-test, {result['part']}: {result['wrong']}" for result in found if result["wrong"]]
    missing = len(selftest.PARTS) - first - len(found)
    return problems + ([f"self-test: exit {r.returncode}, {missing} parts missing"] if missing else [])


def check_model(folder: Path) -> list[str]:
    """tiny-moe, exported, by both devices of this process's libraries."""
    from mobie_export.methods.ordered import Ordered

    path = exporting.export(TINY, folder / "tiny.gguf", method=Ordered(samples=32, seq_len=64), threads=1).output
    chunks = np.random.default_rng(0).integers(0, 256, (4, 128))
    problems = []
    for one_by_one in (False, True):
        found = [scored_on(layers, path, chunks[: 1 if one_by_one else None], one_by_one) for layers in (0, 99)]
        off, how = divergence(*found), "token by token" if one_by_one else "prompts"
        print(f"  tiny-moe     {how:<14} {off.kl:.3g} nats from the CPU, top token differs {off.top1:.2%}", flush=True)
        if not 0 < off.kl <= BOUND:  # 0: nothing was on the device
            problems.append(f"tiny-moe, {how}: {off}")
    return problems


def scored_on(layers: int, path: Path, chunks: np.ndarray, one_by_one: bool) -> np.ndarray:
    """Log probabilities with so many layers on the device."""
    from llama_cpp import Llama

    n = chunks.shape[1]
    options = {"n_ctx": n, "n_batch": n, "n_threads": 1, "n_threads_batch": 1, "flash_attn": False}
    llama = Llama(str(path), n_gpu_layers=layers, logits_all=True, verbose=False, **options)
    return scored(llama, chunks, one_by_one)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, help="parallel compilations (default: all cores)")
    parser.add_argument("--binaries", type=Path, help="of a build that is there, instead of compiling one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            binaries = (args.binaries or built(args.jobs)).resolve()
            problems, environment = check_shaders(binaries, folder)
        except MobieError as e:
            sys.exit(str(e))
        problems += check_operations(binaries, environment)
        os.environ.update(environment, LLAMA_CPP_LIB_PATH=str(binaries))
        problems += check_selftest() + check_model(folder)
    for line in problems:
        print(f"FAILED: {line}")
    print("the device computes what the CPU does" if not problems else f"{len(problems)} problem(s)")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
