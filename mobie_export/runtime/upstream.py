"""Which llama.cpp is everything built from, and how do its sources get here?

The release is pinned in patches/pin.toml; pip downloads it into the cache. Of it come the tree that is patched and
built (patching.py) and the converter of Hugging Face checkpoints.
"""

import hashlib
import os
import re
import shutil
import sys
import tarfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from mobie_export.errors import BAD_OUTPUT, MobieError
from mobie_export.runtime.processes import run, unavailable

LLAMA = Path("vendor") / "llama.cpp"  # in the sdist
CONVERTER = (
    "convert_hf_to_gguf.py",
    "conversion",
    "gguf-py/gguf",
    "models/templates",
    "src/llama-vocab.cpp",  # which pre-tokenizers there are
    "LICENSE",
)  # in llama.cpp; the script finds the rest


def shipped(name: str) -> Path:
    """A folder of the project beside the package in a checkout, inside it in an installed wheel (pyproject.toml)."""
    package = Path(__file__).resolve().parents[1]
    return package / name if (package / name).is_dir() else package.parent / name


PATCHES = shipped("patches")


@dataclass(frozen=True)
class Pin:
    """The upstream release everything is built from (patches/pin.toml)."""

    package: str
    version: str
    sha256: str
    llama_cpp: str
    ggml: str

    @property
    def sdist(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}.tar.gz"


def read_pin() -> Pin:
    return Pin(**tomllib.loads((PATCHES / "pin.toml").read_text()))


def cache_dir() -> Path:
    """MOBIE_CACHE, or mobie-export in the user's cache folder; made where it is not there. Raises MobieError."""
    given = os.environ.get("MOBIE_CACHE")
    folder = Path(given).resolve() if given else platformdirs.user_cache_path("mobie-export")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        todo = "set MOBIE_CACHE to a folder that can be written"
        raise MobieError(BAD_OUTPUT, f"cannot make the cache {folder}", e.strerror or str(e), todo=todo) from None
    return folder


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fetch_sdist(pin: Pin, given: Path | None = None) -> Path:
    """The verified sdist: the file given, the one in the cache, or pip's download. Raises MobieError."""
    path = given or cache_dir() / pin.sdist
    if given is None and not path.exists():
        print(f"fetching {pin.sdist} with pip", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        what = f"{pin.package}=={pin.version}"
        command = ["download", "--no-deps", "--no-binary", pin.package, "--dest", str(path.parent), what]
        run([sys.executable, "-m", "pip", "--quiet", *command], f"could not download {what}")
    if not path.is_file():
        raise unavailable(
            f"there is no {path}", "", f"the release {pin.sdist}", "leave --sdist out to fetch it with pip"
        )
    found = sha256(path)
    if found != pin.sha256:
        if given is None:
            path.unlink()
        todo = "give the right file" if given else "the file has been removed: run the command again"
        raise unavailable(f"{path} is not the release it should be", f"SHA-256 {found}", f"SHA-256 {pin.sha256}", todo)
    return path


def unpack(sdist: Path, to: Path) -> None:
    """Unpack the sdist so that `to` holds its top level; atomic, so that a killed run leaves no half tree."""
    part = to.with_name(to.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(sdist) as tar:
        tar.extractall(part, filter="data")
    (top,) = part.iterdir()
    top.rename(to)
    part.rmdir()


def unpack_converter(sdist: Path, to: Path) -> None:
    """Take upstream's Hugging Face converter, with its gguf package and its licence, out of the sdist; atomic."""
    part = to.with_name(to.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    inside = re.compile(rf"[^/]+/{LLAMA.as_posix()}/((?:{'|'.join(map(re.escape, CONVERTER))})(?:/.*)?)")
    with tarfile.open(sdist) as tar:
        for member in tar:
            if found := inside.fullmatch(member.name):
                member.name = found[1]
                tar.extract(member, part, filter="data")
    missing = [name for name in CONVERTER if not (part / name).exists()]
    if missing:
        raise unavailable(f"{sdist} holds no converter", f"no {', '.join(missing)} in {LLAMA}")
    part.rename(to)


def converter(sdist: Path | None = None) -> Path:
    """The folder with the pinned tree's convert_hf_to_gguf.py: the wheel's own, or taken from the sdist once.

    The script needs torch and transformers (mobie-export[calibrate]) and puts the gguf package beside it first on its
    path, so run it in a process of its own. Raises MobieError where the sdist has to be fetched and cannot be.
    """
    if shipped("converter").is_dir():
        return shipped("converter")
    pin = read_pin()
    parts = hashlib.sha256("".join((pin.sha256, *CONVERTER)).encode()).hexdigest()
    folder = cache_dir() / f"converter-{parts[:12]}"
    if not folder.exists():
        unpack_converter(fetch_sdist(pin, sdist), folder)
    return folder


def pre_tokenizers() -> list[str]:
    """The names that the pinned llama.cpp knows as tokenizer.ggml.pre. Raises MobieError as `converter` does."""
    text = (converter() / "src" / "llama-vocab.cpp").read_text()
    return sorted(set(re.findall(r'tokenizer_pre == "([^"]+)"', text)))
