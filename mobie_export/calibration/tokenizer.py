"""Text to tokens, by the model's own tokenizer in llama.cpp, in a process of its own.

llama.cpp ends the process it runs in where a text or a vocabulary is not what its tokenizer expects (uncaught
exceptions, aborts, recursion of std::regex over long runs). What may be lost then is the child alone. This file is the
child's program as well, and imports nothing of the package there.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np


def tokenize(
    path: Path, text: bytes, special: bool = False, name: str = "the calibration text"
) -> tuple[np.ndarray, int | None]:
    """(tokens int32 [n], the token every sequence starts with or None) of a text, by the vocabulary of a GGUF.

    special: whether the names of special tokens in the text are these tokens, as in what a chat template makes. name:
    of the text, for errors. MobieError where llama.cpp is not installed, cannot load the vocabulary, or fails.
    """
    from mobie_export.errors import BAD_INPUT, UNSUPPORTED, MobieError

    # -P: the folder of this file is no place to import from
    command = [sys.executable, "-P", __file__, str(path), "special" if special else "plain"]
    child = subprocess.run(command, input=text, capture_output=True, env={**os.environ, "GGML_NO_BACKTRACE": "1"})
    said = [x.strip() for x in child.stderr.decode("utf-8", "replace").splitlines() if x.strip()]
    head, _, rest = child.stdout.partition(b"\n")
    failed, found, first = "died", "", None
    if child.returncode == 0 and head:
        failed, found, first = json.loads(head)
    match failed:
        case "":
            return np.frombuffer(rest, "<i4").copy(), first
        case "runtime":
            raise MobieError(
                UNSUPPORTED,
                "calibration tokenizes with llama.cpp, which is not installed",
                found,
                todo="mobie-export runtime build",
            )
        case "vocabulary":
            raise MobieError(
                BAD_INPUT,
                f"llama.cpp cannot load the vocabulary of {path}",
                found or (said[-1] if said else ""),
                "a tokenizer that llama.cpp knows",
                "convert the model again with its tokenizer files, or export with --method sign",
            )
    end = f"exit code {child.returncode}"
    if child.returncode < 0:
        with contextlib.suppress(ValueError):
            end = signal.Signals(-child.returncode).name
    raise MobieError(
        BAD_INPUT,
        f"llama.cpp's tokenizer cannot take {name}",
        "; ".join([end, *said[-1:]]),
        "text in UTF-8, in words and lines",
        "give another text with --calibration",
    )


def _main(path: str, kind: str) -> None:
    """On stdin the text; on stdout a line of JSON, then tokens in int32. What llama.cpp says goes to stderr."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(ImportError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # nobody wants its memory on the disk
    text = sys.stdin.buffer.read()

    def answer(failed: str = "", found: str = "", first: int | None = None, values: bytes = b"") -> None:
        out.write(json.dumps([failed, found, first]).encode() + b"\n" + values)
        out.flush()

    try:
        import llama_cpp
    except (ImportError, RuntimeError, OSError) as e:
        return answer("runtime", str(e))

    @llama_cpp.llama_log_callback
    def log(level: int, line: bytes, data: object) -> None:
        if level == ERROR:
            sys.stderr.write(line.decode("utf-8", "replace"))

    llama_cpp.llama_log_set(log, None)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        return answer("vocabulary")
    vocab = llama_cpp.llama_model_get_vocab(model)
    if llama_cpp.llama_vocab_type(vocab) == NONE:
        return answer("vocabulary", "the model has no tokenizer")
    n = -len(text) - 8
    for _ in range(2):  # more tokens than bytes: each byte that is not UTF-8 becomes three
        tokens = np.empty(-n, "<i4")
        pointer = ctypes.cast(tokens.ctypes.data, llama_cpp.llama_token_p)
        n = llama_cpp.llama_tokenize(vocab, text, len(text), pointer, len(tokens), False, kind == "special")
        if n >= 0:
            break
    else:
        sys.exit(f"{-n} tokens")
    first = llama_cpp.llama_vocab_bos(vocab) if llama_cpp.llama_vocab_get_add_bos(vocab) else None
    answer(first=first, values=tokens[:n].tobytes())


ERROR, NONE = 4, 0  # GGML_LOG_LEVEL_ERROR, LLAMA_VOCAB_TYPE_NONE

if __name__ == "__main__":
    _main(*sys.argv[1:])
