"""The command line. Every command is one call; what takes time to import is imported by the command that needs it."""

import argparse
import contextlib
import dataclasses
import enum
import errno
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from mobie_export import __version__, progress
from mobie_export.calibration import ranks
from mobie_export.errors import BAD_INPUT, NO_SPACE, USAGE, Kind, MobieError, Stopped
from mobie_export.progress import size_text, time_text

if TYPE_CHECKING:
    from mobie_export.exporting.effort import Effort
    from mobie_export.exporting.flow import Report
    from mobie_export.exporting.plan import Plan
    from mobie_export.exporting.requantize import Rule
    from mobie_export.methods.base import Method, Outcome

DEFAULT = "export"
PATH_SHOWN = 200  # characters of a name in an error
NAMED = 12  # experts of a layer that are named at the end


class Exit(enum.IntEnum):
    """Exit codes. Those of errors have the names of errors.Kind."""

    OK = 0
    INTERNAL = 1
    USAGE = 2  # argparse's own
    BAD_INPUT = 3
    UNSUPPORTED = 4
    BAD_OUTPUT = 5
    NO_SPACE = 6
    VERIFY_FAILED = 7
    NO_RUNTIME = 8
    NOT_FETCHED = 9
    CONVERT_FAILED = 10
    NO_MEMORY = 11
    RANK_LOST = 12
    HUNG_UP = 129  # 128 + the number of the signal, as shells report it: SIGHUP
    INTERRUPTED = 130  # SIGINT
    TERMINATED = 143  # SIGTERM

    @property
    def meaning(self) -> str:
        return MEANINGS[self] if self in MEANINGS else Kind[self.name].value


