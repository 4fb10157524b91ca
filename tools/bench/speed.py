"""Speed of the mobie type beside llama.cpp's other small types: the tables of docs/measured/speed.md.

    python -m tools.bench.speed                      # everything, hours
    python -m tools.bench.speed --quick              # minutes, written to the work folder, says little
    python -m tools.bench.speed --only models --models qwen3-30b-a3b --layers 48 --types Q1_0,IQ1_S,TQ2_0
    python -m tools.bench.speed --only models --peer ik_llama.cpp=DIR      # DIR: its build folder
    python -m tools.bench.speed --render             # the document from what has been measured

Three parts: the kernels alone (one core), MUL_MAT_ID in ggml's CPU backend, llama-bench on fabricated models. What is
measured goes to results.json in the work folder at once; a second run continues where the first one stopped, and
measures anew what another build of the runtime measured. Nothing else should run on the machine.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from mobie_export.errors import MobieError
from mobie_export.reporting.machine import machine as described
from mobie_export.runtime import doctor, installed, libggml, patching, processes, upstream
from tools.assets import fabricate_gguf as fab
from tools.bench.common import Results, say, table

ROOT = Path(__file__).resolve().parents[2]
OURS = "mobie"
# in the order of their bits per weight
TYPES = ("Q1_0", "IQ1_S", "TQ1_0", "IQ1_M", "TQ2_0", "IQ2_XXS", "Q2_K", "Q4_0", "Q4_K")
PARTS = ("kernels", "ops", "models")
MAIN_MODEL = "qwen3-30b-a3b"  # whose shapes the targets are about, and which is also measured with the second type
RESTS = ("Q4_0", "Q8_0")  # types of all matrices that are not experts
TITLES = {
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "olmoe-1b-7b": "OLMoE-1B-7B",
    "qwen1.5-moe-a2.7b": "Qwen1.5-MoE-A2.7B",
    "deepseek-v2-lite": "DeepSeek-V2-Lite",
    "gpt-oss-20b": "GPT-OSS-20B",
}
# Types of a peer that are worth a comparison: number in its ggml (None: the one upstream has), weights of a block.
PEER_TYPES = {"IQ1_S_R4": (219, 32), "IQ1_KT": (158, 256), "Q1_0": (None, 128)}
PEER_LIMIT = 1.8  # bits per weight: up to here a peer's type counts for the target


@dataclass(frozen=True)
class Settings:
    work: Path
    models: tuple[str, ...] = tuple(TITLES)
    types: tuple[str, ...] = TYPES
    rests: tuple[str, ...] = RESTS
    rounds: int = 3  # of llama-bench; kernels and ops take more, they are short
    short_rounds: int = 9
    repetitions: int = 3  # within a run of llama-bench
    layers: int = 8
    megabytes: int = 256  # of weights of every type, kernels
    op_megabytes: int = 512  # the same for MUL_MAT_ID, where the last call's experts should have left the cache
    tokens: tuple[int, ...] = (1, 2, 8, 32, 128, 512)
    prompts: tuple[int, ...] = (1, 8, 64, 512)
    generated: int = 64
    threads: tuple[int, ...] = tuple(t for t in (1, 2) if t <= (os.cpu_count() or 1))
    peers: dict[str, Path] = field(default_factory=dict)
    peer_flags: tuple[str, ...] = ()
    quick: bool = False


QUICK = {
    "quick": True,
    "models": (MAIN_MODEL,),
    "types": ("Q1_0", "IQ1_S", "TQ2_0"),
    "rounds": 1,
    "short_rounds": 2,
    "repetitions": 1,
    "layers": 2,
    "megabytes": 16,
    "op_megabytes": 32,
    "tokens": (1, 512),
    "prompts": (1, 512),
}


# --- results ----------------------------------------------------------------------------------------------------------


def library_folder() -> Path:
    return fab.runtime_ggml().parent


@cache
def runtime_digest() -> str:
    h = hashlib.sha256()
    for library in ("ggml-base", "ggml-cpu", "llama"):
        h.update((library_folder() / f"lib{library}{fab.runtime_ggml().suffix}").read_bytes())
    return h.hexdigest()[:12]


# --- kernels and ops --------------------------------------------------------------------------------------------------


def compile_bench(work: Path, name: str = "ops") -> Path:
    """tools/bench/NAME.cpp against the headers the runtime was built from and the libraries that are installed."""
    ggml = patching.home() / "src" / upstream.LLAMA / "ggml"
    if not (ggml / "include").exists():
        raise processes.unavailable(f"there is no {ggml / 'include'}", todo="mobie-export runtime build")
    source, program = ROOT / "tools/bench" / f"{name}.cpp", work / f"bench_{name}"
    lib = library_folder()
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O3", "-march=native", str(source), "-o", str(program)]
    command += [f"-I{ggml / 'include'}", f"-I{ggml / 'src' / 'mobie'}", f"-L{lib}", f"-Wl,-rpath,{lib}"]
    command += ["-lggml", "-lggml-cpu", "-lggml-base", "-lpthread"]
    processes.run(command, f"compiling {name}.cpp failed")
    return program


def run_bench(s: Settings, *arguments: object) -> list[dict]:
    command = [str(compile_bench(s.work)), *map(str, arguments)]
    say(" ".join(command[1:]))
    r = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=clean_environment())
    if r.returncode:
        sys.exit(f"bench_ops ended with {r.returncode}")
    return [json.loads(line) for line in r.stdout.splitlines()]


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "MOBIE_ISA" and not key.startswith("GGML_")}


def kernels_name(s: Settings) -> str:
    return f"kernels/{s.megabytes} MB"


def ops_name(s: Settings) -> str:
    return f"ops/{s.op_megabytes} MB"


def covers(entry: dict | None, what: str, s: Settings) -> bool:
    """Whether everything that is asked for has been measured."""
    lines = pick(entry["lines"], what=what) if entry else []
    found = {(line["type"].lower(), line.get("tokens"), line.get("threads")) for line in lines}
    types = [t.lower() for t in (OURS, *s.types)]
    if what == "kernel":
        return {(t, None, None) for t in types} <= found
    return {(t, n, threads) for t in types for n in s.tokens for threads in s.threads} <= found


def measure_kernels(s: Settings, results: Results) -> None:
    if not covers(results.get(kernels_name(s)), "kernel", s):
        types = ",".join((OURS, *s.types))
        results.put(kernels_name(s), {"lines": run_bench(s, "kernels", s.megabytes, s.short_rounds, types)})


def measure_ops(s: Settings, results: Results) -> None:
    if not covers(results.get(ops_name(s)), "mul_mat_id", s):
        lists = [",".join(map(str, x)) for x in ((OURS, *s.types), s.tokens, s.threads)]
        results.put(ops_name(s), {"lines": run_bench(s, "ops", s.op_megabytes, s.short_rounds, *lists)})


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rival:
    """Another type for a model's experts, perhaps of another program."""

    kind: str  # the type asked for
    label: str  # what the file holds
    bits: float  # stored, of an expert weight
    peer: str = ""
    missing: str = ""  # why it cannot be measured

    @property
    def key(self) -> str:
        return f"{self.peer}:{self.kind}" if self.peer else self.kind


