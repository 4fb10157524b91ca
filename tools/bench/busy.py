"""Generation while another program holds one core, by build of llama-bench: what threads do that wait for each other.

    python -m tools.bench.busy MODEL.gguf --build ours=PATH/llama-bench --build "OpenMP=PATH/llama-bench" [--rounds 3]

Every round measures all builds on the quiet machine and beside a busy loop, and one thread of the first build.
KEY=VALUE words before a path become its environment: --build "spins=GOMP_SPINCOUNT=1000 PATH/llama-bench".
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from contextlib import contextmanager


def tokens_per_second(command: list[str], model: str, threads: int) -> float:
    environment = dict(word.split("=", 1) for word in command if "=" in word)
    program = [word for word in command if "=" not in word]
    given = ["-m", model, "-t", str(threads), "-p", "0", "-n", "32", "-r", "2", "-o", "json"]
    out = subprocess.run([*program, *given], capture_output=True, check=True, env={**os.environ, **environment}).stdout
    return float(json.loads(out)[0]["avg_ts"])


@contextmanager
def load(busy: bool):
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if program:
            program.kill()
            program.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--build", action="append", required=True, metavar="NAME=[KEY=VALUE ...] PATH [OPTION ...]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    args = parser.parse_args()
    builds = {name: command.split() for name, command in (b.split("=", 1) for b in args.build)}
    found = defaultdict(list)
    for _ in range(args.rounds):
        for busy in (False, True):
            with load(busy):
                for name, command in builds.items():
                    found[name, busy].append(tokens_per_second(command, args.model, args.threads))
                found["one thread", busy].append(tokens_per_second(next(iter(builds.values())), args.model, 1))
    print("| build | quiet | beside a busy loop |\n|---|---|---|")
    for name in [*builds, "one thread"]:
        quiet, busy = (statistics.median(found[name, b]) for b in (False, True))
        print(f"| {name} | {quiet:.1f} | {busy:.1f} |")


if __name__ == "__main__":
    main()