MEANINGS = {
    Exit.OK: "done",
    Exit.INTERNAL: "unexpected internal error (a defect; please report it)",
    Exit.HUNG_UP: "the terminal went away; what was computed is kept, as after an interrupt",
    Exit.INTERRUPTED: "interrupted; the same command goes on from what is kept",
    Exit.TERMINATED: "terminated; what was computed is kept, as after an interrupt",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (Exit)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parser()
    if not argv:
        parser.print_help(sys.stderr)
        return Exit.USAGE
    given = list(argv)
    if argv[0] not in (*commands, "-h", "--help", "--version"):
        argv.insert(0, DEFAULT)
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # names and metadata may hold what the terminal's encoding has not
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args.given = given
    if not ranks.first():  # it does its part; the first one speaks
        sys.stdout, args.quiet = open(os.devnull, "w"), True  # noqa: SIM115 (as long as the process)
    try:
        with _stoppable():
            return args.run(args)
    except MobieError as e:
        _say(f"error: {e}", e)
        return Exit[e.kind.name]
    except KeyboardInterrupt as e:
        _say("interrupted", e)
        return 128 + e.signal if isinstance(e, Stopped) else Exit.INTERRUPTED
    except BrokenPipeError:  # `mobie-export inspect FILE | head`
        sys.stdout = None
        return Exit.OK
    except OSError as e:  # of a path that was given, or of the cache; what is written says more (disk.writing)
        found = MobieError(
            NO_SPACE if e.errno == errno.ENOSPC else BAD_INPUT,
            f"cannot use {str(e.filename)[:PATH_SHOWN]}" if e.filename else "a file or device failed",
            e.strerror or str(e),
            todo="check the path, its permissions and the disk",
        )
        _say(f"error: {found}", e)
        return Exit[found.kind.name]
    except Exception:
        traceback.print_exc()  # with the notes
        print("mobie-export: internal error; please report it with the lines above", file=sys.stderr)
        return Exit.INTERNAL


def _say(text: str, error: BaseException) -> None:
    """With what was noted on the error's way: work that is kept."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        who = "mobie-export" + (f" (rank {ranks.rank()} of {ranks.world()})" if ranks.world() > 1 else "")
        print("\n".join([f"{who}: {text}", *getattr(error, "__notes__", [])]), file=sys.stderr)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise Stopped, unless they are ignored (nohup).

    What is raised while an object is finalized, or in a callback of a library, is lost; the next update of a progress
    raises it again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
    before = {s: signal.getsignal(s) for s in signals}
    before = {s: h for s, h in before.items() if h in (signal.SIG_DFL, signal.default_int_handler)}
    hook = sys.unraisablehook

    def stop(number: int, _frame: FrameType | None) -> None:
        progress.stopped = Stopped(number)
        raise progress.stopped

    sys.unraisablehook = lambda lost: None if isinstance(lost.exc_value, Stopped) else hook(lost)
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        progress.stopped, sys.unraisablehook = None, hook


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    codes = "\n".join(f"  {code:>3}  {code.meaning}" for code in Exit)
    parser = argparse.ArgumentParser(
        prog="mobie-export",
        description="Export a Mixture-of-Experts model to about one bit per expert weight.\n\n"
        "  mobie-export model.gguf          writes model-mobie.gguf beside it\n"
        "  mobie-export model.gguf --type q1_0   writes model-q1_0.gguf, which stock llama.cpp runs\n"
        "  mobie-export folder/Model        from a Hugging Face checkpoint: writes folder/Model-MOBIE.gguf\n"
        "  mobie-export org/Model           from the hub: writes Model-MOBIE.gguf\n"
        "  mobie-export COMMAND --help      options of a command",
        epilog=f"exit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mobie-export {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = command("export", _export, "write the MoBiE version of a model (the default command)")
    _export_arguments(sub)
    sub.add_argument("--dry-run", action="store_true", help="only say what would be done, as `plan` does")
    sub.add_argument("-q", "--quiet", action="store_true", help="no progress")

    sub = command("plan", _plan, "check the input and say what an export needs: size, disk, memory")
    _export_arguments(sub)

    sub = command("improve", _improve, "refine an export further, against the model that it was made from")
    sub.add_argument("file", type=Path, help="an export; it stays as it is")
    sub.add_argument(
        "--against",
        dest="model",
        required=True,
        metavar="SOURCE",
        help="what FILE was made from: a GGUF, a folder with a Hugging Face checkpoint, or org/name on the hub",
    )
    sub.add_argument("-o", "--output", type=_output, help="default: FILE with -improved behind its name")
    _writing_arguments(sub)
    _effort_arguments(sub)
    from mobie_export.methods.improve import Improve

    _method_arguments(sub, {Improve.name: Improve}, without=("start",))
    _checkpoint_arguments(sub)
    sub.add_argument("--dry-run", action="store_true", help="only say what would be done")
    sub.add_argument("-q", "--quiet", action="store_true", help="no progress")

    sub = command("advise", _advise, "say what of a model fits into the memory, and how fast it writes at most")
    sub.add_argument(
        "model",
        help="a GGUF, a folder with a Hugging Face checkpoint, or org/name on the hub, of which only headers are read; "
        "org/name:TYPE is one GGUF of several",
    )
    sub.add_argument(
        "--ram",
        type=_size,
        metavar="SIZE",
        help="what the model may take when it runs, such as 8G (default: what is free here)",
    )
    sub.add_argument("--threads", type=_positive, help="that will run the model (default: the cores of this machine)")
    sub.add_argument("-c", "--ctx-size", type=_positive, default=4096, metavar="N", help="tokens (default: 4096)")
    _type_argument(sub)
    _checkpoint_arguments(sub)

    sub = command("inspect", _inspect, "list the tensors of any GGUF and its true bits per weight")
    sub.add_argument("file", type=Path)
    sub.add_argument("--json", action="store_true", help="everything as JSON")

    sub = command("verify", _verify, "check a MoBiE file: metadata, shapes, every block and scale")
    sub.add_argument("file", type=Path)
    sub.add_argument("-q", "--quiet", action="store_true", help="no progress")

    sub = command(
        "report", _report, "hold an export beside its source: quality, layers, behaviour, speed, what is wrong"
    )
    sub.add_argument("file", type=Path)
    sub.add_argument(
        "--against",
        required=True,
        metavar="SOURCE",
        help="what FILE was made from: a GGUF, a folder with a Hugging Face checkpoint, or org/name on the hub",
    )
    sub.add_argument(
        "--text", type=Path, metavar="FILE", help="to measure on: text, or text.xz (default: a bundled one)"
    )
    sub.add_argument(
        "--tasks",
        action="append",
        default=[],
        type=_task,
        metavar="NAME=FILE",
        help="hellaswag, winogrande or multiple-choice, on a file as llama-perplexity reads it",
    )
    sub.add_argument("--quick", action="store_true", help="less of everything: minutes instead of tens of them")
    sub.add_argument("--card", action="store_true", help="write a model card, README.md, with the figures")
    sub.add_argument("--threads", type=_positive, help="default: the cores of this machine")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing report")
    sub.add_argument("-q", "--quiet", action="store_true", help="no progress")

    sub = command("bench", _bench, "measure tokens per second here, as a row to share (docs/community/README.md)")
    sub.add_argument("file", type=Path)
    sub.add_argument("--threads", type=_positive, help="default: the cores of this machine")
    sub.add_argument("-p", "--prompt", type=_positive, default=512, metavar="N", help="tokens read (default: 512)")
    sub.add_argument("-n", "--generate", type=_positive, default=64, metavar="N", help="tokens written (default: 64)")
    sub.add_argument("-r", "--repetitions", type=_positive, default=5, metavar="N", help="of each (default: 5)")
    sub.add_argument("--json", action="store_true", help="everything as JSON")

    sub = command("dequantize", _dequantize, "write a MoBiE file's experts as floats, for any llama.cpp")
    sub.add_argument("file", type=Path)
    sub.add_argument("-o", "--output", type=_output, required=True)
    sub.add_argument("--type", choices=("f32", "f16", "bf16"), default="f32", help="of the experts (default: f32)")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing output")
    sub.add_argument("-q", "--quiet", action="store_true", help="no progress")

    sub = command("clean", _clean, "list what exports that did not finish left in a folder, and remove it")
    sub.add_argument("folder", type=Path, nargs="?", default=Path(), help="where the outputs are (default: here)")
    sub.add_argument("--remove", action="store_true", help="remove all of it that is not in use")

    sub = command(
        "metadata", _metadata, "write a GGUF with other metadata and the same tensors: a chat template, a name"
    )
    sub.add_argument("file", type=Path)
    sub.add_argument("-o", "--output", type=_output, required=True)
    add: dict[str, Any] = {"action": "append", "default": [], "dest": "changes"}
    sub.add_argument(
        "--set",
        type=lambda text: ("parse", text),
        metavar="KEY[:TYPE]=VALUE",
        help="an entry keeps its type, a new one is a string unless TYPE says u32, f32, bool, ...; arrays as JSON",
        **add,
    )
    sub.add_argument(
        "--set-file", type=lambda text: ("from_file", text), metavar="KEY[:TYPE]=FILE", help="to a file's text", **add
    )
    sub.add_argument("--remove", type=lambda text: ("remove", text), metavar="KEY", help="leave an entry out", **add)
    sub.add_argument("--split-max-size", type=_shard_size, metavar="N(M|G)", help="write shards, as an export does")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing output")
    sub.add_argument("-q", "--quiet", action="store_true", help="no progress")

    sub = command("doctor", _doctor, "say whether the patched runtime is here and can run a file")
    sub.add_argument("file", type=Path, nargs="?")

    sub = command("runtime", _runtime, "build the patched llama.cpp, or put the stock one back")
    sub.add_argument("action", choices=("build", "restore", "status"))
    sub.add_argument("--jobs", type=_positive, help="parallel compilations (default: all cores)")
    sub.add_argument("--sdist", type=Path, help="build from this copy of the pinned source package")
    sub.add_argument("--cuda", action="store_true", help="with NVIDIA's CUDA, where toolkit and card are here")
    sub.add_argument(
        "--cuda-arch", metavar="LIST", help="for cards of these compute capabilities, e.g. 80,90 (implies --cuda)"
    )
    sub.add_argument("--vulkan", action="store_true", help="with Vulkan, for GPUs of AMD, Intel and others")
    return parser, list(commands.choices)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        help="GGUF with experts in F32, F16, BF16 or quantized (of a split model, the first shard), a folder with a "
        "Hugging Face checkpoint, or org/name on the hub",
    )
    parser.add_argument(
        "-o", "--output", type=_output, help="default: MODEL-mobie.gguf beside a GGUF, MODEL-MOBIE.gguf for the others"
    )
    _type_argument(parser)
    parser.add_argument(
        "--tensor-type",
        action="append",
        type=_rule,
        metavar="NAME=TYPE",
        help="give tensors that are no experts another type, as llama-quantize does: attn_v=q6_K, token_embd=q8_0; "
        "NAME is a regular expression, the first match is taken (default: all keep theirs)",
    )
    from mobie_export import methods
    from mobie_export.exporting import effort

    found = methods.known()
    lines = "; ".join(f"{name}: {method.summary}" for name, method in found.items())
    parser.add_argument("--method", choices=list(found), help=f"{lines} (default: {effort.METHOD}, by --effort)")
    _writing_arguments(parser)
    _effort_arguments(parser)
    _method_arguments(parser, found)
    _checkpoint_arguments(parser)


def _writing_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--split-max-size",
        type=_shard_size,
        metavar="N(M|G)",
        help="shards of at most so much tensor data, in 10^6 or 10^9 bytes; the largest tensor is the least",
    )
    parser.add_argument("--card", action="store_true", help="write a model card, README.md, beside the output")
    parser.add_argument(
        "--threads", type=_positive, help="default: the cores of this machine; at most 8 of them convert and write"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def _effort_arguments(parser: argparse.ArgumentParser) -> None:
    from mobie_export.exporting import effort

    parser.add_argument(
        "--effort",
        choices=effort.LEVELS,
        help="of a calibration whose method is not named (default: the most that fits memory, disk and a night)",
    )
    parser.add_argument("--time", type=_duration, metavar="TIME", help="that it may take, as 90m or 8h (default: 8h)")
    parser.add_argument("--max-disk", type=_size, metavar="SIZE", help="that its unfinished work may take, as 40G")
    parser.add_argument(
        "--max-ram",
        type=_size,
        metavar="SIZE",
        help="memory that may be resident at most, as 8G or 900M; refused beforehand where it will not do",
    )


def _type_argument(parser: argparse.ArgumentParser) -> None:
    from mobie_export.spec import block

    parser.add_argument(
        "--type",
        choices=list(block.CODINGS),
        default=block.MOBIE.option,
        help="of the experts: mobie, which the patched llama.cpp runs (default), or q1_0, which every llama.cpp runs "
        "that knows it, and which has no second signs (--bpw, --preset)",
    )


def _method_arguments(
    parser: argparse.ArgumentParser, found: Mapping[str, "type[Method]"], without: tuple[str, ...] = ()
) -> None:
    """The options of all methods; one that several have is the same for all. What is not given stays None."""
    every: dict[str, dataclasses.Field[object]] = {}
    of: dict[str, list[str]] = {}
    for name, method in found.items():
        for option in dataclasses.fields(method):
            every.setdefault(option.name, option)
            of.setdefault(option.name, []).append(name)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for dest, option in every.items():
        if dest in without:
            continue
        names, data = " and ".join(of[dest]), option.metadata
        if names not in groups:
            groups[names] = parser.add_argument_group(f"options of --method {names}")
        one = groups[names].add_mutually_exclusive_group() if data["named"] else groups[names]
        how: dict[str, Any] = {"dest": dest, "default": None, "help": data["help"]}
        if data["const"] is not None:
            one.add_argument(data["flag"], action="store_const", const=data["const"], **how)
            continue
        one.add_argument(data["flag"], type=data["parse"], metavar=data["metavar"], choices=data["choices"], **how)
        if data["named"]:
            how["help"] = ", ".join(f"{name}: {data['flag']} {value}" for name, value in data["named"].items())
            how["dest"] = "preset"
            one.add_argument("--preset", type=_named(data["named"]), metavar="|".join(data["named"]), **how)


def _named(values: Mapping[str, object]) -> Callable[[str], object]:
    def value(text: str) -> object:
        if text not in values:
            raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(values)}")
        return values[text]

    return value


def _checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    h = parser.add_argument_group("checkpoints", "need more packages: pip install 'mobie-export[convert]'")
    h.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub (default: the newest)")
    h.add_argument(
        "--pre-tokenizer",
        metavar="NAME",
        help="as llama.cpp calls it, where the converter does not know the checkpoint's tokenizer",
    )
    h.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let Python files of the checkpoint run, where its tokenizer is one (default: nothing of it is executed)",
    )


def _improvement(args: argparse.Namespace) -> "Method | Effort":
    """Of the command `improve`: as many steps as are asked for, or as time allows."""
    from mobie_export.exporting.effort import Effort
    from mobie_export.methods.improve import Improve

    names = [f.name for f in dataclasses.fields(Improve)]
    given = {n: getattr(args, n) for n in names if getattr(args, n, None) is not None} | {"start": args.file}
    limits = (args.effort, args.time, args.max_disk)
    if args.steps is not None and limits == (None, None, None):
        return Improve(**given)
    return Effort(*limits, given, Improve.name)


def _method(args: argparse.Namespace) -> "Method | Effort":
    """The method of the command line with its options, or the effort where none is named. Options never choose a
    method: MobieError for those of another one."""
    from mobie_export import methods
    from mobie_export.exporting.effort import METHOD, Effort

    found, name = methods.known(), args.method or METHOD
    of = {name: {f.name: f for f in dataclasses.fields(method)} for name, method in found.items()}
    flags, given = {}, {}
    for field in (f for fields in of.values() for f in fields.values()):
        dests = {field.name: field.metadata["flag"]} | ({"preset": "--preset"} if field.metadata["named"] else {})
        for dest, flag in dests.items():
            if getattr(args, dest) is not None:
                flags[field.name], given[field.name] = flag, getattr(args, dest)
    foreign = given.keys() - of[name].keys()
    if foreign:
        able = [name for name, fields in of.items() if given.keys() <= fields.keys()]
        raise MobieError(
            USAGE,
            f"--method {name} has no such options",
            ", ".join(flags[n] for n in given if n in foreign),
            " or ".join(f"--method {name}" for name in able) or "options of one method",
            f"mobie-export {shlex.join(_with_method(args.given, able[0]))}" if able else "",
        )
    if args.method is None:
        return Effort(args.effort, args.time, args.max_disk, given)
    limits = {"--effort": args.effort, "--time": args.time, "--max-disk": args.max_disk}
    if any(value is not None for value in limits.values()):
        raise MobieError(
            USAGE,
            "a method that is named has no effort",
            ", ".join(flag for flag, value in limits.items() if value is not None),
            todo=f"leave out --method {name}, or these",
        )
    return found[name](**given)


def _explicit(argv: list[str], flags: list[list[str]]) -> list[str]:
    """The command line of a plan with the method that was chosen in place of the effort."""
    kept, given = [], iter(argv[1:] if argv[0] in ("plan", "export") else argv)
    flags = [f for f in flags if argv[0] != "improve" or f[0] not in ("--method", "--start")]
    for word in given:
        if word in ("--effort", "--time", "--max-disk"):
            next(given, None)
        elif word.partition("=")[0] not in ("--effort", "--time", "--max-disk", "--dry-run"):
            kept.append(word)
    said = {word.partition("=")[0] for word in kept}
    said |= {"--bpw"} if "--preset" in said else set()
    return [*kept, *(word for option in flags if option[0] not in said for word in option)]


def _with_method(argv: list[str], name: str) -> list[str]:
    """A command line with the method that its options belong to."""
    kept, values = [], iter(argv)
    for word in values:
        if word == "--method":
            next(values, None)
        elif not word.startswith("--method="):
            kept.append(word)
    return [*kept, "--method", name]


def _output(text: str) -> Path:
    if not Path(text).name:
        raise argparse.ArgumentTypeError("the name of a file is wanted")
    return Path(text)


def _task(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=FILE")
    return name, Path(path)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _rule(text: str) -> "Rule":
    from mobie_export.exporting import requantize

    try:
        return requantize.parse(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _size(text: str) -> int:
    """`8G` -> bytes; K, M, G and T are powers of 1024, with or without iB."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 8G or 900M")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def _duration(text: str) -> float:
    """`8h` -> seconds."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)(s|m|min|h|d)", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text} is not a time such as 90m or 8h")
    return float(match[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}[match[2]]


def _shard_size(text: str) -> int:
    """`2G` -> 2000000000, as llama.cpp's tools count."""
    match = re.fullmatch(r"(\d+)([MG])", text)
    if not match or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number followed by M or G")
    return int(match[1]) * {"M": 10**6, "G": 10**9}[match[2]]


