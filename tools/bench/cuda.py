"""The mobie type on a GPU beside other low-bit types: compiles cuda.cpp against the installed runtime.

    python -m tools.bench.cuda [TYPE,... [MEGABYTES [ROUNDS]]]        default: mobie,Q1_0,IQ1_S,Q4_0

The runtime must have been built with --cuda. Prints the tables of docs/measured/cuda.md.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from mobie_export.errors import MobieError
from tools.bench.speed import compile_bench


def main() -> int:
    arguments = sys.argv[1:] or ["mobie,Q1_0,IQ1_S,Q4_0"]
    with tempfile.TemporaryDirectory() as work:
        try:
            program = compile_bench(Path(work), "cuda")
        except MobieError as e:
            print(e, file=sys.stderr)
            return 1
        return subprocess.run([str(program), *arguments]).returncode


if __name__ == "__main__":
    sys.exit(main())
