"""What can be exported: what does a word on the command line mean?"""

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mobie_export import disk
from mobie_export.errors import BAD_INPUT, USAGE, MobieError
from mobie_export.runtime import upstream
from mobie_export.sources import checkpoint, ggufs
from mobie_export.sources.checkpoint import Tower
from mobie_export.sources.hub import download
from mobie_export.spec.block import MOBIE, Coding

# Behind the colon a type or a file, as llama.cpp has it.
HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<which>\w[\w./-]*))?")


@dataclass(frozen=True)
class Source:
    """Something to export. Exactly one of `gguf` and `checkpoint` is there."""

    name: str  # of the model, as a published file would be called
    gguf: Path | None = None  # the GGUF, or its first shard
    checkpoint: Path | None = None  # a Hugging Face folder
    hub: str | None = None  # its name on the hub
    pre_tokenizer: str | None = None
    trust_remote_code: bool = False  # whether Python files of the checkpoint may be executed
    towers: tuple[Tower, ...] = ()  # what of the checkpoint is not exported

    def default_output(self, coding: Coding = MOBIE, suffix: str = "") -> Path | None:
        """`<Model>-MOBIE.gguf`: the form in which llama.cpp finds a quantization by its name on the hub. None for a
        GGUF, which has a rule of its own (plan.default_output)."""
        if self.checkpoint is None:
            return None
        return (
            Path() if self.hub else self.checkpoint.resolve().parent
        ) / f"{self.name}-{coding.option.upper()}{suffix}.gguf"

    def left_out(self, converter: Path | None = None) -> list[str]:
        """A line for every part of the model that is not exported, and one with how to get it: with the converter's
        path, the command for this machine."""
        lines = [
            f"Not exported: the {t.kind} part, {t.weights:,} of {t.of:,} weights; this is the language model."
            for t in self.towers
        ]
        if lines:
            program, folder = (converter, self.checkpoint) if converter else ("convert_hf_to_gguf.py", "CHECKPOINT")
            lines.append(
                "llama.cpp reads it from a file of its own, which its converter writes: "
                f"`python {program} --mmproj {folder} --outfile mmproj.gguf`"
            )
        return lines


def find(
    text: str, revision: str | None = None, pre_tokenizer: str | None = None, trust_remote_code: bool = False
) -> Source:
    """The source that a word on the command line means; a hub model is downloaded. Raises MobieError."""
    path = Path(text)
    asked = hub_word(text)
    if asked:
        hub: str | None = asked["name"]
        path = download(asked["name"], revision, trust_remote_code, asked["which"])
    elif os.path.isdir(path):  # Path.is_dir raises where the name is too long
        hub = disk.hub_name(path)  # a snapshot in the hub's cache, which is called by the digest of its commit
        if not checkpoint.weights(path):
            path = ggufs.of_folder(path, text) or path
    else:
        return Source(path.name.removesuffix(".gguf"), gguf=path)
    if not path.is_dir():
        return Source(path.name.removesuffix(".gguf"), gguf=path, hub=hub)
    return of_checkpoint(path, text, hub, pre_tokenizer, trust_remote_code)


def hub_word(text: str) -> re.Match[str] | None:
    """Whether a word on the command line means a model of the hub: its name, and which GGUF of it where it says so."""
    asked = HUB_NAME.fullmatch(text)
    if asked is None or os.path.exists(text) or (asked["which"] is None and text.endswith(".gguf")):
        return None
    return asked


def of_checkpoint(
    folder: Path, text: str, hub: str | None, pre_tokenizer: str | None, trust_remote_code: bool
) -> Source:
    """The checkpoint in a folder. text: what the user called it. MobieError where something is missing that a
    conversion needs."""
    name = hub.split("/")[1] if hub else folder.resolve().name
    if not (folder / "config.json").is_file():
        raise MobieError(
            BAD_INPUT,
            f"{text} is no Hugging Face checkpoint",
            "no config.json and no GGUF",
            "config.json, safetensors and a tokenizer; or a GGUF",
            "give a folder with a checkpoint, or a GGUF",
        )
    towers = checkpoint.check(folder, text)
    if pre_tokenizer is not None:
        _check_pre_tokenizer(pre_tokenizer)
    return Source(name, None, folder, hub, pre_tokenizer, trust_remote_code, tuple(towers))


def _check_pre_tokenizer(name: str) -> None:
    known = upstream.pre_tokenizers()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        raise MobieError(
            USAGE,
            f"llama.cpp knows no pre-tokenizer {name}",
            f"near it: {', '.join(near)}" if near else f"{len(known)} others: {', '.join(known[:8])}, ...",
            "the one that the tokenizer was made from, as llama.cpp calls it",
        )
