"""Quality beside llama.cpp's other small types at equal or larger size: the tables of docs/measured/quality.md.

    python -m tools.bench.quality MODEL.gguf [--text FILE[:BYTES]]... [--calibration FILE]

Peers are made by the patched runtime's own `llama-quantize` with an importance matrix of `llama-imatrix` on the same
calibration text, the package's own by default; only experts are quantized. ARB-LLM-RC, which no file format has, is
scored as F16 and its bits are counted. Everything is scored by the runtime's `llama-perplexity` against the
logits of the original: what is scored is what ships. Results are kept in a work folder and taken from there by the
next run, so it can be stopped at any time. The plots are drawn from the tables: make plots.
"""

from __future__ import annotations

import argparse
import dataclasses
import lzma
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from math import log
from pathlib import Path

import torch

from mobie_export import gguf_io
from mobie_export.calibration import bundled, passes, states
from mobie_export.calibration.text import load, read_text
from mobie_export.calibration.tokenizer import tokenize
from mobie_export.errors import MobieError
from mobie_export.methods.paper import recipe
from mobie_export.models import twin
from mobie_export.spec import block, layout
from tools.bench import method
from tools.bench.common import Failed, Results, run, say, table

REPO = Path(__file__).resolve().parents[2]
TINY = REPO / "examples/tiny-moe/tiny-moe-f16.gguf"

