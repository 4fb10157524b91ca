"""How long the search for signs takes, an expert of Qwen3-30B-A3B's shapes: loops over columns by PyTorch, by what the
runtime has compiled, and the products that both of them need.

    python -m tools.bench.signs --threads 1

Random weights and second moments; alternating, medians. Gate and up of an expert are one matrix.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from mobie_export.calibration.products import product_type, products
from mobie_export.methods.calibrated import compiled, glas, signs
from tools.bench.common import say, table

WIDTH, FF = 2048, 768
SHAPES = {"gate and up": (2 * FF, WIDTH), "down": (WIDTH, FF)}  # rows, columns
EXPERTS = {"gate and up": 4, "down": 1}  # that are searched for together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--descents", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with products("cpu"):
        rows = [row for name in SHAPES for row in measure(name, args)]
    say(f"products in {product_type('cpu')}, {args.threads} threads, {args.descents} sweeps; ms an expert\n")
    say(table(["", "loops by", "factor", "propagation", "a sweep", "all", "products of a sweep"], rows))


def measure(name: str, args: argparse.Namespace) -> list[list[str]]:
    rows, cols = SHAPES[name]
    batch = EXPERTS[name]
    x = torch.randn(batch, 2 * cols, cols) * torch.rand(cols).square()
    W, H = torch.randn(batch, rows, cols), x.mT @ x
    found: dict[str, list[list[float]]] = {}
    best = compiled.best
    every = [None, *compiled.every()]
    for _ in range(args.rounds + 1):
        for search in every:
            compiled.best = lambda device, search=search: search  # type: ignore[assignment]
            times, h = [], H.clone()
            R = timed(times, lambda h=h: glas.factor(h))
            binary = timed(times, lambda R=R: signs.propagate(W, R))
            timed(times, lambda b=binary, h=h: [signs.descend(b, h) for _ in range(args.descents)])
            timed(times, lambda b=binary, h=h: [h[:, c : c + signs.SPAN] @ b.left for c in range(0, cols, signs.SPAN)])
            found.setdefault(search.name if search else "PyTorch", []).append(times)
    compiled.best = best
    made = []
    for loops, runs in found.items():
        factor, propagation, sweeps, product = (
            1e3 * statistics.median(t) / batch
            for t in zip(*runs[1:], strict=True)  # the first one warms up
        )
        parts = (factor, propagation, sweeps / args.descents, factor + propagation + sweeps, product)
        made.append([name, loops, *(f"{t:.0f}" for t in parts)])
    return made


def timed(times: list[float], work: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    made = work()
    times.append(time.perf_counter() - started)
    return made


if __name__ == "__main__":
    main()
