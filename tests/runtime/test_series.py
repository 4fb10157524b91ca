"""The patch series as commits: patches become commits and commits the same patches; another release is a rebase."""

import io
import shutil
import tarfile

import pytest

from mobie_export.errors import BAD_INPUT, MobieError
from mobie_export.runtime import patching, processes, upstream
from tools.release import series

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="needs git")
LINES = [f"line {n}" for n in range(40)]
PIN = """# a comment that stays
package = "llama-cpp-python"
version = "1.0"
sha256 = "{}"
llama_cpp = "abc"
ggml = "0.1.2"
"""


def text(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def release(version: str, lines: list[str]) -> str:
    """An sdist with a llama.cpp of two files in the cache; returns its digest."""
    path = upstream.cache_dir() / f"llama_cpp_python-{version}.tar.gz"
    files = {
        "a.txt": text(lines),
        "ggml/CMakeLists.txt": "".join(f"set(GGML_VERSION_{p} 7)\n" for p in ("MAJOR", "MINOR", "PATCH")),
        ".git": "gitdir: ../../.git/modules/vendor/llama.cpp\n",
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"llama_cpp_python-{version}/{upstream.LLAMA}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))
    return upstream.sha256(path)


@pytest.fixture
def patches(tmp_path, monkeypatch):
    """A pin and a series of two: the first adds a line behind line 5, the second one behind line 30."""
    monkeypatch.setenv("MOBIE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(upstream, "PATCHES", tmp_path / "patches")
    monkeypatch.setattr(series, "BUILD", tmp_path / "build")
    for folder in ("cache", "patches"):
        (tmp_path / folder).mkdir()
    (tmp_path / "patches/pin.toml").write_text(PIN.format(release("1.0", LINES)))
    llama = series.start("1.0", [])
    commit(llama, 5, "first: " + "a subject that is longer than a line of a mail " * 2 + "may be")
    commit(llama, 30, "second")
    series.write("1.0")
    shutil.rmtree(series.home("1.0"))
    return tmp_path / "patches"


def commit(llama, line: int, subject: str) -> None:
    file = llama / "a.txt"
    file.write_text(file.read_text().replace(f"line {line}\n", f"line {line}\nmore {line}\n"))
    series.git(llama, "commit", "--quiet", "--all", "--message", subject)


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def added(line: int, lines: list[str] = LINES) -> list[str]:
    at = lines.index(f"line {line}") + 1
    return [*lines[:at], f"more {line}", *lines[at:]]


def test_patches_become_commits_and_commits_the_same_patches(patches, monkeypatch, tmp_path):
    before = contents(patches)
    assert sorted(before)[1:] == ["0002-second.patch", "pin.toml"]
    for name in before.keys() - {"pin.toml"}:
        assert b"From: mobie-export <mobie-export@localhost>\nDate: Sat, 1 Jan 2000" in before[name]
    monkeypatch.setenv("GIT_AUTHOR_NAME", "somebody")
    (tmp_path / ".gitconfig").write_text("[diff]\nnoprefix = true\n[format]\nsignature = me\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    llama = series.start("1.0", patching.patch_files())
    assert series.git(llama, "log", "--format=%s %an", "series").splitlines()[0] == "second mobie-export"
    assert (llama / "a.txt").read_text() == text(added(30, added(5)))
    series.write("1.0")
    assert contents(patches) == before


def test_a_patch_keeps_its_name_where_others_come_before_it(patches):
    (patches / "0002-second.patch").rename(patches / "0002-short.patch")
    llama = series.start("1.0", patching.patch_files())
    series.git(llama, "reset", "--quiet", "--hard", "HEAD~1")
    commit(llama, 20, "between")
    series.git(llama, "cherry-pick", "ORIG_HEAD")
    series.write("1.0")
    assert [p.name for p in patching.patch_files()][1:] == ["0002-between.patch", "0003-short.patch"]


def test_nothing_is_lost(patches):
    """What is not written yet is not removed, and what is not committed not left out."""
    llama = series.start("1.0", patching.patch_files())
    with pytest.raises(MobieError, match="is there already"):
        series.start("1.0", patching.patch_files())
    with pytest.raises(MobieError, match="is the pinned release"):
        series.bump("1.0", patching.patch_files())
    before = contents(patches)
    (llama / "a.txt").write_text("")
    with pytest.raises(MobieError, match="not committed") as e:
        series.write("1.0")
    assert "a.txt" in e.value.found and e.value.kind == BAD_INPUT
    series.git(llama, "reset", "--quiet", "--hard", "release-1.0")
    with pytest.raises(MobieError, match="no commits"):
        series.write("1.0")
    assert contents(patches) == before
    with pytest.raises(MobieError, match="there is no"):
        series.write("9.9")


def test_another_release_with_other_lines(patches, tmp_path):
    lines = ["new", *LINES, "last"]
    digest = release("1.1", lines)
    series.bump("1.1", patching.patch_files())
    llama = series.tree("1.1")
    assert (llama / "a.txt").read_text() == text(added(30, added(5, lines)))
    kernel = llama / "ggml/src/mobie/codec.cpp"  # a build copies the kernels there: no part of the series
    kernel.parent.mkdir(parents=True)
    kernel.write_text("")
    assert series.git(llama, "status", "--porcelain") == ""
    series.write("1.1")
    pin = upstream.read_pin()
    assert (pin.version, pin.sha256, pin.llama_cpp, pin.ggml) == ("1.1", digest, "", "7.7.7")
    assert (patches / "pin.toml").read_text().startswith("# a comment that stays\n")
    upstream.unpack(upstream.fetch_sdist(pin), tmp_path / "src")  # as a user's build does it, without git
    patching.apply_series(tmp_path / "src" / upstream.LLAMA, patching.patch_files())
    assert (tmp_path / "src" / upstream.LLAMA / "a.txt").read_text() == (llama / "a.txt").read_text()


def test_a_conflict_is_named_and_the_rebase_can_be_gone_on_with(patches):
    release("1.2", ["line five" if line == "line 5" else line for line in LINES])
    with pytest.raises(MobieError, match=r"conflicts with 1\.2: first: a subject") as e:
        series.bump("1.2", patching.patch_files())
    llama, before = series.tree("1.2"), contents(patches)
    assert e.value.kind == BAD_INPUT and e.value.found == "a.txt"
    assert str(llama) in e.value.todo and "rebase --continue" in e.value.todo and "write 1.2" in e.value.todo
    with pytest.raises(MobieError, match="not finished"):
        series.write("1.2")
    assert contents(patches) == before

    conflict = (llama / "a.txt").read_text()
    ours, rest = conflict.split("<<<<<<< ", 1)
    (llama / "a.txt").write_text(ours + "line five\nmore 5\n" + rest.split(">>>>>>> ", 1)[1].split("\n", 1)[1])
    series.git(llama, "add", "a.txt")
    series.git(llama, "-c", "core.editor=true", "rebase", "--continue")
    series.write("1.2")
    assert sorted(contents(patches)) == sorted(before), "names stay"
    assert "+more 5" in patching.patch_files()[0].read_text() and "+more 30" in patching.patch_files()[1].read_text()
    assert upstream.read_pin().version == "1.2"


def test_the_projects_own_series(tmp_path, monkeypatch):
    """On the pinned release: the files are what the tool writes, and a build without git gets the same tree."""
    shutil.copytree(upstream.PATCHES, tmp_path / "patches")
    monkeypatch.setattr(upstream, "PATCHES", tmp_path / "patches")
    monkeypatch.setattr(series, "BUILD", tmp_path / "build")
    before, version = contents(tmp_path / "patches"), upstream.read_pin().version
    llama = series.start(version, patching.patch_files())
    series.write(version)
    assert contents(tmp_path / "patches") == before, "python -m tools.release.series start, then write"
    series.git(llama, "checkout", "--quiet", f"release-{version}")
    patching.apply_series(llama, patching.patch_files())
    assert series.git(llama, "diff", "--name-only", "series") == ""
    assert series.git(llama, "status", "--porcelain", "--untracked-files=all").count("??") == 1, ".mobie-patched"


def test_only_what_the_environment_lacks_is_installed(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(processes, "run", lambda command, failure: asked.append(command))
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\ndependencies = ["numpy>=1.20", "patch_ng"]\n')
    series.install_needs(tmp_path, tmp_path / "needs")
    assert not asked and not any((tmp_path / "needs").iterdir())
    project.write_text('[project]\ndependencies = ["numpy>=1.20", "no-such-package>=5; python_version > \'3\'"]\n')
    series.install_needs(tmp_path, tmp_path / "needs")
    assert asked[0][-1].startswith("no-such-package") and "numpy>=1.20" not in asked[0]