# ---- commands --------------------------------------------------------------------------------------------------------


def _export(args: argparse.Namespace, method: "Method | Effort | None" = None) -> int:
    """method: where it does not follow from the arguments."""
    from mobie_export import api
    from mobie_export.exporting import card

    plan = _planned(args, method)
    if args.dry_run or (plan.effort and not args.quiet):
        _print_plan(args, plan)
    if args.dry_run:
        return Exit.OK
    report = api.export(plan, progress=_shown(args))
    if args.card:
        card.write(report.output, plan.source, report.source_size, args.overwrite)
    _print_outcome(report.outcome)
    _print_report(report)
    if not report.not_loaded:
        print(f"\nrun it:   llama-cli -m {report.output}\ncheck it: mobie-export doctor {report.output}")
    return _loaded(report)


def _improve(args: argparse.Namespace) -> int:
    from mobie_export import gguf_io
    from mobie_export.exporting import requantize
    from mobie_export.spec import block, metadata

    with gguf_io.open_model(args.file) as file:
        args.type = (metadata.coding(file) or block.MOBIE).option
        args.tensor_type = requantize.as_in(file)
    args.output = args.output or args.file.with_name(f"{args.file.stem}-improved.gguf")
    return _export(args, _improvement(args))


def _planned(args: argparse.Namespace, method: "Method | Effort | None" = None) -> "Plan":
    from mobie_export import api
    from mobie_export.exporting import card
    from mobie_export.runtime import upstream

    plan = api.plan(
        args.model,
        args.output,
        method=method or _method(args),
        type=args.type,
        tensor_types=tuple(args.tensor_type or ()),
        split_max_size=args.split_max_size,
        max_ram=args.max_ram,
        threads=args.threads,
        overwrite=args.overwrite,
        revision=args.revision,
        pre_tokenizer=args.pre_tokenizer,
        trust_remote_code=args.trust_remote_code,
    )
    card.check(plan.asked, args.card, args.overwrite)
    if plan.source.towers:
        print("\n".join(plan.source.left_out(upstream.converter() / "convert_hf_to_gguf.py")))
    return plan


