"""How signs are found: one folder for each method, with a class `METHOD` in its __init__.py.

`get` finds a method by its name. A folder that is put here is found without a line anywhere else; a method from
elsewhere is made known by `register`, or by an installed package that names it as an entry point of the group
`mobie_export.methods`, and then has its options on the command line, too.
"""

import importlib
import importlib.metadata
import pkgutil
from pathlib import Path
from typing import TypeVar

from mobie_export.errors import USAGE, MobieError
from mobie_export.methods.base import Method

Kind = TypeVar("Kind", bound=type[Method])
_registered: dict[str, type[Method]] = {}


def register(method: Kind) -> Kind:
    """Make a method of somebody's own known under its name; for use as a decorator. ValueError where it is taken."""
    if known().get(method.name, method) is not method:
        raise ValueError(f"there is a method {method.name} already: {known()[method.name].__module__}")
    _registered[method.name] = method
    return method


def known() -> dict[str, type[Method]]:
    """Name -> class, of all methods."""
    folders = (m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.ispkg)
    own = (importlib.import_module(f"{__name__}.{name}").METHOD for name in folders)
    installed = (point.load() for point in importlib.metadata.entry_points(group=__name__))
    return {m.name: m for m in (*own, *installed)} | _registered


def get(name: str) -> type[Method]:
    """Raises MobieError for a name that no method has."""
    found = known().get(name)
    if found is None:
        raise MobieError(USAGE, f"there is no method {name}", wanted=", ".join(known()))
    return found
