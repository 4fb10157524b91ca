#!/usr/bin/env python3
"""`make check-wheels`: install the wheels into an empty environment without a compiler, and run them on old CPUs.

    python tools/check_wheels.py [--dist dist] [--arch x86_64|aarch64]

Here: pip installs both wheels, `mobie-export` exports the bundled model, every command starts, `doctor` finds nothing
wrong, and llama-completion and llama_cpp write. Old CPUs are qemu-user's (Debian, Ubuntu: apt install qemu-user): each
must take the variant meant for it, and an instruction it does not have would end the process. AVX-512 is beyond qemu;
there the machine at hand is the test.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from mobie_export import runtime

REPO = Path(__file__).resolve().parent.parent
MODEL = REPO / "examples/tiny-moe/tiny-moe-f16.gguf"
PROMPT = "The old man looked at the sea, and"
WRITE = ["-p", PROMPT, "-n", "16", "--temp", "0", "-no-cnv", "--no-warmup", "-t", "2"]

# qemu's CPU model and the variant it should get
OLD_CPUS = {
    "x86_64": {"Nehalem": "sse42", "SandyBridge": "sse42", "Haswell": "haswell"},
    "aarch64": {"cortex-a53": "armv8.0_1", "cortex-a76": "armv8.2_2"},
}
PYTHON_CODE = f"""
import llama_cpp
llama = llama_cpp.Llama(MODEL, n_ctx=256, n_threads=2, verbose=True)
print("TEXT", repr(llama({PROMPT!r}, max_tokens=16, temperature=0)["choices"][0]["text"]))
"""


def call(*command: str | Path, env: dict[str, str], expected: int = 0) -> str:
    """Run; returns stdout and stderr. An unexpected exit code ends the check."""
    r = subprocess.run([*map(str, command)], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if r.returncode != expected:
        words = " ".join(map(str, command))
        sys.exit(f"FAILED: exit {r.returncode} of {words}\n{runtime.tail(r.stdout + r.stderr)}")
    return r.stdout + r.stderr


def only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"need one {pattern} in {folder}, found {len(found)}: make wheels")
    return found[0]


def variant(log: str) -> str:
    """Which of ggml's CPU variants was loaded."""
    found = re.findall(r"loaded CPU backend from \S*libggml-cpu-([\w.]+)\.so", log)
    if len(found) != 1:
        sys.exit(f"FAILED: not one CPU backend but {found}\n{runtime.tail(log)}")
    return found[0]


def check_install(dist: Path, env_dir: Path, model: Path) -> dict[str, str]:
    """Install both wheels, export, run every command; returns the environment variables used."""
    venv.create(env_dir, with_pip=True)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")}
    env["PATH"] = str(env_dir / "bin")
    for compiler in ("cc", "c++", "gcc", "g++", "clang", "clang++", "cmake"):
        assert shutil.which(compiler, path=env["PATH"]) is None
    wheels = [only(dist, "mobie_export-*.whl"), only(dist, f"llama_cpp_python-*{platform.machine()}.whl")]
    call(env_dir / "bin/python", "-m", "pip", "install", "--quiet", *wheels, env=env)
    call(env_dir / "bin/python", "-m", "pip", "check", env=env)
    call(env_dir / "bin/mobie-export", MODEL, "-o", model, env=env)
    report = call(env_dir / "bin/mobie-export", "doctor", model, env=env)
    print("\n".join(f"  {line}" for line in report.splitlines()))
    for name in runtime.TOOLS:
        # llama-quantize and llama-imatrix end with 1 after their help
        r = subprocess.run([env_dir / "bin" / name, "--help"], env=env, capture_output=True, text=True)
        if r.returncode not in (0, 1) or "usage" not in (r.stdout + r.stderr).lower():
            sys.exit(f"FAILED: {name} --help, exit {r.returncode}\n{runtime.tail(r.stdout + r.stderr)}")
    log = call(env_dir / "bin/llama-completion", "-m", model, "-v", *WRITE, env=env)
    print(f"  llama-completion   variant {variant(log)}")
    python = PYTHON_CODE.replace("MODEL", repr(str(model)))
    log = call(env_dir / "bin/python", "-c", python, env=env)
    print(f"  llama_cpp          variant {variant(log)}  {log[log.index('TEXT') :].splitlines()[0]}")
    return env


def check_old_cpus(arch: str, package: Path, model: Path, env: dict[str, str], python: Path | None) -> None:
    """The tools, and llama_cpp where python is given, under every old CPU of the table."""
    qemu = shutil.which(f"qemu-{arch}")
    if qemu is None:
        sys.exit(f"need qemu-{arch} (Debian, Ubuntu: apt install qemu-user)")
    root = ["-L", "/usr/aarch64-linux-gnu"] if arch != platform.machine() else []
    for cpu, wanted in OLD_CPUS[arch].items():
        emulated = [qemu, *root, "-cpu", cpu]
        runs = {"llama-completion": [package / "bin/llama-completion", "-m", model, "-v", *WRITE]}
        if python:
            runs["llama_cpp"] = [python, "-c", PYTHON_CODE.replace("MODEL", repr(str(model)))]
        for name, command in runs.items():
            found = variant(call(*emulated, *command, env=env))
            if found != wanted:
                sys.exit(f"FAILED: {cpu} took the variant {found}, not {wanted}")
            print(f"  {cpu:<12} {name:<17} variant {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dist", type=Path, default=Path("dist"))
    parser.add_argument("--arch", choices=[*OLD_CPUS], default=platform.machine())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny-mobie.gguf"
        if args.arch == platform.machine():
            print("in an empty environment, no compiler on the PATH:", flush=True)
            env_dir = Path(folder) / "env"
            env = check_install(args.dist, env_dir, model)
            (package,) = env_dir.glob("lib/python*/site-packages/llama_cpp")
            print("on old CPUs:", flush=True)
            check_old_cpus(args.arch, package, model, env, env_dir / "bin/python")
        else:
            subprocess.run([sys.executable, "-m", "mobie_export", MODEL, "-o", model], check=True)
            package = Path(folder) / "llama_cpp"
            with zipfile.ZipFile(only(args.dist, f"llama_cpp_python-*{args.arch}.whl")) as z:
                z.extractall(folder)
            for program in (package / "bin").iterdir():
                program.chmod(0o755)
            print("in an emulator:", flush=True)
            check_old_cpus(args.arch, package, model, dict(os.environ), None)
    print("the wheels work")


if __name__ == "__main__":
    main()
