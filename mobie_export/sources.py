"""What can be exported: a GGUF, a Hugging Face folder, or a model of the hub by its name.

The last two are converted by the converter of the pinned llama.cpp, in a process of its own (hf_convert.py), into a
work file beside the output that is removed afterwards. Before the weights are converted, a header without them is: it
takes seconds, and whatever the converter or the exporter has against the model is said then.
"""

import contextlib
import difflib
import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mobie_export import __version__, checkpoint, disk, loads, runtime
from mobie_export.checkpoint import Tower
from mobie_export.errors import (
    BAD_INPUT,
    BAD_OUTPUT,
    CONVERT_FAILED,
    NO_SPACE,
    NOT_FETCHED,
    UNSUPPORTED,
    USAGE,
    MobieError,
)
from mobie_export.progress import Progress, size_text

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What conversion reads, and what a card says of the source.
WANTED_FILES = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "README.md", "LICENSE*")
CODE_FILES = ("*.py",)  # with --trust-remote-code
# What the converter says, and what it means: pattern -> exit code, what happened, what to do.
FAILURES = (
    (
        r"trust_remote_code|code of the checkpoint",  # transformers' words, hf_convert's
        UNSUPPORTED,
        "the checkpoint's tokenizer or configuration is code of its own, which is not executed",
        "read its .py files, then allow them with --trust-remote-code; or look for a GGUF of the model",
    ),
    (
        r"pre-tokenizer was not recognized",
        UNSUPPORTED,
        "the converter does not know this checkpoint's tokenizer",
        "name the one it was made from with --pre-tokenizer, as llama.cpp calls it (qwen2, llama-bpe, gpt-2, ...)",
    ),
    (
        r"Model (\S+) is not supported",
        UNSUPPORTED,
        "the pinned llama.cpp cannot convert this architecture",
        "look for a GGUF of the model, or for a newer mobie-export",
    ),
    (
        r"ModuleNotFoundError: No module named",
        UNSUPPORTED,
        "the converter needs a package that is not installed",
        "pip install 'mobie-export[convert]'",
    ),
    (
        r"File too large",
        BAD_OUTPUT,
        "the system does not let files become so large",
        "raise the limit (ulimit -f), or write to a disk without it with -o",
    ),
    (r"No space left on device", NO_SPACE, "the disk is full", "free some space, or write to another disk with -o"),
)


@dataclass(frozen=True)
class Source:
    """Something to export. Exactly one of `gguf` and `checkpoint` is there."""

    name: str  # of the model, as a published file would be called
    gguf: Path | None = None  # the GGUF, or its first shard
    checkpoint: Path | None = None  # a Hugging Face folder
    hub: str | None = None  # its name on the hub
    pre_tokenizer: str | None = None
    trust_code: bool = False  # whether Python files of the checkpoint may be executed
    towers: tuple[Tower, ...] = ()  # what of the checkpoint is not exported

    def default_output(self) -> Path | None:
        """`<Model>-MOBIE.gguf`: the form in which llama.cpp finds a quantization by its name on the hub. None for a
        GGUF, which has a rule of its own (pipeline.default_output)."""
        if self.gguf:
            return None
        return (Path() if self.hub else self.checkpoint.resolve().parent) / f"{self.name}-MOBIE.gguf"

    def left_out(self, converter: Path | None = None) -> list[str]:
        """A line for every part of the model that is not exported, and one with how to get it: with the converter's
        path, the command for this machine."""
        lines = [
            f"Not exported: the {t.kind} part, {t.weights:,} of {t.of:,} weights; this is the language model."
            for t in self.towers
        ]
        if lines:
            program, folder = (converter, self.checkpoint) if converter else ("convert_hf_to_gguf.py", "CHECKPOINT")
            lines.append(
                "llama.cpp reads it from a file of its own, which its converter writes: "
                f"`python {program} --mmproj {folder} --outfile mmproj.gguf`"
            )
        return lines


# ---- finding ---------------------------------------------------------------------------------------------------------