def expert_bits(shape: fab.Shape, kinds: dict[str, str], types: fab.Types) -> float:
    matrices = fab.expert_matrices(shape)
    weights = sum(cols * rows for cols, rows, _ in matrices.values())
    return sum(8 * types.row_bytes(kinds[name], dims[0]) * dims[1] for name, dims in matrices.items()) / weights


def rivals(shape: fab.Shape, names: tuple[str, ...]) -> Iterator[Rival]:
    """One per file: types that fall back to the same ones are one file."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        try:
            groups.setdefault(tuple(fab.expert_types(shape, name).values()), []).append(name)
        except MobieError as e:
            yield Rival(name, name, 0, missing=f"{e.what}, and llama-quantize knows no other type instead")
    for kinds, members in groups.items():
        resolved = dict(zip(fab.expert_matrices(shape), kinds, strict=True))
        own = [m for m in members if set(kinds) == {m}]
        others = [m for m in members if m not in own]
        label = kinds[0] if len(set(kinds)) == 1 else f"{kinds[0]}, down {resolved['ffn_down_exps']}"
        if others and len(set(kinds)) == 1:
            label += f" ({'also ' if own else ''}in place of {', '.join(others)})"
        yield Rival((own or members)[0], label, expert_bits(shape, resolved, fab.Types()))


def peer_library(folder: Path) -> Path:
    for name in ("libggml-base.so", "libggml.so", "libggml-base.dylib", "libggml.dylib"):
        found = sorted(folder.rglob(name))
        if found:
            return found[0]
    sys.exit(f"{folder}: no libggml found; build with -DBUILD_SHARED_LIBS=ON")


def peer_program(folder: Path) -> Path:
    for path in (folder / "bin" / "llama-bench", folder / "llama-bench", folder / "build" / "bin" / "llama-bench"):
        if path.exists():
            return path
    sys.exit(f"{folder}: no bin/llama-bench found")


def peer_ids() -> dict[str, int]:
    return {name: number for name, (number, _) in PEER_TYPES.items() if number}


def peer_rivals(shape: fab.Shape, peer: str, folder: Path) -> Iterator[Rival]:
    types = fab.Types(peer_library(folder), peer_ids())
    for name, (_, block) in PEER_TYPES.items():
        widths = {dims[0] for dims in fab.expert_matrices(shape).values() if dims[0] % block}
        label = f"{name} in {peer}"
        if widths:
            why = f"its blocks of {block} do not divide rows of {', '.join(map(str, sorted(widths)))}"
            yield Rival(name, label, 0, peer, why)
            continue
        yield Rival(name, label, expert_bits(shape, dict.fromkeys(fab.expert_matrices(shape), name), types), peer)


def shape_of(model: str, s: Settings) -> fab.Shape:
    return replace(fab.SHAPES[model], n_layer=min(s.layers, fab.SHAPES[model].n_layer))


def fabricate(model: str, rest: str, rival: Rival | None, s: Settings) -> Path:
    """Make a file in a process of its own, so that its memory and libraries go away, and read it into the cache."""
    kind = rival.kind if rival else OURS
    path = s.work / f"{model}-{shape_of(model, s).n_layer}-{rest}-{rival.key if rival else OURS}.gguf".replace(":", "-")
    command = [sys.executable, "-m", fab.__name__, str(path), "--shape", model]
    command += ["--layers", str(shape_of(model, s).n_layer), "--type", rest, "--experts", kind]
    if rival and rival.peer:
        ids = ",".join(f"{name}={number}" for name, number in peer_ids().items())
        command += ["--ggml", str(peer_library(s.peers[rival.peer])), "--ids", ids]
    try:
        processes.run(command, f"{path.name} could not be made", cwd=ROOT)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    with open(path, "rb") as file:
        while file.read(16 << 20):
            pass
    return path


def llama_bench(program: Path, path: Path, s: Settings, flags: tuple[str, ...] = ()) -> dict[str, float]:
    """{"pp512 t2": tokens per second, the median of the repetitions}; MobieError when it fails."""
    command = [str(program), "-m", str(path), "-p", ",".join(map(str, s.prompts)), "-n", str(s.generated)]
    command += ["-t", ",".join(map(str, s.threads)), "-r", str(s.repetitions), "-o", "json", *flags]
    r = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    found = re.search(r"^\[\s*\{.*^\]", r.stdout, re.DOTALL | re.MULTILINE)  # a peer's may print other lines, too
    if r.returncode or not found:
        raise processes.unavailable(f"{program.name} failed on {path.name}", processes.tail(r.stderr, 8))
    speeds = {}
    for test in json.loads(found[0]):
        name = f"pp{test['n_prompt']}" if test["n_prompt"] else f"tg{test['n_gen']}"
        speeds[f"{name} t{test['n_threads']}"] = statistics.median(test["samples_ts"])
    return speeds


def our_program() -> Path:
    path = installed.site() / "llama_cpp" / "bin" / "llama-bench"
    if not path.exists():
        raise processes.unavailable(f"there is no {path}", todo="mobie-export runtime build")
    return path


def models_name(model: str, rest: str, rival: Rival, s: Settings) -> str:
    return f"models/{model}/{shape_of(model, s).n_layer} layers/{rest}/{rival.key}"


def all_rivals(model: str, s: Settings) -> list[Rival]:
    shape = shape_of(model, s)
    found = list(rivals(shape, s.types))
    for peer, folder in s.peers.items():
        found += peer_rivals(shape, peer, folder)
    return found


def rests_of(model: str, s: Settings) -> tuple[str, ...]:
    return s.rests if model == MAIN_MODEL else s.rests[:1]


def measure_models(s: Settings, results: Results) -> None:
    for model in s.models:
        for rest in rests_of(model, s):
            waiting = [r for r in all_rivals(model, s) if not r.missing and not enough(results, model, rest, r, s)]
            if not waiting:
                continue
            ours = fabricate(model, rest, None, s)
            try:
                for rival in waiting:
                    measure_rival(model, rest, rival, ours, s, results)
            finally:
                ours.unlink()


def enough(results: Results, model: str, rest: str, rival: Rival, s: Settings) -> bool:
    entry = results.get(models_name(model, rest, rival, s))
    return bool(entry) and len(entry["rounds"]) >= s.rounds


def measure_rival(model: str, rest: str, rival: Rival, ours: Path, s: Settings, results: Results) -> None:
    name = models_name(model, rest, rival, s)
    about = {"label": rival.label, "bits": rival.bits, "peer": rival.peer, "ours_bytes": ours.stat().st_size}
    rounds = (results.get(name) or {"rounds": []})["rounds"]
    theirs = None
    try:
        theirs = fabricate(model, rest, rival, s)
        about["bytes"] = theirs.stat().st_size
        memory = doctor.available_memory()
        if memory is not None and about["bytes"] + about["ours_bytes"] > memory:
            raise processes.unavailable(f"{theirs.name} and ours do not fit into {memory / 1e9:.1f} GB of memory")
        program = peer_program(s.peers[rival.peer]) if rival.peer else our_program()
        flags = s.peer_flags if rival.peer else ()
        sides = {"ours": lambda: llama_bench(our_program(), ours, s)}
        sides["theirs"] = lambda: llama_bench(program, theirs, s, flags)
        while len(rounds) < s.rounds:
            order = sorted(sides, reverse=len(rounds) % 2 == 1)
            rounds.append({side: sides[side]() for side in order})
            results.put(name, {**about, "rounds": rounds})
            say(f"{name}, round {len(rounds)}: ours / theirs {ratios_text(rounds[-1])}")
    except MobieError as e:
        say(f"{name}: {e}")
        results.put(name, {**about, "rounds": rounds, "failed": e.what})
    finally:
        if theirs:
            theirs.unlink()


def ratios_text(round_: dict) -> str:
    return ", ".join(f"{test} {round_['ours'][test] / speed:.2f}" for test, speed in round_["theirs"].items())


# --- reading results --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """Rates of one subject of bench_ops."""

    weights: float  # 1e9 products of a weight and an activation per second
    gigabytes: float  # per second

    @classmethod
    def of(cls, line: dict) -> "Line":
        seconds = statistics.median(line["seconds"]) * 1e9
        return cls(line["macs"] / seconds, line["bytes"] / seconds)


def pick(lines: list[dict], **wanted: object) -> list[dict]:
    """Lines with these members; types are compared as ggml spells them or as we do."""
    same = lambda a, b: str(a).lower() == str(b).lower()  # noqa: E731
    return [line for line in lines if all(same(line.get(key), value) for key, value in wanted.items())]


def best(lines: list[dict], rate: Callable[[Line], float] = lambda line: line.weights, **wanted: object) -> float:
    """The highest rate among the lines; 0 where there is none."""
    return max((rate(Line.of(line)) for line in pick(lines, **wanted)), default=0.0)


def reading(lines: list[dict], **wanted: object) -> float:
    return best(lines, lambda line: line.gigabytes, what="read", **wanted)


@dataclass(frozen=True)
class Compared:
    """One rival's file beside ours in llama-bench."""

    rival: Rival
    entry: dict

    def speed(self, test: str, side: str = "theirs") -> float:
        return statistics.median(r[side][test] for r in self.entry["rounds"])

    def ratio(self, test: str) -> float:
        return statistics.median(r["ours"][test] / r["theirs"][test] for r in self.entry["rounds"])


