#!/usr/bin/env python3
"""The mobie type on a GPU beside other low-bit types: compiles bench_cuda.cpp against the installed runtime.

    tools/bench_cuda.py [TYPE,... [MEGABYTES [ROUNDS]]]        default: mobie,Q1_0,IQ1_S,Q4_0

The runtime must have been built with --cuda. Prints the tables of docs/measured/cuda.md.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mobie_export.errors import MobieError  # noqa: E402
from tools.bench_speed import compile_bench  # noqa: E402


def main() -> int:
    arguments = sys.argv[1:] or ["mobie,Q1_0,IQ1_S,Q4_0"]
    with tempfile.TemporaryDirectory() as work:
        try:
            program = compile_bench(Path(work), "bench_cuda")
        except MobieError as e:
            print(e, file=sys.stderr)
            return 1
        return subprocess.run([str(program), *arguments]).returncode


if __name__ == "__main__":
    sys.exit(main())
