"""Which GGUF is meant where a folder or a repository holds several files? Read from their names, as llama.cpp does."""

import re
from collections.abc import Iterable
from pathlib import Path

from mobie_export import gguf_io
from mobie_export.errors import BAD_INPUT, MobieError
from mobie_export.spec import exportable, metadata

# Parts of the names of files that llama.cpp uses beside a model (gguf_filename_is_model in common/download.cpp).
BESIDE = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
SHOWN = 12  # names in an error


def models(names: Iterable[str]) -> list[str]:
    """The models among the names of files, sorted; of a split one its first shard."""
    found = []
    for name in names:
        file = name.rpartition("/")[2]
        shard = gguf_io.SHARD_NAME.fullmatch(file)
        if file.endswith(".gguf") and not any(part in file for part in BESIDE) and (not shard or int(shard["no"]) == 1):
            found.append(name)
    return sorted(found)


def files_of(model: str, names: Iterable[str]) -> list[str]:
    """The names of all shards of a model that `choose` gave."""
    shard = gguf_io.SHARD_NAME.fullmatch(model)
    if not shard:
        return [model]
    wanted = {f"{shard['stem']}-{i:05d}-of-{shard['count']}.gguf" for i in range(1, int(shard["count"]) + 1)}
    return sorted(wanted & set(names))


def choose(names: Iterable[str], which: str | None, place: str, todo: str) -> str:
    """The name of the one model that is meant, or of its first shard. MobieError where it is none or one of several.

    which: the name of a file, or what `llama-cli -hf ORG/NAME:WHICH` takes, a type that the name has before a dot or a
    hyphen. todo: how to choose one.
    """
    every = list(names)
    found = models(every)
    if which is not None:
        found = [n for n in every if f"/{n}".endswith(f"/{which}")] or _of_type(found, which)
    if len(found) == 1:
        return found[0]
    seen = found or sorted(n for n in every if n.endswith(".gguf"))
    more = f" and {len(seen) - SHOWN} more" if len(seen) > SHOWN else ""
    listed = ", ".join(seen[:SHOWN]) + more if seen else "no GGUF"
    if found:
        raise MobieError(
            BAD_INPUT,
            f"{place} holds {len(found)} models",
            listed,
            "one; the larger the type, the better to export from: F16, BF16, Q8_0",
            todo,
        )
    asked = f" called {which}" if which else ""
    raise MobieError(BAD_INPUT, f"{place} holds no model{asked}", listed, "a GGUF of a model", todo if seen else "")


def _of_type(found: list[str], which: str) -> list[str]:
    """As llama.cpp matches, but that `F16` is not also BF16."""
    text = re.escape(which)
    every = [n for n in found if re.search(rf"{text}[.-]", n, re.IGNORECASE)]
    return [n for n in every if re.search(rf"(^|[./_-]){text}[.-]", n, re.IGNORECASE)] or every


def of_folder(folder: Path, place: str) -> Path | None:
    """The one model in a folder of this machine; None where there is no GGUF at all. Of several files the metadata
    decide, too: what is no model, or was exported, is not meant."""
    names = [p.name for p in folder.glob("*.gguf")]
    if not names:
        return None
    found = models(names)
    if len(found) > 1:
        found = [n for n in found if _is_source(folder / n)] or found
    beside = [n for n in names if n not in models(names)]
    return folder / choose([*found, *beside], None, place, f"give the file itself, such as {folder / found[0]}")


def _is_source(path: Path) -> bool:
    try:
        header = gguf_io.read_header(path)
    except MobieError:  # said when it is chosen
        return True
    return exportable.other_than_model(header) is None and metadata.FORMAT_VERSION.name not in header.entries