def compared(results: Results, model: str, rest: str, s: Settings) -> list[Compared]:
    """All rivals with results, also those of peers that are not given this time."""
    prefix = f"models/{model}/{shape_of(model, s).n_layer} layers/{rest}/"
    found = []
    for name in results.entries:
        entry = results.get(name)
        if name.startswith(prefix) and entry and entry["rounds"]:
            peer, _, kind = name.removeprefix(prefix).rpartition(":")
            found.append(Compared(Rival(kind, entry["label"], entry["bits"], peer), entry))
    return sorted(found, key=lambda c: (c.rival.peer, c.rival.bits))


# --- targets ----------------------------------------------------------------------------------------------------------

Target = tuple[str, str, str, bool | None]  # what, measured, target, met


def target(what: str, *alternatives: tuple[float, float, str]) -> Target:
    """Met when one of the alternatives (measured, wanted, unit) is; unit "x" or "%"."""

    def show(value: float, unit: str) -> str:
        return f"{value:.2f}x" if unit == "x" else f"{100 * value:.0f} % of {unit}"

    known = [a for a in alternatives if a[0]]
    measured = ", ".join(show(value, unit) for value, _, unit in known)
    wanted = " or ".join(show(value, unit) for _, value, unit in alternatives)
    return what, measured or "not measured", wanted, any(a[0] >= a[1] for a in known) if known else None


