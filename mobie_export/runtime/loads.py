"""Does the installed llama.cpp load a file? It is asked, without the weights, in a process of its own: it can abort.

As a program, `python -m mobie_export.runtime.loads FILE` loads metadata, vocabulary and the table of tensors, and
prints what llama.cpp has against them.
"""

import os
import subprocess
import sys
from pathlib import Path

from mobie_export.errors import NO_RUNTIME, MobieError
from mobie_export.runtime import libggml

TIMEOUT = 600  # seconds; the largest vocabularies take two


def problem(path: Path) -> str:
    """Why the patched runtime does not load a GGUF, in its words; empty where it does, or where there is none."""
    if not libggml.kernel_names():
        return ""
    command = [sys.executable, "-P", "-m", "mobie_export.runtime.loads", str(path)]
    quiet = os.environ | {"GGML_NO_BACKTRACE": "1"}  # no debugger where it aborts
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, env=quiet)
    except subprocess.TimeoutExpired:
        return f"no answer in {TIMEOUT} seconds"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    ended = "" if done.returncode > 0 else f"ended by signal {-done.returncode}; "
    if lines and lines[0].startswith("Traceback"):
        lines = lines[-1:]
    return ended + (lines[0] if lines else "without a word")


def check(path: Path, name: str) -> None:
    """MobieError where there is a patched runtime and it does not load the file. name: as the user knows it."""
    if found := problem(path):
        raise MobieError(
            NO_RUNTIME,
            f"llama.cpp does not load {name}",
            found,
            "a vocabulary and tensors that the pinned llama.cpp knows",
            "look for a GGUF of the model that it runs, or for a newer mobie-export",
        )


def main(path: str) -> int:
    import ctypes

    try:
        import llama_cpp
    except ImportError:  # libraries without their binding: `doctor` says so
        return 0

    said = []

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _: object) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            said.append(text.decode("utf-8", "replace").strip())

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.no_alloc, params.n_gpu_layers = True, 0
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE  # nothing is mapped either
    if llama_cpp.llama_model_load_from_file(os.fsencode(path), params):
        return 0
    print("\n".join(said))
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
