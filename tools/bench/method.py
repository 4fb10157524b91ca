"""What each part of the method adds and removes: perplexity of one model with its experts rebuilt by every variant.

    python -m tools.bench.method MODEL.gguf --text books.txt:400000 --text wikitext2-test.txt:500000

Every variant's experts are written as F16 and scored by `llama-perplexity -c 256` of the installed runtime; bits are
those of the file that the variant would be, or for ARB-LLM-RC those of its own form, everything counted. With --work
the variants are kept in a folder, and the next run scores them again or goes on scoring.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from mobie_export import gguf_io
from mobie_export.calibration import bundled, passes, states, store, text
from mobie_export.calibration.statistics import LayerStatistics
from mobie_export.methods.calibrated import layer
from mobie_export.methods.paper import arb, nges, recipe
from mobie_export.methods.paper.recipe import Settings
from mobie_export.models import twin
from mobie_export.runtime import installed
from mobie_export.spec import block
from tools.bench.common import run, say, table

BLOCK_BITS = 8 * block.BLOCK_BYTES / block.BLOCK_LEN
PLAIN = Settings(factor_bits=None, groups=0, columns=False, null_space=False)
GROUPS = 4

# Each line adds to or takes from the one it names; the paper's recipe is `all`.
VARIANTS: dict[str, Settings] = {
    "row scales, error propagation": PLAIN,
    "+ column scales (ARB-RC)": Settings(factor_bits=None, groups=0, null_space=False),
    "+ GLAS": Settings(factor_bits=None, null_space=False),
    "+ NGES": Settings(factor_bits=None),
    "+ CEJD, 8 bits = all": Settings(),
    "all, second plane on 5 % of the columns = --method paper": recipe.PAPER,
    "all, lambda as it stands in the paper": Settings(relative_lambda=False),
    "all but GLAS": Settings(groups=0),
    "all but NGES": Settings(null_space=False),
    "all but column scales": Settings(columns=False),
    "all, input factor in the activation metric": Settings(activation_metric=True),
    "all, factors in 16 bits": Settings(factor_bits=16),
    "all, factors in 4 bits": Settings(factor_bits=4),
    "all, second plane on half of the columns": Settings(salient=0.5),
}
SIGNS, OURS, COMPARATOR = (
    "signs and means, no calibration",
    "the default's error propagation",
    "ARB-LLM-RC, bitmaps counted",
)
# The default's error propagation in another basis of what gate and up read, or another order of what down reads.
ROTATED, ORDERED, DOWN_ORDERED = (
    "the same, block-Hadamard in front of gate and up",
    "the same, columns of gate and up ordered by size",
    "the same, columns of down ordered by size (folds)",
)
ROUTERS = ("router binarized too", "router binarized, NGES on it")


def bits(s: Settings, n_expert: int, shapes: dict[str, tuple[int, int]]) -> float:
    """Stored bits per expert weight of one layer."""
    weights = n_expert * sum(r * c for r, c in shapes.values())
    total = BLOCK_BITS * weights + 32 * n_expert * len(shapes)
    for p, (rows, cols) in shapes.items():
        if s.factor_bits is not None or p == "down":
            c = s.salient_columns(cols)
            total += n_expert * BLOCK_BITS * rows * c  # both planes share the scale
    if s.factor_bits is not None:
        width = shapes["gate"][1]
        total += 2 * width * width * (s.factor_bits if s.factor_bits == 16 else s.factor_bits + 0.5)
    return total / weights


def variants(model: Path, samples: int, folder: Path) -> tuple[dict, dict]:
    """(variant -> GGUF tensor -> float32 array, variant -> bits per expert weight)"""
    tensors: dict[str, dict[str, np.ndarray]] = {}
    found: dict[str, float] = {}
    with gguf_io.open_model(model) as gguf:
        t = twin.Twin(gguf)
        made = bundled.load(gguf, samples, text.SEQ_LEN, text.SEED)
        work = states.Work(folder, t, made)
        passes.forward(work)

        def put(name: str, i: int, weights: dict[str, torch.Tensor]) -> None:
            for p, (tensor, _) in t.expert_names(i).items():
                tensors.setdefault(name, {})[tensor] = weights[p].half().numpy()

        for factors in (False, True):
            basis = (lambda w: recipe.gradient_basis(w, Settings())) if factors else None
            for i, stats in passes.backward(work, groups=GROUPS, basis=basis):
                shapes = {p: tuple(w.shape[1:]) for p, w in stats.weights.items()}
                for name, s in VARIANTS.items():
                    if (s.factor_bits is not None) == factors:
                        put(name, i, recipe.dense(recipe.layer(stats, s)))
                        found[name] = bits(s, stats.n_expert, shapes)
                        print(f"layer {i}: {name}", file=sys.stderr, flush=True)
                if not factors:
                    others(put, found, tensors, i, stats, t)
    return tensors, found


def others(put, found, tensors, i, stats, t) -> None:
    """What stands beside the paper's recipe."""
    plain = {p: (w >= 0, w.abs().unflatten(-1, (-1, block.BLOCK_LEN)).mean(-1)) for p, w in stats.weights.items()}
    n_weights = sum(w.numel() for w in stats.weights.values())
    found[SIGNS] = found[OURS] = BLOCK_BITS + 32 * stats.n_expert * len(plain) / n_weights
    put(SIGNS, i, {p: recipe.stored(*x) for p, x in plain.items()})
    mean = {p: s.mean(1, keepdim=True) for p, s in stats.saliency.items()}
    one = LayerStatistics(stats.x, stats.index, mean, stats.weights, stats.fisher)
    put(OURS, i, default(one))
    width = stats.x.shape[1]
    identity, size = torch.eye(width), sum(stats.weights[p].square().sum((0, 1)) for p in ("gate", "up"))
    put(ROTATED, i, default(one, basis=hadamard(width)))
    put(ORDERED, i, default(one, basis=identity[:, size.argsort()]))
    put(DOWN_ORDERED, i, default(one, order=stats.weights["down"].square().sum(1).argsort(1)))
    found[ROTATED] = found[ORDERED] = found[DOWN_ORDERED] = found[OURS]
    weights, n = recipe.arb_llm_rc(stats)
    put(COMPARATOR, i, weights)
    found[COMPARATOR] = n / n_weights
    name = t.tensor_name(i, t.arch.router)
    router = t.tensor(name)[None]
    B, ar, ac = arb.row_column(router)
    Wq = arb.compose(B, ar, ac)
    D = nges.target(router, Wq, nges.null_projector(stats.x.T @ stats.x))
    br, bc, _ = nges.fit(D, Wq)
    for variant, values in zip(ROUTERS, (Wq, arb.compose(Wq, br, bc)), strict=True):
        tensors.setdefault(variant, {})[name] = values[0].numpy()


