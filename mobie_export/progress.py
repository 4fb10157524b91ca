"""How far long work has come: told to a callback, by the command line shown on stderr."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from mobie_export.errors import NO_MEMORY, MobieError, Stopped

stopped: Stopped | None = None  # a signal asked the process to end; raised again where it was lost (cli._stoppable)

LINE_INTERVAL = 10.0  # seconds between plain lines


def size_text(n: float) -> str:
    """Bytes for people: 1234567 -> '1.18 MiB'."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def time_text(seconds: float) -> str:
    """Seconds for people: 3725 -> '1 h 02 min'."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def peak_memory() -> int | None:
    """Largest resident size of this process so far in bytes, where the system says so.

    Linux's ru_maxrss is inherited from the process that started this one, so the kernel's own figure is preferred.
    """
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int | None:
    """Bytes that a process can take without pushing others out, where the system says so."""
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def check_memory(max_ram: int | None) -> None:
    """MobieError when more was resident than that: a promise to whatever else runs on the machine."""
    peak = peak_memory() if max_ram is not None else None
    if peak is not None and max_ram is not None and peak > max_ram:
        raise MobieError(
            NO_MEMORY,
            "the export took more memory than --max-ram allows",
            size_text(peak),
            size_text(max_ram),
            "allow more; or calibrate with fewer --samples, or convert with fewer --threads",
        )


@dataclass(frozen=True)
class Step:
    """How far a phase of the work has come. With `ended` it is over, whether it came to its end or not."""

    phase: str
    done: float
    total: float
    unit: str  # "B" for bytes, or what is counted
    what: str = ""  # what is being worked on
    ended: bool = False


Callback = Callable[[Step], None]


class Progress:
    """Counts bytes, or other units, towards a total, and tells `callback`; with `max_ram` every update checks that no
    more than so many bytes were resident."""

    def __init__(
        self, label: str, total: float, callback: Callback | None, unit: str = "B", max_ram: int | None = None
    ):
        self.label, self.total, self.callback, self.unit, self.max_ram = label, total, callback, unit, max_ram
        self.done = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.callback is not None:
            self.callback(Step(self.label, self.done, self.total, self.unit, ended=True))

    def update(self, n: float, what: str) -> None:
        """`n` more are done; `what` is being worked on."""
        if stopped is not None:
            raise stopped
        check_memory(self.max_ram)
        self.done += n
        if self.callback is not None:
            self.callback(Step(self.label, self.done, self.total, self.unit, what))


class Shown:
    """The callback of the command line: a bar on stderr in a terminal, a plain line every few seconds elsewhere."""

    def __init__(self) -> None:
        self.phase, self.bar, self.shown = "", None, 0.0
        self.started = self.last_line = 0.0

    def __call__(self, step: Step) -> None:
        if step.phase != self.phase:
            if step.ended:  # of a phase around the one that was shown
                return
            if self.bar is not None:
                self.bar.close()
            self._begin(step)
        if self.bar is not None:
            self.bar.set_postfix_str(step.what, refresh=False)
            self.bar.update(step.done - self.shown)
        elif not step.ended:
            self._line(step)
        self.shown = step.done
        if step.ended:
            if self.bar is not None:
                self.bar.close()
            self.phase, self.bar = "", None

    def _begin(self, step: Step) -> None:
        self.phase, self.shown = step.phase, 0.0
        self.started = self.last_line = time.monotonic()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                desc=step.phase,
                total=step.total,
                unit="B" if step.unit == "B" else f" {step.unit}s",
                unit_scale=True,
                unit_divisor=1024 if step.unit == "B" else 1000,
                leave=False,
            )

    def _line(self, step: Step) -> None:
        now = time.monotonic()
        if now - self.last_line < LINE_INTERVAL:
            return
        self.last_line = now
        speed = step.done / (now - self.started)
        left = (step.total - step.done) / speed if speed else 0.0

        def text(n: float) -> str:
            if step.unit == "B":
                return size_text(n)
            return f"{n:,.0f} {step.unit}s" if n >= 10 else f"{n:.2g} {step.unit}s"

        print(
            f"{step.phase} {step.done / max(step.total, 1):4.0%}  {text(step.done)} of {text(step.total)}, "
            f"{text(speed)}/s, {time_text(left)} left, {step.what}",
            file=sys.stderr,
            flush=True,
        )
