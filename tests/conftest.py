"""Fixtures shared by several test files."""

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

# `make test` tries a few random inputs, the same ones each time; `make test-more` many, others each time
settings.register_profile("few", max_examples=120, deadline=None, derandomize=True)
settings.register_profile("more", max_examples=20_000, deadline=None)
settings.load_profile("few")

SECONDS = Path(__file__).resolve().parent.parent / "build" / "seconds.txt"  # of `make test`'s other parts


def pytest_terminal_summary(terminalreporter) -> None:
    """How long each part took: what make did before, then the slowest test files."""
    if SECONDS.exists():
        parts = (line.rsplit(" ", 1) for line in SECONDS.read_text().splitlines())
        terminalreporter.write_line("make: " + ", ".join(f"{name} {seconds} s" for name, seconds in parts))
    files: Counter[str] = Counter()
    for report in (r for reports in terminalreporter.stats.values() for r in reports if hasattr(r, "duration")):
        files[report.nodeid.split("::")[0].removeprefix("tests/")] += report.duration
    slowest = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in files.most_common(12) if seconds >= 1)
    terminalreporter.write_line(f"tests: {slowest or 'less than a second each'}")


@pytest.fixture(scope="session")
def runtime_tools() -> Path:
    """The folder of the installed runtime's tools, which `mobie-export runtime build` makes.

    Or of another build's, which may hold the libraries alone.
    """
    from mobie_export.runtime import installed

    if "MOBIE_TEST_TOOLS" in os.environ:
        return Path(os.environ["MOBIE_TEST_TOOLS"])
    folder = installed.site() / "llama_cpp" / "bin"
    if not (folder / "llama-quantize").exists():
        pytest.fail("needs the patched runtime: mobie-export runtime build (make test does it)")
    return folder


@pytest.fixture
def source(tmp_path) -> Path:
    """A small model with experts, m.gguf in the test's own folder."""
    from tests import models

    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, seed=3)
    return path


@pytest.fixture(scope="module")
def quick_probe():
    """`advise` measures the memory's bandwidth on little of it."""
    from mobie_export.exporting import advise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advise, "PROBE", 8 << 20)
        yield


@pytest.fixture(scope="module")
def without_runtime():
    """For tests of what is written, many of which write what llama.cpp does not load: nobody asks it."""
    from mobie_export.runtime import loads

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loads, "problem", lambda path: "")
        yield
