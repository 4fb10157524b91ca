"""The patch series as commits: change it, carry it to another llama-cpp-python, check what is built from it.

    python -m tools.release.series start              # build/series-0.3.36/: the pinned release, a commit per patch
    python -m tools.release.series write [VERSION]    # the commits of build/series-VERSION/ to patches/
    python -m tools.release.series bump VERSION       # build/series-VERSION/: the series rebased onto another release
    python -m tools.release.series check [VERSION]    # build it; upstream's own tests and tests/runtime/test_parity.py

The repository is src/vendor/llama.cpp in that folder: `release-VERSION` is the release as it was, `series` the branch
with the patches. VERSION is the pinned one where it is left out. Only `write` changes the checkout. Needs git.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from mobie_export.errors import BAD_INPUT, MobieError
from mobie_export.runtime import cmake, installed, patching, processes, upstream
from tools.release import check_upstream

REPO = Path(__file__).resolve().parents[2]
BUILD = REPO / "build"
NAME, EMAIL, DATE = "mobie-export", "mobie-export@localhost", "Sat, 1 Jan 2000 00:00:00 +0000"
IDENTITY = {"NAME": NAME, "EMAIL": EMAIL, "DATE": DATE}
SHAPE = ("--zero-commit", "--no-signature", "--full-index", "--no-stat", "--no-numbered", "--no-attach")


def home(version: str) -> Path:
    return BUILD / f"series-{version}"


def tree(version: str) -> Path:
    return home(version) / "src" / upstream.LLAMA


def git(folder: Path, *args: object) -> str:
    """What git prints, whatever the user's own settings. The same files make the same commits: llama.cpp compiles the
    name of its commit into everything. Raises MobieError."""
    who = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in IDENTITY.items()}
    env = {**os.environ, **who, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    r = subprocess.run(["git", "-C", folder, *map(str, args)], capture_output=True, text=True, env=env)
    if r.returncode:
        raise MobieError(BAD_INPUT, f"git {args[0]} failed in {folder}", processes.tail(r.stdout + r.stderr, 8))
    return r.stdout


def pin_of(version: str) -> upstream.Pin:
    """The pinned release, verified; or another one as pip finds it, whose digest then becomes the pin's."""
    pinned = upstream.read_pin()
    if version == pinned.version:
        upstream.fetch_sdist(pinned)
        return pinned
    other = upstream.Pin(pinned.package, version, "", llama_cpp="", ggml="")
    path = upstream.cache_dir() / other.sdist
    if not path.exists():
        print(f"fetching {path.name} with pip", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        command = ["download", "--no-deps", "--no-binary", pinned.package, "--dest", str(path.parent)]
        what = f"{pinned.package}=={version}"
        processes.run([sys.executable, "-m", "pip", "--quiet", *command, what], f"could not download {what}")
    return upstream.Pin(pinned.package, version, upstream.sha256(path), llama_cpp="", ggml="")


def unpacked(pin: upstream.Pin, to: Path) -> Path:
    """The release's llama.cpp, without the name of a repository that the sdist does not hold."""
    upstream.unpack(upstream.cache_dir() / pin.sdist, to)
    (to / upstream.LLAMA / ".git").unlink(missing_ok=True)
    return to / upstream.LLAMA


def commit_release(repository: Path, files: Path, pin: upstream.Pin) -> None:
    """All files of a release as the commit of a branch of its own, and as the tag release-VERSION."""
    git(repository, "checkout", "--quiet", "--orphan", f"of-{pin.version}")
    work = ("--git-dir", repository / ".git", "--work-tree", files)
    git(files, *work, "add", "--all", "--force")
    git(files, *work, "commit", "--quiet", "--message", f"llama.cpp of {pin.package} {pin.version}")
    git(files, *work, "tag", f"release-{pin.version}")


def start(version: str, series: list[Path]) -> Path:
    """The pinned release with the series as commits; returns the repository."""
    pin, folder = upstream.read_pin(), home(version)
    if folder.exists():
        todo = "go on in it, or remove it to begin anew"
        raise MobieError(BAD_INPUT, f"{folder} is there already", "commits that may not be written yet", todo=todo)
    pin_of(pin.version)
    folder.mkdir(parents=True)
    llama = unpacked(pin, folder / "src")
    git(llama, "init", "--quiet")
    for key, value in (("user.name", NAME), ("user.email", EMAIL), ("core.autocrlf", "false"), ("gc.auto", "0")):
        git(llama, "config", key, value)
    with open(llama / ".git/info/exclude", "a") as f:
        f.write("/ggml/src/mobie/\n")  # the kernels, which a build copies there
    commit_release(llama, llama, pin)
    git(llama, "checkout", "--quiet", "-b", "series")
    if series:
        git(llama, "am", "--quiet", "--committer-date-is-author-date", *(p.resolve() for p in series))
    return llama


def bump(version: str, series: list[Path]) -> None:
    """The series on another release. Raises MobieError where a patch conflicts; `git rebase --continue` goes on."""
    old = upstream.read_pin()
    if version == old.version:
        raise MobieError(BAD_INPUT, f"{version} is the pinned release", todo="series start")
    pin = pin_of(version)
    llama = start(version, series)
    git(llama, "tag", f"series-{old.version}")
    fresh = unpacked(pin, home(version) / "new")
    commit_release(llama, fresh, pin)
    (llama / ".git").rename(fresh / ".git")
    shutil.rmtree(home(version) / "src")
    (home(version) / "new").rename(home(version) / "src")
    try:
        git(llama, "rebase", "--quiet", "--onto", f"release-{version}", f"release-{old.version}", "series")
    except MobieError as e:
        if not (llama / ".git/rebase-merge").exists():
            raise
        patch = git(llama, "log", "-1", "--format=%s", "REBASE_HEAD").strip()
        files = git(llama, "diff", "--name-only", "--diff-filter=U").split()
        todo = (
            f"in {llama}: make them fit, `git add` them, `git rebase --continue`; "
            f"at the end: python -m tools.release.series write {version}"
        )
        raise MobieError(BAD_INPUT, f"a patch conflicts with {version}: {patch}", ", ".join(files), todo=todo) from e
    print(f"the series is on {version}, in {llama}. Read what became other lines:")
    print(f"    git range-diff release-{old.version}..series-{old.version} release-{version}..series")


def write(version: str) -> None:
    """patches/ anew from the commits, and its pin.toml. A patch keeps its short name as long as its subject stays."""
    llama, base = tree(version), f"release-{version}"
    if not llama.exists():
        raise MobieError(BAD_INPUT, f"there is no {llama}", todo="python -m tools.release.series start")
    if any((llama / ".git" / name).exists() for name in ("rebase-merge", "rebase-apply")):
        raise MobieError(BAD_INPUT, f"a rebase is not finished in {llama}", todo="git rebase --continue")
    if changed := git(llama, "status", "--porcelain"):
        todo = "commit it: --amend, or --fixup and git rebase --interactive --autosquash"
        raise MobieError(BAD_INPUT, f"something is not committed in {llama}", changed.rstrip(), todo=todo)
    commits = git(llama, "rev-list", "--reverse", f"{base}..series").split()
    if not commits:
        raise MobieError(BAD_INPUT, f"there are no commits on {base} in {llama}")
    pin = pin_of(version)
    names = {subject(p.read_text()): p.name.split("-", 1)[1] for p in patching.patch_files()}
    texts = {}
    for n, commit in enumerate(commits, 1):
        text = git(llama, "format-patch", "--stdout", "-1", *SHAPE, commit)
        text = re.sub(r"^From: .*$", f"From: {NAME} <{EMAIL}>", text, count=1, flags=re.MULTILINE)
        text = re.sub(r"^Date: .*$", f"Date: {DATE}", text, count=1, flags=re.MULTILINE)
        short = git(llama, "log", "-1", "--format=%f.patch", commit).strip()
        texts[f"{n:04d}-{names.get(subject(text), short)}"] = text
    for old in patching.patch_files():
        old.unlink()
    for name, text in texts.items():
        (upstream.PATCHES / name).write_text(text)
    if version != upstream.read_pin().version:
        write_pin(pin, llama)
    print(f"{len(texts)} patches written to {upstream.PATCHES}")


def subject(text: str) -> str:
    """Of a patch, its lines joined."""
    found = re.search(r"^Subject: \[PATCH\] (.*(?:\n .*)*)", text, re.MULTILINE)
    return re.sub(r"\n ", " ", found[1]) if found else ""


def write_pin(pin: upstream.Pin, llama: Path) -> None:
    """What the sdist does not say, the name of upstream's commit, is left empty: it is there for reference."""
    cmake = (llama / "ggml" / "CMakeLists.txt").read_text()
    numbers = [re.search(rf"GGML_VERSION_{part} (\d+)", cmake) for part in ("MAJOR", "MINOR", "PATCH")]
    ggml = ".".join(n[1] for n in numbers) if all(numbers) else ""
    text = (upstream.PATCHES / "pin.toml").read_text()
    for key, value in {"version": pin.version, "sha256": pin.sha256, "llama_cpp": "", "ggml": ggml}.items():
        text = re.sub(rf'^{key} = "[^"]*"', f'{key} = "{value}"', text, flags=re.MULTILINE)
    (upstream.PATCHES / "pin.toml").write_text(text)


# --- check ------------------------------------------------------------------------------------------------------------


def install_needs(source: Path, to: Path) -> None:
    """What the release's binding needs and this environment does not have, into a folder; empty where it has all."""
    needs = tomllib.loads((source / "pyproject.toml").read_text())["project"]["dependencies"]
    installed = {d.name.lower().replace("_", "-") for d in importlib.metadata.distributions()}
    missing = [r for r in needs if re.match(r"[\w.-]+", r)[0].lower().replace("_", "-") not in installed]
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    if missing:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(to)]
        processes.run([*pip, *missing], f"could not install {', '.join(missing)}, which llama_cpp needs")


