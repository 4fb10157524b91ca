#!/usr/bin/env python3
"""Fuzz the C++ side under AddressSanitizer and UndefinedBehaviorSanitizer, with clang's libFuzzer.

    python tools/fuzz.py [kernels] [load] [--runs N] [--seed S]

kernels: codec, validation and products of every kernel of this CPU (kernels_cpp/tests/fuzz_kernels.cpp), 10^6 inputs;
load: GGUF files with MoBiE tensors, and a few tokens where they load (kernels_cpp/tests/fuzz_load.cpp), 10^5 inputs.

Builds a runtime of its own with both sanitizers in the cache. The corpus is made by the fuzzer and kept there. Exit
status 1 where something was found: the input lies in the folder that is named then. What upstream does to such files
(ggml aborts, undefined behaviour in lines that are not ours) is listed and counts as nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mobie_export.runtime import cmake, patching, processes, upstream

TESTS = Path(__file__).resolve().parent.parent / "kernels_cpp/tests"
RUNS = {"kernels": 1_000_000, "load": 100_000}
LONGEST = {"kernels": 4096, "load": 97}  # bytes of an input
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize=vptr,function"  # C calls through other pointer types
COMPILED = f"-O1 -g1 -DNDEBUG -fno-omit-frame-pointer -fexceptions {SANITIZERS}"  # aborts are thrown through ggml's C
COVERAGE = "-fsanitize=fuzzer-no-link -fno-sanitize-coverage=trace-cmp"  # without: twice as fast
FLAGS = (
    "-DCMAKE_BUILD_TYPE=None",
    "-DCMAKE_C_COMPILER=clang",
    "-DCMAKE_CXX_COMPILER=clang++",
    f"-DCMAKE_C_FLAGS={COMPILED} {COVERAGE}",
    f"-DCMAKE_CXX_FLAGS={COMPILED} {COVERAGE}",
    *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("TOOLS", "SERVER", "EXAMPLES", "COMMON")),
    "-DGGML_NATIVE=OFF",  # our kernels do not depend on it
    "-DGGML_OPENMP=OFF",
    "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
)


def compiled(test: str, like: str, binaries: Path) -> str:
    """The object file of a source of the tests, compiled as that kernel file was."""
    commands = json.loads((binaries.parent / "compile_commands.json").read_text())
    command = next(c for c in commands if c["file"].endswith(f"/mobie/{like}"))
    out = binaries / f"{test}.o"
    words = [str(TESTS / test) if word == command["file"] else word for word in shlex.split(command["command"])]
    words[words.index("-o") + 1] = str(out)
    processes.run(words, f"compiling {test} failed", cwd=command["directory"])
    return str(out)


def build(home: Path, binaries: Path, name: str) -> Path:
    llama, program = home / "src" / upstream.LLAMA, binaries / f"fuzz_{name}"
    command = ["clang++", "-std=c++17", *COMPILED.split(), "-fsanitize=fuzzer", str(TESTS / f"fuzz_{name}.cpp")]
    if name == "kernels":  # what plays tiles, with the flags of its kind
        command += [compiled("amx_played.cpp", "kernels_amx.cpp", binaries)]
        command += [compiled("tiles_plain.cpp", "kernels_ref.cpp", binaries)]
    command += [f"-I{llama / folder}" for folder in ("include", "ggml/include", "ggml/src/mobie")]
    command += [f"-L{binaries}", "-Wl,-rpath,$ORIGIN"]
    command += [f"-l{library}" for library in (*(["llama"] if name == "load" else []), "ggml", "ggml-cpu", "ggml-base")]
    processes.run([*command, "-o", str(program)], f"compiling {name} failed")
    return program


def fuzz(program: Path, name: str, runs: int, seed: int) -> bool:
    """Whether nothing was found."""
    corpus, found = (program.parent.parent / f"{what}-{name}" for what in ("corpus", "found"))
    corpus.mkdir(exist_ok=True)
    found.mkdir(exist_ok=True)
    command = [program, f"-runs={runs}", f"-seed={seed}", f"-max_len={LONGEST[name]}", "-print_final_stats=1"]
    command += ["-len_control=0", "-print_funcs=0", "-rss_limit_mb=4096", "-malloc_limit_mb=2048", "-timeout=60"]
    command += [
        "-detect_leaks=0",
        f"-artifact_prefix={found}/",
        corpus,
    ]  # aborts that are thrown leak
    print(f"{' '.join(map(str, command))}", flush=True)
    start, log = time.monotonic(), program.parent.parent / f"fuzz-{name}.log"
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # at the end as well: what was thrown through leaks
    with open(log, "w") as out:
        words = [str(c) for c in command]
        code = subprocess.run(words, stdout=out, stderr=subprocess.STDOUT, env=environment).returncode
    text = log.read_text(errors="replace")
    executed = re.search(r"number_of_executed_units:\s*(\d+)", text)
    inputs = list(corpus.iterdir())
    print(
        f"{name}: {executed[1] if executed else '?'} inputs in {time.monotonic() - start:.0f} s, "
        f"corpus {len(inputs)} files, {sum(p.stat().st_size for p in inputs)} bytes; log {log}"
    )
    wrong = sorted({line for line in re.findall(r".*runtime error:.*", text) if "/mobie/" in line or "fuzz_" in line})
    others = sorted({line for line in re.findall(r"(?:.*runtime error:|UPSTREAM:).*", text)} - set(wrong))
    for title, lines in (("upstream's", others), ("OURS", wrong)):
        print(f"{title}: {len(lines)}", *lines, sep="\n  ")
    if code or wrong:
        print(f"found something, see {log} and {found}", processes.tail(text, 60), sep="\n")
    return not code and not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="kernels, load; both if left out")
    parser.add_argument("--runs", type=int, help="inputs for each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int)
    args = parser.parse_args()
    if not shutil.which("clang++"):
        sys.exit("need clang with libFuzzer (Debian, Ubuntu: apt install clang)")
    targets = args.targets or list(RUNS)
    if not set(targets) <= set(RUNS):
        parser.error(f"targets are {', '.join(RUNS)}")
    home = patching.prepare()
    binaries = cmake.compile_targets(home, ("llama" if "load" in targets else "ggml",), args.jobs, FLAGS, "build-fuzz")
    programs = {name: build(home, binaries, name) for name in targets}
    return 0 if all([fuzz(programs[name], name, args.runs or RUNS[name], args.seed) for name in targets]) else 1


if __name__ == "__main__":
    sys.exit(main())