def quotient(a: float, b: float) -> float:
    return a / b if b else 0.0


def kernel_targets(s: Settings, results: Results) -> Iterator[Target]:
    entry = results.get(kernels_name(s))
    lines = entry["lines"] if entry else []
    kernels = pick(lines, what="kernel")
    others = {t: best(kernels, type=t) for t in ("Q1_0", "IQ1_S", "TQ2_0")}
    ours = best(kernels, type=OURS)
    masked = best([line for line in kernels if not line["isa"].startswith(("avx512", "amx"))], type=OURS)
    read = quotient(best(kernels, lambda line: line.gigabytes, type=OURS), reading(lines, threads=1))
    what = f"product with one token, one core, {s.megabytes} MB, against "
    yield target(what + "Q1_0", (quotient(ours, others["Q1_0"]), 4, "x"))
    yield target(what + "IQ1_S", (quotient(ours, others["IQ1_S"]), 8, "x"))
    yield target(what + "TQ2_0", (quotient(ours, others["TQ2_0"]), 2, "x"), (read, 0.85, "one core's read bandwidth"))
    yield target("the same without AVX-512, against Q1_0", (quotient(masked, others["Q1_0"]), 2.5, "x"))


def op_targets(s: Settings, results: Results) -> Iterator[Target]:
    entry = results.get(ops_name(s))
    threads = max(s.threads)
    lines = pick(entry["lines"], threads=threads) if entry else []
    decode = pick(lines, what="mul_mat_id", tokens=1)
    read = quotient(best(decode, lambda line: line.gigabytes, type=OURS), reading(lines))
    ours = best(decode, type=OURS)
    what = f"MUL_MAT_ID, Qwen3 shapes, {threads} threads, 1 token, against "
    bandwidth = (read, 0.8, "the read bandwidth")
    yield target(what + "Q1_0", (quotient(ours, best(decode, type="Q1_0")), 3, "x"))
    yield target(what + "IQ1_S", (quotient(ours, best(decode, type="IQ1_S")), 6, "x"), bandwidth)
    many = pick(lines, what="mul_mat_id", tokens=512)
    ours = best(many, type=OURS)
    fastest = best([line for line in many if line["type"] != OURS])
    what = f"the same with 512 tokens, {threads} threads"
    yield target(f"{what}, against the fastest of all types", (quotient(ours, fastest), 2, "x"))
    yield target(what, (quotient(ours, best(lines, what="int8")), 0.5, "the int8 rate"))