def find(text: str, revision: str | None = None, pre_tokenizer: str | None = None, trust_code: bool = False) -> Source:
    """The source that a word on the command line means; a hub model is downloaded. Raises MobieError."""
    path = Path(text)
    if os.path.isdir(path):  # Path.is_dir raises where the name is too long
        hub = disk.hub_name(path)  # a snapshot in the hub's cache, which is called by the digest of its commit
        name, folder = hub.split("/")[-1] if hub else path.resolve().name, path
    elif os.path.exists(path) or path.suffix == ".gguf" or not HUB_NAME.fullmatch(text):
        return Source(path.name.removesuffix(".gguf"), gguf=path)
    else:
        name, folder, hub = text.split("/")[1], download(text, revision, trust_code), text
    towers = _check(folder, text)
    if pre_tokenizer is not None:
        _check_pre_tokenizer(pre_tokenizer)
    return Source(name, None, folder, hub, pre_tokenizer, trust_code, tuple(towers))


def _check(folder: Path, what: str) -> list[Tower]:
    """What of a checkpoint is left out; MobieError where something is missing that a conversion needs."""
    if not (folder / "config.json").is_file():
        ggufs = sorted(p.name for p in folder.glob("*.gguf"))
        raise MobieError(
            BAD_INPUT,
            f"{what} is no Hugging Face checkpoint",
            f"no config.json; GGUF files: {', '.join(ggufs[:4])}" if ggufs else "no config.json",
            "config.json, safetensors and a tokenizer",
            "give the GGUF file itself" if ggufs else "give a folder with a checkpoint, or a GGUF",
        )
    return checkpoint.check(folder, what)


def _check_pre_tokenizer(name: str) -> None:
    known = runtime.pre_tokenizers()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        raise MobieError(
            USAGE,
            f"llama.cpp knows no pre-tokenizer {name}",
            f"near it: {', '.join(near)}" if near else f"{len(known)} others: {', '.join(known[:8])}, ...",
            "the one that the tokenizer was made from, as llama.cpp calls it",
        )


