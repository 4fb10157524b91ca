"""How fast do an export and its source run here? Asked of llama-bench, in turns, so that what else the machine does
meets both."""

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mobie_export.reporting import tools

ROUNDS, PROMPT, GENERATED = 3, 128, 32
QUICK = (3, 64, 16)


def rounds(quick: bool) -> int:
    return QUICK[0] if quick else ROUNDS


def rows(file: Path, prompt: int, generated: int, repetitions: int, threads: int) -> list[dict[str, Any]]:
    """What llama-bench of the patched runtime says of a model: one row for the prompt, one for what is generated.
    prompt, generated: tokens. MobieError."""
    options = ["-p", prompt, "-n", generated, "-r", repetitions, "-t", threads, "-o", "json"]
    return parsed(tools.run("llama-bench", ["-m", file, *options]))


def parsed(text: str) -> list[dict[str, Any]]:
    """The JSON array that llama-bench printed, amid what else it said."""
    found: list[dict[str, Any]] = json.loads(text[text.index("[\n") : text.rindex("]") + 1])
    return found


def tokens_per_second(found: list[dict[str, Any]]) -> dict[str, float]:
    """{"prompt": ..., "generation": ...} of llama-bench's rows."""
    return {"prompt" if row["n_prompt"] else "generation": float(row["avg_ts"]) for row in found}


def measure(file: Path, source: Path, threads: int, quick: bool, step: Callable[[str], None]) -> dict[str, Any]:
    """Tokens per second of both, medians of the rounds; load: of the machine before, 1 for every busy core."""
    n_rounds, prompt, generated = QUICK if quick else (ROUNDS, PROMPT, GENERATED)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    every: dict[str, list[dict[str, float]]] = {"source": [], "file": []}
    models = {"source": source, "file": file}
    for i in range(n_rounds):
        for which in ("source", "file") if i % 2 == 0 else ("file", "source"):
            step(f"speed of the {'source' if which == 'source' else 'export'}, round {i + 1} of {n_rounds}")
            every[which].append(tokens_per_second(rows(models[which], prompt, generated, 1, threads)))
    found: dict[str, Any] = {"rounds": n_rounds, "prompt_tokens": prompt, "generated_tokens": generated, "load": load}
    for which, results in every.items():
        found[which] = {k: statistics.median(r[k] for r in results) for k in ("prompt", "generation")}
    return found