def model_targets(s: Settings, results: Results) -> Iterator[Target]:
    found = compared(results, MAIN_MODEL, RESTS[0], s)
    t = f" t{max(s.threads)}"
    tg, pp = f"tg64{t}", f"pp512{t}"

    def ratios(test: str, chosen: list[Compared]) -> list[float]:
        return [c.ratio(test) for c in chosen if test in c.entry["rounds"][0]["theirs"]]

    own = [c for c in found if not c.rival.peer]
    what = f"llama-bench, Qwen3 shapes, {shape_of(MAIN_MODEL, s).n_layer} layers, {max(s.threads)} threads, "
    for name, wanted in (("Q1_0", 1.6), ("IQ1_S", 2.4), ("TQ2_0", 1.15)):
        measured = max(ratios(tg, [c for c in own if c.rival.kind == name]), default=0)
        yield target(f"{what}tg64, against {name}", (measured, wanted, "x"))
    three = [c for c in own if c.rival.kind in ("Q1_0", "IQ1_S", "TQ2_0")]
    yield target(f"{what}pp512, against the fastest of these three", (min(ratios(pp, three), default=0), 1.3, "x"))
    yield target(f"{what}pp512, against the fastest of all types", (min(ratios(pp, own), default=0), 1.3, "x"))
    small = [c for c in found if c.rival.peer and c.rival.bits < PEER_LIMIT]
    for peer in sorted({c.rival.peer for c in small} | set(s.peers)) or ["ik_llama.cpp"]:
        theirs = [c for c in small if c.rival.peer == peer]
        for test, name in ((tg, "tg64"), (pp, "pp512")):
            measured = min(ratios(test, theirs), default=0)
            yield target(f"{what}{name}, against {peer}'s best under {PEER_LIMIT} bits", (measured, 1.2, "x"))


