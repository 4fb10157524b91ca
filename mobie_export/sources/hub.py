"""How does a model of the hub get here, whole or the headers of its files alone? By huggingface_hub, whose cache and
log-in are used."""

import contextlib
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mobie_export import disk, gguf_io
from mobie_export.errors import BAD_INPUT, NOT_FETCHED, UNSUPPORTED, MobieError
from mobie_export.gguf_io import Gguf, Header, first_bytes
from mobie_export.sources import ggufs, safetensors

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem

WEIGHTS = "*.safetensors"
# What conversion reads, and what a card says of the source.
SMALL_FILES = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "README.md", "LICENSE*")
WANTED_FILES = (*SMALL_FILES, WEIGHTS)
CODE_FILES = ("*.py",)  # with --trust-remote-code
FIRST = 100_000  # bytes that hold the header of most shards, as huggingface_hub reads them
AT_ONCE = 8  # files whose headers are read


def download(name: str, revision: str | None = None, trust_remote_code: bool = False, which: str | None = None) -> Path:
    """A model of the hub in the cache of huggingface_hub, where an interrupted download goes on: the folder of a
    checkpoint; or a GGUF, with all its shards, where `which` names one (ggufs.choose) or there is nothing else.
    MobieError."""
    names = list(listing(name, revision).sizes)
    chosen = choose(name, names, which)
    if chosen is None:
        return _snapshot(name, revision, [*WANTED_FILES, *(CODE_FILES if trust_remote_code else ())])
    return _snapshot(name, revision, ggufs.files_of(chosen, names)) / chosen


def choose(name: str, names: list[str], which: str | None) -> str | None:
    """The GGUF that is meant (ggufs.choose) among the files of a model of the hub; None where the checkpoint is."""
    if which is None and (shards(names) or not ggufs.models(names)):
        return None
    todo = f"name one by its type, or its file: {name}:TYPE, {name}:FILE.gguf"
    return ggufs.choose(names, which, f"{name} on the hub", todo)


def shards(names: Iterable[str]) -> list[str]:
    """The files with weights of a checkpoint."""
    return [n for n in names if Path(n).match(WEIGHTS) and "/" not in n]


@dataclass(frozen=True)
class Listing:
    """The files of a model of the hub and their bytes."""

    sizes: dict[str, int]
    cached: Path | None = None  # the folder that was looked at where the hub cannot be reached


def listing(name: str, revision: str | None = None) -> Listing:
    """What there is of a model. MobieError."""
    try:
        with _asking(name):
            hub = _library().HfFileSystem()
            found = hub.find(_path(name, revision), detail=True)
            return Listing({hub.resolve_path(p).path_in_repo: info["size"] or 0 for p, info in found.items()})
    except MobieError:
        with contextlib.suppress(MobieError):
            folder = _snapshot(name, revision, [], local_files_only=True)
            files = [p for p in folder.rglob("*") if p.is_file()]
            return Listing({p.relative_to(folder).as_posix(): p.stat().st_size for p in files}, folder)
        raise


# ---- headers ---------------------------------------------------------------------------------------------------------


def gguf(name: str, revision: str | None, file: str, sizes: dict[str, int]) -> Gguf:
    """The header of a GGUF of the hub, of all its shards; its tensors cannot be read. sizes: of the Listing.
    MobieError."""
    whole, hub = Path(name), _library().HfFileSystem()

    def read(path: Path) -> Header:
        inside = path.relative_to(whole).as_posix()
        with _reading(hub, name, revision, inside, sizes[inside]) as some:
            return gguf_io.parse_header(path, some, sizes[inside])

    return gguf_io.assembled(whole / file, read, lambda path: path.relative_to(whole).as_posix() in sizes)


