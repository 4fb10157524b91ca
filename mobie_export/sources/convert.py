"""How does a checkpoint become a GGUF?

The converter of the pinned llama.cpp writes it, in a process of its own (hf_convert.py), into a work file beside the
output that is removed afterwards. Before the weights are converted, a header without them is: it takes seconds, and
whatever the converter or the exporter has against the model is said then.
"""

import contextlib
import fnmatch
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from mobie_export import __version__, disk
from mobie_export.errors import BAD_INPUT, BAD_OUTPUT, CONVERT_FAILED, NO_SPACE, UNSUPPORTED, MobieError
from mobie_export.progress import Callback, Progress, size_text
from mobie_export.runtime import loads, upstream
from mobie_export.sources.find import Source
from mobie_export.sources.hub import CODE_FILES, WANTED_FILES

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
# ... and at the very end: an error on the way there may be one that it got over
NO_FILE = r"(?:FileNotFoundError: .*?: '?|Error: Missing )(?P<path>.+?)'?\Z"
NO_KEY = r"KeyError: (?:'(?P<key>\w+)'|\"could not find any of: \[(?P<keys>.+)\]\")\Z"


@contextlib.contextmanager
def opened(
    source: Source,
    beside: Path,
    check: Callable[[Path], int] | None = None,
    header_only: bool = False,
    progress: Callback | None = None,
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
            with _named(source, path):
                yield path
        return
    name = f".mobie-{disk.CONVERT}-{_content(source, progress)}"
    about, busy = f"{source.name}, converted", f"{source.hub or source.checkpoint} is being converted already"
    with disk.private(beside / name, about, busy, keep=True) as folder:
        path, part = folder / f"{source.name}.gguf", folder / "converting.part"
        if not path.exists():
            shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
            with disk.writing(part):
                part.mkdir()
            unfinished = part / path.name
            _convert_header(source, unfinished)
            with _named(source, unfinished):
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
            convert(source, unfinished, show_progress=progress is not None)
            with disk.writing(path):
                with open(unfinished, "rb") as file:
                    os.fsync(file.fileno())
                unfinished.rename(path)
            shutil.rmtree(part, ignore_errors=True)
        with _named(source, path):
            yield path


@contextlib.contextmanager
def _named(source: Source, path: Path) -> Iterator[None]:
    """Errors about the GGUF at `path` name what the user gave: this file is not the user's, and may be gone by then."""
    try:
        yield
    except MobieError as e:
        name = str(source.hub or source.checkpoint)
        e.what, e.found, e.wanted, e.todo = (x.replace(str(path), name) for x in (e.what, e.found, e.wanted, e.todo))
        raise


def _convert_header(source: Source, path: Path) -> None:
    convert(source, path, header_only=True)
    loads.check(path, str(source.hub or source.checkpoint))


def _content(source: Source, callback: Callback | None) -> str:
    """A digest of all that decides what a checkpoint is converted to, every byte of its files included."""
    patterns = (*WANTED_FILES, *CODE_FILES, "*.bin")
    assert source.checkpoint is not None
    found, path = {}, source.checkpoint
    try:
        every = [p for p in sorted(path.iterdir()) if p.is_file()]
        files = [p for p in every if any(fnmatch.fnmatch(p.name, x) for x in patterns)]
        with Progress("digest of the checkpoint", sum(p.stat().st_size for p in files), callback) as progress:
            for path in files:
                found[path.name] = hashlib.sha256()
                with open(path, "rb") as file:
                    while chunk := file.read(disk.CHUNK):
                        found[path.name].update(chunk)
                        progress.update(len(chunk), path.name)
    except OSError as e:
        raise MobieError(BAD_INPUT, f"cannot read {path}", e.strerror or str(e), "a file of the checkpoint") from e
    digests = {name: digest.hexdigest() for name, digest in found.items()}
    return disk.digest(__version__, upstream.read_pin(), vars(source) | {"checkpoint": digests})


def convert(source: Source, path: Path, header_only: bool = False, show_progress: bool = False) -> None:
    """Write a GGUF of a checkpoint. Raises MobieError.

    Weights become 16-bit, but for experts in MXFP4, which stay as they are; FP8 becomes BF16.
    """
    program = Path(__file__).with_name("hf_convert.py")
    command = [sys.executable, str(program), str(upstream.converter())]
    if header_only:
        command.append("--header-only")
    if source.pre_tokenizer:
        command += ["--pre-tokenizer", source.pre_tokenizer]
    if source.trust_remote_code:
        command.append("--trust-remote-code")
    command += [str(source.checkpoint), "--outfile", str(path), "--model-name", source.name]
    if source.hub:
        origin = path.with_suffix(".json")
        origin.write_text(json.dumps({"general.source.repo_url": f"https://huggingface.co/{source.hub}"}))
        command += ["--metadata", str(origin)]
    lines: deque[str] = deque(maxlen=30)
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    # It ends when its stdin does: with this process.
    with subprocess.Popen(command, stdin=pipe, stdout=nothing, stderr=pipe) as process:
        assert isinstance(process.stderr, io.BufferedReader)
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
    text = "\n".join(lines).rstrip()
    name = source.hub or source.checkpoint
    for pattern, exit_code, what, todo in FAILURES:
        match = re.search(pattern, text)
        if match:
            line = next(x for x in reversed(lines) if re.search(pattern, x))
            return MobieError(exit_code, f"{what}: {name}", line.strip(), todo=todo)
    match = re.search(NO_FILE, text)
    if match and (path := Path(match["path"])).parent == source.checkpoint:
        return MobieError(
            BAD_INPUT,
            f"{name} lacks a file that llama.cpp's converter reads",
            f"no {path}",
            "every file that the model was published with",
            f"download {path.name} from the model's page into the folder",
        )
    match = re.search(NO_KEY, text)
    if match:
        return MobieError(
            CONVERT_FAILED,
            f"{name} lacks a key that llama.cpp's converter reads, most likely in config.json",
            f"no {match['key'] or match['keys']}",
            "the configuration that the model was published with",
            "compare config.json with the one on the model's page; where it is the same, look for a GGUF of the model",
        )
    return MobieError(
        CONVERT_FAILED,
        f"llama.cpp's converter cannot convert {name}",
        f"exit code {code}, and at the end\n" + "\n".join(list(lines)[-12:]),
        "a checkpoint that transformers loads",
        "look for a GGUF of the model",
    )
