"""Nothing here needs the runtime: where one is installed, it is hidden, from child processes too."""

import os
import sys

import pytest


@pytest.fixture(autouse=True)
def hidden_runtime(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "llama_cpp.py").write_text("raise ImportError('hidden: tests of tests/runtime may need it')\n")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
