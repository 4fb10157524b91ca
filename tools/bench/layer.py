"""How long calibrating one layer of a large model takes, part by part, and what the whole model adds up to.

    python -m tools.bench.layer                            two cores
    python -m tools.bench.layer --device cuda

The layer has the shapes of Qwen3-30B-A3B and random weights and inputs: what is timed does not depend on the values.
With --experts fewer experts than the layer's are timed, with the tokens they would get, and scaled up.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from mobie_export.calibration.statistics import LayerStatistics
from mobie_export.methods.calibrated import layer, refine
from mobie_export.models.twin import Experts

WIDTH, FF, N_EXPERT, TOP_K, N_LAYERS = 2048, 768, 128, 8, 48  # Qwen3-30B-A3B
BATCH_TOKENS = 2048
PAPER_HOURS = 10 + 58 / 60  # of MoBiE (arXiv 2604.06798) for this model on an RTX A6000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--tokens", type=int, default=262_144, help="of the calibration (default: 1024 sequences of 256)"
    )
    parser.add_argument("--experts", type=int, default=N_EXPERT, help="timed; the rest is scaled up")
    parser.add_argument("--steps", type=int, default=5, help="timed of a refinement")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    seconds = measure(args)
    report(args, seconds)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Part -> seconds for one whole layer, or for one step of 2048 tokens."""
    device, share = args.device, N_EXPERT // args.experts
    n_tokens = args.tokens // share  # so that every expert gets as many as in the whole layer
    seconds = {part: share * s for part, s in moe_pass(args, n_tokens).items()}
    weights = random_weights(args)
    index = torch.rand(n_tokens, args.experts, device=device).topk(TOP_K).indices
    x = torch.randn(n_tokens, WIDTH, device=device)
    saliency = {p: torch.rand(n_tokens * TOP_K, 1, device=device) for p in weights}
    statistics = LayerStatistics(x, index, saliency, weights, dict.fromkeys(weights, 1.0))
    before: dict[str, float] = {"moments": 0.0}
    moment = statistics.second_moment

    def timed_moment(*a, **k):
        t = now(device)
        found = moment(*a, **k)
        before["moments"] += now(device) - t
        return found

    statistics.second_moment = timed_moment
    t = now(device)
    packed, _ = layer.quantize_layer(statistics)
    total = now(device) - t
    seconds["second moments"] = share * before["moments"]
    seconds["error propagation"] = share * (total - before["moments"])

    experts = refine.BinaryExperts(packed, device=device)
    optimizer = torch.optim.Adam(experts.theta.values(), lr=1e-3, foreach=True)
    some = torch.randn(BATCH_TOKENS // share, WIDTH, device=device)

    def step() -> None:
        p = torch.full((len(some), TOP_K), 1 / TOP_K, device=device)
        experts(some.requires_grad_(), index[: len(some)], p).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    seconds["step"] = share * clock(device, lambda: [step() for _ in range(args.steps)]) / args.steps
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # a step of the streamed refinement saves and loads the layer's scales
        state = {"values": list(experts.theta.values()), "optimizer": optimizer.state_dict()}
        path = Path(folder) / "state.pt"

        def through_file() -> None:
            torch.save(state, path)
            torch.load(path, map_location=device)

        seconds["step, through files"] = seconds["step"] * 4 / 3 + share * clock(device, through_file)
    return seconds


def moe_pass(args: argparse.Namespace, n_tokens: int) -> dict[str, float]:
    """Seconds of the experts' forward and of both passes over n_tokens; attention, a tenth of it, is left out."""
    x = torch.randn(BATCH_TOKENS, WIDTH, device=args.device)
    index = torch.rand(BATCH_TOKENS, args.experts, device=args.device).topk(TOP_K).indices
    experts, p = Experts(**random_weights(args)), torch.full(index.shape, 1 / TOP_K, device=args.device)

    def forward() -> None:
        with torch.no_grad():
            experts(x, index, p)

    def backward() -> None:
        experts(x.requires_grad_(), index, p).sum().backward()

    times = n_tokens / BATCH_TOKENS
    return {"forward": times * clock(args.device, forward), "backward": times * clock(args.device, backward)}


def random_weights(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    shapes = {"gate": (FF, WIDTH), "up": (FF, WIDTH), "down": (WIDTH, FF)}
    return {p: torch.randn(args.experts, *s, device=args.device) / s[1] ** 0.5 for p, s in shapes.items()}


def now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def clock(device: str, work) -> float:
    work()
    t = now(device)
    work()
    return now(device) - t


def report(args: argparse.Namespace, s: dict[str, float]) -> None:
    layer, whole = refine.LAYERWISE.steps, refine.WHOLE.steps
    each = s["forward"] + s["backward"] + s["second moments"] + s["error propagation"]
    rows = {
        "forward and backward of the calibration": s["forward"] + s["backward"],
        "second moments (one for gate and up, one for down)": s["second moments"],
        "error propagation": s["error propagation"],
        f"layerwise refinement, {layer} steps of 2048 tokens": layer * s["step"],
    }
    for name, value in rows.items():
        print(f"{value:9.1f} s  {name}")
    model = N_LAYERS * (each + layer * s["step"])
    streamed = N_LAYERS * 100 * s["step, through files"]
    print(f"{model / 3600:9.2f} h  {N_LAYERS} layers")
    print(
        f"{streamed / 3600:9.2f} h  100 steps of 2048 tokens of the streamed refinement more (the default is {whole})"
    )
    print(f"{PAPER_HOURS:9.2f} h  the paper, on one RTX A6000")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    gpu = f", GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if args.device != "cpu" else ""
    print(f"peak memory {peak:.1f} GiB{gpu}")
    json.dump(s, sys.stdout)
    print()


if __name__ == "__main__":
    main()
