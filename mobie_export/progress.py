"""Progress of long work on stderr: a bar in a terminal, a plain line every few seconds elsewhere."""

import sys
import time

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


def check_memory(max_ram: int | None) -> None:
    """MobieError when more was resident than that: a promise to whatever else runs on the machine."""
    peak = peak_memory() if max_ram is not None else None
    if max_ram is not None and peak is not None and peak > max_ram:
        raise MobieError(
            NO_MEMORY,
            "the export took more memory than --max-ram allows",
            size_text(peak),
            size_text(max_ram),
            "allow more; or calibrate with fewer --samples, or convert with fewer --threads",
        )


class Progress:
    """Counts bytes, or other units, towards a total. Shows nothing unless asked to; with `max_ram` every update checks
    that no more than so many bytes were resident."""

    def __init__(self, label: str, total: int, show: bool, unit: str = "B", max_ram: int | None = None):
        self.label, self.total, self.show, self.max_ram = label, total, show, max_ram
        self.text = size_text if unit == "B" else lambda n: f"{n:,.0f} {unit}s" if n >= 10 else f"{n:.2g} {unit}s"
        self.done = 0
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if show and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                desc=label,
                total=total,
                unit=unit if unit == "B" else f" {unit}s",
                unit_scale=True,
                unit_divisor=1024 if unit == "B" else 1000,
                leave=False,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, n: int, what: str) -> None:
        """`n` more are done; `what` is being worked on."""
        if stopped is not None:
            raise stopped
        check_memory(self.max_ram)
        self.done += n
        if self.bar is not None:
            self.bar.set_postfix_str(what, refresh=False)
            self.bar.update(n)
            return
        now = time.monotonic()
        if self.show and now - self.last_line >= LINE_INTERVAL:
            self.last_line = now
            speed = self.done / (now - self.started)
            left = (self.total - self.done) / speed if speed else 0.0
            print(
                f"{self.label} {self.done / max(self.total, 1):4.0%}  {self.text(self.done)} of "
                f"{self.text(self.total)}, {self.text(speed)}/s, {time_text(left)} left, {what}",
                file=sys.stderr,
                flush=True,
            )
