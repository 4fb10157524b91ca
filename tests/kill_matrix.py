"""Exports that are killed, that find the disk full or their folder gone, and what comes of them.

    python -m tests.kill_matrix             # all of it, see docs/reliability.md
    python -m tests.kill_matrix --few       # a handful

Every trial runs an export that something happens to, looks whether anything of the user's changed, and gives the same
command again: the bytes must be those of an undisturbed run, and nothing may be left beside them.

    stage    a signal before the first and the last call of every one of STAGES
    name     SIGKILL before calls that make, rename or remove a file or wait for the disk: all, or four of each kind
             where a run takes long
    moment   a signal at a random moment, several times over
    full     the disk becomes full (a tmpfs, which needs root), or files may not grow any more, before a stage
    folder   the output's folder is moved away, or becomes read-only (needs root), before a stage

The exports run in forks of this process, which has the libraries loaded and computes nothing itself. A checkpoint is
converted by llama.cpp's converter once; in the trials a stand-in writes the same bytes.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import gguf.quants  # noqa: F401 (loaded before the forks)
import torch  # noqa: F401
import transformers  # noqa: F401

from mobie_export import cli, disk, gguf_io
from mobie_export.calibration import bundled, own_text, states, statistics, store
from mobie_export.cli import Exit
from mobie_export.exporting import card, write
from mobie_export.methods.calibrated import refine, steps
from mobie_export.methods.ordered import sensitivity
from mobie_export.methods.ordered import steps as ordered
from mobie_export.runtime import upstream
from mobie_export.sources import convert, find
from mobie_export.spec import verify
from tests import families, models

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DRAWS = 10  # of a moment, at most
STAGES = (
    (convert, "_content"),
    (convert, "convert"),
    (gguf_io.Gguf, "content"),
    (bundled, "load"),
    (own_text, "write"),
    (sensitivity, "damage"),
    (states.States, "__init__"),
    (states.States, "write"),
    (states.States, "finish"),
    (statistics.LayerStatistics, "save"),
    (steps, "quantize_layer"),
    (ordered, "binarized"),
    (store.Store, "put"),
    (refine.Layers, "update"),
    (refine.Layers, "save"),
    (refine, "_tuned"),
    (gguf_io.Writer, "write"),
    (gguf_io.Writer, "finish"),
    (write, "_read_back"),
    (verify, "_block_problems"),
    (disk, "place"),
    (disk, "sync"),
    (card, "write"),
    (disk, "remove"),
)
CALLS = ((os, "mkdir"), (os, "rename"), (os, "link"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "fsync"))
ERRORS = {Exit.BAD_INPUT, Exit.BAD_OUTPUT, Exit.NO_SPACE, Exit.VERIFY_FAILED, Exit.CONVERT_FAILED}
USERS = {"o.gguf.part": b"somebody's", "notes.txt": b"somebody's too"}  # in every output folder
FILLER = "filler"

SHORT = ["--samples", "34", "--seq-len", "16"]
SIGN, CALIBRATED = ["--method", "sign"], ["--method", "calibrated", *SHORT]
JOBS = {  # name -> (kind of source, options)
    "sign": ("gguf", SIGN),
    "sign, overwrite, card": ("gguf", [*SIGN, "--overwrite", "--card"]),
    "sign, shards": ("gguf", [*SIGN, "--split-max-size", "1M"]),
    "calibrated, streamed": ("small", [*CALIBRATED, "--refine", "streamed", "--steps", "2"]),
    "calibrated, second signs": ("small", [*CALIBRATED, "--refine", "none", "--bpw", "1.3"]),
    "ordered, second signs": ("small", ["--method", "ordered", *SHORT, "--bpw", "1.3"]),
    "ordered, its own text": ("small", ["--method", "ordered", *SHORT, "--calibration", "self"]),
    "calibrated, paper": ("small", ["--method", "paper", *SHORT]),
    "checkpoint, sign": ("folder", SIGN),
    "checkpoint, calibrated": ("folder", [*CALIBRATED, "--refine", "none"]),
}


STAND_IN = """
import sys, time
with open(sys.argv[sys.argv.index("--outfile") + 1], "wb") as out, open({converted!r}, "rb") as file:
    while data := file.read(1 << 20):
        out.write(data)
        time.sleep(0.05)
