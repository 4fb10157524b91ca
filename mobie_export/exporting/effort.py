"""Which method an export takes where none is named: the most effort that memory, disk and time allow.

An effort is a name for a method and its options; what is kept, in the work folder and in the file, are these.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mobie_export import methods
from mobie_export.calibration import ranks
from mobie_export.errors import NO_MEMORY, NO_SPACE, USAGE, MobieError
from mobie_export.methods.base import Method, Run
from mobie_export.progress import available_memory, size_text, time_text

METHOD = "ordered"
LEVELS = ("fast", "normal", "best")  # of the method: its `efforts`
NIGHT = 8 * 3600.0  # seconds that an export may take unless it is told


@dataclass(frozen=True)
class Effort:
    """What the user asked for. MobieError for values that make no sense."""

    level: str | None = None  # None: the best one that fits
    time: float | None = None  # seconds at most; None: a night, and where a level is named as long as it takes
    max_disk: int | None = None  # bytes for unfinished work; None: what is free
    options: Mapping[str, Any] = field(default_factory=dict)  # of the method, the others follow from the level
    method: str = METHOD

    def __post_init__(self) -> None:
        if self.level not in (None, *LEVELS):
            raise MobieError(USAGE, "there is no such effort", str(self.level), ", ".join(LEVELS))
        if self.time is not None and not self.time > 0:
            raise MobieError(USAGE, "--time is out of range", str(self.time), "more than nothing")

    def check(self) -> None:
        """As a method's."""
        methods.get(self.method)(**self.options).check()


@dataclass(frozen=True)
class Chosen:
    method: Method
    level: str
    left_out: tuple[str, ...]  # better efforts, and why they were not taken


def choose(asked: Effort, run: Run) -> Chosen:
    """MobieError where the model cannot be calibrated, and where not even the least effort fits."""
    levels = methods.get(asked.method).efforts(run.source, run.coding)
    names = [asked.level] if asked.level else list(reversed(LEVELS))
    left_out: dict[str, str] = {}  # better ones -> why they do not fit
    kind = USAGE
    for name in names:
        better: dict[str, str] = {}  # of this level
        for options in levels[name]:
            method = methods.get(asked.method).of_effort(options, asked.options)
            found = _too_much(method, asked, run)
            if found is None:
                return Chosen(method, name, tuple(f"{x} is left out: {why}" for x, why in (left_out | better).items()))
            kind, why = found
            better.setdefault(_label(name, method, levels[name]), why)
        left_out[name] = why  # of its last choice, which takes least
    raise MobieError(
        kind,
        "no calibration fits" if asked.level is None else f"--effort {asked.level} does not fit",
        "; ".join(f"{x}: {why}" for x, why in left_out.items()),
        todo="allow more with --time, --max-ram or --max-disk, or take fewer --samples; --method sign needs next to "
        "nothing and calibrates nothing",
    )


def _label(name: str, method: Method, choices: list[dict[str, Any]]) -> str:
    """A level, with the options by which its choices differ."""
    differ = {key for c in choices for key in c if any(key not in o or o[key] != c[key] for o in choices)}
    found = [name]
    for option in dataclasses.fields(method):
        if option.name in differ and getattr(method, option.name) != option.default:
            found += [option.metadata["flag"], str(getattr(method, option.name))]
    return " ".join(found)


def _too_much(method: Method, asked: Effort, run: Run) -> tuple[Any, str] | None:
    try:
        needs = method.needs(run)
    except MobieError as e:
        if e.kind not in (NO_MEMORY, NO_SPACE):
            raise
        return e.kind, f"{e.what}: {e.found}"
    free_memory = available_memory()
    free_memory = None if free_memory is None else free_memory // ranks.on_this_machine()
    memory = run.max_ram if run.max_ram is not None else free_memory
    if memory is not None and needs.memory > memory:
        return NO_MEMORY, f"it takes {size_text(needs.memory)} of memory, {size_text(memory)} are there"
    free = shutil.disk_usage(run.output.parent).free if run.output.parent.exists() else None
    disk = asked.max_disk if asked.max_disk is not None else free
    if disk is not None and needs.disk - needs.disk_there > disk:
        return NO_SPACE, f"it takes {size_text(needs.disk)} of disk for its work, {size_text(disk)} are there"
    limit = asked.time if asked.time is not None else None if asked.level else NIGHT
    seconds = sum(method.seconds(run).values()) if limit is not None else 0.0
    if limit is not None and seconds > limit:
        return USAGE, f"it takes about {time_text(seconds)}, more than {time_text(limit)}"
    return None


def flags(method: Method) -> list[list[str]]:
    """The options of the command line that stand for a method, each with its value: every one that is not its
    default."""
    found = [["--method", method.name]]
    for option in dataclasses.fields(method):
        value = getattr(method, option.name)
        if value != option.default:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            found.append([option.metadata["flag"], *([] if option.metadata["const"] is not None else [shown])])
    return found