def skeleton(
    name: str, revision: str | None, sizes: dict[str, int], folder: Path, trust_remote_code: bool = False
) -> None:
    """Make a folder with a checkpoint of the hub whose weights are holes: small files whole, of the others the header.
    sizes: of the Listing. MobieError."""
    hub = _library().HfFileSystem()  # one for all threads: it knows the listing
    small = _snapshot(name, revision, [*SMALL_FILES, *(CODE_FILES if trust_remote_code else ())])
    for path in small.iterdir():
        if path.is_file() and not path.match(WEIGHTS):
            (folder / path.name).symlink_to(path.resolve())

    def fetch(file: str) -> None:
        with _reading(hub, name, revision, file, sizes[file]) as some:
            head = some(FIRST)
            if len(head) >= 8:
                (length,) = struct.unpack_from("<Q", head)
                if len(head) < 8 + length <= safetensors.MAX_HEADER:
                    head += some(8 + length - len(head))
        with disk.writing(folder / file), open(folder / file, "wb") as out:
            out.write(head)
            out.truncate(sizes[file])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(fetch, shards(sizes)))


@contextlib.contextmanager
def _reading(
    hub: "HfFileSystem", name: str, revision: str | None, file: str, size: int
) -> Iterator[Callable[[int], bytes]]:
    """A function that gives the next bytes of a file of the hub, of which nothing else is fetched."""
    path = f"{_path(name, revision)}/{file}"
    with _asking(name), hub.open(path, "rb", block_size=FIRST, cache_type="none", size=size) as remote:

        def some(n: int) -> bytes:
            data = bytes(remote.read(n))
            if first_bytes.is_pointer(data):
                found, todo = "a Git LFS pointer in place of the file", "look for another copy of the model"
                raise MobieError(BAD_INPUT, f"{name}/{file} holds no weights", found, "the file itself", todo)
            return data

        yield some


def _path(name: str, revision: str | None) -> str:
    """As HfFileSystem has it."""
    return f"{name}@{revision.replace('/', '%2F')}" if revision else name


# ---- the library -----------------------------------------------------------------------------------------------------


def _snapshot(name: str, revision: str | None, wanted: list[str], **options: bool) -> Path:
    with _asking(name):
        return Path(_library().snapshot_download(name, revision=revision, allow_patterns=wanted, **options))


def _library() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as e:
        raise MobieError(
            UNSUPPORTED,
            "downloading needs a package that is not installed",
            str(e),
            "huggingface_hub",
            "pip install 'mobie-export[convert]', or give a folder or a GGUF",
        ) from e
    return huggingface_hub


@contextlib.contextmanager
def _asking(name: str) -> Iterator[None]:
    """What the library raises becomes a MobieError."""
    _library()
    from huggingface_hub import errors

    def failed(found: str, todo: str) -> MobieError:
        return MobieError(
            NOT_FETCHED, f"{name} could not be downloaded", found, f"a model at huggingface.co/{name}", todo
        )

    try:
        yield
    except (errors.HTTPError, errors.HFValidationError, OSError) as raised:
        # HfFileSystem raises FileNotFoundError from what the hub said
        e = raised.__cause__ if type(raised) is FileNotFoundError and raised.__cause__ else raised
        if isinstance(e, errors.GatedRepoError):
            found, todo = "its owners want its terms accepted", "accept them there, then log in with `hf auth login`"
        elif isinstance(e, errors.RevisionNotFoundError):
            found, todo = "it has no such revision", "check --revision: a branch, a tag or a commit"
        elif isinstance(e, errors.RepositoryNotFoundError):
            found = "no such model, or it is private"
            todo = "check the name; a private model needs `hf auth login`"
        elif isinstance(e, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled) or not isinstance(
            e, errors.HfHubHTTPError | errors.HFValidationError | OSError
        ):  # the last: no connection, no answer
            found = "the hub cannot be reached, and the model is not in the local cache"
            todo = "go online, or give a folder or a GGUF on this machine"
        else:
            found = (str(e).strip().splitlines() or [type(e).__name__])[0]
            todo = "run the command again: the download goes on where it stopped"
        raise failed(found, todo) from raised
