"""Speed and error of the block layouts in docs/measured/format-choice.md, as markdown tables.

    cmake -B build && cmake --build build --target bench_formats
    python -m tools.bench.format --build build --model MODEL

MODEL is a safetensors file or a directory of them with unfused experts (...experts.N.NAME.weight). Needs safetensors
and, for BF16 weights, torch.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mobie_export.spec import block as fmt


def expert_weights(path: Path) -> Iterator[np.ndarray]:
    """float64 [rows, cols] of every expert matrix."""
    from safetensors import safe_open

    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with safe_open(file, "pt") as f:
            for name in f.keys():  # noqa: SIM118
                if ".experts." in name and name.endswith(".weight"):
                    yield f.get_tensor(name).double().numpy()


# --- magnitudes: [rows, n_scales] float64 of one expert -> what the layout stores, decoded ---------------------------


def exact(a: np.ndarray) -> np.ndarray:
    return a


def float16(a: np.ndarray) -> np.ndarray:
    return a.astype(np.float16).astype(np.float64)


def u8_expert(a: np.ndarray) -> np.ndarray:
    """8 bits linear, one float per expert: FORMAT.md."""
    scale, codes = fmt.encode_scales(a)
    return codes * fmt.SCALE_UNIT * np.float64(scale)


def u8_fixed(a: np.ndarray) -> np.ndarray:
    """8 bits linear in units of 2^-7 without a float per expert."""
    return np.minimum(np.rint(a / fmt.SCALE_UNIT), fmt.SCALE_MAX) * fmt.SCALE_UNIT


def e3m5_fixed(a: np.ndarray) -> np.ndarray:
    """3 bits of exponent, 5 of mantissa, in units of 2^-13 (largest 63 * 2^6 units = 0.49), no float per expert."""
    unit = 2.0**-13
    codes = np.arange(256)
    levels = np.where(codes < 32, codes, (32 + codes % 32) * 2.0 ** (codes // 32 - 1)) * unit
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, a)
    return levels[nearest]


# name as in bench_formats.cpp, bits per weight, columns per scale, magnitudes
LAYOUTS = [
    ("u8 per 128, 17 bytes", 1.0625, 128, u8_expert),
    ("f16 per 128, 18 bytes", 1.125, 128, float16),
    ("u8 per 64, 9 bytes", 1.125, 64, u8_expert),
    ("u8 per 64, 36 bytes per 256", 1.125, 64, u8_expert),
    ("u8 per 64, no float per expert", 1.125, 64, u8_fixed),
    ("e3m5 per 64, 9 bytes", 1.125, 64, e3m5_fixed),
    ("f16 per 64, 10 bytes", 1.25, 64, float16),
    ("exact per 128", None, 128, exact),
    ("exact per 64", None, 64, exact),
]


def errors(model: Path, divide: float) -> dict[str, float]:
    """{layout: sum (w - sign(w) a)^2 / sum w^2} over all experts, a the stored mean magnitude of the columns."""
    squared, total, n_experts = dict.fromkeys((name for name, *_ in LAYOUTS), 0.0), 0.0, 0
    for w in expert_weights(model):
        n_experts += 1
        w = w / divide
        total += (w**2).sum()
        for name, _, length, stored in LAYOUTS:
            magnitude = np.abs(w).reshape(len(w), -1, length)
            a = stored(magnitude.mean(axis=-1))
            squared[name] += ((magnitude - a[..., None]) ** 2).sum()
    if not n_experts:
        sys.exit(f"{model}: found no tensors named ...experts.N.NAME.weight in its safetensors files")
    print(f"{n_experts} expert matrices\n")
    return {name: value / total for name, value in squared.items()}


def speeds(build: Path, megabytes: int) -> dict[str, dict[str, str]]:
    """{layout: {instruction set: "Gweights/s (GB/s)"}}"""
    table: dict[str, dict[str, str]] = {}
    for isa in ("avx512vnni", "avx2"):
        program = build / "kernels_cpp" / f"bench_formats_{isa}"
        if not program.exists():
            sys.exit(f"{program} is missing: cmake --build {build} --target bench_formats")
        result = subprocess.run([program, str(megabytes)], capture_output=True, text=True)
        if result.returncode:
            print(f"{program.name} ended with {result.returncode}: {result.stderr.strip()}", file=sys.stderr)
            continue
        for line in result.stdout.splitlines():
            _, name, _, rate, gigabytes = line.split("\t")
            table.setdefault(name, {})[isa] = f"{rate} ({gigabytes})" if rate else f"({gigabytes})"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, help="build directory with the target bench_formats: print speeds")
    parser.add_argument("--model", type=Path, help="safetensors file or directory: print errors")
    parser.add_argument("--divide", type=float, default=1, help="the weights by this first (1)")
    parser.add_argument("--megabytes", type=int, default=256, help="of weights, for the speeds (256)")
    args = parser.parse_args()
    if not (args.build or args.model):
        parser.error("give --build, --model or both")
    if args.build:
        print("| layout | AVX-512 VNNI, Gweights/s (GB/s) | AVX2 |\n|---|---|---|")
        for name, row in speeds(args.build, args.megabytes).items():
            print(f"| {name} | {row.get('avx512vnni', '')} | {row.get('avx2', '')} |")
        print()
    if args.model:
        error = errors(args.model, args.divide)
        print("| layout | bits per weight | relative squared error |\n|---|---|---|")
        for name, bits, *_ in LAYOUTS:
            print(f"| {name} | {bits or ''} | {error[name]:.5f} |")


if __name__ == "__main__":
    main()
