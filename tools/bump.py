#!/usr/bin/env python3
"""`make bump PIN=x.y.z`: does the patch series fit another llama-cpp-python, and does what is built from it work?

    python tools/bump.py 0.3.37 [--patches DIR | --take] [--only-apply | --quick] [--jobs N]

1. fetches and unpacks the release;
2. applies each patch: as it is, or (with GNU patch) at other lines, or with differing context. What does not apply is
   left out and reported, the others are still tried;
3. writes the series as it would have to be for that release, and its pin.toml, to build/bump-x.y.z/patches/, and
   what did not apply as *.rejected; the tree is left where the first of those is to be made anew;
4. builds llama.cpp from it, and runs upstream's own tests and tests/test_parity.py against that build.

A rejected patch is made anew by hand in the tree the command names: the patches before it and what applies of it are
there, *.rej hold the rest. The next run with --take makes a patch of what the tree then holds, and goes on with the
series in build/bump-x.y.z/patches/; --patches with that folder tries it once more. Nothing of the checkout or of the
environment changes; to move the pin, copy build/bump-x.y.z/patches/ over patches/. Needs git and patch.
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
from dataclasses import dataclass
from pathlib import Path

from mobie_export import runtime
from mobie_export.errors import BAD_INPUT, MobieError

REPO = Path(__file__).resolve().parent.parent
AS_IT_IS, MOVED, FUZZY, REJECTED = "as it is", "at other lines", "with other context: read it", "DOES NOT APPLY"
UPSTREAM_CHECKS = {
    "test-quantize-fns": [],
    "test-backend-ops": ["test", "-b", "CPU", "-o", "MUL_MAT,MUL_MAT_ID,GET_ROWS"],
    "test-gguf": [],
}


@dataclass
class Outcome:
    patch: Path
    how: str
    detail: str = ""

    @property
    def name(self) -> str:
        return self.patch.name.removesuffix(".rejected")


def fetch(version: str) -> runtime.Pin:
    """Download a release beside the pinned one; its digest becomes the pin's."""
    pinned = runtime.read_pin()
    name = f"{pinned.package.replace('-', '_')}-{version}.tar.gz"
    path = runtime.cache_dir() / name
    if not path.exists():
        print(f"fetching {name} with pip", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        command = ["download", "--no-deps", "--no-binary", pinned.package, "--dest", str(path.parent)]
        runtime.run(
            [sys.executable, "-m", "pip", "--quiet", *command, f"{pinned.package}=={version}"],
            f"could not download {pinned.package} {version}",
        )
    return runtime.Pin(pinned.package, version, runtime.sha256(path), llama_cpp="", ggml="")


def git(tree: Path, *args: str) -> str:
    """Run git. The same series makes the same commits: llama.cpp compiles the name of its commit into everything."""
    who = ["-c", "user.name=bump", "-c", "user.email=bump@localhost", "-c", "core.autocrlf=false"]
    env = {**os.environ, "GIT_AUTHOR_DATE": "2000-01-01T00:00Z", "GIT_COMMITTER_DATE": "2000-01-01T00:00Z"}
    return subprocess.run(["git", "-C", tree, *who, *args], check=True, capture_output=True, text=True, env=env).stdout


def unpacked(pin: runtime.Pin, home: Path) -> Path:
    """A fresh llama.cpp of the release, its files committed to a repository of its own; fills in what the pin says."""
    source = home / "src"
    if not source.exists():
        runtime.unpack(runtime.cache_dir() / pin.sdist, source)
        llama = source / runtime.LLAMA
        if (llama / ".git").exists():
            (home / "commit").write_text(git(llama, "rev-parse", "--short=9", "HEAD"))
            (llama / ".git").rename(home / "upstream.git")
        git(llama, "init", "--quiet")
        git(llama, "add", "--all", "--force")
        git(llama, "commit", "--quiet", "--message", "upstream")
        git(llama, "tag", "upstream")
    llama = source / runtime.LLAMA
    git(llama, "reset", "--quiet", "--hard", "upstream")
    git(llama, "clean", "--quiet", "--force", "-d", "-x")
    return llama


def changed_files(llama: Path) -> dict[Path, tuple[bytes, int]]:
    """What differs from upstream in the tree, and what is new in it, with the time it was written at."""
    names = git(llama, "diff", "--name-only", "upstream") + git(llama, "ls-files", "--others")
    paths = [p for p in map(llama.joinpath, names.splitlines()) if p.is_file()]
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}


def keep_times(llama: Path, before: dict[Path, tuple[bytes, int]]) -> None:
    """Files that are again what they were get their time back, so that a second build goes on where the first ended."""
    for path, (content, _) in changed_files(llama).items():
        if path in before and before[path][0] == content:
            os.utime(path, ns=(before[path][1], before[path][1]))
    git(llama, "update-index", "-q", "--refresh")


