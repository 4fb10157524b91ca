"""The package is a house of rooms, one above the other: what is imported lies below."""

import ast
import graphlib
import tomllib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "mobie_export"

# From the ground up. A name stands for a module, or for a package with all that is in it; the longest one counts.
LEVELS = (
    "",  # mobie_export itself: the version; other names are looked up, upstairs, when they are asked for
    "errors",
    "progress",
    "disk",
    "spec.block",
    "gguf_io",
    "spec",
    "runtime",
    "sources",
    "models",
    "calibration",
    "methods",
    "exporting",
    "reporting",
    "api",
    "cli",
    "__main__",
)
PROGRAMS = {"sources.hf_convert"}  # started by their path in a process of their own


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def level(module: str) -> int:
    names = [name for name in LEVELS if module == name or (name and module.startswith(f"{name}."))]
    assert names, f"{module} is in no room: tests/unit/test_imports.py lists them"
    return LEVELS.index(max(names, key=len))


def imports(text: str, at_once: bool = False) -> set[str]:
    """What of the package a module imports: anywhere, in functions and for annotations too, or when it is imported."""
    found, tree = set(), ast.parse(text)
    if at_once:
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the whole path"
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        else:
            continue
        for name in named:
            if name == "mobie_export" or name.startswith("mobie_export."):
                inside = name.removeprefix("mobie_export").removeprefix(".")
                while inside not in MODULES:  # a function, a class or a constant of it
                    inside = inside.rpartition(".")[0]
                found.add(inside)
    return found


TEXTS = {module: path.read_text(encoding="utf-8") for module, path in MODULES.items() if module}


def test_imports_of_every_form_are_found():
    text = """
import mobie_export.disk
from mobie_export import __version__, cli
def f():
    from mobie_export.spec.block import BLOCK_LEN
    import numpy
if TYPE_CHECKING:
    from mobie_export.errors import MobieError
"""
    assert imports(text) == {"disk", "", "cli", "spec.block", "errors"}
    assert imports(text, at_once=True) == {"disk", "", "cli"}


def test_every_room_is_there():
    assert {LEVELS[level(module)] for module in MODULES} == set(LEVELS)


def test_every_folder_is_part_of_a_wheel():
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("__init__.py")}
    assert {name.replace("/", ".") for name in folders} == set(settings["packages"]) - set(settings["package-dir"])


def test_nothing_is_imported_from_above():
    upward = {
        f"{module} imports {other}"
        for module, text in TEXTS.items()
        for other in imports(text)
        if level(other) > level(module)
    }
    assert not upward


def test_no_circles_when_modules_are_imported():
    graph = {module: imports(text, at_once=True) for module, text in TEXTS.items()}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the modules of a circle


def test_programs_of_their_own_import_nothing_of_the_package():
    for module in PROGRAMS:
        assert not imports(TEXTS[module])
