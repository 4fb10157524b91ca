"""The text that is calibrated on unless another one is named: data/README.md says what it is and whose.

Two parts: text written for this purpose, of many kinds (dialogues, code, mathematics, articles, what stands on the web,
twenty languages), and public-domain books, of which there are more. A model that was fitted to books alone is lost on
everything else (docs/measured/real-weights.md), so two sequences of three are of the first part as long as it lasts.
"""

import hashlib
import json
import lzma
from importlib import resources

import torch

from mobie_export.calibration import chat, text
from mobie_export.calibration.text import Calibration
from mobie_export.errors import MobieError
from mobie_export.gguf_io import Gguf

WRITTEN = ("articles.txt", "code.txt", "mathematics.txt", "web.txt", "languages.txt")
DIALOGUES = "calibration/dialogues.jsonl"
NAME = "the package's text"
ONE_BOOK_IN = 3  # sequences


def books() -> bytes:
    return lzma.decompress(_data("books.txt.xz"))


def load(gguf: Gguf, n_samples: int, seq_len: int, seed: int) -> Calibration:
    """At most n_samples sequences of seq_len tokens, as `text.load` makes them, both parts mixed. MobieError."""
    dialogues, special = _dialogues(gguf)
    parts = [(dialogues, special), (_written(), False), (books(), False)]
    model = gguf.paths[0]
    found = [text.windows(model, data, seq_len, wrapped, NAME) for data, wrapped in parts]
    generator = torch.Generator().manual_seed(seed)

    def mixed(windows: torch.Tensor) -> list[torch.Tensor]:
        return list(windows[torch.randperm(len(windows), generator=generator)])

    written, read = mixed(torch.cat(found[:2])), mixed(found[2])
    chosen: list[torch.Tensor] = []
    while len(chosen) < n_samples and (written or read):
        turn = read if read and (not written or len(chosen) % ONE_BOOK_IN == ONE_BOOK_IN - 1) else written
        chosen.append(turn.pop())
    return Calibration(torch.stack(chosen), hashlib.sha256(b"".join(data for data, _ in parts)).hexdigest())


def own_places(n: int) -> list[int]:
    """Which of n sequences the model's own text takes: those of the first part."""
    return [i for i in range(n) if i % ONE_BOOK_IN != ONE_BOOK_IN - 1]


def plain() -> bytes:
    """The first part as plain text, and so much of the books that they are a third: for tools that take a file."""
    written = b"\n\n".join([_said(), _written()])
    return b"\n\n".join([written, books()[: len(written) // (ONE_BOOK_IN - 1)]])


def _written() -> bytes:
    return b"\n\n".join(_data(f"calibration/{n}") for n in WRITTEN)


def _dialogues(gguf: Gguf) -> tuple[bytes, bool]:
    """(the dialogues, whether special tokens are among them): in the model's template, or as plain text where it has
    none or one that does not take them."""
    try:
        return chat.render(gguf, _data(DIALOGUES)), True
    except MobieError:
        return _said(), False


def _said() -> bytes:
    lines = (json.loads(line)["messages"] for line in _data(DIALOGUES).splitlines())
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for said in lines for m in said).encode()


def _data(name: str) -> bytes:
    return resources.files("mobie_export").joinpath("data", *name.split("/")).read_bytes()
