"""A GGUF once more, with some of its tensors and metadata entries changed."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobie_export.errors import BAD_OUTPUT, MobieError
from mobie_export.gguf_io.read import Entry, Gguf
from mobie_export.gguf_io.types import TYPE_F16, TYPE_F32, TYPE_I32
from mobie_export.gguf_io.write import Writer

NUMPY_TYPES = {np.dtype("<f4"): TYPE_F32, np.dtype("<f2"): TYPE_F16, np.dtype("<i4"): TYPE_I32}


@dataclass(frozen=True)
class NewTensor:
    """What a tensor becomes. shape: fastest dimension first; pieces: called once, its bytes in order."""

    shape: tuple[int, ...]
    type_id: int
    pieces: Callable[[], Iterable[np.ndarray]]

    @classmethod
    def of(cls, values: np.ndarray) -> "NewTensor":
        """Of values, float32, float16 or int32 [slowest, ..., fastest], in the type of the same name.

        KeyError for values of another type."""
        return cls.stored(values.shape[::-1], NUMPY_TYPES[values.dtype], values)

    @classmethod
    def stored(cls, shape: tuple[int, ...], type_id: int, data: np.ndarray) -> "NewTensor":
        """Of bytes as they are stored, an array of any type and shape."""
        return cls(tuple(shape), type_id, lambda: [np.ascontiguousarray(data)])


def merged(old: Iterable[Entry], changes: Iterable[Entry]) -> list[Entry]:
    """Entries with the changes made: changed keys stay in their place, new ones come last."""
    return list(({e.key: e for e in old} | {e.key: e for e in changes}).values())


def rewrite(
    source: Gguf,
    output: Path,
    *,
    tensors: Mapping[str, NewTensor] | None = None,
    entries: Iterable[Entry] = (),
    drop: Collection[str] = (),
) -> None:
    """Copy a GGUF into one file, as a stream, with other tensors and entries.

    What is changed keeps its place, what is new comes last. drop: names of tensors, and keys, that are left out.
    Digests in the metadata are not made anew. After an exception `output` is incomplete. MobieError where it cannot be
    written or is one of the source's files; ValueError where a new tensor has more or fewer bytes than its type says.
    """
    if output.exists() and any(output.samefile(path) for path in source.paths):
        raise MobieError(BAD_OUTPUT, f"the output would replace an input: {output}", todo="choose another name")
    new = dict(tensors or {})
    names = [n for n in [*source.tensors, *(n for n in new if n not in source.tensors)] if n not in drop]
    table = {n: new.get(n) or source.tensors[n] for n in names}
    kept = [e for e in merged(source.entries.values(), entries) if e.key not in drop]
    rows = [(n, t.shape, t.type_id) for n, t in table.items()]
    with Writer(output, kept, rows, source.alignment) as writer:
        for name in names:
            writer.write(name, new[name].pieces() if name in new else source.chunks(source.tensors[name]))
        writer.finish()
