"""Which metadata a MoBiE file has: the keys of FORMAT.md in its order, their types, the settings, the seals."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from mobie_export import gguf_io
from mobie_export.errors import UNSUPPORTED, MobieError
from mobie_export.gguf_io import Entry, Gguf, Writer
from mobie_export.spec import block, layout
from mobie_export.spec.block import Coding

PREFIX = "mobie."
T = TypeVar("T", int, float, str)
STORED_AS = {int: gguf_io.U32, float: gguf_io.F32, str: gguf_io.STRING}


@dataclass(frozen=True)
class Key(Generic[T]):
    """One metadata entry. value: the one that it has in every file; optional: whether a file may be without it."""

    name: str
    python: type[T]
    value: T | None = None
    optional: bool = False

    @property
    def type(self) -> int:
        """As which the entry is stored (gguf_io.U32, F32 or STRING)."""
        return STORED_AS[self.python]

    def entry(self, value: T) -> Entry:
        return gguf_io.make_entry(self.name, self.type, value)

    def of(self, gguf: Gguf) -> T | None:
        """The value in a file, None where it has none. MobieError where it is of another type."""
        return gguf.get(self.name, self.python)


FORMAT_VERSION = Key(f"{PREFIX}format_version", int, block.FORMAT_VERSION)
TYPE_ID = Key(f"{PREFIX}type_id", int)  # that of the coding, as FILE_TYPE is
METHOD = Key(f"{PREFIX}method", str)
UNCALIBRATED = "sign, uncalibrated"  # METHOD of files whose signs are those of the weights, and nothing refined
SETTINGS = Key(f"{PREFIX}settings", str)
EXPORTER = Key(f"{PREFIX}exporter", str)
RUNTIME = Key(f"{PREFIX}runtime", str)
SOURCE_SEAL = Key(f"{PREFIX}source.sha256", str)
SEAL = Key(f"{PREFIX}data.sha256", str)
EXPERT_SEAL = Key(f"{PREFIX}experts.sha256", str, optional=True)  # files of before have none
TENSOR_SEAL = Key(f"{PREFIX}tensors.sha256", str, optional=True)  # likewise
EXPERT_BPW = Key(f"{PREFIX}expert_bpw", float)
FILE_TYPE = Key("general.file_type", int)
QUANTIZATION_VERSION = Key("general.quantization_version", int, 2)

KEYS: tuple[Key[int] | Key[float] | Key[str], ...] = (
    *(FORMAT_VERSION, TYPE_ID, METHOD, SETTINGS, EXPORTER, RUNTIME, SOURCE_SEAL, SEAL, EXPERT_SEAL, TENSOR_SEAL),
    *(EXPERT_BPW, FILE_TYPE, QUANTIZATION_VERSION),
)


def is_mobie(gguf: Gguf) -> bool:
    """Whether a file says that it is a MoBiE file."""
    return FORMAT_VERSION.name in gguf.entries


def check_version(gguf: Gguf) -> None:
    """MobieError for a file of a format later than this program knows, whose tensors may mean something else."""
    version = FORMAT_VERSION.of(gguf)
    if version is not None and version > block.FORMAT_VERSION:
        raise MobieError(
            UNSUPPORTED,
            f"{gguf.paths[0]} is of a later format than this mobie-export knows",
            f"{FORMAT_VERSION.name} {version}, written by {EXPORTER.of(gguf) or 'nobody named'}",
            f"version {block.FORMAT_VERSION}",
            "install a newer mobie-export",
        )


def coding(gguf: Gguf) -> Coding | None:
    """How the experts of a MoBiE file are stored, as it says; None where it names no type that is one for them."""
    found = gguf.value(TYPE_ID.name)
    return block.BY_TYPE.get(found) if isinstance(found, int) else None


# ---- settings --------------------------------------------------------------------------------------------------------


def settings_entry(settings: Mapping[str, object]) -> Entry:
    return SETTINGS.entry(json.dumps(settings, sort_keys=True))


def settings(gguf: Gguf) -> dict[str, object]:
    """What had an influence on the bytes, by name; empty where the file does not say. MobieError where the entry is no
    JSON object."""
    found = parsed_settings(SETTINGS.of(gguf) or "{}")
    if found is None:
        raise gguf_io.damaged(gguf.paths[0], f"{SETTINGS.name} is no JSON object", "what FORMAT.md says")
    return found


def parsed_settings(text: str) -> dict[str, object] | None:
    """The settings in the text of their entry; None where it is no JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # JSON may be deeper than Python goes
        return None
    return found if isinstance(found, dict) else None


# ---- seals -----------------------------------------------------------------------------------------------------------

SEALED_KINDS = ("expert", "expert scale", "expert residual", "expert columns")  # which no other program changes


def expert_seal(digests: Mapping[str, bytes]) -> str:
    """The value of EXPERT_SEAL, from the SHA-256 of every tensor by name."""
    return tensor_seal({n: d for n, d in digests.items() if layout.kind(n) in SEALED_KINDS})


def tensor_seal(digests: Mapping[str, bytes]) -> str:
    """The value of TENSOR_SEAL, likewise."""
    return hashlib.sha256("".join(f"{d.hex()}  {n}\n" for n, d in sorted(digests.items())).encode()).hexdigest()


# What the writer fills in when it has written all tensors: key -> its value.
SEALS: dict[str, Callable[[Writer], str]] = {
    SEAL.name: lambda writer: writer.data.hexdigest(),
    EXPERT_SEAL.name: lambda writer: expert_seal(writer.digests),
    TENSOR_SEAL.name: lambda writer: tensor_seal(writer.digests),
}
UNSEALED = [Key(name, str).entry("0" * 64) for name in SEALS]  # until then
