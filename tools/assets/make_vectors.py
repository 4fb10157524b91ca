"""Writes the golden vectors of tests/vectors from FORMAT.md's rules, in numpy and alone of the C++ kernels.

    python -m tools.assets.make_vectors            writes them
    python -m tools.assets.make_vectors --check    exits with 1 where a file is not what would be written

A file is lines of "case NAME" and "FIELD HEX", little-endian bytes as hexadecimal digits; '#' starts a comment. Inputs
come from a multiplicative generator written out below, so that another language can make the same ones.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from mobie_export.spec import block as fmt

ROOT = Path(__file__).resolve().parents[2]
GROUP_LEN = 256
ACT_GROUP = np.dtype([("scale", "<f4"), ("sums", "<i2", 4)])


class Generator:
    """state = state * 6364136223846793005 + 1442695040888963407 mod 2^64; a draw is its upper 32 bits."""

    def __init__(self, seed: int):
        self.state = seed

    def draw(self, n: int) -> np.ndarray:
        """n uint32."""
        out = np.empty(n, np.uint32)
        for i in range(n):
            self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
            out[i] = self.state >> 32
        return out

    def floats(self, n: int, span: float = 1.0) -> np.ndarray:
        """n float32, multiples of span / 2^15 between -span and span."""
        return (((self.draw(n) >> 16).astype(np.float64) - 2**15) / 2**15 * span).astype(np.float32)

    def blocks(self, n_blocks: int) -> np.ndarray:
        """uint8 [n_blocks * 9], any bytes: every pattern is valid."""
        return (self.draw(n_blocks * fmt.BLOCK_BYTES) >> 24).astype(np.uint8)


# --- the rules -------------------------------------------------------------------------------------------------------


def decode_block(block: bytes) -> list[float]:
    """9 bytes -> 64 weights at expert scale 1, bit by bit (FORMAT.md, "The block"), without mobie_export.format."""
    magnitude = block[0] * 2.0**-7
    return [magnitude if block[1 + j // 8] >> (j % 8) & 1 else 0.0 - magnitude for j in range(64)]


def quantize_row(x: np.ndarray) -> np.ndarray:
    """float32 [n] -> blocks at expert scale 1, as the C quantizer does (FORMAT.md, "From floats to blocks")."""
    total = np.zeros(len(x) // fmt.BLOCK_LEN)
    for column in np.abs(x.astype(np.float64)).reshape(-1, fmt.BLOCK_LEN).T:  # in the order of the columns
        total += column
    codes = np.minimum(np.rint(total / fmt.BLOCK_LEN / fmt.SCALE_UNIT), fmt.SCALE_MAX).astype(np.uint8)
    return fmt.pack(x >= 0, codes)


def quantize_act(x: np.ndarray) -> bytes:
    """float32 [n] -> the runtime's row of quantized activations (mobie.h, mobie_act_size)."""
    n = len(x)
    q = np.zeros(n, np.int8)
    groups = np.zeros(-(-n // GROUP_LEN), ACT_GROUP)
    for g, group in enumerate(groups):
        xg = x[g * GROUP_LEN : (g + 1) * GROUP_LEN]
        top = np.abs(xg).max()
        if not np.isfinite(xg).all():
            group["scale"] = np.nan
        elif top >= np.float32(2.0**-100):
            group["scale"] = top / np.float32(127)
            qg = np.rint(xg * (np.float32(127) / top)).astype(np.int8)
            q[g * GROUP_LEN : (g + 1) * GROUP_LEN] = qg
            sums = qg.reshape(-1, fmt.BLOCK_LEN).sum(axis=1, dtype=np.int64)
            group["sums"][: len(sums)] = sums
    row = q.tobytes() + groups.tobytes()
    return row + bytes(-len(row) % 64)


def product(blocks: np.ndarray, act: bytes, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The integer sums int32 [rows, groups] and results float32 [rows] (FORMAT.md, "Products").

    blocks: uint8 [rows, n / 64 * 9]; act: a row of quantize_act
    """
    signs, codes = fmt.unpack(blocks)
    weights = np.where(signs, 1, -1) * np.repeat(codes.astype(np.int64), fmt.BLOCK_LEN, axis=-1)
    terms = weights * np.frombuffer(act, np.int8, n)
    n_groups = -(-n // GROUP_LEN)
    groups = np.frombuffer(act, ACT_GROUP, n_groups, offset=n)
    sums = np.add.reduceat(terms, np.arange(0, n, GROUP_LEN), axis=-1)
    y = np.zeros(len(blocks), np.float32)
    with np.errstate(invalid="ignore"):
        for g in range(n_groups):
            y = y + groups["scale"][g] * sums[:, g].astype(np.float32)
    return sums.astype(np.int32), y * np.float32(fmt.SCALE_UNIT)


# --- the files -------------------------------------------------------------------------------------------------------


def decode_cases():
    signs = np.isin(np.arange(64), [0, 1, 2, 63])
    yield "worked_example", {"blocks": fmt.pack(signs, np.array([48], np.uint8))}
    yield "zero", {"blocks": np.zeros(9, np.uint8)}
    yield "zero_with_signs", {"blocks": np.array([0] + [0xA5] * 8, np.uint8)}
    yield "largest", {"blocks": np.array([255] + [0xFF] * 8, np.uint8)}
    yield "most_negative", {"blocks": np.array([255] + [0] * 8, np.uint8)}
    for bit in (0, 7, 8, 31, 32, 63):
        yield f"only_{bit}_plus", {"blocks": fmt.pack(np.arange(64) == bit, np.array([1], np.uint8))}
    yield "any_bytes", {"blocks": Generator(1).blocks(5)}


def quantize_cases():
    gen = Generator(2)
    yield "random", {"floats": gen.floats(320)}
    yield "random_small", {"floats": gen.floats(128, 0.05)}
    yield "zeros_of_both_signs", {"floats": np.where(np.arange(64) % 2, np.float32(0), np.float32(-0.0))}
    yield "sign_of_zero", {"floats": np.array([0, -0.0, 1] + [-1] * 61, np.float32)}
    # Means of 2.5, 3.5 and 0.5 units: halves to even.
    for name, units in (("half_down", 2.5), ("half_up", 3.5), ("half_to_zero", 0.5)):
        yield name, {"floats": np.full(64, -units / 128, np.float32)}
    yield "clamped", {"floats": gen.floats(64, 100)}
    yield "denormal", {"floats": np.full(64, 2.0**-140, np.float32)}


def product_cases():
    gen = Generator(3)
    for n, rows in ((64, 3), (192, 2), (256, 9), (320, 1), (768, 2)):
        yield f"random_{n}", {"activations": gen.floats(n, 3), "blocks": gen.blocks(rows * n // 64).reshape(rows, -1)}
    full = np.full((2, 4 * 9), 255, np.uint8)
    full[1, np.arange(36) % 9 > 0] = 0
    yield "largest_sums", {"activations": np.full(256, 2, np.float32), "blocks": full}
    yield "zeros", {"activations": np.full(64, -0.0, np.float32), "blocks": gen.blocks(1)[None]}
    tiny = np.concatenate([gen.floats(256, 2.0**-101), gen.floats(64, 2.0**-98)])
    yield "tiny", {"activations": tiny, "blocks": gen.blocks(5)[None]}
    yield "huge", {"activations": gen.floats(320, 1e30), "blocks": gen.blocks(10).reshape(2, -1)}
    not_finite = gen.floats(320)
    not_finite[7] = np.inf
    yield "not_finite", {"activations": not_finite, "blocks": gen.blocks(5)[None]}


def decode_results(case):
    data = case["blocks"].tobytes()
    weights = [w for at in range(0, len(data), 9) for w in decode_block(data[at : at + 9])]
    return {"floats": np.array(weights, np.float32)}


def quantize_results(case):
    return {"blocks": quantize_row(case["floats"])}


def product_results(case):
    act = quantize_act(case["activations"])
    sums, result = product(case["blocks"], act, len(case["activations"]))
    return {"quantized": np.frombuffer(act, np.uint8), "sums": sums, "result": result}


FILES = {
    "decode.txt": (
        "blocks -> floats (float32): FORMAT.md, The block",
        decode_cases,
        decode_results,
    ),
    "quantize.txt": (
        "floats (float32) -> blocks at expert scale 1: FORMAT.md, From floats to blocks",
        quantize_cases,
        quantize_results,
    ),
    "product.txt": (
        "activations (float32), blocks of the rows -> quantized (a row of activations, mobie.h),\n"
        "# sums (int32 [rows][groups of 256 columns]), result (float32 [rows]): FORMAT.md, Products",
        product_cases,
        product_results,
    ),
}


def text_of(name: str) -> str:
    """The contents of one file of tests/vectors."""
    about, cases, results = FILES[name]
    lines = [
        f"# {about}",
        "# Written by tools/assets/make_vectors.py, which also says how the inputs are made. Do not edit.",
    ]
    for case_name, case in cases():
        lines += ["", f"case {case_name}"]
        for field, value in {**case, **results(case)}.items():
            little = value.astype(value.dtype.newbyteorder("<"))
            lines.append(f"{field} {little.tobytes().hex()}")
    return "\n".join(lines) + "\n"


def read(path: Path) -> dict[str, dict[str, bytes]]:
    """{case: {field: bytes}} of one file."""
    cases: dict[str, dict[str, bytes]] = {}
    for line in path.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == "case":
            fields = cases.setdefault(value, {})
        elif key and key != "#":
            fields[key] = bytes.fromhex(value)
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    parser.add_argument("--dir", type=Path, default=ROOT / "tests" / "vectors")
    args = parser.parse_args()
    stale = []
    for name in FILES:
        path, text = args.dir / name, text_of(name)
        if not args.check:
            args.dir.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(str(path))
    if stale:
        print("stale, run tools/assets/make_vectors.py:", *stale, file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
