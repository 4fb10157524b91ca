"""Text that the model writes itself, by llama.cpp, in a process of its own: `--calibration self`.

What a model writes is what it knows, in every kind of text that it was trained on. A sequence begins with a token drawn
from the vocabulary (LLM-QAT, arXiv 2305.17888); every other one, where the model has a chat template, with the
template's words before a user's message, so that it writes the question, too (Magpie, arXiv 2406.08464). All that
follows is drawn from the model's distribution as it is: no temperature, nothing cut off.

This file is the child's program as well, and imports nothing of the package there (as tokenizer.py).
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

AT_ONCE = 32  # sequences that are written together
NUMBER = np.dtype("<i4")  # of a token, between the processes and in files


def write(
    model: Path,
    opening: str,  # what every other sequence begins with; empty: none does
    n: int,
    length: int,
    seed: int,
    threads: int,
    folder: Path,
    step: Callable[[int, str], None] = lambda n, what: None,
) -> np.ndarray:  # int64 [n, length]
    """Sequences written by the model; rounds of them are kept in the folder, and one that is there is not made again.
    Several ranks divide the rounds.

    step: called with the tokens of every round, of the last one those that are asked for. MobieError where llama.cpp is
    not installed or fails, and where the folder cannot be written, or what is in it read.
    """
    import torch

    from mobie_export.calibration import ranks
    from mobie_export.calibration.store import complete
    from mobie_export.errors import BAD_INPUT, MobieError

    own = range(-(-n // AT_ONCE))[ranks.divide(-(-n // AT_ONCE))]
    paths = {r: Path(folder) / f"own-{r}.tokens" for r in own}
    left = [r for r, path in paths.items() if not path.exists()]
    asked = {r: min(AT_ONCE, n - r * AT_ONCE) * length for r in own}
    step(sum(asked[r] for r in own if r not in left), "done before")
    size = AT_ONCE * length * NUMBER.itemsize
    if left:
        task = {"model": str(model), "opening": opening, "length": length, "seed": seed, "threads": threads}
        command = [sys.executable, "-P", __file__]  # the task by stdin: an opening may be longer than arguments may be
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        # What it says goes to a file: a pipe that nobody reads would stop it. It ends when its stdin does.
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, env=environment
            ) as child,
        ):
            assert child.stdin is not None and child.stdout is not None
            try:
                _send(child.stdin.fileno(), json.dumps(task | {"rounds": left}).encode() + b"\n")
                for r in left:
                    if len(found := child.stdout.read(size)) < size:
                        break
                    with complete(paths[r]) as file:
                        file.write(found)
                    step(asked[r], model.name)
                child.wait()
            except BaseException:
                child.kill()
                raise
            said.seek(0)
            lines = said.read().decode("utf-8", "replace").strip().splitlines()
        if child.returncode:
            if child.returncode < 0:  # such as the signal that the system sends when memory runs out
                lines.append(signal.Signals(-child.returncode).name)
            raise MobieError(
                BAD_INPUT,
                f"{model} cannot write its own text",
                lines[-1] if lines else f"exit code {child.returncode}",
                "a model that llama.cpp runs",
                "calibrate without --calibration self",
            )
    rounds = [np.empty((0, length), NUMBER), *(_read(path, length) for path in paths.values())]
    return ranks.gathered(torch.from_numpy(np.concatenate(rounds))).numpy()[:n].astype(np.int64)


def _send(pipe: int, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # it is gone, and says why
        while data:
            data = data[os.write(pipe, data) :]


def _read(path: Path, length: int) -> np.ndarray:  # int32 [AT_ONCE, length]
    from mobie_export import disk

    with disk.reading_back(path):
        return np.frombuffer(path.read_bytes(), NUMBER).reshape(AT_ONCE, length)


def _main(task: dict[str, Any]) -> None:
    """Writes the rounds to stdout, int32 [AT_ONCE, length] each. The last line on stderr says what failed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import llama_cpp as llama

    @llama.llama_log_callback
    def log(level: int, line: bytes, data: object) -> None:
        if level == ERROR:
            sys.stderr.write(line.decode("utf-8", "replace"))

    llama.llama_log_set(log, None)
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(os.fsencode(task["model"]), llama.llama_model_default_params())
    if not model:
        sys.exit("llama.cpp cannot load it")
    length = task["length"]
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = AT_ONCE * length, AT_ONCE, False
    params.n_batch = params.n_ubatch = AT_ONCE
    params.n_threads = params.n_threads_batch = task["threads"]
    context = llama.llama_init_from_model(model, params)
    if not context:
        sys.exit("no memory for its context")
    vocab = llama.llama_model_get_vocab(model)
    n_vocab = llama.llama_vocab_n_tokens(vocab)
    plain = np.array([t for t in range(n_vocab) if not llama.llama_vocab_get_attr(vocab, t) & NOT_PLAIN])
    first = [llama.llama_vocab_bos(vocab)] if llama.llama_vocab_get_add_bos(vocab) else []
    opening = _tokens(llama, vocab, task["opening"].encode())
    batch = llama.llama_batch_init(AT_ONCE, 0, 1)
    batch.n_tokens = AT_ONCE
    for r in task["rounds"]:
        random = np.random.default_rng([task["seed"], r])
        given = [[*first, *(opening if opening and s % 2 else [random.choice(plain)])] for s in range(AT_ONCE)]
        found = np.zeros((AT_ONCE, length), NUMBER)
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        for at in range(length):
            for s in range(AT_ONCE):
                if at < len(given[s]):
                    found[s, at] = given[s][at]
                batch.token[s], batch.pos[s] = int(found[s, at]), at
                batch.n_seq_id[s], batch.seq_id[s][0], batch.logits[s] = 1, s, 1
            if at + 1 == length:
                break
            if llama.llama_decode(context, batch):
                sys.exit(f"llama.cpp failed at token {at}")
            logits = np.ctypeslib.as_array(llama.llama_get_logits(context), shape=(AT_ONCE, n_vocab))
            sums = np.exp(logits - logits.max(1, keepdims=True)).cumsum(1, dtype=np.float64)
            if not np.isfinite(sums[:, -1]).all():
                sys.exit(f"its logits are infinite or NaN at token {at}")
            drawn = random.random(AT_ONCE) * sums[:, -1]
            found[:, at + 1] = [np.searchsorted(row, x, side="right") for row, x in zip(sums, drawn, strict=True)]
        out.write(found.tobytes())
        out.flush()


def _end_with_parent() -> None:
    """Wait until the process that started this one, and holds the other end of stdin, is gone, and go."""
    while os.read(0, 1 << 10):
        pass
    os._exit(1)


def _tokens(llama: Any, vocab: Any, text: bytes) -> list[int]:
    found = np.empty(len(text) + 8, "<i4")
    pointer = ctypes.cast(found.ctypes.data, llama.llama_token_p)
    n = llama.llama_tokenize(vocab, text, len(text), pointer, len(found), False, True)
    return [int(t) for t in found[: max(0, n)]]


ERROR = 4  # GGML_LOG_LEVEL_ERROR
NOT_PLAIN = 1 | 2 | 8  # LLAMA_TOKEN_ATTR_UNKNOWN, _UNUSED, _CONTROL

if __name__ == "__main__":
    _main(json.loads(sys.stdin.buffer.readline()))