"""


@dataclass(frozen=True)
class Job:
    name: str
    source: Path
    options: tuple[str, ...]
    seconds: float = 0.0  # of an undisturbed run
    calls: dict[str, int] | None = None  # of STAGES and CALLS in it
    outputs: dict[str, str] | None = None  # file -> digest

    def arguments(self, folder: Path) -> list[str]:
        return [str(self.source), "-o", str(folder / "o.gguf"), "--threads", "1", "-q", *self.options]

    @property
    def overwrites(self) -> bool:
        return "--overwrite" in self.options


# ---- processes -------------------------------------------------------------------------------------------------------


def begin(arguments: list[str], log: Path, before: Callable[[], None] = lambda: None) -> int:
    """The process id of an export in a fork."""
    pid = os.fork()
    if pid:
        return pid
    code = Exit.INTERNAL
    try:
        for s in SIGNALS[1:]:
            signal.signal(s, signal.SIG_DFL if s != signal.SIGINT else signal.default_int_handler)
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        before()
        code = cli.main(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:  # outside of main
        code = Exit.INTERRUPTED
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Its exit code, -N for signal N."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_call(owner, name: str, n: int, act: Callable[[], None]) -> Callable[[], None]:
    """For `begin`: act before the n-th call of owner.name."""

    def install() -> None:
        function, calls = getattr(owner, name), [0]

        def wrapped(*args, **more):
            calls[0] += 1
            if calls[0] == n:
                act()
            return function(*args, **more)

        setattr(owner, name, wrapped)

    return install


def counted(into: Path) -> Callable[[], None]:
    """For `begin`: leave the number of calls of STAGES and CALLS in a file."""

    def install() -> None:
        calls: Counter = Counter()

        def counting(function: Callable, key: str) -> Callable:
            def wrapped(*args, **more):
                calls[key] += 1
                return function(*args, **more)

            return wrapped

        for owner, name in (*STAGES, *CALLS):
            setattr(owner, name, counting(getattr(owner, name), key_of(owner, name)))
        leave = os._exit

        def exit(code):
            into.write_text(json.dumps(calls))
            leave(code)

        os._exit = exit

    return install


def key_of(owner, name: str) -> str:
    return f"{getattr(owner, '__qualname__', owner.__name__)}.{name}".removeprefix("mobie_export.")


def others(folder: Path) -> list[str]:
    """Command lines of living processes that work in a folder: converters that outlived their export."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in text and int(path.parent.name) != os.getpid():
                found.append(text)
    return found


# ---- one trial -------------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """What should not have happened."""


def expect(condition: bool, text: str) -> None:
    if not condition:
        raise Wrong(text)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def prepared(job: Job, folder: Path) -> None:
    """The output's folder with what the user has in it."""
    folder.mkdir(exist_ok=True)
    for name, data in USERS.items():
        (folder / name).write_bytes(data)
    if job.overwrites:
        (folder / "o.gguf").write_bytes(b"precious")
        (folder / "README.md").write_bytes(b"precious")


def check_users(job: Job, folder: Path) -> None:
    """Nothing of the user's changed, and outputs are whole or as they were."""
    for name, data in USERS.items():
        expect((folder / name).read_bytes() == data, f"{name} was changed")
    for path in folder.iterdir():
        if path.name in USERS or path.name.startswith(".mobie-") or path.name == FILLER:
            continue
        old = job.overwrites and path.read_bytes() == b"precious"
        expect(old or path.name in job.outputs, f"{path.name} is left")
        if path.name != "README.md":  # the card has the time it took
            expect(old or digest(path) == job.outputs[path.name], f"{path.name} has other bytes")


def check_done(job: Job, folder: Path, log: Path) -> str:
    """Give the command again and compare. Returns how it ended."""
    there = all((folder / n).exists() for n in job.outputs) and not job.overwrites
    some = any((folder / n).exists() for n in job.outputs) and not job.overwrites
    code = ended(begin(job.arguments(folder), log))
    if there:
        expect(code == Exit.BAD_OUTPUT, f"exit code {code} with the output there")
        ended(begin(["clean", str(folder), "--remove"], log))
    elif some:  # killed between the names of two shards: asked for by name, they are replaced
        expect(code == Exit.BAD_OUTPUT, f"exit code {code} with part of the output there")
        code = ended(begin([*job.arguments(folder), "--overwrite"], log))
        expect(code == Exit.OK, f"exit code {code} when replacing")
    else:
        expect(code == Exit.OK, f"exit code {code} when given again")
    check_users(job, folder)
    left = {p.name for p in folder.iterdir()} - set(USERS) - set(job.outputs)
    expect(not left, f"left beside the output: {sorted(left)}")
    expect(all((folder / n).exists() for n in job.outputs), "no output")
    return "done before" if there else "replaced" if some else "resumed"


