"""Make examples/evaluate/cloze.jsonl: which of four sentences comes next?

    python -m tools.assets.make_cloze

From mobie_export/data/held-out.txt (in the public domain): a sentence, the one after
it, and three from elsewhere in the text of nearly its length, so that preferring short sentences does not help.
"""

import itertools
import json
import random
import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
TEXT = REPO / "mobie_export/data/held-out.txt"
OUT = REPO / "examples/evaluate/cloze.jsonl"
LENGTHS = range(60, 200)  # characters of a sentence
N_CHOICES = 4
N_ITEMS = 60


def pairs(text: str) -> list[tuple[str, str]]:
    """Neighbouring sentences of one paragraph, both of a length in LENGTHS."""
    result = []
    for paragraph in text.split("\n\n"):
        sentences = re.findall(r"[A-Z][^.!?\"]*[.!?](?=\s|$)", paragraph)
        result += [(a, b) for a, b in itertools.pairwise(sentences) if len(a) in LENGTHS and len(b) in LENGTHS]
    return result


def main() -> None:
    rng = random.Random(0)
    found = pairs(TEXT.read_text())
    with open(OUT, "w") as out:
        for context, right in rng.sample(found, min(N_ITEMS, len(found))):
            others = sorted((b for _, b in found if b != right), key=lambda b: abs(len(b) - len(right)))
            choices = [right, *others[: N_CHOICES - 1]]
            rng.shuffle(choices)
            item = {"context": context, "choices": choices, "label": choices.index(right)}
            out.write(json.dumps(item, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
