"""What a file is that is not what it should be: said from its first bytes, with what to do about it."""

import os
import re
import stat
from pathlib import Path

from mobie_export.errors import BAD_INPUT, MobieError

ENOUGH = 64  # bytes that tell
AGAIN = "download the file again"
# pattern -> what it is, what to do
KNOWN = (
    (rb"version https://git-lfs", "a Git LFS pointer in place of the file", "run `git lfs pull` in its folder"),
    (rb"\Z", "an empty file", AGAIN),
    (rb"\s*<(!doctype|html|\?xml)", "a web page", "download the file itself, not the page about it"),
    (rb"GGUF", "a GGUF file", "give it where a GGUF is wanted"),
    (rb"lmgg|fmgg|tjgg|algg", "a file of the time before GGUF", "look for a GGUF of the model"),
    (rb".{6}\0\0\{\s*\"", "a safetensors file", "give the folder that it lies in, with config.json and tokenizer"),
    (
        rb"PK\x03\x04|\x80[\x02-\x05]",
        "a PyTorch file",
        "give the folder that it lies in, with config.json and tokenizer",
    ),
    (rb"\x1f\x8b|\xfd7zXZ|BZh|\x28\xb5\x2f\xfd", "a compressed file", "unpack it"),
)


def read(path: Path, n: int = ENOUGH) -> bytes:
    """The first n bytes of a file, fewer where it is shorter. MobieError where it cannot be read or is a device."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not path.is_dir():  # a pipe would be waited for
            raise MobieError(BAD_INPUT, f"cannot read {str(path)[:200]}", "a device or pipe", "a file")
        with open(path, "rb") as file:
            return file.read(n)
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the name
        raise MobieError(BAD_INPUT, f"cannot read {str(path)[:200]}", getattr(e, "strerror", None) or str(e)) from e


def is_pointer(head: bytes) -> bool:
    """Whether a file is what Git LFS leaves in place of one that was not fetched."""
    return head.startswith(b"version https://git-lfs")


def other(path: Path, wanted: str, todo: str, head: bytes | None = None) -> MobieError:
    """The error for a file that is not `wanted`; `todo` is advised where its first bytes say nothing better. head:
    these bytes, of a file that is not here."""
    head = read(path) if head is None else head
    for pattern, what, advice in KNOWN:
        if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
            return MobieError(BAD_INPUT, f"{path} is not {wanted}", what, wanted, advice)
    return MobieError(BAD_INPUT, f"{path} is not {wanted}", f"first bytes {head[:4]!r}", wanted, todo)