def check_message(log: Path, code: int) -> None:
    text = log.read_text(errors="replace")
    if code == Exit.CONVERT_FAILED:  # quotes the converter
        text = text.replace("Traceback", "")
    expect("Traceback" not in text and "internal error" not in text, f"a traceback, exit code {code}")
    if code in ERRORS:
        expect("mobie-export: error: " in text, f"exit code {code} without a message")


@contextlib.contextmanager
def trial(job: Job, home: Path, name: str) -> Iterator[tuple[Path, Path]]:
    """(output folder, log); what goes wrong is named after the trial."""
    folder, log = Path(tempfile.mkdtemp(dir=home)) / "out", home.with_name("log")
    log.write_bytes(b"")
    prepared(job, folder)
    try:
        yield folder, log
    except (Wrong, OSError) as e:
        raise Wrong(f"{job.name}, {name}: {e}\n{log.read_text(errors='replace')[-3000:]}") from e
    shutil.rmtree(folder.parent)


def killed(job: Job, home: Path, name: str, number: int, kill: Callable[[list[str], Path], int]) -> str:
    """kill: from arguments and log to the exit code of a run that got the signal, perhaps too late."""
    with trial(job, home, f"{name}, {signal.Signals(number).name}") as (folder, log):
        code = kill(job.arguments(folder), log)
        allowed = (0, -number, 128 + number)
        expect(code in allowed, f"exit code {code}")
        check_message(log, code)
        deadline = time.monotonic() + 20
        while others(folder) and time.monotonic() < deadline:
            time.sleep(0.02)
        expect(not others(folder), f"still running: {others(folder)}")
        if not code:
            return "too late"
        check_users(job, folder)
        if number != signal.SIGKILL and not any((folder / n).exists() for n in job.outputs):
            kept = [p for p in folder.iterdir() if p.name.startswith(".mobie-")]
            expect(bool(kept) == ("kept: " in log.read_text()), f"left {kept}, and the message says otherwise")
            expect(not any(disk.PART in p.name.split("-")[1] for p in kept), f"left {kept}")
        return check_done(job, folder, log)


