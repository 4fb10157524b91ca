"""How does the pinned release become a tree that knows the type? The patches are applied, the kernels copied in."""

import hashlib
import shutil
from pathlib import Path

from mobie_export.runtime import upstream
from mobie_export.runtime.processes import unavailable
from mobie_export.runtime.upstream import LLAMA, Pin

KERNELS = upstream.shipped("kernels_cpp")


def patch_files() -> list[Path]:
    return sorted(upstream.PATCHES.glob("*.patch"))


def series_digest(pin: Pin) -> str:
    """Changes with the pin and with the patches, not with the kernels: those are copied anew at every build."""
    h = hashlib.sha256(pin.sha256.encode())
    for p in patch_files():
        h.update(p.read_bytes())
    return h.hexdigest()[:12]


def kernel_files() -> list[Path]:
    """What a build takes of kernels_cpp/, relative to it."""
    files = (p.relative_to(KERNELS) for p in KERNELS.rglob("*") if p.is_file())
    return sorted(p for p in files if "tests" not in p.parts)


def kernels_digest() -> str:
    h = hashlib.sha256()
    for rel in kernel_files():
        h.update(f"{rel.as_posix()}\0".encode() + (KERNELS / rel).read_bytes())
    return h.hexdigest()[:12]


def apply_series(llama: Path, series: list[Path]) -> None:
    """Apply the patches to a llama.cpp tree, once: a tree that already has this series is left as it is.

    Raises MobieError; the tree may then be half patched and is of no more use.
    """
    import patch_ng

    done = llama / ".mobie-patched"
    want = "".join(f"{p.name} {upstream.sha256(p)}\n" for p in series)
    if done.exists():
        if done.read_text() == want:
            return
        raise unavailable(f"{llama} is patched with another series", todo="remove the folder and build again")
    for p in series:
        parsed = patch_ng.fromfile(str(p))
        if not parsed or not parsed.apply(root=str(llama)):
            raise unavailable(
                f"{p.name} does not apply to {llama}",
                wanted=f"the llama.cpp of {upstream.read_pin().sdist} as it was released",
                todo="remove the folder and build again",
            )
    done.write_text(want)


def copy_kernels(llama: Path) -> None:
    """Mirror kernels_cpp/ into the tree; files that did not change keep their time, so that nothing is rebuilt."""
    to = llama / "ggml" / "src" / "mobie"
    wanted = set(kernel_files())
    for rel in wanted:
        target = to / rel
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != (KERNELS / rel).read_bytes():
            shutil.copyfile(KERNELS / rel, target)
    for old in [p for p in to.rglob("*") if p.is_file() and p.relative_to(to) not in wanted]:
        old.unlink()


def home() -> Path:
    """The folder of the tree with this series and of what is built in it, made or not."""
    return upstream.cache_dir() / f"runtime-{series_digest(upstream.read_pin())}"


def prepare(sdist: Path | None = None) -> Path:
    """Fetch, verify, unpack and patch. Returns the folder with src/ (and later build/)."""
    folder = home()
    if not (folder / "src").exists():
        archive = upstream.fetch_sdist(upstream.read_pin(), sdist)
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / "src.new"
        shutil.rmtree(fresh, ignore_errors=True)
        upstream.unpack(archive, fresh)
        apply_series(fresh / LLAMA, patch_files())
        fresh.rename(folder / "src")
    apply_series(folder / "src" / LLAMA, patch_files())
    copy_kernels(folder / "src" / LLAMA)
    return folder
