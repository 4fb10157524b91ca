"""docs/scale.md: what models of hundreds of billions of weights would take, by arithmetic: nothing is run.

    python -m tools.bench.scale

Shapes are made up as headers without weights. Memory, disk and operations are the planner's; what is sent is counted
from what calibration/ranks.py is asked for. Rates of a machine are assumptions, and options.
"""

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from mobie_export import gguf_io
from mobie_export.methods.base import Needs, Run
from mobie_export.methods.calibrated import estimate, refine, steps
from mobie_export.methods.ordered import Ordered
from mobie_export.methods.ordered.steps import SWEEPS
from mobie_export.models.twin import Twin
from mobie_export.spec import block, exportable, layout
from tools.assets import fabricate_gguf as fab
from tools.bench.common import table

BASE = fab.SHAPES["qwen3-30b-a3b"]
SHAPES = {
    "30 billion (Qwen3-30B-A3B)": BASE,
    "235 billion (Qwen3-235B-A22B)": replace(BASE, n_layer=94, n_embd=4096, n_head=64, n_ff_expert=1536),
    "a trillion (60 layers of 384 experts, 7168 x 2048)": replace(
        BASE, n_layer=60, n_embd=7168, n_head=64, n_ff_expert=2048, n_expert=384
    ),
}
RANKS = 1, 4, 16
METHOD = Ordered(bpw=1.25, samples=256)
GIB = 2**30


def sent(twin: Twin, n: int) -> dict[str, float]:
    """Bytes that a rank sends, by what it is for. A sum to one rank, and a gathering, cost the tensor; a sum to all
    twice as much."""
    down = [x for x in estimate.expert_tensors(twin) if layout.is_down(x.tensor.name)]
    share, signs = (n - 1) / n, 1 + 4 / block.BLOCK_LEN  # of a weight: a byte and its part of a magnitude
    moments = sum(4.0 * (x.n_expert + 2 * 4) * x.rows**2 for x in down)  # four of a layer, to all: its inputs' drift
    squares = sum(4.0 * (SWEEPS + 1) * x.n_expert * (2 * x.cols**2 + x.cols * x.rows) for x in down)
    moved = sum(4.0 * SWEEPS * x.n_weights for x in down)
    return {
        "second moments": share * moments,
        "least squares of down": share * (squares + moved),
        "signs": share * signs * 3 * sum(x.n_weights for x in down),
    }


def needs(gguf: gguf_io.Gguf, n: int) -> Needs:
    """Of one rank of n, one on each machine."""
    world = {"TORCHELASTIC_RUN_ID": "arithmetic", "WORLD_SIZE": str(n), "RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= world
    try:
        experts = exportable.check(gguf, block.MOBIE)
        return steps.sizes(METHOD, Run(gguf, experts, Path("out.gguf"), Needs(), None, None, None))
    finally:
        for name in world:
            del os.environ[name]


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / 3600:,.0f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--products", type=float, default=1e12, help="operations a second of a machine")
    parser.add_argument("--copies", type=float, default=1e10, help="float32 weights a machine copies in a second")
    parser.add_argument("--reads", type=float, default=5e8, help="weights a machine reads and decodes in a second")
    parser.add_argument("--network", type=float, default=1.25e9, help="bytes a second to and from a machine")
    args = parser.parse_args()
    rate = estimate.Speed(args.products, args.copies, args.reads)
    rows: list[list[str]] = []
    phases: list[list[str]] = []
    refined: list[list[str]] = []
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.gguf"
            fab.fabricate(path, shape, "BF16", sparse=True)
            with gguf_io.open_model(path) as gguf:
                twin = Twin(gguf)
                weights = sum(x.n_weights for x in layout.experts(gguf).values())
                size = gguf.file_size - 2 * weights + weights * METHOD.bpw / 8
                work = METHOD.operations(twin, block.MOBIE)
                for n in RANKS:
                    found, moving = needs(gguf, n), sent(twin, n)
                    computing = sum(rate.seconds(w.of_rank(n)) for w in work.values())
                    on_wire = sum(moving.values()) / args.network
                    figures = [
                        f"{size / GIB:,.0f} GiB",
                        f"{found.memory / GIB:,.0f} GiB",
                        f"{found.disk / GIB:,.0f} GiB",
                    ]
                    figures += [f"{sum(moving.values()) / 1e9:,.0f} GB", hours(computing), hours(on_wire)]
                    rows.append([name, str(n), *figures])
                each = {phase: hours(rate.seconds(w)) for phase, w in work.items()}
                gb = [f"{x / 1e9:,.0f} GB" for x in sent(twin, 1 << 30).values()]
                phases.append([name, *each.values(), *gb])
                # of signs as long as they are free, and of magnitudes; twice, being summed to all
                free, magnitudes = 8.0 * weights, 8.0 * weights / block.BLOCK_LEN
                for kept, gradient in {"streamed, end-to-end": free + magnitudes, "magnitudes": magnitudes}.items():
                    share = refine.WHOLE.free_signs if gradient > free else 1.0
                    wire = gradient * share * refine.WHOLE.steps / args.network
                    refined.append([name, kept, f"{gradient / 1e9:,.0f} GB", hours(wire)])
    head = ["model", "machines", "output", "memory of each", "work on its disk", "each sends"]
    print(table([*head, "computing", "sending"], rows))
    print(table(["model", *work, *sent(twin, 2)], phases))
    print(table(["model", "--refine", "each sends in a step", "in all steps"], refined))


if __name__ == "__main__":
    main()
