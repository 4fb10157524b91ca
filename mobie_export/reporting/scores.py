"""How far is an export from its source on a text, and how well do both do on tasks? Asked of llama-perplexity."""

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mobie_export.errors import NO_SPACE, MobieError
from mobie_export.gguf_io import Gguf
from mobie_export.progress import size_text
from mobie_export.reporting import tools
from mobie_export.runtime.processes import tail, unavailable

CONTEXT = 512  # tokens of a chunk, of which the second half is scored
CHUNKS, QUICK_CHUNKS, QUICK_TASKS = 32, 4, 20
LARGEST_BASE = 4 << 30  # bytes on the disk of the source's probabilities

NUMBER = r"(-?[\d.]+(?:e[+-]?\d+)?|-?nan|-?inf)"
FIGURES = {
    "ppl_source": rf"Mean PPL\(base\)\s*:\s*{NUMBER}\s*±\s*{NUMBER}",
    "ppl": rf"Mean PPL\(Q\)\s*:\s*{NUMBER}\s*±\s*{NUMBER}",
    "ratio": rf"Mean PPL\(Q\)/PPL\(base\)\s*:\s*{NUMBER}\s*±\s*{NUMBER}",
    "kl": rf"Mean\s+KLD:\s*{NUMBER}\s*±\s*{NUMBER}",
    "kl_median": rf"Median\s+KLD:\s*{NUMBER}",
    "kl_99": rf"99\.0%\s+KLD:\s*{NUMBER}",
    "same_top": rf"Same top p:\s*{NUMBER}\s*±\s*{NUMBER}",
}
# Name of a task -> what its score looks like: the first pattern that is found, and of it the last one. Of fewer than a
# hundred tasks some print a running score alone.
TASKS = {
    "hellaswag": [r"^(?P<n>\d+)\t(?P<score>[\d.]+)%\t\[\s*(?P<low>[\d.]+)%,\s*(?P<high>[\d.]+)%\]"],
    "winogrande": [
        rf"Final Winogrande score\((?P<n>\d+) tasks\):\s*(?P<score>[\d.]+) \+/- (?P<error>{NUMBER})",
        rf"^(?P<n>\d+)\t(?P<score>[\d.]+)\t\s*{NUMBER}\s+{NUMBER}\s+\d+\s+\d+$",
    ],
    "multiple-choice": [
        rf"Final result:\s*(?P<score>[\d.]+) \+/- (?P<error>{NUMBER})",
        r"^(?P<n>\d+)\t(?P<score>[\d.]+)$",
    ],
}


def figures(text: str) -> dict[str, float]:
    """What `llama-perplexity --kl-divergence` found; NAME_error is the standard error of NAME. same_top: percent.
    MobieError where something is missing."""
    found = {}
    for name, pattern in FIGURES.items():
        match = re.search(pattern, text)
        if not match:
            raise unavailable(f"llama-perplexity printed no {name}", tail(text, 5))
        found[name] = float(match[1])
        if match.lastindex == 2:
            found[f"{name}_error"] = float(match[2])
    return found


def score(task: str, text: str) -> dict[str, float]:
    """{"score": percent, "n": tasks, ...} of what llama-perplexity printed for a task. MobieError where it has none."""
    found = next((f for p in TASKS[task] if (f := list(re.finditer(p, text, re.MULTILINE)))), None)
    if found is None:
        raise unavailable(f"llama-perplexity printed no score of {task}", tail(text, 5))
    return {name: float(value) for name, value in found[-1].groupdict().items() if value is not None}


def divergence(
    file: Gguf, source: Gguf, text: Path, work: Path, threads: int, quick: bool, step: Callable[[str], None]
) -> dict[str, Any]:
    """Perplexity of both and the divergence of the export from the source. work: an empty folder for the source's
    probabilities. MobieError where llama-perplexity fails, or the disk is too small."""
    context = min(CONTEXT, source.get(f"{source.architecture}.context_length", int, CONTEXT))
    words = len(source.get_list("tokenizer.ggml.tokens", str) or [])
    chunk = (context // 2) * (words + 4) * 2  # bytes that llama-perplexity keeps of one
    free = shutil.disk_usage(work).free
    chunks = min(QUICK_CHUNKS if quick else CHUNKS, max(1, LARGEST_BASE // chunk))
    if chunks * chunk > free:
        raise MobieError(
            NO_SPACE,
            "not enough disk for the source's probabilities",
            f"{size_text(free)} free in {work.parent}",
            size_text(chunks * chunk),
            "free some space; --quick takes less",
        )
    base, common = work / "probabilities", ["-f", text, "-c", context, "--chunks", chunks, "-t", threads]
    step("perplexity of the source")
    said = tools.run("llama-perplexity", ["-m", source.paths[0], *common, "--kl-divergence-base", base])
    done = re.search(r"calculating perplexity over (\d+) chunks", said)
    step("divergence of the export")
    said = tools.run(
        "llama-perplexity", ["-m", file.paths[0], *common, "--kl-divergence-base", base, "--kl-divergence"]
    )
    found: dict[str, Any] = {"context": context, "chunks": int(done[1]) if done else None}
    return found | figures(said)


def tasks(
    file: Path, source: Path, asked: Mapping[str, Path], threads: int, quick: bool, step: Callable[[str], None]
) -> dict[str, Any]:
    """Name of a task -> {"file", "source", "score"}: what both models score on the user's files."""
    found = {}
    for name, data in asked.items():
        options = ["-f", data, f"--{name}", "-t", threads, *([f"--{name}-tasks", QUICK_TASKS] if quick else [])]
        both = {}
        for which, model in (("source", source), ("file", file)):
            step(f"{name} of the {'source' if which == 'source' else 'export'}")
            both[which] = score(name, tools.run("llama-perplexity", ["-m", model, *options]))
        found[name] = {"data": data.name, **both}
    return found
