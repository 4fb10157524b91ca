"""The tool that moves the pin: what applies, what is left for hand, and what it makes of that."""

import os
import shutil
from pathlib import Path

import pytest

from mobie_export.errors import MobieError
from mobie_export.runtime import upstream
from tools import bump

PIN = upstream.Pin("llama-cpp-python", "9.9", "0" * 64, llama_cpp="", ggml="")
pytestmark = pytest.mark.skipif(not (shutil.which("git") and shutil.which("patch")), reason="needs git and patch")
TEXT = "".join(f"line {n}\n" for n in range(20))


@pytest.fixture
def tool():
    return bump


@pytest.fixture
def tree(tool, tmp_path):
    """An upstream that moved on: its line 5 is another one, and there is one more at the top."""
    tree = tmp_path / "llama.cpp"
    tree.mkdir()
    (tree / "a.txt").write_text("new\n" + TEXT.replace("line 5\n", "line five\n"))
    tool.git(tree, "init", "--quiet")
    tool.git(tree, "add", "--all")
    tool.git(tree, "commit", "--quiet", "--message", "upstream")
    return tree


def patch(folder: Path, name: str, line: int) -> None:
    """A patch that adds a line behind another one."""
    lines = [f" line {n}\n" for n in range(line - 2, line + 4)]
    lines.insert(3, f"+more {line}\n")
    head = f"subject {line}\n\n--- a/a.txt\n+++ b/a.txt\n@@ -{line - 1},6 +{line - 1},7 @@\n"
    (folder / name).write_text(head + "".join(lines))


def run(tool, tree, patches, series):
    outcomes = [tool.apply(tree, p) for p in tool.series_in(patches)]
    tool.write_series(tree, outcomes, PIN, series)
    return outcomes


def tree_again(tool, tree):
    """As the release has it."""
    first = tool.git(tree, "rev-list", "--max-parents=0", "HEAD").strip()
    tool.git(tree, "reset", "--quiet", "--hard", first)
    return tree


def test_a_rejected_patch_is_made_anew_by_hand(tool, tree, tmp_path):
    patches, series = tmp_path / "patches", tmp_path / "series"
    patches.mkdir()
    for name, line in ("1.patch", 15), ("2.patch", 5), ("3.patch", 10):
        patch(patches, name, line)
    outcomes = run(tool, tree, patches, series)
    assert [o.how for o in outcomes] == [tool.MOVED, tool.REJECTED, tool.MOVED]
    assert outcomes[1].detail.startswith("1 of 1 hunks")
    assert [p.name for p in tool.series_in(series)] == ["1.patch", "2.patch.rejected", "3.patch"]

    # nothing is lost where it is only tried again
    assert [o.how for o in run(tool, tree_again(tool, tree), series, series)][1] == tool.REJECTED

    # the tree stands before the second patch, and what was not done is not taken
    assert tool.leave_for_hand(tree, outcomes, series) == "2.patch"
    text = (tree / "a.txt").read_text()
    assert "more 15" in text and "more 10" not in text
    with pytest.raises(MobieError, match="hunks that were not made"):
        tool.take(tree, series)
    (tree / "a.txt.rej").unlink()
    with pytest.raises(MobieError, match="nothing was changed"):
        tool.take(tree, series)
    (tree / "a.txt").write_text(text.replace("line five\n", "line five\nmore 5\n"))
    tool.take(tree, series)
    assert (series / "2.patch").read_text().startswith("subject 5\n\ndiff ")

    outcomes = run(tool, tree_again(tool, tree), series, series)
    assert [o.how for o in outcomes] == [tool.AS_IT_IS, tool.AS_IT_IS, tool.MOVED]
    assert sorted(p.name for p in series.iterdir()) == ["1.patch", "2.patch", "3.patch", "pin.toml"]
    assert "line five\nmore 5\n" in (tree / "a.txt").read_text()
    with pytest.raises(MobieError, match="no patch is missing"):
        tool.take(tree, series)


def test_files_that_are_again_what_they_were_keep_their_time(tool, tree, tmp_path):
    tool.git(tree, "tag", "upstream")
    patch(tmp_path, "1.patch", 15)
    tool.apply(tree, tmp_path / "1.patch")
    file, kernel = tree / "a.txt", tree / "kernel.cpp"
    kernel.write_text("one")
    for path in file, kernel:
        os.utime(path, (1, 1))
    before = tool.changed_files(tree)
    assert set(before) == {file, kernel}

    tool.apply(tree_again(tool, tree), tmp_path / "1.patch")
    kernel.write_text("another")
    tool.keep_times(tree, before)
    assert file.stat().st_mtime == 1 and kernel.stat().st_mtime > 1


def test_only_what_the_environment_lacks_is_installed(tool, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(tool.processes, "run", lambda command, failure: asked.append(command))
    release = tmp_path / "pyproject.toml"
    release.write_text('[project]\ndependencies = ["numpy>=1.20", "patch_ng"]\n')
    tool.install_needs(tmp_path, tmp_path / "needs")
    assert not asked and not any((tmp_path / "needs").iterdir())
    release.write_text('[project]\ndependencies = ["numpy>=1.20", "no-such-package>=5; python_version > \'3\'"]\n')
    tool.install_needs(tmp_path, tmp_path / "needs")
    assert asked[0][-1].startswith("no-such-package") and "numpy>=1.20" not in asked[0]
