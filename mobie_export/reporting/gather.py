"""All parts of a report as one JSON object, written with the page that is made from it."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from mobie_export import __version__, disk, gguf_io
from mobie_export.calibration.text import read_text
from mobie_export.errors import BAD_INPUT, USAGE, MobieError
from mobie_export.exporting import card
from mobie_export.gguf_io import Gguf
from mobie_export.methods.base import cpus
from mobie_export.methods.calibrated.options import check_packages
from mobie_export.progress import Callback, Progress
from mobie_export.reporting import behaviour, findings, page, scores, speed, tally
from mobie_export.reporting.machine import machine
from mobie_export.sources import convert, find
from mobie_export.sources.find import Source
from mobie_export.spec import layout, metadata, verify

FORMAT = 1  # of the JSON
TEXT = "held-out.txt"  # in data/

Step = Callable[[str], None]


@dataclass(frozen=True)
class Compared:
    """What `report` returns: the files that it wrote, what is in the JSON, and the card where one was asked for."""

    json: Path
    html: Path
    data: dict[str, Any]
    card: Path | None = None

    @property
    def findings(self) -> list[dict[str, Any]]:
        """What of the export should not be so: kind, severity (error, warning or note), layer, what."""
        return list(self.data["findings"])


def report(
    file: str | Path,
    against: str | Path,
    *,
    text: str | Path | None = None,
    tasks: Mapping[str, str | Path] | None = None,
    quick: bool = False,
    threads: int | None = None,
    overwrite: bool = False,
    write_card: bool = False,
    progress: Callback | None = None,
) -> Compared:
    """Hold an export beside its source, and write FILE-report.json and FILE-report.html beside it. Raises MobieError.

    against: the GGUF that it was made from, a folder with a checkpoint, or org/name on the hub. text: to measure
    perplexity and divergence on, a file of text (default: one of the package's that nothing was calibrated on). tasks:
    hellaswag, winogrande or multiple-choice -> a file as llama-perplexity reads it. quick: less of everything.
    write_card: a model card, README.md, with the figures. What cannot be measured here (no runtime, no PyTorch, an
    architecture without a twin) is left out, and the report says why.
    """
    started = time.perf_counter()
    file, origin = Path(file), find.find(str(against))
    page.check_library()
    asked = _tasks(tasks or {})
    words = read_text(Path(text), "the text of the report") if text is not None else _bundled()
    outputs = card.report_path(file), card.report_path(file, "html")
    disk.check_folder(file.parent)
    for path in outputs:
        disk.check_target(path, overwrite)
    card.check(file, write_card, overwrite)
    busy = f"{outputs[0]} is being written by another process"
    folder = file.parent / f".mobie-{disk.WORK}-{disk.digest('report', outputs[0].name)}"
    with (
        convert.opened(origin, file.parent, progress=progress) as path,
        gguf_io.open_model(file) as ours,
        gguf_io.open_model(path) as theirs,
        disk.private(folder, f"the unfinished {outputs[0].name}", busy, keep=False) as work,
    ):
        _check(ours, theirs)
        data = _gather(ours, theirs, origin, words, asked, quick, threads or cpus(), work, progress)
        data["text"] = {"name": Path(text).name if text is not None else TEXT, "bytes": len(words)}
        data["made"]["seconds"] = time.perf_counter() - started
        data = finite(data)
        data["findings"] = findings.find(data)
        written = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
        for target, content in zip(outputs, (written, page.page(json.loads(written))), strict=True):
            part = work / f"{target.name}.part"
            with disk.writing(target):
                part.write_text(content, encoding="utf-8")
            disk.place(part, target, overwrite)
    where = card.write(file, origin, data["source"]["bytes"], overwrite) if write_card else None
    return Compared(*outputs, data, where)


def _tasks(asked: Mapping[str, str | Path]) -> dict[str, Path]:
    """MobieError for a task that llama-perplexity has not, or a file that is not there."""
    for name, path in asked.items():
        if name not in scores.TASKS:
            raise MobieError(USAGE, f"there is no task {name}", wanted=" or ".join(scores.TASKS))
        if not Path(path).is_file():
            raise MobieError(BAD_INPUT, f"there is no {path}", wanted=f"a file of {name} as llama-perplexity reads it")
    return {name: Path(path) for name, path in asked.items()}


def _bundled() -> bytes:
    return resources.files("mobie_export").joinpath("data", TEXT).read_bytes()


def _check(file: Gguf, source: Gguf) -> None:
    """MobieError where both have nothing to do with each other."""
    if not metadata.is_mobie(file):
        what = f"{file.paths[0]} is not a MoBiE file"
        raise MobieError(BAD_INPUT, what, f"no {metadata.FORMAT_VERSION.name}", "an export", "mobie-export MODEL.gguf")
    metadata.check_version(file)
    if not layout.experts(source):
        raise MobieError(BAD_INPUT, f"{source.paths[0]} has no experts", wanted="what the export was made from")
    for what, of in (
        ("architecture", lambda g: g.architecture),
        ("vocabulary", lambda g: g.get_list("tokenizer.ggml.tokens", str)),
    ):
        if of(file) != of(source):
            raise MobieError(
                BAD_INPUT,
                f"{source.paths[0]} is another model than {file.paths[0]}",
                f"another {what}",
                "what the export was made from",
                "name its source with --against",
            )


def _gather(
    file: Gguf,
    source: Gguf,
    origin: Source,
    text: bytes,
    tasks: Mapping[str, Path],
    quick: bool,
    threads: int,
    work: Path,
    progress: Callback | None,
) -> dict[str, Any]:
    words = work / "text"
    words.write_bytes(text)
    here = {"threads": threads, "quick": quick}
    data: dict[str, Any] = {
        "format": FORMAT,
        "made": {"by": f"mobie-export {__version__}", "at": datetime.now(UTC).isoformat(timespec="seconds"), **here}
        | {"machine": machine()},
        "file": _about(file) | {"problem": _problem(file, progress), "of_source": _is_of(file, source)},
        "source": _about(source) | {"hub": origin.hub},
    }
    total = sum(t.n_bytes for t in file.tensors.values())
    with Progress("tensors", total, progress) as shown:
        data["tensors"] = tally.tally(file, source, shown.update)
    n_layers = source.get(f"{source.architecture}.block_count", int, 0)
    with Progress("layers", n_layers, progress, "layer") as shown:
        data["layers"] = _part(lambda: _layers(file, source, text, threads, quick, shown.update))
    models = file.paths[0], source.paths[0]
    with _steps("perplexity", 2, progress) as step:
        data["scores"] = _part(lambda: scores.divergence(file, source, words, work, threads, quick, step))
    for left in work.glob("probabilities"):  # gigabytes
        left.unlink()
    with _steps("tasks", 2 * len(tasks), progress) as step:
        data["tasks"] = _part(lambda: scores.tasks(*models, tasks, threads, quick, step))
    with _steps("speed", 2 * speed.rounds(quick), progress) as step:
        data["speed"] = _part(lambda: speed.measure(*models, threads, quick, step))
    with _steps("behaviour", 2 * behaviour.n_requests(quick) + 2, progress) as step:
        data["behaviour"] = _part(lambda: behaviour.compare(file, source, work, threads, quick, step))
    return data


def _layers(
    file: Gguf, source: Gguf, text: bytes, threads: int, quick: bool, step: Callable[[int, str], None]
) -> dict[str, Any]:
    try:
        check_packages()
    except MobieError as e:
        e.what, e.todo = "packages are not installed", "pip install 'mobie-export[report]'"
        raise
    from mobie_export.reporting import layers

    try:
        return layers.compare(file, source, text, threads, quick, step)
    except MobieError as e:
        e.todo = ""  # what an export should do about it
        raise


def _part(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A part of the report, or why it is left out."""
    try:
        return measure()
    except MobieError as e:
        return {"left_out": "; ".join(x for x in (e.what, e.found) if x), "todo": e.todo}


@contextmanager
def _steps(name: str, total: int, progress: Callback | None) -> Iterator[Step]:
    """A function that is told what begins; what began before is then done."""
    with Progress(name, max(total, 1), progress, "step") as shown:
        begun = 0

        def step(what: str) -> None:
            nonlocal begun
            shown.update(min(begun, 1), what)
            begun += 1

        yield step


# ---- what is said of a file ------------------------------------------------------------------------------------------


def _about(gguf: Gguf) -> dict[str, Any]:
    bpw, expert_bpw = layout.bits_per_weight(gguf)
    experts = layout.experts(gguf)
    return {
        "name": gguf.paths[0].name,
        "files": len(gguf.paths),
        "bytes": gguf.file_size,
        "bpw": bpw,
        "expert_bpw": expert_bpw,
        "architecture": gguf.architecture,
        "model": gguf.value("general.name"),
        "layers": len({x.layer for x in experts.values()}),
        "experts": max(x.n_expert for x in experts.values()),
        "used": gguf.value(f"{gguf.architecture}.expert_used_count"),
        "seal": metadata.SEAL.of(gguf),
    }


def _problem(file: Gguf, progress: Callback | None) -> str:
    """What `verify` has against an export; empty where nothing."""
    try:
        verify.check(file, progress=progress)
    except MobieError as e:
        return "; ".join(x for x in (e.what.replace(f"{file.paths[0].parent}{os.sep}", ""), e.found) if x)
    return ""


def _is_of(file: Gguf, source: Gguf) -> bool:
    return metadata.SOURCE_SEAL.of(file) == source.sha256


def finite(value: Any) -> Any:
    """As JSON has it: numbers that are none become null."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
