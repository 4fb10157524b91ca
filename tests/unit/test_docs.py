"""The documents: links and anchors lead somewhere, and commands are ones that the command line takes."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from mobie_export import cli

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/*.md"), ROOT / "patches/README.md"]
)
LINK = re.compile(r"\]\(([^()\s]+)\)")
COMMAND = re.compile(r"`([^`]*)`")
# Code that names a document, outside of the documents themselves.
NAMED = re.compile(r"\bdocs/[\w/.-]+\.(?:md|svg)\b")
SOURCES = [
    ROOT / "Makefile",
    *(p for d in ("mobie_export", "tools", "kernels_cpp", "examples") for p in (ROOT / d).rglob("*")),
]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    """Indented and fenced blocks hold no links; a list's continuation lines are not code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<=\n\n)(?: {4}.*\n)+", "", text)


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", without_code(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document):
    broken = []
    for link in LINK.findall(without_code(document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):  # https:, mailto:
            continue
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_code_names_documents_that_are_there():
    missing = {
        f"{name(path)}: {document}"
        for path in SOURCES
        if path.is_file() and path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".txt", ".yaml", ".cmake", "")
        for document in NAMED.findall(path.read_text(encoding="utf-8"))
        if not (ROOT / document).exists()
    }
    assert not missing


def commands(document: Path) -> Iterator[str]:
    """Every `mobie-export ...` of a document, in code blocks and in running text."""
    text = re.sub(r"\\\n\s*", " ", document.read_text(encoding="utf-8"))
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    for found in (*lines, *COMMAND.findall(text)):
        # what comes before is variables of the environment; what comes behind, other commands
        for part in re.split(r"&&|;|\s#|\s\|\s", found):
            match = re.fullmatch(r"(?:sudo )?(?:\w+=\S+ )*mobie-export (\S.*)", part.strip())
            if match:
                yield match[1]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_commands_are_ones_that_the_command_line_takes(document):
    parser, names = cli._parser()
    for command in commands(document):
        argv = shlex.split(command)
        if "--help" in argv or argv[-1] == "COMMAND" or argv[0] == "metadata":
            continue
        if len(argv) == 1 and argv[0].isalpha() and argv[0].islower():  # the command's name alone, in running text
            assert argv[0] in names
            continue
        if argv[0] not in (*names, "--version"):
            argv.insert(0, cli.DEFAULT)
        try:
            parser.parse_args(argv)
        except SystemExit:
            pytest.fail(f"mobie-export {command}")
