"""What lies on the disk beside finished outputs, and how an output gets its name.

Work goes on in private folders beside the output, `.mobie-KIND-DIGEST`, so that nothing of the user's can have their
name:

    part      an output while it grows; named after the output, so that two exports to one output exclude each other
    work      a calibration, named after all that decides its result, so that the same command continues it
    convert   the GGUF of a checkpoint, named after the checkpoint's content

A folder is in use while its file `lock` is locked; the system lets go of the lock when the process ends, however it
ends. Files are complete when their name does not end in `.part`.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO
from zipfile import BadZipFile

from filelock import FileLock, Timeout

from mobie_export.errors import BAD_INPUT, BAD_OUTPUT, NO_SPACE, MobieError
from mobie_export.progress import size_text

PART, WORK, CONVERT, GONE = "part", "work", "convert", "gone"  # the last: on its way to be removed
FOLDER_NAME = re.compile(rf"\.mobie-({PART}|{WORK}|{CONVERT}|{GONE})-[0-9a-f]{{16}}(-[0-9a-f]{{16}})?")
LOCK, ABOUT = "lock", "about"
CHUNK = 8 << 20  # bytes in flight while a file is read
WAIT = 0.3  # seconds for a lock: another process may only be looking


# ---- errors of the system --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path, option: str = "-o") -> Iterator[None]:
    """What the system has against writing `path` becomes a MobieError. option: that names the path, here and below."""
    try:
        yield
    except OSError as e:
        code, todo = BAD_OUTPUT, f"choose another place with {option}"
        if e.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            code, todo = NO_SPACE, "free some space and give the same command again"
        elif e.errno == errno.EFBIG:
            todo = "raise the limit on file sizes (ulimit -f), or write shards with --split-max-size"
        raise MobieError(code, f"cannot write {path}", e.strerror or str(e), todo=todo) from e


@contextlib.contextmanager
def reading_back(path: Path) -> Iterator[None]:
    """A file of a private folder that is gone or damaged becomes a MobieError."""
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, BadZipFile, UnpicklingError) as e:
        raise MobieError(
            BAD_INPUT,
            f"cannot read back {path}",
            (str(e).splitlines() or [type(e).__name__])[0],
            "the file as it was written",
            f"check the disk; begin anew after: mobie-export clean {path.parent.parent} --remove",
        ) from e


def advise(fd: int, offset: int, size: int, advice: str) -> None:
    """Tell the system, where it listens, how a range of a file will be used. advice: name of a constant of `os`."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # a hint; some file systems refuse it
            os.posix_fadvise(fd, offset, size, getattr(os, advice))


def reserve(file: BinaryIO, size: int) -> None:
    """Take the disk space of a file that will be written, so that a full disk is an OSError now."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as e:  # some file systems cannot; then a full disk is found when writing
            if e.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise


def link(source: Path, path: Path) -> None:
    """Another name, on the disk, for a private folder's file; a copy where the file system has no such thing."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        part.unlink(missing_ok=True)
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.replace(path)


# ---- private folders -------------------------------------------------------------------------------------------------