CONTEXT = 256  # llama-perplexity scores the second half of every window
CALIBRATION_BYTES, PIECES = 10_000_000, 1000  # of a long text, evenly spaced
ROUTER_SEQUENCES = 64
PEERS = ("Q1_0", "IQ1_S", "IQ1_M", "TQ1_0", "IQ2_XXS", "Q2_K")
PRESETS = ("small", "medium", "large")
BEGIN, END = "<!-- begin: tools/bench/quality.py -->", "<!-- end -->"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A file to score: its name in the tables and how it is made."""

    name: str
    group: str  # ours, peer, part or original
    make: Callable[[Path], None]  # writes it


class Bench:
    """The work folder: files, and results by name in results.json."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.work = args, args.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.results = Results(self.work / "results.json")
        self.texts = dict(self.text(spec) for spec in args.text)
        self.calibration = self.calibration_text()
        self.truth: list | None = None  # the original's choice of experts

    def text(self, spec: str) -> tuple[str, Path]:
        """(name, file) of FILE[:BYTES]; the first bytes are copied."""
        name, _, size = spec.partition(":")
        source = Path(name)
        target = self.work / f"text-{source.stem}.txt"
        if not target.exists():
            target.write_bytes(read(source)[: int(size) if size else None])
        return source.stem, target

    def calibration_text(self) -> Path:
        target = self.work / "calibration.txt"
        if not target.exists():
            data = bundled.plain() if self.args.calibration is None else read(self.args.calibration)
            if len(data) > CALIBRATION_BYTES:
                step, size = len(data) // PIECES, CALIBRATION_BYTES // PIECES
                data = b"".join(data[i * step : i * step + size] for i in range(PIECES))
            target.write_bytes(data)
        return target

    def tool(self, name: str, *arguments: object) -> str:
        return run(Path(sysconfig.get_path("scripts")) / name, *arguments)

    def export(self, path: Path, *options: str) -> None:
        """Make one of ours; the seconds it took are kept."""
        started = time.perf_counter()
        command = [sys.executable, "-m", "mobie_export", self.args.model, "-o", path, "--overwrite", "--quiet"]
        if options:
            method = [] if "--method" in options else ["--method", "calibrated"]
            command += [*method, *(["--calibration", self.calibration] if self.args.calibration else [])]
        text = run(*command, *options, *(["--threads", str(self.args.threads)] if self.args.threads else []))
        self.results.put(f"made {path.stem}", {"seconds": time.perf_counter() - started, "report": text.splitlines()})

    def imatrix(self) -> Path:
        path = self.work / "imatrix.gguf"
        if not path.exists():
            part = self.work / "imatrix.part.gguf"
            options = ["-c", CONTEXT, *self.threads()]
            self.tool("llama-imatrix", "-m", self.args.model, "-f", self.calibration, "-o", part, *options)
            part.replace(path)
        return path

    def peer(self, path: Path, kind: str) -> None:
        # overrides count only beside a quantized default, and the first match is taken
        types = [f"ffn_(gate|up|gate_up|down)_exps={kind.lower()}", ".=f16"]
        options = ["--imatrix", self.imatrix(), *(x for t in types for x in ("--tensor-type", t))]
        options += ["--output-tensor-type", "f16", "--token-embedding-type", "f16"]
        self.tool("llama-quantize", *options, self.args.model, path, "Q8_0")

    def arb_llm_rc(self, path: Path) -> None:
        """The original with every expert by ARB-LLM-RC, as F16; its bits, bitmaps included, go to the results."""
        torch.set_num_threads(self.args.threads or 1)
        text = read_text(self.calibration)
        with tempfile.TemporaryDirectory(dir=self.work) as folder, gguf_io.open_model(self.args.model) as gguf:
            model = twin.Twin(gguf)
            work = states.Work(Path(folder), model, load(self.args.model, text))
            passes.forward(work)
            tensors, bits = {}, 0
            for i, stats in passes.backward(work):
                weights, n = recipe.arb_llm_rc(stats)
                bits += n
                for p, (tensor, _) in model.expert_names(i).items():
                    tensors[tensor] = weights[p].half().numpy()
        method.write(self.args.model, path, tensors)
        bpw = bits / sum(x.size for x in tensors.values())
        self.results.put(f"made {path.stem}", {"bits": {"bpw": bpw, "active": bpw}})

    def threads(self) -> list[str]:
        return ["-t", str(self.args.threads)] if self.args.threads else []

    def file(self, variant: Variant) -> Path:
        if variant.group == "original":
            return self.args.model
        path = self.work / f"{slug(variant.name)}.gguf"
        if not path.exists():
            say(f"making {variant.name}")
            part = path.with_suffix(".tmp.gguf")
            part.unlink(missing_ok=True)
            variant.make(part)
            part.replace(path)
            self.results.put(f"made {path.stem}", self.results.get(f"made {part.stem}") or {})
        return path

    def base(self, text: str) -> Path:
        """The original's logits over a text."""
        path = self.work / f"logits-{text}.bin"
        if not path.exists():
            part = path.with_suffix(".part")
            self.perplexity(self.args.model, text, "--kl-divergence-base", part)
            part.replace(path)
        return path

    def perplexity(self, path: Path, text: str, *options: object) -> str:
        common = ["-m", path, "-f", self.texts[text], "-c", CONTEXT, "-fa", "off", *self.threads()]
        return self.tool("llama-perplexity", *common, *options)

    def divergence(self, path: Path, text: str) -> dict[str, float]:
        """`statistics` of one file."""
        return statistics(self.perplexity(path, text, "--kl-divergence-base", self.base(text), "--kl-divergence"))

    def score(self, variant: Variant) -> dict:
        """{"bpw", "active", text: {"ppl", "kl", "kl99", "top1"}} of one file."""
        key = f"score {variant.name}"
        found = self.results.get(key) or {}
        if set(self.texts) <= set(found):
            return found
        path = self.file(variant)
        found |= (self.results.get(f"made {path.stem}") or {}).get("bits") or bits(path)
        for text in self.texts:
            if text not in found:
                say(f"scoring {variant.name} on {text}")
                found[text] = self.divergence(path, text)
                self.results.put(key, found)
        if "router" not in found:
            found["router"] = self.router(path)
            self.results.put(key, found)
        return found

    def router(self, path: Path) -> list[float] | None:
        """By layer, the share of the original's experts that a token still goes to; None where it cannot be said: other
        architectures, and types that the gguf package does not decode."""
        try:
            with tempfile.TemporaryDirectory(dir=self.work) as folder:
                plain = path
                if is_ours(path):
                    plain = Path(folder) / "f32.gguf"
                    run(sys.executable, "-m", "mobie_export", "dequantize", path, "-o", plain, "-q")
                if self.truth is None:
                    self.truth = chosen_experts(self.args.model, self)
                ours, truth = chosen_experts(plain, self), self.truth
        except (MobieError, NotImplementedError) as e:
            say(f"no router agreement: {e}")
            return None
        same = [(a.unsqueeze(-1) == b.unsqueeze(-2)).any(-1).double().mean() for a, b in zip(ours, truth, strict=True)]
        return [float(x) for x in same]


