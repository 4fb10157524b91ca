"""Fixtures shared by several test files."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def runtime_tools() -> Path:
    """The folder of the installed runtime's tools; `mobie-export runtime build` makes it."""
    from mobie_export import runtime

    folder = runtime.site() / "llama_cpp" / "bin"
    if not (folder / "llama-quantize").exists():
        pytest.fail("needs the patched runtime: mobie-export runtime build (make test does it)")
    return folder