# --- document ---------------------------------------------------------------------------------------------------------

NOTES_BEGIN, NOTES_END = "<!-- notes: begin, kept when the document is rendered anew -->", "<!-- notes: end -->"
DEFAULT_NOTES = "## What was tried\n"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else ""


def bits(line: dict) -> str:
    return f"{8 * line['bytes'] / line['macs']:.4g}"


def spelled(name: str) -> str:
    """A type as we write it; ggml has some of them in lower case."""
    return next((t for t in TYPES if t.lower() == name.lower()), name)


def display(name: str) -> str:
    return f"**{name}**" if name == OURS else spelled(name)


def machine() -> str:
    found, kernels = described(), libggml.kernel_names()
    memory = f"{(found['memory'] or 0) / 2**30:.0f} GiB of memory"
    return (
        f"{found['cpu']}, {os.cpu_count()} cores, {memory}, {found['system']}; "
        f"kernels `{kernels[-1]}` (also here: {', '.join(kernels[:-1])}); llama.cpp of llama-cpp-python "
        f"{upstream.read_pin().version}, built for this machine."
    )


def kernel_section(s: Settings, results: Results) -> Iterator[str]:
    entry = results.get(kernels_name(s))
    if not entry:
        return
    lines = entry["lines"]
    read, int8 = reading(lines, threads=1), best(lines, what="int8", threads=1)
    yield "## The kernels alone\n"
    yield (
        f"One core, rows of 2048 weights, {s.megabytes} MB of weights per type, one activation row. The other types' "
        "`vec_dot` is called row by row, as ggml does; ours is `mobie_kernels.matmul`. All subjects in turns, medians "
        f"of {len(lines[0]['seconds'])} rounds.\n"
    )
    rows = []
    for line in pick(lines, what="kernel"):
        rate = Line.of(line)
        name = display(line["type"]) + (f", {line['isa']}" if line["type"] == OURS else "")
        shares = [percent(rate.gigabytes, read), percent(rate.weights, int8)]
        rows.append([name, bits(line), f"{rate.weights:.1f}", f"{rate.gigabytes:.1f}", *shares])
    head = ["type", "bits per weight", "Gweights/s", "GB/s", "of the read bandwidth", "of the int8 rate"]
    yield table(head, rows)
    yield machine_line(lines)


def machine_line(lines: list[dict]) -> str:
    """Read bandwidth and int8 rate in the same run."""
    threads = sorted({line["threads"] for line in pick(lines, what="read")})
    read = ", ".join(f"{reading(lines, threads=t):.1f} GB/s with {t}" for t in threads)
    sets = list(dict.fromkeys(line["isa"] for line in pick(lines, what="int8")))
    rates = [[f"{best(lines, what='int8', isa=isa, threads=t):.0f}" for t in threads] for isa in sets]
    int8 = "; ".join(f"{isa} {' and '.join(both)}" for isa, both in zip(sets, rates, strict=True))
    count = " and ".join(map(str, threads))
    return f"Threads that only read: {read}. Multiplying int8 in registers, {count} threads, GMAC/s: {int8}.\n"


