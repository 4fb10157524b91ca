"""Make mobie_export/data/books.txt.xz: about a megabyte (three unpacked) of varied public-domain English.

    python -m tools.assets.make_calibration.py books-train.txt.xz mobie_export/data/books.txt.xz

The input is a collection of books, each with a line `# Title: ...` at its start. Two hundred of them, spread over
the collection, give a piece each, cut at paragraphs: every other one the part of the book with the most dialogue, the
rest from a place drawn by a fixed seed. Same input, same output.
"""

import argparse
import lzma
import random
import re
from pathlib import Path

N_BOOKS, PIECE, SEED = 200, 15_000, 1
SHORTEST = 100_000  # characters of a book that is taken
SKIP = 4_000  # characters at either end of a book: contents, prefaces, notes


def pieces(text: str) -> list[str]:
    books = [b for b in re.split(r"(?m)^(?=# Title: )", text) if len(b) > SHORTEST]
    rng = random.Random(SEED)
    chosen = [books[i * len(books) // N_BOOKS] for i in range(N_BOOKS)]
    return [piece(book, dialogue=bool(i % 2), rng=rng) for i, book in enumerate(chosen)]


def piece(book: str, dialogue: bool, rng: random.Random) -> str:
    """About PIECE characters of whole paragraphs."""
    starts = [m.end() for m in re.finditer(r"\n\n+", book) if SKIP < m.end() < len(book) - SKIP - PIECE]
    if dialogue:
        quotes = re.compile('["\u201c\u201d]')
        start = max(starts, key=lambda s: len(quotes.findall(book, s, s + PIECE)))
    else:
        start = rng.choice(starts)
    end = book.rfind("\n\n", start, start + PIECE)
    return book[start : end if end > start + PIECE // 2 else start + PIECE].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("books", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    text = lzma.decompress(args.books.read_bytes()).decode()
    made = "\n\n".join(pieces(text)) + "\n"
    data = made.encode()
    args.output.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    print(f"{len(data):,} bytes of text, {args.output.stat().st_size:,} compressed")


if __name__ == "__main__":
    main()