def digest(*decides: object) -> str:
    """Of anything that json, or str, can write: 16 hexadecimal digits."""
    text = json.dumps(decides, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@contextlib.contextmanager
def private(path: Path, about: str, busy: str, keep: bool) -> Iterator[Path]:
    """A private folder for the time of the context, this process's alone; MobieError `busy` when it is in use.

    After success it is removed. After anything else what is complete in it stays where `keep` is set, and the
    exception gets a note that says so.
    """
    lock = None
    try:
        lock = _locked(path, busy)
        for gone in path.parent.glob(f".mobie-{GONE}-*"):
            _remove_unused(gone)
        if not keep:
            _empty(path)
        with writing(path):
            (path / ABOUT).write_text(about + "\n", encoding="utf-8", errors="replace")
        yield path
        remove(path)
    except BaseException as e:
        lock = lock or _try(path)  # interrupted while the lock was taken
        if lock and keep and complete_files(path):
            e.add_note(
                f"kept: {path} ({size_text(size_of(path))}), {about}; the same command goes on from it, "
                f"`mobie-export clean {path.parent}` lists and removes what is left"
            )
        elif lock:
            remove(path)
        raise
    finally:
        if lock:
            lock.release()


def _locked(path: Path, busy: str) -> FileLock:
    """The lock of a private folder, which is made where it is not there."""
    while True:
        with writing(path):
            path.mkdir(exist_ok=True)
        lock = FileLock(path / LOCK, timeout=WAIT)
        try:
            lock.acquire()
        except Timeout as e:
            todo = "wait for it, or choose another output with -o"
            raise MobieError(BAD_OUTPUT, busy, f"{path} is in use by another process", todo=todo) from e
        except OSError:
            if path.parent.is_dir() and not path.exists():
                continue  # its last user removed it in between
            with writing(path):
                raise
        if (path / LOCK).exists():
            return lock
        lock.release()


def complete_files(path: Path) -> list[Path]:
    """What an interrupted run has finished in its folder."""
    with contextlib.suppress(OSError):
        return [p for p in path.iterdir() if p.name not in (LOCK, ABOUT) and p.suffix != ".part"]
    return []


def _empty(path: Path) -> None:
    """Remove what a run that was killed left."""
    for left in path.iterdir():
        if left.name != LOCK:
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a private folder whose lock is held. It loses its name first: a half removed one is never continued."""
    gone = path.with_name(f".mobie-{GONE}-{secrets.token_hex(8)}")
    try:
        path.rename(gone)
    except OSError:
        gone = path
    shutil.rmtree(gone, ignore_errors=True)


def size_of(path: Path) -> int:
    """Bytes on the disk of a private folder's files; 0 where there is none."""
    sizes: dict[tuple[int, int], int] = {}  # of files, which may have several names
    for p in path.rglob("*"):
        if p.name in (LOCK, ABOUT):
            continue
        with contextlib.suppress(OSError):
            s = p.lstat()
            if stat.S_ISREG(s.st_mode):
                sizes[s.st_dev, s.st_ino] = 512 * s.st_blocks if hasattr(s, "st_blocks") else s.st_size
    return sum(sizes.values())


# ---- what is left ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Left:
    """A private folder that a run left, or works in."""

    path: Path
    about: str
    size: int  # bytes on the disk
    age: float  # seconds since something in it changed
    in_use: bool


def left(folder: Path) -> list[Left]:
    """Private folders directly in `folder`, by name. Others, and links, are nobody's business here."""
    if not folder.is_dir():
        raise MobieError(BAD_INPUT, f"no such folder: {folder}", todo="name the folder where the outputs are")
    found = []
    for path in sorted(folder.iterdir()):
        if not _is_ours(path):
            continue
        times = [p.lstat().st_mtime for p in [path, *path.rglob("*")] if p.exists()]
        about = "half removed"
        with contextlib.suppress(OSError):
            about = (path / ABOUT).read_text(encoding="utf-8", errors="replace").strip()
        lock = _try(path)
        if lock:
            lock.release()
        age = max(0.0, time.time() - max(times, default=0))
        found.append(Left(path, about, size_of(path), age, in_use=lock is None))
    return found


def remove_left(item: Left) -> bool:
    """Whether the folder could be removed: it stays when somebody uses it by now."""
    _remove_unused(item.path)
    return not item.path.exists()


def _remove_unused(path: Path) -> None:
    lock = _try(path)
    if lock:
        try:
            remove(path)
        finally:
            lock.release()


def _is_ours(path: Path) -> bool:
    match = FOLDER_NAME.fullmatch(path.name)
    if not match or path.is_symlink() or not path.is_dir():
        return False
    return match[1] == GONE or (path / LOCK).is_file() or not any(path.iterdir())


def _try(path: Path) -> FileLock | None:
    lock = FileLock(path / LOCK, timeout=0)
    try:
        lock.acquire()
    except (Timeout, OSError):
        return None
    return lock


# ---- outputs ---------------------------------------------------------------------------------------------------------


def check_folder(folder: Path, option: str = "-o") -> None:
    """MobieError where an output's folder is not there or cannot be written into."""
    if not folder.is_dir():
        raise MobieError(
            BAD_OUTPUT,
            f"the folder of the output does not exist: {folder}",
            todo=f"make it, or choose another with {option}",
        )
    if not os.access(folder, os.W_OK):
        raise MobieError(
            BAD_OUTPUT, f"cannot write into {folder}", "no permission", todo=f"choose another with {option}"
        )


def check_target(path: Path, overwrite: bool, option: str = "-o") -> None:
    """MobieError where a file cannot get this name: a plain file is there, or something that is never replaced."""
    with writing(path, option):
        try:
            there = path.lstat()
        except FileNotFoundError:
            return
    if not stat.S_ISREG(there.st_mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISLNK, "a link"), (stat.S_ISFIFO, "a pipe"))
        kind = next((text for is_kind, text in kinds if is_kind(there.st_mode)), "a device or socket")
        raise MobieError(
            BAD_OUTPUT,
            f"the output is {kind}: {path}",
            wanted="the name of a file",
            todo=f"choose another with {option}",
        )
    if not overwrite:
        raise MobieError(
            BAD_OUTPUT,
            f"{path} exists already",
            size_text(there.st_size),
            todo=f"choose another name with {option}, or replace it with --overwrite",
        )


def place(written: Path, final: Path, overwrite: bool, option: str = "-o") -> None:
    """Give a finished file its name. A file that came there meanwhile stays unless `overwrite`; MobieError then."""
    check_target(final, overwrite, option)
    with writing(final, option):
        if overwrite:
            os.replace(written, final)
            return
        try:
            os.link(written, final)  # never replaces anything, as a rename does
        except FileExistsError:
            check_target(final, overwrite, option)
            raise
        except OSError:  # a file system without hard links
            check_target(final, overwrite, option)
            os.rename(written, final)


def sync(folder: Path) -> None:
    """Names are on the disk when their folder is."""
    if hasattr(os, "O_DIRECTORY"):
        with contextlib.suppress(OSError):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def hub_name(path: Path) -> str | None:
    """`owner/name` of the model to which a folder, or a file, in the cache of huggingface_hub belongs."""
    folder = (path if path.is_dir() else path.parent).resolve()
    for snapshot in [folder, *folder.parents]:
        kind, *name = snapshot.parent.parent.name.split("--")
        if snapshot.parent.name == "snapshots" and kind == "models" and name:
            return "/".join(name)
    return None