def chosen_experts(path: Path, bench: Bench) -> list:
    """By layer, the experts of every token of the first text's beginning, int64 [n_tokens, k]."""
    text = next(iter(bench.texts.values())).read_bytes()
    tokens, _ = tokenize(bench.args.model, text[: ROUTER_SEQUENCES * CONTEXT * 8])
    tokens = torch.from_numpy(tokens[: len(tokens) // CONTEXT * CONTEXT]).long().view(-1, CONTEXT)[:ROUTER_SEQUENCES]
    found = []
    with gguf_io.open_model(path) as gguf, torch.no_grad():
        model = twin.Twin(gguf)
        hidden = model.embedding()[tokens]
        for i in range(model.n_layers):
            layer = model.layer(i)
            model.experts_of(layer).tap = lambda seen: found.append(seen.index.clone())
            hidden = model.run(layer, hidden)
    return found


def variants(bench: Bench) -> list[Variant]:
    def ours(name: str, group: str, *options: str) -> Variant:
        return Variant(name, group, lambda path: bench.export(path, *options))

    steps = ["--steps", str(bench.args.steps)] if bench.args.steps else []
    found = [Variant("F16", "original", lambda path: None)]
    found += [Variant(kind, "peer", lambda path, kind=kind: bench.peer(path, kind)) for kind in PEERS]
    for preset in PRESETS:
        for refinement in bench.args.refine:
            name = f"ours {preset}, {refinement}"
            found.append(ours(name, "ours", "--preset", preset, "--refine", refinement, *steps))
    found += [
        ours("sign", "part"),
        ours("small, error propagation", "part", "--refine", "none"),
        ours("small, layerwise", "part", "--refine", "layerwise"),
        ours("medium, error propagation", "part", "--preset", "medium", "--refine", "none"),
        ours("large, error propagation", "part", "--preset", "large", "--refine", "none"),
    ]
    found.append(Variant("ARB-LLM-RC", "peer", bench.arb_llm_rc))
    found.append(ours("recipe paper", "ours", "--method", "paper"))
    wanted = bench.args.only
    return [v for v in found if v.group == "original" or not wanted or any(w in v.name for w in wanted)]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def statistics(text: str) -> dict[str, float]:
    """The figures of `llama-perplexity --kl-divergence`."""
    patterns = {
        "ppl": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
        "ratio": r"Mean PPL\(Q\)/PPL\(base\)\s*:\s*([\d.]+)",
        "kl": r"Mean\s+KLD:\s*(-?[\d.]+)",
        "kl99": r"99\.0%\s+KLD:\s*([\d.]+)",
        "top1": r"Same top p:\s*([\d.]+)",
    }
    found = {key: re.search(pattern, text) for key, pattern in patterns.items()}
    missing = [key for key, match in found.items() if not match]
    if missing:
        raise Failed(f"llama-perplexity printed no {', '.join(missing)}.\n{text[-3000:]}")
    return {key: float(match[1]) for key, match in found.items()}


def bits(path: Path) -> dict[str, float]:
    """Stored and active bits per expert weight."""
    with gguf_io.open_model(path) as gguf:
        return {"bpw": layout.bits_per_weight(gguf)[1], "active": layout.active_bits_per_weight(gguf)}


def is_ours(path: Path) -> bool:
    with gguf_io.open_model(path) as gguf:
        return any(t.type_id == block.TYPE_ID for t in gguf.tensors.values())


def closed(score: dict, text: str, results: Results) -> float | None:
    """Share of the gap in log perplexity between Q1_0 and the original that is closed."""
    worst = (results.get("score Q1_0") or {}).get(text)
    return None if worst is None or worst["ratio"] < 1.01 else 1 - log(score[text]["ratio"]) / log(worst["ratio"])


# ---- report ----------------------------------------------------------------------------------------------------------


def tables(bench: Bench, chosen: list[Variant]) -> str:
    scored = [(v, bench.results.get(f"score {v.name}") or {}) for v in chosen]
    scored = [(v, s) for v, s in scored if set(bench.texts) <= set(s)]
    texts = list(bench.texts)
    parts = []
    titles = {"peer": "llama.cpp's types and ours", "part": "What the parts add"}
    for groups, title in ((("original", "ours", "peer"), titles["peer"]), (("part",), titles["part"])):
        rows = [(v, s) for v, s in scored if v.group in groups]
        if not rows:
            continue
        head = ["experts as", "bits stored / active", *(f"{t}: PPL, ratio (closed)" for t in texts)]
        head += [f"{t}: KL mean / 99 %, same top-1" for t in texts] + ["same experts, by layer"]
        lines = []
        for v, s in sorted(rows, key=lambda row: (row[1]["bpw"], row[0].name)):
            cells = [v.name, f"{s['bpw']:.3f} / {s['active']:.3f}"]
            for t in texts:
                share = closed(s, t, bench.results)
                cells.append(
                    f"{s[t]['ppl']:.2f}, {s[t]['ratio']:.3f}" + (f" ({share:.0%})" if share is not None else "")
                )
            cells += [f"{s[t]['kl']:.4f} / {s[t]['kl99']:.2f}, {s[t]['top1']:.1f} %" for t in texts]
            cells.append(" ".join(f"{x:.1%}" for x in s["router"]) if s.get("router") else "")
            lines.append(cells)
        parts.append(f"### {title}\n\n" + table(head, lines))
    return "\n".join(parts)


def write(bench: Bench, chosen: list[Variant]) -> None:
    """The tables into the marked part of the document."""
    document = bench.args.output
    plots = [f"![Mean KL divergence over stored bits, {text}](quality-{text}.svg)" for text in bench.texts]
    body = "\n\n".join([f"{BEGIN}\n", tables(bench, chosen), *plots, END])
    old = document.read_text() if document.exists() else f"# Quality\n\n{BEGIN}\n{END}\n"
    before, rest = old.split(BEGIN, 1)
    document.write_text(before + body + rest.split(END, 1)[1])
    say(f"written: {document}")


# ---- small things ----------------------------------------------------------------------------------------------------


def read(path: Path) -> bytes:
    data = Path(path).read_bytes()
    return lzma.decompress(data) if Path(path).suffix == ".xz" else data


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", name.lower())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=TINY)
    parser.add_argument("--text", action="append", help="held-out text, its first BYTES")
    parser.add_argument("--calibration", type=Path, help="text (default: the package's)")
    parser.add_argument("--refine", action="append", choices=("layerwise", "streamed", "end-to-end"))
    parser.add_argument("--steps", type=int, help="of the refinement of all layers together")
    parser.add_argument("--only", action="append", help="only what has this in its name")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=REPO / "build/bench-quality")
    parser.add_argument("-o", "--output", type=Path, default=REPO / "docs/measured/quality.md")
    args = parser.parse_args()
    args.text = args.text or [str(REPO / "mobie_export/data/held-out.txt")]
    args.refine = args.refine or ["end-to-end"]  # streamed gives the same bytes, slower
    return args


def main() -> None:
    bench = Bench(parse())
    chosen = variants(bench)
    for variant in chosen:
        try:
            bench.score(variant)
        except Failed as e:
            if variant.group != "peer":
                sys.exit(str(e))
            say(f"{variant.name} is left out: {e}")  # a width that is no multiple of its block, say
        write(bench, chosen)


if __name__ == "__main__":
    main()