def op_section(s: Settings, results: Results) -> Iterator[str]:
    entry = results.get(ops_name(s))
    if not entry:
        return
    lines = entry["lines"]
    tokens = sorted({line["tokens"] for line in pick(lines, what="mul_mat_id")})
    threads = sorted({line["threads"] for line in lines})
    yield "## MUL_MAT_ID in ggml's CPU backend\n"
    yield (
        "The three expert products of Qwen3-30B-A3B (gate and up 2048 to 768, down 768 to 2048; 128 experts, 8 per "
        f"token), as many layers as make {s.op_megabytes} MB or more of every type, experts drawn anew for every call. "
        "Weights are where llama.cpp puts them: types it rearranges while loading are measured rearranged (marked r). "
        "GMAC/s; with one token that is Gweights/s.\n"
    )
    decode = pick(lines, what="mul_mat_id", tokens=1)
    rows = []
    for line in pick(decode, threads=threads[0]):
        row = [marked(line), bits(line)]
        for t in threads:
            (same,) = pick(decode, type=line["type"], threads=t)
            rate = Line.of(same)
            share = percent(rate.gigabytes, reading(lines, threads=t))
            row += [f"{rate.weights:.1f}", share]
        rows.append(row)
    columns = [text for t in threads for text in (f"{count_text(t)}", "of the read bandwidth")]
    yield table(["1 token", "bits per weight", *columns], rows)
    for t in threads:
        batches = [n for n in tokens if n > 1]
        int8 = best(lines, what="int8", threads=t)
        rows = []
        for line in pick(lines, what="mul_mat_id", tokens=tokens[-1], threads=t):
            rates = [best(lines, what="mul_mat_id", type=line["type"], tokens=n, threads=t) for n in batches]
            rows.append([marked(line), *(f"{r:.1f}" for r in rates), percent(rates[-1], int8)])
        head = [f"tokens, {count_text(t)}", *map(str, batches), f"int8 rate at {batches[-1]}"]
        yield table(head, rows)
    yield machine_line(lines)


def count_text(threads: int) -> str:
    return f"{threads} thread" + "s" * (threads > 1)


def marked(line: dict) -> str:
    return display(line["type"]) + (" (r)" if line["isa"] != "CPU" else "")


def model_section(model: str, rest: str, s: Settings, results: Results) -> Iterator[str]:
    found = compared(results, model, rest, s)
    if not found:
        return
    shape = shape_of(model, s)
    kinds = dict.fromkeys(fab.expert_matrices(shape), OURS)
    yield f"### {TITLES[model]}, {shape.n_layer} of {fab.SHAPES[model].n_layer} layers, the rest {rest}\n"
    tests = [t for t in found[0].entry["rounds"][0]["ours"] if all(t in c.entry["rounds"][0]["theirs"] for c in found)]
    for t in sorted({test.split()[1] for test in tests}):
        columns = [test for test in tests if test.endswith(f" {t}")]
        ours = [statistics.median(c.speed(test, "ours") for c in found) for test in columns]
        size = f"{found[0].entry['ours_bytes'] / 1e9:.2f}"
        speeds = [f"{speed:.1f}" for speed in ours]
        rows = [[f"**{OURS}**", f"{expert_bits(shape, kinds, fab.Types()):.4g}", size, *speeds]]
        for c in found:
            cells = [f"{c.speed(test):.1f} ({c.ratio(test):.2f}x)" for test in columns]
            rows.append([c.rival.label, f"{c.rival.bits:.4g}", f"{c.entry['bytes'] / 1e9:.2f}", *cells])
        head = [f"experts, {count_text(int(t[1:]))}", "bits per weight", "GB", *(test.split()[0] for test in columns)]
        yield table(head, rows)
    left_out = [f"{r.label}: {r.missing}." for r in all_rivals(model, s) if r.missing]
    left_out += [f"{e['label']}: {e['failed']}." for e in failures(results, model, rest, s)]
    if left_out:
        yield "Left out: " + " ".join(left_out) + "\n"


def failures(results: Results, model: str, rest: str, s: Settings) -> list[dict]:
    prefix = f"models/{model}/{shape_of(model, s).n_layer} layers/{rest}/"
    entries = [results.get(name) for name in results.entries if name.startswith(prefix)]
    return [e for e in entries if e and "failed" in e]


