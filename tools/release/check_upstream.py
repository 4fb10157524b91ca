"""Does the patch series leave upstream as it was?

Builds upstream's own tests twice, from the pristine pin and from the patched tree, runs both and compares:
every test passes in both, and a file without MoBiE tensors gives bit-identical logits.

    python -m tools.release.check_upstream [MODEL.gguf]     default: the bundled model
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mobie_export.runtime import cmake, installed, patching, upstream

REPO = Path(__file__).resolve().parents[2]
MODEL = REPO / "examples/tiny-moe/tiny-moe-f16.gguf"
CHECKS = {
    "test-quantize-fns": [],
    "test-backend-ops": ["test", "-b", "CPU", "-o", "MUL_MAT,MUL_MAT_ID,GET_ROWS"],
    "test-gguf": [],
    "test-llama-archs": [],
}


def pristine_home() -> Path:
    """The pinned sdist, unpacked and not patched."""
    home = upstream.cache_dir() / f"pristine-{upstream.read_pin().sha256[:12]}"
    if not (home / "src").exists():
        home.mkdir(parents=True, exist_ok=True)
        upstream.unpack(upstream.fetch_sdist(upstream.read_pin()), home / "src")
    return home


def run_checks(binaries: Path) -> dict[str, tuple[int, str]]:
    """Exit code and last line of every check."""
    results = {}
    for name, args in CHECKS.items():
        r = subprocess.run([binaries / name, *args], capture_output=True, text=True)
        (binaries.parent / f"{name}.log").write_text(r.stdout + r.stderr)
        lines = [line for line in (r.stdout + r.stderr).splitlines() if line.strip()]
        results[name] = (r.returncode, lines[-1].strip() if lines else "")
        print(f"  {name:<20} exit {r.returncode}  {results[name][1]}", flush=True)
    return results


def digest(binaries: Path, model: Path) -> str:
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(binaries)}
    script = REPO / "tools/release/logits_digest.py"
    return subprocess.run(
        [sys.executable, script, model], env=env, check=True, capture_output=True, text=True
    ).stdout.strip()


def concluded(failed: list[str], well: str) -> int:
    """The exit status of a check: 1, and what failed, a line each; 0 and `well` where nothing did."""
    for line in failed:
        print(f"FAILED: {line}")
    print(f"{len(failed)} failed" if failed else well)
    return bool(failed)


def main() -> int:
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL
    failed = []
    results, digests = {}, {}
    for kind, home in (("pristine", pristine_home()), ("patched", patching.prepare())):
        binaries = cmake.compile_targets(home, ("llama", "mtmd", *installed.TOOLS, *cmake.UPSTREAM_TESTS))
        print(f"{kind}:", flush=True)
        results[kind] = run_checks(binaries)
        digests[kind] = digest(binaries, model)
        print(f"  logits of {model.name:<10} {digests[kind]}")
    for name in CHECKS:
        if results["patched"][name][0] != results["pristine"][name][0]:
            failed.append(f"{name}: exit {results['patched'][name][0]}, unpatched {results['pristine'][name][0]}")
    if results["patched"]["test-backend-ops"][0] != 0:
        failed.append("test-backend-ops fails")
    if digests["patched"] != digests["pristine"]:
        failed.append("logits of a file without MoBiE tensors differ")
    return concluded(failed, "upstream unharmed")


if __name__ == "__main__":
    sys.exit(main())