def check(version: str, jobs: int | None, quick: bool) -> list[str]:
    """Build and run the checks; returns what failed."""
    folder = home(version)
    patching.copy_kernels(tree(version))
    targets = ("llama",) if quick else ("llama", "mtmd", *installed.TOOLS, *check_upstream.CHECKS)
    binaries = cmake.compile_targets(folder, targets, jobs)
    found = {} if quick else check_upstream.run_checks(binaries)
    failed = [name for name, (code, _) in found.items() if code]

    binding = folder / "binding"  # the release's llama_cpp alone on the path, not what lies beside it
    binding.mkdir(exist_ok=True)
    if not (binding / "llama_cpp").exists():
        (binding / "llama_cpp").symlink_to(folder / "src" / "llama_cpp", target_is_directory=True)
    install_needs(folder / "src", folder / "needs")
    paths = os.pathsep.join(map(str, (binding, folder / "needs")))
    env = {**os.environ, "PYTHONPATH": paths, "LLAMA_CPP_LIB_PATH": str(binaries)}
    env["MOBIE_TEST_TOOLS"] = str(binaries)
    r = subprocess.run([sys.executable, "-m", "pytest", "tests/runtime/test_parity.py"], cwd=REPO, env=env)
    return failed + (["tests/runtime/test_parity.py"] if r.returncode else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("start", help="the pinned release with the series as commits")
    writing = commands.add_parser("write", help="patches/ from the commits")
    bumping = commands.add_parser("bump", help="the series on another release")
    checking = commands.add_parser("check", help="build, and run upstream's own tests and tests/runtime/test_parity.py")
    bumping.add_argument("version")
    for command in (writing, checking):
        command.add_argument("version", nargs="?")
    checking.add_argument("--quick", action="store_true", help="build the libraries only, run test_parity.py alone")
    checking.add_argument("--jobs", type=int)
    args = parser.parse_args()
    try:
        version = getattr(args, "version", None) or upstream.read_pin().version
        if args.command == "start":
            print(f"the series is in {start(version, patching.patch_files())}")
        elif args.command == "write":
            write(version)
        elif args.command == "bump":
            bump(version, patching.patch_files())
        elif failed := check(version, args.jobs, args.quick):
            print(f"FAILED: {', '.join(failed)}")
            return 1
        else:
            print("all checks pass")
    except MobieError as e:
        print(f"series: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
