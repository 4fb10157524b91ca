"""Fixtures shared by several test files."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def runtime_tools() -> Path:
    """The folder of the installed runtime's tools, which `mobie-export runtime build` makes; or of another build's."""
    from mobie_export import runtime

    folder = Path(os.environ.get("MOBIE_TEST_TOOLS", runtime.site() / "llama_cpp" / "bin"))
    if not (folder / "llama-quantize").exists():
        pytest.fail("needs the patched runtime: mobie-export runtime build (make test does it)")
    return folder