def _shown(args: argparse.Namespace) -> progress.Callback | None:
    return None if args.quiet else progress.Shown()


def _plan(args: argparse.Namespace) -> int:
    _print_plan(args, _planned(args))
    return Exit.OK


def _print_plan(args: argparse.Namespace, plan: "Plan") -> None:
    from mobie_export.exporting import effort

    source = plan.source
    types = ", ".join(f"{count} {name}" for name, count in plan.expert_types.items())
    name = source.gguf or source.hub or source.checkpoint
    print(f"source       {name}: {size_text(plan.source_size)}, {plan.source_bpw:.3f} bits per weight")
    print(f"model        {plan.architecture}, {plan.n_layers} layers of {plan.n_expert} experts")
    print(f"experts      {types} of {plan.n_tensors} tensors")
    print(f"output       {plan.output}: {size_text(plan.output_size)}, {plan.bpw:.3f} bits per weight")
    print(f"  experts    {plan.expert_bpw:.4f} bits per weight")
    work = f" and {size_text(plan.work_size)} while it calibrates" if plan.work_size else ""
    converted = "" if source.gguf else f", {size_text(plan.source_size)} for the converted checkpoint"
    print(f"disk         {size_text(plan.output_size)}{converted}{work} of {size_text(plan.disk_free)} free")
    print(f"peak memory  {size_text(plan.peak_memory)} with {plan.threads} threads")
    if plan.seconds:
        phases = ", ".join(f"{name} {time_text(s)}" for name, s in plan.seconds.items())
        print(f"time         about {time_text(sum(plan.seconds.values()))}: {phases}")
    if plan.effort:
        print(
            f"effort       {plan.effort}: mobie-export {shlex.join(_explicit(args.given, effort.flags(plan.method)))}"
        )
    for note in plan.notes:
        print(f"note         {note}")
    sys.stdout.flush()