def models_section(s: Settings, results: Results) -> Iterator[str]:
    sections = [text for m in s.models for rest in rests_of(m, s) for text in model_section(m, rest, s, results)]
    if not sections:
        return
    yield "## llama-bench\n"
    yield (
        "Tokens per second on files with the shapes of real models and random weights "
        "(`tools/assets/fabricate_gguf.py`). Where layers are left out the output head is whole, so that its share of "
        "the time is larger than in the full model. All matrices that are not experts have the same type in every "
        "file. In brackets how much faster ours is, the median over rounds; in every round both files are run, in "
        "changing order. Where blocks do not divide a width, the experts have the type that llama-quantize falls back "
        "to, as the first column says.\n"
    )
    yield from sections


def target_section(s: Settings, results: Results) -> Iterator[str]:
    yield "## Targets\n"
    marks = {True: "met", False: "**missed**", None: ""}
    every = [*kernel_targets(s, results), *op_targets(s, results), *model_targets(s, results)]
    yield table(["", "measured", "target", ""], [[what, found, goal, marks[met]] for what, found, goal, met in every])


def notes(document: Path) -> str:
    """What somebody has written into the document."""
    text = document.read_text() if document.exists() else ""
    if NOTES_BEGIN in text and NOTES_END in text:
        return text.split(NOTES_BEGIN)[1].split(NOTES_END)[0].strip("\n") + "\n"
    return DEFAULT_NOTES


def render(s: Settings, results: Results, folder: Path) -> None:
    document = folder / "speed.md"
    parts = [
        "# Speed\n",
        "Written by `make bench-speed` (`tools/bench/speed.py`, options: `make bench-speed ARGS='--help'`).\n",
        machine() + "\n",
    ]
    if s.quick:
        parts.append("**A quick run, to see that everything works. Its figures say nothing.**\n")
    else:
        parts.append("![Expert products, generation and prompt processing by type](speed.svg)\n")
    for section in (target_section, kernel_section, op_section, models_section):
        parts += section(s, results)
    parts.append(f"{NOTES_BEGIN}\n\n{notes(document)}\n{NOTES_END}\n")
    document.write_text("\n".join(parts))
    say(f"written: {document}")


# --- command line -----------------------------------------------------------------------------------------------------


def names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        wrong = [n for n in found if n not in known]
        if wrong:
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)} not among {', '.join(known)}")
        return found

    return parse


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def peer_argument(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not folder or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: wanted NAME=FOLDER")
    return name, Path(folder).resolve()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=names(PARTS), default=PARTS, help=f"parts: {', '.join(PARTS)}")
    parser.add_argument("--models", type=names(tuple(TITLES)), help=f"of {', '.join(TITLES)} (all)")
    parser.add_argument("--types", type=names(TYPES), help=f"of {', '.join(TYPES)} (all)")
    parser.add_argument("--rests", type=names(RESTS), help="types of what is not experts (Q4_0, and once Q8_0)")
    parser.add_argument("--rounds", type=int, help="of llama-bench on both files (3)")
    parser.add_argument("--short-rounds", type=int, help="of kernels and ops (9)")
    parser.add_argument("--repetitions", type=int, help="within a run of llama-bench (3)")
    parser.add_argument("--layers", type=int, help="of the fabricated models, at most all (8)")
    parser.add_argument("--threads", type=numbers, help="numbers of threads (1,2)")
    parser.add_argument("--quick", action="store_true", help="a few minutes; the document goes to the work folder")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "bench-speed", help="folder for files and results"
    )
    parser.add_argument("--peer", type=peer_argument, action="append", default=[], help="NAME=FOLDER of another build")
    parser.add_argument("--peer-flags", type=shlex.split, default=[], help="for the peer's llama-bench, in one word")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the document")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    chosen = ("models", "types", "rests", "rounds", "short_rounds", "repetitions", "layers", "threads")
    given = {key: getattr(args, key) for key in chosen if getattr(args, key) is not None}
    if args.quick:
        given = {**QUICK, **given}
    s = Settings(args.work.resolve(), peers=dict(args.peer), peer_flags=tuple(args.peer_flags), **given)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # large files are removed on the way out
    s.work.mkdir(parents=True, exist_ok=True)
    results = Results(s.work / "results.json", runtime_digest())
    say(f"work folder {s.work}, {shutil.disk_usage(s.work).free / 1e9:.1f} GB free")
    measure = {"kernels": measure_kernels, "ops": measure_ops, "models": measure_models}
    try:
        for part in args.only if not args.render else ():
            measure[part](s, results)
        render(s, results, s.work if s.quick else ROOT / "docs/measured")
    except MobieError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main()
