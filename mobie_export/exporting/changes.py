"""Changes to the metadata of a GGUF, as the command line gives them: KEY=VALUE, KEY=FILE, KEY.

An entry keeps its type, and a new one is a string unless its type is given: KEY:u32=VALUE. Arrays are written as JSON.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from mobie_export import gguf_io
from mobie_export.errors import BAD_INPUT, USAGE, MobieError
from mobie_export.gguf_io import Entry, Gguf
from mobie_export.spec import metadata

# What says how the rest is to be read, or what was written: changing it makes another file of it, or a wrong one.
FIXED = (
    "general.architecture",
    "general.alignment",
    metadata.FILE_TYPE.name,
    metadata.QUANTIZATION_VERSION.name,
)
FIXED_PARTS = (metadata.PREFIX, "split.")


@dataclass(frozen=True)
class Change:
    """One entry and its new value as text; None removes it."""

    key: str
    text: str | None
    type: str | None = None  # as `inspect` names it

    @classmethod
    def parse(cls, text: str) -> "Change":
        """`KEY=VALUE` or `KEY:TYPE=VALUE`. MobieError for anything else."""
        name, equals, value = text.partition("=")
        key, _, kind = name.partition(":")
        if not equals or not key or (kind and kind not in gguf_io.KV_TYPE_NAMES):
            wanted = f"KEY=VALUE, or KEY:TYPE=VALUE with one of {', '.join(gguf_io.KV_TYPE_NAMES)}"
            raise MobieError(USAGE, f"{text[:80]} is no entry", wanted=wanted)
        return cls(key, value, kind or None)

    @classmethod
    def removed(cls, key: str) -> "Change":
        return cls(key, None)


def from_file(text: str) -> Change:
    """`KEY=FILE` or `KEY:TYPE=FILE`: the value is the file's text. MobieError where it cannot be read."""
    change = Change.parse(text)
    path = Path(change.text or "")
    try:
        return Change(change.key, path.read_bytes().decode(), change.type)
    except (OSError, ValueError) as e:
        raise MobieError(BAD_INPUT, f"cannot read {path}", str(e), "a text file in UTF-8") from None


def applied(gguf: Gguf, changes: list[Change]) -> list[Entry]:
    """The entries of a file with the changes made, in their order, new ones last. MobieError for a senseless one."""
    entries = dict(gguf.entries)
    for change in changes:
        if change.key in FIXED or change.key.startswith(FIXED_PARTS):
            raise MobieError(
                USAGE,
                f"{change.key} cannot be changed",
                "it says how the file is to be read",
                "what describes the model, such as tokenizer.chat_template or general.name",
            )
        if change.text is not None:
            entries[change.key] = _entry(entries.get(change.key), change, change.text)
        elif entries.pop(change.key, None) is None:
            wanted = "a key that `inspect --json` lists"
            raise MobieError(BAD_INPUT, f"{gguf.paths[0]} has no {change.key}", wanted=wanted)
    return list(entries.values())


def _entry(old: Entry | None, change: Change, text: str) -> Entry:
    kind = gguf_io.STRING if old is None else old.type
    if change.type is not None:
        kind = gguf_io.KV_TYPE_NAMES.index(change.type)
    item = old.item_type if old is not None and old.type == gguf_io.ARRAY else None
    try:
        if kind != gguf_io.ARRAY:
            return gguf_io.make_entry(change.key, kind, _value(kind, text))
        values = json.loads(text)
        if item is None or not isinstance(values, list):
            raise ValueError("arrays can be changed, not made")
        given = [v if isinstance(v, str) else json.dumps(v) for v in values]
        return gguf_io.make_entry(change.key, kind, [_value(item, v) for v in given], item)
    except (ValueError, struct.error, OverflowError) as e:
        name = gguf_io.KV_TYPE_NAMES[kind]
        wanted = f"a JSON list of {gguf_io.KV_TYPE_NAMES[item]}" if item is not None else f"a value of type {name}"
        raise MobieError(USAGE, f"{change.key} cannot be {text[:80]!r}", str(e), wanted) from None


def _value(kind: int, text: str) -> str | bool | float | int:
    """A Python value for an entry; ValueError where the text is none of the type."""
    if kind == gguf_io.STRING:
        return text
    if kind == gguf_io.BOOL:
        if text not in ("true", "false"):
            raise ValueError("neither true nor false")
        return text == "true"
    return float(text) if kind in (gguf_io.F32, gguf_io.F64) else int(text, 0)
