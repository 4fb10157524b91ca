"""What the benchmarks share: results that outlive a run, tables, commands."""

import json
import os
import subprocess
import sys
from pathlib import Path


class Results:
    """{name: entry} in a JSON file that is complete at any time; another run may add to it at the same time.

    With a build (the digest of a runtime, say) entries of another one are not found, but kept.
    """

    def __init__(self, path: Path, build: str | None = None):
        self.path, self.build = path, build
        path.parent.mkdir(parents=True, exist_ok=True)
        self.entries: dict[str, dict] = {}
        self._read()

    def _read(self) -> None:
        if self.path.exists():
            self.entries |= json.loads(self.path.read_text())

    def get(self, name: str) -> dict | None:
        entry = self.entries.get(name)
        return entry if entry is not None and entry.get("runtime") == self.build else None

    def put(self, name: str, entry: dict) -> None:
        self._read()
        self.entries[name] = entry if self.build is None else {"runtime": self.build, **entry}
        part = self.path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(self.entries, indent=1) + "\n")
        part.replace(self.path)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; all columns but the first are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Failed(RuntimeError):
    """A command that did not do what it was asked for."""


def run(*command: object) -> str:
    """What it wrote. Raises Failed."""
    r = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if r.returncode:
        raise Failed(f"{' '.join(map(str, command))}\nfailed with {r.returncode}:\n{r.stdout[-3000:]}")
    return r.stdout
