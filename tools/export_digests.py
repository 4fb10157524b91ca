#!/usr/bin/env python3
"""Digests of exports by every method: run before and after a change that must not change bytes, and compare.

    python tools/export_digests.py before.json MODEL.gguf ...       # of the tree on PYTHONPATH
    python tools/export_digests.py after.json MODEL.gguf ... --against before.json

Digests are of whole files, on one machine: calibrations depend on its float sums and on the number of threads (one).
A model that a method refuses has the error's first line in place of a digest.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SMALL = ["--samples", "32", "--seq-len", "64"]
CALIBRATED = ["--method", "calibrated", *SMALL]
METHODS = {
    "sign": ["--method", "sign"],
    "sign, q1_0": ["--method", "sign", "--type", "q1_0"],
    "typed": ["--method", "sign", "--tensor-type", "attn=q8_0"],
    "propagation": [*CALIBRATED, "--refine", "none"],
    "layerwise": [*CALIBRATED, "--refine", "layerwise"],
    "second signs": [*CALIBRATED, "--refine", "none", "--bpw", "1.4"],
    "streamed": [*CALIBRATED, "--steps", "4", "--bpw", "1.4"],
    "end-to-end": [*CALIBRATED, "--steps", "4", "--refine", "end-to-end"],
    "paper": ["--method", "paper", *SMALL],
    "ordered": ["--method", "ordered", *SMALL],
    "ordered, second signs": ["--method", "ordered", *SMALL, "--bpw", "1.4"],
    "ordered, q1_0": ["--method", "ordered", *SMALL, "--type", "q1_0"],
    "end-to-end, q1_0": [*CALIBRATED, "--steps", "4", "--refine", "end-to-end", "--type", "q1_0"],
}


def digest(model: Path, options: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.gguf"
        command = [sys.executable, "-m", "mobie_export", str(model), "-o", str(output), "--threads", "1", *options]
        r = subprocess.run(command, capture_output=True, text=True)
        if r.returncode:
            return f"exit code {r.returncode}: {(r.stderr.strip().splitlines() or ['nothing said'])[0]}"
        return hashlib.sha256(output.read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--against", type=Path, help="an earlier output: exit code 1 where digests differ")
    args = parser.parse_args()
    found = {}
    for model in args.models:
        for name, options in METHODS.items():
            found[f"{model.stem} {name}"] = digest(model, options)
            print(f"{model.stem:<24} {name:<14} {found[f'{model.stem} {name}'][:70]}", flush=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    if args.against is None:
        return 0
    before = json.loads(args.against.read_text())
    different = [k for k in before if found.get(k) != before[k]]
    print(f"{len(before) - len(different)} of {len(before)} the same", *different, sep="\n  ")
    return 1 if different or found.keys() != before.keys() else 0


if __name__ == "__main__":
    sys.exit(main())