def _advise(args: argparse.Namespace) -> int:
    from mobie_export.exporting import advise
    from mobie_export.methods.base import cpus
    from mobie_export.methods.calibrated.method import PRESETS
    from mobie_export.sources import headers
    from mobie_export.spec import block

    coding = block.CODINGS[args.type]
    free = progress.available_memory()
    ram = args.ram or free
    if ram is None:
        raise MobieError(USAGE, "the system does not say how much memory is free", todo="give --ram")
    with headers.opened(args.model, args.revision, args.pre_tokenizer, args.trust_remote_code) as gguf:
        found = advise.choices(gguf, PRESETS, args.ctx_size, coding)
        try:
            costs, refused = advise.costs(gguf, PRESETS["medium"], coding), None
        except MobieError as e:
            costs, refused = [], e
    if refused:
        found = [c for c in found if c.preset == advise.LEAST]
    threads = args.threads or cpus()
    speed = advise.bandwidth(threads, free)
    print(
        f"{'':<8} {'bits':>5} {'the rest':<9}{'weights':>12} {'context':>12} {'buffers':>12} {'together':>12} "
        f"{'tokens/s':>9}"
    )
    for c in found:
        sizes = " ".join(f"{size_text(n):>12}" for n in (c.weights, c.context, c.buffers, c.total))
        fits = "fits" if c.total <= ram else "does not fit"
        estimate = _rate(speed / c.per_token) if c.per_token and c.total <= ram else ""
        print(f"{c.preset:<8} {c.bpw:>5.2f} {c.rest or 'as it is':<9}{sizes} {estimate:>9}  {fits}")
    print(
        f"\ntokens/s: an estimate for one token after the other with {args.ctx_size} tokens in the context: what each "
        f"reads, at the\n{speed / 1e9:.0f} GB/s that {threads} threads read from this machine's memory just now. "
        "Runs reach 0.4 to 0.9 of it."
    )
    choice = advise.best(found, ram)
    if choice is None:
        print(
            f"\nnothing fits into {size_text(ram)}; a smaller context, or experts read from the disk as needed (slow)"
        )
        return Exit.UNSUPPORTED
    rest = ["--type", coding.option] if coding.stock else []
    rest += ["--tensor-type", f"{advise.EVERY}={choice.rest}"] if choice.rest else []
    rest += ["--revision", args.revision] if args.revision else []
    rest += ["--pre-tokenizer", args.pre_tokenizer] if args.pre_tokenizer else []

    def command(*options: str) -> str:
        return shlex.join(["mobie-export", args.model, *options, *rest])

    if refused:
        print(f"\nit cannot be calibrated here: {refused.what}: {refused.found}")
        print(f"\n{command('--method', 'sign')}")
        return Exit.OK
    print("\na calibration takes about, here, by its effort:")
    for cost in costs:
        print(
            f"  --effort {cost.effort:<8}{time_text(cost.seconds):>12}, {size_text(cost.disk)} of disk and "
            f"{size_text(cost.memory)} of memory while it runs"
        )
    least = [] if coding.stock else ["--bpw", f"{math.ceil(1e4 * choice.bpw) / 1e4:.4f}"]
    print(f"\n{command(*(least if choice.preset == advise.LEAST else ['--preset', choice.preset]))}")
    return Exit.OK


