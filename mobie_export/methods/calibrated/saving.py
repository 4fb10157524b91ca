"""Statistics for later runs (calibration/saved.py): when they are written, and what is said of those that are taken."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from mobie_export import __version__, disk
from mobie_export.calibration import bundled, ranks, saved, text
from mobie_export.calibration.products import product_type
from mobie_export.calibration.states import States
from mobie_export.calibration.store import complete
from mobie_export.calibration.text import Calibration
from mobie_export.errors import BAD_OUTPUT, NO_SPACE, USAGE, MobieError
from mobie_export.methods.base import Run
from mobie_export.methods.calibrated.options import TextMethod
from mobie_export.progress import size_text

if TYPE_CHECKING:
    from mobie_export.methods.calibrated.steps import Workspace

NOTE = "saved"  # in a work folder: the digest of the statistics that it saved


def disk_bytes(method: TextMethod, run: Run, every: Calibration, left: list[Path]) -> int:
    """What --save-statistics takes on the output's disk, at most. MobieError where the file cannot be written; one that
    an earlier run of this calibration wrote, whose work folder is `left`, is no other file."""
    path = method.save_statistics
    if path is None:
        return 0
    if ranks.world() > 1:
        raise MobieError(
            USAGE,
            f"{saved.OPTION} runs in one process",
            f"{ranks.world()} of them, started by torchrun",
            todo="leave it out; --statistics is read by several",
        )
    disk.check_folder(path.parent, saved.OPTION)
    disk.check_target(path, True, saved.OPTION)
    others = [run.output, *run.source.paths, *method.inputs]
    if any(path.resolve() == other.resolve() for other in others):
        raise MobieError(
            BAD_OUTPUT,
            f"the statistics would replace an input, or the output: {path}",
            todo=f"choose another name with {saved.OPTION}",
        )
    if any(_is_saved(path, folder) for folder in left):
        return 0
    disk.check_target(path, run.overwrite, saved.OPTION)
    known = method.known.n_targets if method.known else 0
    n = max(known, len(every.tokens) if method.whole else 0)
    size = saved.size(_with_rest(every).shape[0], method.seq_len, n, method.twin(run.source).width)
    if run.output.parent.is_dir() and os.stat(path.parent).st_dev == os.stat(run.output.parent).st_dev:
        return size
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise MobieError(
            NO_SPACE,
            f"not enough space in {path.parent} for the statistics",
            f"{size_text(free)} free",
            size_text(size),
            f"free some space, or write them to another disk with {saved.OPTION}",
        )
    return 0


def _is_saved(path: Path, folder: Path) -> bool:
    """Whether the file is what the run of this work folder has saved."""
    note = folder / NOTE
    if not (note.exists() and path.exists()):
        return False
    with disk.reading_back(note), contextlib.suppress(MobieError):  # what it was is no matter
        return saved.Statistics(path).digest == note.read_text()
    return False


def _with_rest(every: Calibration) -> torch.Tensor:
    return every.tokens if every.rest is None else torch.cat([every.tokens, every.rest])


def save(method: TextMethod, run: Run, work: "Workspace") -> None:
    """--save-statistics, as soon as no pass is to come that adds to them."""
    path, known, twin = method.save_statistics, work.known, work.files.twin
    if path is None or _is_saved(path, work.files.folder):
        return
    tokens = _with_rest(work.every)
    parts: dict[str, saved.Part] = {"tokens": (tuple(tokens.shape), iter([tokens.numpy()]))}
    if work.sensitivity is not None:
        for name, of_layers in (("sensitivity_layers", work.sensitivity), ("sensitivity", work.sensitivity.values())):
            parts[name] = (len(work.sensitivity),), iter([np.array(list(of_layers))])
    targets = work.targets
    if targets is None and known is not None and known.n_targets:
        targets = known.targets((known.n_targets, known.seq_len, twin.width), 0, "cpu")
    if targets is not None:
        parts["targets"] = targets.shape, _stored(targets)
    own, text_name = method.own, method.text.name if method.text else bundled.NAME
    samples = len(work.files.every.tokens) if own else len(tokens)
    if known is not None:
        own, text_name, samples = known.about.own, known.about.text, known.about.samples
    about = saved.About(
        source=work.source,
        text=text_name,
        text_sha256=text.tokens_digest(tokens) if own else work.every.sha256,
        own=own,
        chat=bool(work.settings["chat"]),
        seed=method.seed,
        samples=samples,
        made={name: how for name, how in work.made.items() if name in parts},
    )

    def named(digest: str) -> None:
        with complete(work.files.folder / NOTE) as file:
            file.write(digest.encode())

    size = saved.size(len(tokens), method.seq_len, targets.shape[0] if targets else 0, twin.width)
    with run.phase("saving statistics", size) as progress:
        saved.write(path, about, parts, run.overwrite, progress.update, named)


def _stored(targets: States) -> Iterator[np.ndarray]:
    """bfloat16 as the bits of uint16."""
    at_once = max(1, text.BATCH_TOKENS // targets.shape[1])
    for first in range(0, targets.shape[0], at_once):
        values = targets.read(slice(first, first + at_once)).to(torch.bfloat16)
        yield values.view(torch.uint16).cpu().numpy()


def made(method: TextMethod, run: Run, **more: object) -> dict[str, object]:
    """What decides the numbers of a pass, besides source and text."""
    return {
        "mobie_export": __version__,
        "torch": torch.__version__,
        "device": method.device.split(":")[0],
        "threads": run.computing_threads,
        "products": product_type(method.device),
        "ranks": ranks.world(),
    } | more


def taken(work: "Workspace", name: str, here: dict[str, object]) -> None:
    """Say in the settings how a tensor of the statistics was made otherwise than it would be here: it decides the
    bytes."""
    differ = {key: work.made[name].get(key) for key in here if work.made[name].get(key) != here[key]}
    if differ:
        of_statistics = work.settings.setdefault("statistics", {})
        assert isinstance(of_statistics, dict)
        of_statistics[name] = differ