def default(stats, basis: torch.Tensor | None = None, order: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """A layer by the default's error propagation: in an orthogonal basis [width, width] of the inputs of gate and up,
    or with the neurons of every expert in an order, int64 [E, ff]."""
    weights, x = stats.weights, stats.x
    if basis is not None:
        x = x @ basis
        weights = weights | {p: weights[p] @ basis for p in ("gate", "up")}
    if order is not None:
        weights = store.reordered(weights, order)
    changed = LayerStatistics(x, stats.index, stats.saliency, weights, stats.fisher)
    packed, _ = layer.quantize_layer(changed)
    made = {p: recipe.stored(planes.signs, planes.magnitudes) for p, planes in packed.items()}
    if order is not None:
        made = store.reordered(made, order.argsort(1))
    if basis is not None:
        made |= {p: made[p] @ basis.T for p in ("gate", "up")}
    return made


def hadamard(width: int, block: int = block.BLOCK_LEN) -> torch.Tensor:
    """[width, width]: Sylvester's matrix over every `block` channels, orthonormal."""
    H = torch.ones(1, 1)
    while len(H) < block:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return torch.block_diag(*[H / block**0.5] * (width // block))


def write(model: Path, output: Path, changed: dict[str, np.ndarray]) -> None:
    with gguf_io.open_model(model) as gguf:
        stored = {n: values.reshape(gguf.tensors[n].shape[::-1]) for n, values in changed.items()}
        gguf_io.rewrite(gguf, output, tensors={n: gguf_io.NewTensor.of(values) for n, values in stored.items()})


def perplexity(tools: Path, model: Path, text: Path, threads: int) -> float:
    command = [tools / "llama-perplexity", "-m", model, "-f", text, "-c", "256", "-t", threads]
    printed = run(*command)
    return float(re.search(r"Final estimate: PPL = ([\d.]+)", printed)[1])


def made(model: Path, samples: int, folder: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """(variant -> its file, variant -> bits), made where the folder has them not yet."""
    order = (SIGNS, *VARIANTS, OURS, ROTATED, ORDERED, DOWN_ORDERED, COMPARATOR, *ROUTERS)
    files = {variant: folder / f"variant-{i}.gguf" for i, variant in enumerate(order)}
    bits_file = folder / "bits.json"
    if not bits_file.exists():
        with tempfile.TemporaryDirectory(dir=folder) as states:
            tensors, found = variants(model, samples, Path(states))
        for variant, file in files.items():
            write(model, file, tensors[variant])
        bits_file.write_text(json.dumps(found))
    return files, json.loads(bits_file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", action="append", required=True, metavar="FILE[:BYTES]", help="its first BYTES")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="keep the variants in this folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tools = installed.site() / "llama_cpp" / "bin"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = []
        for i, given in enumerate(args.text):
            path, _, size = given.partition(":")
            texts.append(folder / f"text-{i}")
            data = Path(path).read_bytes()
            texts[-1].write_bytes(data[: int(size)] if size else data)
        original = [perplexity(tools, args.model, text, args.threads) for text in texts]
        work = args.work or folder
        work.mkdir(parents=True, exist_ok=True)
        files, found = made(args.model, args.samples, work)
        headings = [Path(g.partition(":")[0]).stem for g in args.text]
        rows = [["original", "", *(f"{p:.2f}" for p in original)]]
        for variant, file in files.items():
            ratios = [perplexity(tools, file, t, args.threads) / p for t, p in zip(texts, original, strict=True)]
            shown = f"{found[variant]:.3f}" if variant in found else ""
            rows.append([variant, shown, *(f"{r:.3f}" for r in ratios)])
            say(" ".join(rows[-1]))
        print(table(["experts", "bits", *headings], rows))


if __name__ == "__main__":
    main()
