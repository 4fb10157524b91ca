"""The runtime's programs, run so that none of them outlives the report."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mobie_export.runtime import installed, libggml
from mobie_export.runtime.processes import tail, unavailable

BUILD = "mobie-export runtime build"


def find(name: str) -> Path:
    """A program of the patched runtime. MobieError where it is not installed, or a stock one is."""
    path = installed.site() / "llama_cpp" / "bin" / name
    if not path.exists():
        raise unavailable(f"{name} is not installed", wanted="the patched runtime's", todo=BUILD)
    if not libggml.kernel_names():
        raise unavailable(f"{path} is a stock llama.cpp's", wanted="the patched runtime's", todo=BUILD)
    return path


def environment() -> dict[str, str]:
    """The user's, without what would change the options of a program of llama.cpp's behind the report's back."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_ARG_")}
    return kept | {"GGML_NO_BACKTRACE": "1"}


def run(name: str, arguments: Sequence[object]) -> str:
    """All that a program prints. MobieError where it fails; it is ended where this is interrupted."""
    command = [str(find(name)), *map(str, arguments)]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment(),
    )
    if done.returncode:
        ended = f"exit code {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
        raise unavailable(f"{name} failed: {ended}", tail(done.stdout, 5))
    return done.stdout
