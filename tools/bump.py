#!/usr/bin/env python3
"""`make bump PIN=x.y.z`: does the patch series fit another llama-cpp-python, and does what is built from it work?

    python tools/bump.py 0.3.37 [--patches DIR] [--only-apply | --quick] [--jobs N]

1. fetches and unpacks the release;
2. applies each patch: as it is, or (with GNU patch) at other lines, or with differing context. What does not apply is
   left out and reported, the others are still tried;
3. writes the series as it would have to be for that release, and its pin.toml, to build/bump-x.y.z/patches/, and
   what did not apply as *.rejected;
4. builds llama.cpp from it, and runs upstream's own tests and tests/test_parity.py against that build.

A rejected patch is made anew by hand in the tree the command names, and written where its *.rejected is; the next run
with --patches build/bump-x.y.z/patches takes that series. Nothing of the checkout or of the environment changes; to
move the pin, copy build/bump-x.y.z/patches/ over patches/. Needs git and patch.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mobie_export import runtime
from mobie_export.errors import MobieError

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
    who = ["-c", "user.name=bump", "-c", "user.email=bump@localhost", "-c", "core.autocrlf=false"]
    return subprocess.run(["git", "-C", tree, *who, *args], check=True, capture_output=True, text=True).stdout


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


def described(pin: runtime.Pin, home: Path, llama: Path) -> runtime.Pin:
    """The pin with upstream's commit and ggml's version, for reference."""
    cmake = (llama / "ggml" / "CMakeLists.txt").read_text()
    numbers = [re.search(rf"GGML_VERSION_{part} (\d+)", cmake) for part in ("MAJOR", "MINOR", "PATCH")]
    ggml = ".".join(n[1] for n in numbers) if all(numbers) else ""
    commit = (home / "commit").read_text().strip() if (home / "commit").exists() else ""
    return runtime.Pin(pin.package, pin.version, pin.sha256, llama_cpp=commit, ggml=ggml)


def apply(llama: Path, patch: Path) -> Outcome:
    """Apply one patch on top of what is committed, and commit it; a patch that fails leaves the tree as it was."""
    command = ["patch", "--strip=1", "--force", "--no-backup-if-mismatch", f"--input={patch}"]

    def tried(*options: str) -> subprocess.CompletedProcess:
        r = subprocess.run([*command, *options], cwd=llama, capture_output=True, text=True)
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
            return Outcome(patch, REJECTED, "; ".join(where) or runtime.tail(loose.stdout, 3))
    git(llama, "add", "--all")
    git(llama, "commit", "--quiet", "--message", patch.name)
    return outcome


def write_series(llama: Path, outcomes: list[Outcome], pin: runtime.Pin, to: Path) -> None:
    """The series as it has to be for this release: what applied, with the lines where it did."""
    to.mkdir(parents=True, exist_ok=True)
    texts = {o.patch.name: o.patch.read_text() for o in outcomes}
    for n, outcome in enumerate(reversed([o for o in outcomes if o.how != REJECTED])):
        subject = texts[outcome.patch.name].split("\n", 1)[0]
        diff = git(llama, "diff", f"HEAD~{n + 1}", f"HEAD~{n}")
        texts[outcome.patch.name] = f"{subject}\n\n{diff}"
    for outcome in outcomes:
        name = outcome.patch.name
        good, bad = to / name, to / f"{name}.rejected"
        for old in (good, bad):
            old.unlink(missing_ok=True)
        (bad if outcome.how == REJECTED else good).write_text(texts[name])
    values = {"version": pin.version, "sha256": pin.sha256, "llama_cpp": pin.llama_cpp, "ggml": pin.ggml}
    text = (runtime.PATCHES / "pin.toml").read_text()
    for key, value in values.items():
        text = re.sub(rf'^{key} = "[^"]*"', f'{key} = "{value}"', text, flags=re.MULTILINE)
    (to / "pin.toml").write_text(text)


def check(home: Path, jobs: int | None, quick: bool) -> list[str]:
    """Build and run the checks; returns what failed."""
    failed = []
    targets = ("llama", "llama-quantize") if quick else ("llama", "mtmd", *runtime.TOOLS, *UPSTREAM_CHECKS)
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
    env = {**os.environ, "PYTHONPATH": str(binding), "LLAMA_CPP_LIB_PATH": str(binaries)}
    env["MOBIE_TEST_TOOLS"] = str(binaries)
    r = subprocess.run([sys.executable, "-m", "pytest", "tests/test_parity.py"], cwd=REPO, env=env)
    return failed + (["tests/test_parity.py"] if r.returncode else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("version")
    parser.add_argument("--patches", type=Path, default=runtime.PATCHES, help="another series")
    how_far = parser.add_mutually_exclusive_group()
    how_far.add_argument("--only-apply", action="store_true", help="do not build")
    how_far.add_argument("--quick", action="store_true", help="build the libraries only, and run test_parity.py alone")
    parser.add_argument("--jobs", type=int)
    args = parser.parse_args()
    try:
        home = runtime.cache_dir() / f"bump-{args.version}"
        home.mkdir(parents=True, exist_ok=True)
        pin = fetch(args.version)
        llama = unpacked(pin, home)
        pin = described(pin, home, llama)
        print(f"{pin.package} {pin.version}: llama.cpp {pin.llama_cpp}, ggml {pin.ggml}")
        outcomes = [apply(llama, p) for p in sorted(args.patches.resolve().glob("*.patch"))]
        for o in outcomes:
            print(f"  {o.patch.name:<32} {o.how}  {o.detail}", flush=True)
        series = REPO / "build" / f"bump-{args.version}" / "patches"
        write_series(llama, outcomes, pin, series)
        print(f"the series for it is in {series.relative_to(REPO)}")
        if any(o.how == REJECTED for o in outcomes):
            print(f"not built: a patch is missing (the tree: {llama})")
            return 1
        if args.only_apply:
            return 0
        runtime.copy_kernels(llama)
        failed = check(home, args.jobs, args.quick)
    except MobieError as e:
        print(f"bump: {e}", file=sys.stderr)
        return e.code
    print("all checks pass" if not failed else f"FAILED: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