def described(pin: runtime.Pin, home: Path, llama: Path) -> runtime.Pin:
    """The pin with upstream's commit and ggml's version, for reference."""
    cmake = (llama / "ggml" / "CMakeLists.txt").read_text()
    numbers = [re.search(rf"GGML_VERSION_{part} (\d+)", cmake) for part in ("MAJOR", "MINOR", "PATCH")]
    ggml = ".".join(n[1] for n in numbers) if all(numbers) else ""
    commit = (home / "commit").read_text().strip() if (home / "commit").exists() else ""
    return runtime.Pin(pin.package, pin.version, pin.sha256, llama_cpp=commit, ggml=ggml)


def series_in(folder: Path) -> list[Path]:
    """The patches of a folder in their order; a *.rejected stands for one that was not made anew."""
    by_name = {p.name.removesuffix(".rejected"): p for p in sorted(folder.glob("*.patch*"), reverse=True)}
    return [by_name[name] for name in sorted(by_name)]


def take(llama: Path, series: Path) -> None:
    """Make the first missing patch of the series from what was changed by hand in the tree."""
    missing = [p for p in series_in(series) if p.suffix == ".rejected"]
    if not missing:
        raise MobieError(BAD_INPUT, f"no patch is missing in {series}")
    if left := list(llama.rglob("*.rej")):
        todo = "make these changes by hand, then remove the files"
        raise MobieError(BAD_INPUT, "there are hunks that were not made", " ".join(map(str, left)), todo=todo)
    git(llama, "add", "--all")
    diff = git(llama, "diff", "--cached")
    if not diff:
        raise MobieError(BAD_INPUT, f"nothing was changed in {llama}")
    subject = missing[0].read_text().split("\n", 1)[0]
    missing[0].with_suffix("").write_text(f"{subject}\n\n{diff}")


def patch_command(patch: Path, *options: str) -> list[str]:
    return ["patch", "--strip=1", "--force", "--no-backup-if-mismatch", f"--input={patch.resolve()}", *options]


def apply(llama: Path, patch: Path) -> Outcome:
    """Apply one patch on top of what is committed, and commit it; a patch that fails leaves the tree as it was."""

    def tried(*options: str) -> subprocess.CompletedProcess:
        r = subprocess.run(patch_command(patch, *options), cwd=llama, capture_output=True, text=True)
        if r.returncode:
            git(llama, "reset", "--quiet", "--hard")
            git(llama, "clean", "--quiet", "--force", "-d", "-x")
        return r

    exact = tried("--fuzz=0")
    outcome = Outcome(patch, MOVED if "offset" in exact.stdout else AS_IT_IS)
    if exact.returncode:
        loose = tried("--fuzz=2")
        outcome = Outcome(patch, FUZZY)
        if loose.returncode:
            failed = re.findall(r"patching file (\S+)|(Hunk #\d+ FAILED at \d+)", loose.stdout)
            where, file = [], ""
            for name, hunk in failed:
                file = name or file
                where += [f"{file}: {hunk}"] if hunk else []
            hunks = len(re.findall(r"^@@ ", patch.read_text(), flags=re.MULTILINE))
            detail = f"{len(where)} of {hunks} hunks: {'; '.join(where)}" if where else runtime.tail(loose.stdout, 3)
            return Outcome(patch, REJECTED, detail)
    git(llama, "add", "--all")
    git(llama, "commit", "--quiet", "--message", outcome.name)
    return outcome


def leave_for_hand(llama: Path, outcomes: list[Outcome], series: Path) -> str:
    """Put the tree where the first rejected patch is to be made anew, with what applies of it; returns its name."""
    first = next(i for i, o in enumerate(outcomes) if o.how == REJECTED)
    later = sum(o.how != REJECTED for o in outcomes[first:])
    git(llama, "reset", "--quiet", "--hard", f"HEAD~{later}")
    name = outcomes[first].name
    subprocess.run(patch_command(series / f"{name}.rejected"), cwd=llama, capture_output=True)
    return name