def times(n: int) -> list[int]:
    """First, middle and last of n calls."""
    return sorted({1, -(-n // 2), n}) if n else []


# ---- what happens ----------------------------------------------------------------------------------------------------

Trials = Iterator[Callable[[], str]]  # each says how it ended, or raises Wrong


def places(job: Job, functions: Sequence, parts: int) -> Iterator[tuple[str, Callable]]:
    """(text, what makes of an act what `begin` takes) for calls of functions: the first, and the last of so many parts
    of all calls."""
    for owner, name in functions:
        n = job.calls.get(key_of(owner, name), 0)
        for i in sorted({1, *(-(-n * k // parts) for k in range(1, parts + 1))} if n else ()):
            yield f"before call {i} of {n} of {key_of(owner, name)}", partial(at_call, owner, name, i)


def stages(job: Job, home: Path, rng: random.Random) -> Trials:
    for what, at in places(job, STAGES, 2 if job.seconds < 1 else 1):
        number = rng.choice(SIGNALS)
        yield partial(killed, job, home, what, number, partial(run, before=at(kill_self(number))))
    for number in SIGNALS if job.source.is_dir() else ():
        kill = partial(run_until_converter, number=number, more=rng.uniform(0, 1))
        yield partial(killed, job, home, "while the converter runs", number, kill)


def names(job: Job, home: Path, rng: random.Random) -> Trials:
    for what, at in places(job, CALLS, 1000 if job.seconds < 1 else 3):
        kill = partial(run, before=at(kill_self(signal.SIGKILL)))
        yield partial(killed, job, home, what, signal.SIGKILL, kill)


def moments(job: Job, home: Path, rng: random.Random, n: int) -> Trials:
    for _ in range(n):
        yield partial(at_moment, job, home, random.Random(rng.random()))


def at_moment(job: Job, home: Path, rng: random.Random) -> str:
    """Another moment where the run has ended before the first: how long it takes differs from run to run."""
    for _ in range(DRAWS):
        number, after = rng.choice(SIGNALS), [rng.uniform(0, job.seconds) for _ in range(rng.choice((1, 1, 2)))]
        what = f"after {' and '.join(f'{s:.2f}' for s in after)} s"
        found = killed(job, home, what, number, partial(run_for, number=number, after=after))
        if found != "too late":
            break
    return found


def full(job: Job, home: Path, rng: random.Random) -> Trials:
    yield from before_stages(job, home, "no growing files", lambda folder: no_growth)
    yield from before_stages(job, home, "disk full", lambda folder: partial(fill, folder), small_disk=True)


def folders(job: Job, home: Path, rng: random.Random) -> Trials:
    yield from before_stages(
        job, home, "folder moved away", lambda folder: partial(folder.rename, folder.with_name("away"))
    )
    yield from before_stages(job, home, "read-only", lambda folder: partial(freeze, home), small_disk=True)


def before_stages(
    job: Job, home: Path, text: str, act: Callable[[Path], Callable[[], object]], small_disk: bool = False
) -> Trials:
    """act: from the output's folder to what happens; small_disk: on a disk of its own, which root can make."""
    if small_disk and os.geteuid():
        return
    for what, at in places(job, STAGES, 0):
        more = job, home, f"{text} {what}", lambda folder, at=at: at(act(folder))
        yield partial(on_small_disk, disturbed, *more) if small_disk else partial(disturbed, *more)


def run(arguments: list[str], log: Path, before: Callable[[], None] = lambda: None) -> int:
    return ended(begin(arguments, log, before))


def run_for(arguments: list[str], log: Path, number: int, after: list[float]) -> int:
    for seconds in after:
        pid = begin(arguments, log)
        time.sleep(seconds)
        os.kill(pid, number)
        code = ended(pid)
        if code == 0 or list(Path(arguments[2]).parent.glob("o*.gguf")):  # too late, or just in time
            break
    return code


def run_until_converter(arguments: list[str], log: Path, number: int, more: float) -> int:
    """The signal comes a while after the converter has begun to write."""
    pid, folder = begin(arguments, log), Path(arguments[2]).parent
    while not list(folder.glob(".mobie-convert-*/converting.part/*.gguf")):
        time.sleep(0.01)
    time.sleep(more)
    os.kill(pid, number)
    return ended(pid)


def kill_self(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def no_growth() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, resource.RLIM_INFINITY))


def fill(folder: Path) -> None:
    for size in (1 << 16, 1 << 9):
        with contextlib.suppress(OSError), open(folder / FILLER, "ab", buffering=0) as file:
            while file.write(bytes(size)):
                pass


def freeze(home: Path) -> None:
    """As disks with errors become; not while a file is open for writing, then nothing happens."""
    subprocess.run(["mount", "-o", "remount,ro", str(home)], capture_output=True)


def on_small_disk(one: Callable, job: Job, home: Path, *more) -> str:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(home)], check=True)
    try:
        return one(job, home, *more)
    finally:
        subprocess.run(["umount", "-l", str(home)], check=True)


def disturbed(job: Job, home: Path, what: str, before: Callable[[Path], Callable[[], None]]) -> str:
    """An export that something happens to, which is undone before the command is given again. before: from the output's
    folder to what `begin` takes."""
    with trial(job, home, what) as (folder, log):
        code = run(job.arguments(folder), log, before(folder))
        if os.path.ismount(home):
            subprocess.run(["mount", "-o", "remount,rw", str(home)], check=True)
        away = folder.with_name("away")
        if away.exists():
            shutil.rmtree(folder, ignore_errors=True)
            away.rename(folder)
        (folder / FILLER).unlink(missing_ok=True)
        expect(code in (0, *ERRORS), f"exit code {code}")
        check_message(log, code)
        check_users(job, folder)
        if not code:
            return "went well"
        check_done(job, folder, log)
        return f"exit code {code}, then resumed"


# ---- all of it -------------------------------------------------------------------------------------------------------


def undisturbed(name: str, home: Path, made: dict[str, Path]) -> Job:
    """A job with what an undisturbed run does."""
    kind, options = JOBS[name]
    options = [*options, "--pre-tokenizer", "gpt-2"] if kind == "folder" else options
    if "calibrated" in options:  # less to tokenize than the bundled text
        options = [*options, "--calibration", str(made["text"])]
    job = Job(name, made[kind], tuple(options))
    folder = Path(tempfile.mkdtemp(dir=home)) / "out"
    prepared(job, folder)
    log, calls = home.with_name("log"), home.with_name("calls")
    log.write_bytes(b"")
    took = []
    for n in range(2):
        started = time.monotonic()
        code = ended(begin(job.arguments(folder), log, counted(calls)))
        if code:
            sys.exit(f"{name}: exit code {code} undisturbed\n{log.read_text()}")
        took.append(time.monotonic() - started)
        new = {p.name: digest(p) for p in folder.iterdir() if p.name not in USERS}
        if n == 0:
            shutil.rmtree(folder)
            prepared(job, folder)
            before = new
        elif {k: v for k, v in new.items() if k != "README.md"} != {
            k: v for k, v in before.items() if k != "README.md"
        }:
            sys.exit(f"{name}: two undisturbed runs differ")
    shutil.rmtree(folder.parent)
    return replace(job, seconds=min(took), calls=json.loads(calls.read_text()), outputs=new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", action="store_true", help="a few of each kind, in two minutes")
    parser.add_argument("--kind", action="append", choices=("stage", "name", "moment", "full", "folder"))
    parser.add_argument("--job", action="append", choices=tuple(JOBS))
    parser.add_argument("--moments", type=int, default=100, help="in all (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    refine.LAYERWISE = replace(refine.LAYERWISE, steps=4, batch_tokens=256)
    refine.WHOLE = replace(refine.WHOLE, batch_tokens=256)
    kinds = args.kind or ["stage", "name", "moment", "full", "folder"]
    rng, wrong = random.Random(args.seed), []
    with tempfile.TemporaryDirectory(prefix="kill-matrix-") as folder:
        home = Path(folder) / "home"
        home.mkdir()
        files = {"gguf": "m.gguf", "small": "s.gguf", "folder": "Tiny", "text": "text", "converted": "c.gguf"}
        made = {kind: Path(folder) / name for kind, name in files.items()}
        made["text"].write_text(" ".join(map(str, range(1000))))
        models.write_qwen3moe(made["gguf"], seed=11)
        models.N_EMBD, models.N_FF, models.N_EXPERT = 128, 64, 4
        models.write_qwen3moe(made["small"], seed=12)
        chosen = args.job or (["sign", "calibrated, second signs"] if args.few else list(JOBS))
        if any(JOBS[n][0] == "folder" for n in chosen):
            pid = os.fork()  # it computes
            if not pid:
                families.save("qwen3moe", made["folder"])
                convert.convert(
                    find.Source("Tiny", checkpoint=made["folder"], pre_tokenizer="gpt-2"), made["converted"]
                )
                os._exit(0)
            ended(pid)
            tree = Path(folder) / "converter"
            tree.mkdir()
            (tree / "gguf.py").write_text("class GGUFWriter: pass\n")
            text = "class TextModel: pass\nclass ModelBase:\n    load_hparams = staticmethod(dict)\n"
            (tree / "conversion.py").write_text(text)
            (tree / "src").mkdir()
            (tree / "src" / "llama-vocab.cpp").write_text('tokenizer_pre == "gpt-2"')
            (tree / "convert_hf_to_gguf.py").write_text(STAND_IN.format(converted=str(made["converted"])))
            upstream.converter = lambda: tree
        jobs = [undisturbed(n, home, made) for n in chosen]
        for job in jobs:
            print(f"{job.name}: {job.seconds:.1f} s undisturbed", flush=True)
        for kind in kinds:
            for job in jobs:
                n, found, started = share(job, jobs, args.moments), Counter(), time.monotonic()
                make = {
                    "stage": stages,
                    "name": names,
                    "moment": partial(moments, n=n),
                    "full": full,
                    "folder": folders,
                }
                trials = list(make[kind](job, home, rng))
                for attempt in rng.sample(trials, 2) if args.few else trials:
                    try:
                        found[attempt()] += 1
                    except Wrong as e:
                        wrong.append(str(e))
                        print(f"WRONG: {e}", flush=True)
                text = ", ".join(f"{n} {what}" for what, n in sorted(found.items()))
                seconds = time.monotonic() - started
                print(
                    f"{kind:<7} {job.name:<25} {sum(found.values()):>3} of {len(trials)}: {text} ({seconds:.0f} s)",
                    flush=True,
                )
    sys.exit(f"{len(wrong)} trials went wrong" if wrong else 0)


def share(job: Job, jobs: list[Job], total: int) -> int:
    """Of the random moments, as evenly as it goes."""
    i = jobs.index(job)
    return total * (i + 1) // len(jobs) - total * i // len(jobs)


if __name__ == "__main__":
    main()