def download(name: str, revision: str | None = None, trust_code: bool = False) -> Path:
    """A model of the hub, in the cache of huggingface_hub, where an interrupted download goes on. Raises MobieError."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as e:
        raise MobieError(
            UNSUPPORTED,
            "downloading needs a package that is not installed",
            str(e),
            "huggingface_hub",
            "pip install 'mobie-export[convert]', or give a folder or a GGUF",
        ) from e

    def failed(found: str, todo: str) -> MobieError:
        return MobieError(
            NOT_FETCHED, f"{name} could not be downloaded", found, f"a model at huggingface.co/{name}", todo
        )

    try:
        wanted = [*WANTED_FILES, *(CODE_FILES if trust_code else ())]
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
    except GatedRepoError as e:
        raise failed("its owners want its terms accepted", "accept them there, then log in with `hf auth login`") from e
    except RepositoryNotFoundError as e:
        raise failed("no such model, or it is private", "check the name; a private model needs `hf auth login`") from e
    except LocalEntryNotFoundError as e:
        todo = "go online, or give a folder or a GGUF on this machine"
        raise failed("the hub cannot be reached, and the model is not in the local cache", todo) from e
    except (HfHubHTTPError, OSError) as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise failed(first, "run the command again: the download goes on where it stopped") from e


# ---- converting ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(
    source: Source,
    beside: Path,
    check: Callable[[Path], int] | None = None,
    header_only: bool = False,
    show_progress: bool = False,
) -> Iterator[Path]:
    """A GGUF of the source for the time of the context. Raises MobieError.

    Of a checkpoint it is a work file in a private folder in `beside`, which stays when the context is left by an
    exception: the next run of the same command need not convert again. With `header_only` it has no weights, takes
    seconds and next to no disk, and is good for a plan. check: called with such a file before the weights are
    converted; returns the bytes that must be free besides the work file's.
    """
    if source.gguf:
        yield source.gguf
        return
    disk.check_folder(beside)
    if header_only:
        with tempfile.TemporaryDirectory(prefix="mobie-header-") as folder:
            path = Path(folder) / f"{source.name}.gguf"
            _convert_header(source, path)
            yield path
        return
    name = f".mobie-{disk.CONVERT}-{_content(source, show_progress)}"
    about, busy = f"{source.name}, converted", f"{source.hub or source.checkpoint} is being converted already"
    with disk.private(beside / name, about, busy, keep=True) as folder:
        path, part = folder / f"{source.name}.gguf", folder / "converting.part"
        if not path.exists():
            shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
            with disk.writing(part):
                part.mkdir()
            unfinished = part / path.name
            _convert_header(source, unfinished)
            reserve = check(unfinished) if check else 0
            size, free = unfinished.stat().st_size, shutil.disk_usage(folder).free
            if size + reserve > free:
                raise MobieError(
                    NO_SPACE,
                    f"not enough space in {beside} to convert {source.name}",
                    f"{size_text(free)} free",
                    f"{size_text(size)} for a work file and {size_text(reserve)} for the output",
                    "free some space, or write to another disk with -o",
                )
            convert(source, unfinished, show_progress=show_progress)
            with disk.writing(path):
                with open(unfinished, "rb") as file:
                    os.fsync(file.fileno())
                unfinished.rename(path)
            shutil.rmtree(part, ignore_errors=True)
        yield path


def _convert_header(source: Source, path: Path) -> None:
    convert(source, path, header_only=True)
    loads.check(path, str(source.hub or source.checkpoint))


def _content(source: Source, show: bool) -> str:
    """A digest of all that decides what a checkpoint is converted to, every byte of its files included."""
    patterns = (*WANTED_FILES, *CODE_FILES, "*.bin")
    found, path = {}, source.checkpoint
    try:
        every = [p for p in sorted(path.iterdir()) if p.is_file()]
        files = [p for p in every if any(fnmatch.fnmatch(p.name, x) for x in patterns)]
        with Progress("digest of the checkpoint", sum(p.stat().st_size for p in files), show) as progress:
            for path in files:
                found[path.name] = hashlib.sha256()
                with open(path, "rb") as file:
                    while chunk := file.read(disk.CHUNK):
                        found[path.name].update(chunk)
                        progress.update(len(chunk), path.name)
    except OSError as e:
        raise MobieError(BAD_INPUT, f"cannot read {path}", e.strerror or str(e), "a file of the checkpoint") from e
    digests = {name: digest.hexdigest() for name, digest in found.items()}
    return disk.digest(__version__, runtime.read_pin(), vars(source) | {"checkpoint": digests})


def convert(source: Source, path: Path, header_only: bool = False, show_progress: bool = False) -> None:
    """Write a GGUF of a checkpoint. Raises MobieError.

    Weights become 16-bit, but for experts in MXFP4, which stay as they are; FP8 becomes BF16.
    """
    program = Path(__file__).with_name("hf_convert.py")
    command = [sys.executable, str(program), str(runtime.converter())]
    if header_only:
        command.append("--header-only")
    if source.pre_tokenizer:
        command += ["--pre-tokenizer", source.pre_tokenizer]
    if source.trust_code:
        command.append("--trust-remote-code")
    command += [str(source.checkpoint), "--outfile", str(path), "--model-name", source.name]
    if source.hub:
        origin = path.with_suffix(".json")
        origin.write_text(json.dumps({"general.source.repo_url": f"https://huggingface.co/{source.hub}"}))
        command += ["--metadata", str(origin)]
    lines: deque[str] = deque(maxlen=30)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:  # which ends when its stdin does: with this process
        # progress bars end in carriage returns, so lines would come too late
        rest = b""
        try:
            while chunk := process.stderr.read1(4096):
                if show_progress and not header_only:
                    sys.stderr.write(chunk.decode("utf-8", "replace"))
                    sys.stderr.flush()
                *done, rest = re.split(rb"[\r\n]+", rest + chunk)
                lines += [line.decode("utf-8", "replace") for line in done if line.strip()]
        except BaseException:
            process.kill()  # an interrupted export does not wait for it
            raise
        lines += [rest.decode("utf-8", "replace")] if rest.strip() else []
    if process.returncode or not path.is_file():
        raise _failure(source, process.returncode, lines)


def _failure(source: Source, code: int, lines: deque[str]) -> MobieError:
    text = "\n".join(lines)
    for pattern, exit_code, what, todo in FAILURES:
        match = re.search(pattern, text)
        if match:
            line = next(x for x in reversed(lines) if re.search(pattern, x))
            return MobieError(exit_code, f"{what}: {source.hub or source.checkpoint}", line.strip(), todo=todo)
    return MobieError(
        CONVERT_FAILED,
        f"llama.cpp's converter cannot convert {source.hub or source.checkpoint}",
        f"exit code {code}, and at the end\n" + "\n".join(list(lines)[-12:]),
        "a checkpoint that transformers loads",
        "look for a GGUF of the model",
    )