def write_series(llama: Path, outcomes: list[Outcome], pin: runtime.Pin, to: Path) -> None:
    """The series as it has to be for this release: what applied, with the lines where it did."""
    to.mkdir(parents=True, exist_ok=True)
    texts = {o.name: o.patch.read_text() for o in outcomes}
    for n, outcome in enumerate(reversed([o for o in outcomes if o.how != REJECTED])):
        subject = texts[outcome.name].split("\n", 1)[0]
        diff = git(llama, "diff", f"HEAD~{n + 1}", f"HEAD~{n}")
        texts[outcome.name] = f"{subject}\n\n{diff}"
    for outcome in outcomes:
        name = outcome.name
        good, bad = to / name, to / f"{name}.rejected"
        for old in (good, bad):
            old.unlink(missing_ok=True)
        (bad if outcome.how == REJECTED else good).write_text(texts[name])
    values = {"version": pin.version, "sha256": pin.sha256, "llama_cpp": pin.llama_cpp, "ggml": pin.ggml}
    text = (runtime.PATCHES / "pin.toml").read_text()
    for key, value in values.items():
        text = re.sub(rf'^{key} = "[^"]*"', f'{key} = "{value}"', text, flags=re.MULTILINE)
    (to / "pin.toml").write_text(text)


def install_needs(source: Path, to: Path) -> None:
    """What the release's binding needs and this environment does not have, into a folder; empty where it has all."""
    needs = tomllib.loads((source / "pyproject.toml").read_text())["project"]["dependencies"]
    installed = {d.name.lower().replace("_", "-") for d in importlib.metadata.distributions()}
    missing = [r for r in needs if re.match(r"[\w.-]+", r)[0].lower().replace("_", "-") not in installed]
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    if missing:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(to)]
        runtime.run([*pip, *missing], f"could not install {', '.join(missing)}, which llama_cpp needs")


def check(home: Path, jobs: int | None, quick: bool) -> list[str]:
    """Build and run the checks; returns what failed."""
    failed = []
    targets = ("llama",) if quick else ("llama", "mtmd", *runtime.TOOLS, *UPSTREAM_CHECKS)
    binaries = runtime.compile_targets(home, targets, jobs)
    for name, args in [] if quick else UPSTREAM_CHECKS.items():
        r = subprocess.run([binaries / name, *args], capture_output=True, text=True)
        last = [line.strip() for line in (r.stdout + r.stderr).splitlines() if line.strip()][-1:]
        print(f"  {name:<20} exit {r.returncode}  {''.join(last)}", flush=True)
        failed += [name] if r.returncode else []

    binding = home / "binding"  # the release's llama_cpp alone on the path, not what lies beside it
    binding.mkdir(exist_ok=True)
    if not (binding / "llama_cpp").exists():
        (binding / "llama_cpp").symlink_to(home / "src" / "llama_cpp", target_is_directory=True)
    install_needs(home / "src", home / "needs")
    paths = os.pathsep.join(map(str, (binding, home / "needs")))
    env = {**os.environ, "PYTHONPATH": paths, "LLAMA_CPP_LIB_PATH": str(binaries)}
    env["MOBIE_TEST_TOOLS"] = str(binaries)
    r = subprocess.run([sys.executable, "-m", "pytest", "tests/test_parity.py"], cwd=REPO, env=env)
    return failed + (["tests/test_parity.py"] if r.returncode else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("version")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--patches", type=Path, default=runtime.PATCHES, help="another series")
    which.add_argument("--take", action="store_true", help="go on with the patch that was made by hand in the tree")
    how_far = parser.add_mutually_exclusive_group()
    how_far.add_argument("--only-apply", action="store_true", help="do not build")
    how_far.add_argument("--quick", action="store_true", help="build the libraries only, and run test_parity.py alone")
    parser.add_argument("--jobs", type=int)
    args = parser.parse_args()
    try:
        home = runtime.cache_dir() / f"bump-{args.version}"
        home.mkdir(parents=True, exist_ok=True)
        series = REPO / "build" / f"bump-{args.version}" / "patches"
        if args.take:
            take(home / "src" / runtime.LLAMA, series)
        pin = fetch(args.version)
        built = home / "src" / runtime.LLAMA
        before = changed_files(built) if built.exists() else {}
        llama = unpacked(pin, home)
        pin = described(pin, home, llama)
        print(f"{pin.package} {pin.version}: llama.cpp {pin.llama_cpp}, ggml {pin.ggml}")
        outcomes = [apply(llama, p) for p in series_in(series if args.take else args.patches)]
        for o in outcomes:
            print(f"  {o.name:<34} {o.how}  {o.detail}", flush=True)
        write_series(llama, outcomes, pin, series)
        print(f"the series for it is in {series.relative_to(REPO)}")
        if any(o.how == REJECTED for o in outcomes):
            print(f"not built: make {leave_for_hand(llama, outcomes, series)} anew in {llama}, then run with --take")
            return 1
        runtime.copy_kernels(llama)
        keep_times(llama, before)
        if args.only_apply:
            return 0
        failed = check(home, args.jobs, args.quick)
    except MobieError as e:
        print(f"bump: {e}", file=sys.stderr)
        return 1
    print("all checks pass" if not failed else f"FAILED: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