def _rate(value: float) -> str:
    """Per second, in three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _inspect(args: argparse.Namespace) -> int:
    from mobie_export import api
    from mobie_export.spec import inspect

    info = api.inspect(args.file)
    print(json.dumps(dataclasses.asdict(info), indent=1, default=str) if args.json else inspect.render(info))
    return Exit.OK


def _verify(args: argparse.Namespace) -> int:
    from mobie_export import api

    seen = api.verify(args.file, progress=_shown(args))
    print(
        f"{args.file}: sound; {seen.blocks:,} blocks in {seen.expert_tensors} expert tensors, "
        f"{seen.expert_bpw:.4f} bits per expert weight"
    )
    if seen.requantized:
        types = ", ".join(f"{n} {name}" for name, n in seen.requantized.items())
        print(f"re-quantized since: tensors that are no experts are now {types}; expert tensors are as written")
    return Exit.OK


def _report(args: argparse.Namespace) -> int:
    from mobie_export import api

    made = api.report(
        args.file,
        args.against,
        text=args.text,
        tasks=dict(args.tasks),
        quick=args.quick,
        threads=args.threads,
        overwrite=args.overwrite,
        write_card=args.card,
        progress=_shown(args),
    )
    for found in made.findings:
        where = "" if found["layer"] is None else f"layer {found['layer']}: "
        print(f"{found['severity']:<8}{where}{found['what']}")
    for path in (made.json, made.html, made.card):
        if path is not None:
            print(f"written {path}")
    return Exit.OK


def _bench(args: argparse.Namespace) -> int:
    from mobie_export import api

    found = api.bench(
        args.file,
        threads=args.threads,
        prompt=args.prompt,
        generated=args.generate,
        repetitions=args.repetitions,
    )
    print(json.dumps(found.data, indent=1, ensure_ascii=False) if args.json else found.row)
    return Exit.OK


def _dequantize(args: argparse.Namespace) -> int:
    from mobie_export import api

    report = api.dequantize(
        args.file, args.output, type_name=args.type, overwrite=args.overwrite, progress=_shown(args)
    )
    _print_report(report)
    return Exit.OK


def _clean(args: argparse.Namespace) -> int:
    from mobie_export import disk

    found = disk.left(args.folder)
    for item in found:
        state = "in use" if item.in_use else f"{time_text(item.age)} old"
        if args.remove and not item.in_use:
            state = "removed" if disk.remove_left(item) else "could not be removed"
        print(f"{size_text(item.size):>11}  {state:<12}  {item.path}: {item.about}")
    if not found:
        print(f"nothing is left in {args.folder}")
    elif not args.remove and not all(x.in_use for x in found):
        print("\n--remove removes what is not in use; until then the command that made it goes on from it")
    return Exit.OK


def _metadata(args: argparse.Namespace) -> int:
    from mobie_export import api
    from mobie_export.exporting import changes

    if not args.changes and args.split_max_size is None:
        raise MobieError(USAGE, "nothing to change", todo="give --set, --set-file, --remove or --split-max-size")
    read = {"parse": changes.Change.parse, "from_file": changes.from_file, "remove": changes.Change.removed}
    report = api.edit(
        args.file,
        args.output,
        [read[how](text) for how, text in args.changes],
        overwrite=args.overwrite,
        max_bytes=args.split_max_size,
        progress=_shown(args),
    )
    _print_report(report)
    return _loaded(report)


def _loaded(report: "Report") -> int:
    """Say so where llama.cpp does not load what was written."""
    if not report.not_loaded:
        return Exit.OK
    print(f"\nproblem: llama.cpp does not load {report.output}: {report.not_loaded}")
    print("it may not load what this was made from either; `mobie-export doctor FILE` says so of any GGUF")
    return Exit.NO_RUNTIME


def _doctor(args: argparse.Namespace) -> int:
    from mobie_export.runtime import doctor

    return Exit.OK if doctor.doctor(args.file) else Exit.NO_RUNTIME


def _runtime(args: argparse.Namespace) -> int:
    from mobie_export.runtime import build, doctor, install

    if args.action == "status":
        return Exit.OK if doctor.doctor() else Exit.NO_RUNTIME
    if args.action == "restore":
        install.restore()
    else:
        cuda = args.cuda or args.cuda_arch is not None
        build.build(args.jobs, args.sdist, cuda=cuda, cuda_architectures=args.cuda_arch, vulkan=args.vulkan)
    return Exit.OK


def _print_outcome(outcome: "Outcome") -> None:
    if outcome.rare:
        n = sum(map(len, outcome.rare.values()))
        print(f"{n} experts without tokens in the imatrix; they got their layer's mean:")
        for name, experts in outcome.rare.items():
            print(f"  {name}: {', '.join(map(str, experts))}")
    for name in outcome.plain:
        print(f"{name}: predicts further tokens and is not in the imatrix; its scales are the weights' own")
    for line in outcome.lines:
        print(line)
    for layer, counts in outcome.thin.items():
        fewest = sorted(counts.items(), key=lambda x: x[1])[:NAMED]
        named = ", ".join(f"{e} ({n})" for e, n in fewest)
        named += f" and {len(counts) - NAMED} more; `thin` in mobie.settings has all" if len(counts) > NAMED else ""
        print(f"layer {layer}: experts that saw few tokens, helped out by their layer's: {named}")


def _print_report(report: "Report") -> None:
    ratio = report.output_size / report.source_size
    experts = "" if report.expert_bpw is None else f"; experts {report.expert_bpw:.4f}"
    memory = "unknown" if report.peak_memory is None else size_text(report.peak_memory)
    print(f"written   {report.output}")
    print(f"size      {size_text(report.source_size)} -> {size_text(report.output_size)} ({ratio:.1%})")
    print(f"stored    {report.bpw:.4f} bits per weight{experts}")
    print(f"took      {time_text(report.seconds)}, {size_text(report.bytes_per_second)}/s, peak memory {memory}")
