"""How fast does a GGUF run on this machine? Said so that others can compare: one row of docs/community/README.md."""

import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mobie_export import __version__, gguf_io
from mobie_export.errors import VERIFY_FAILED, MobieError
from mobie_export.gguf_io import Gguf
from mobie_export.methods.base import cpus
from mobie_export.reporting import speed
from mobie_export.reporting.gather import finite
from mobie_export.reporting.machine import machine
from mobie_export.runtime import libggml, upstream
from mobie_export.spec import layout, metadata

FORMAT = 1  # of the data
PROMPT, GENERATED, REPETITIONS = 512, 64, 5
BUSY = 0.5  # a load above it is named
HEAD = ("date", "machine", "build", "model", "prompt, tokens/s", "generation, tokens/s")


@dataclass(frozen=True)
class Benchmark:
    """What `bench` returns. data: everything, as JSON has it; speeds are tokens per second."""

    data: dict[str, Any]

    @property
    def row(self) -> str:
        """A line of Markdown, the cells of HEAD."""
        d = self.data
        rates = (_rate(name, found) for name, found in d["speed"].items())
        cells = (d["at"][:10], _machine(d), _build(d["build"]), _model(d["model"]), *rates)
        return f"| {' | '.join(c.replace('|', '/') for c in cells)} |"


def bench(
    file: str | Path,
    *,
    threads: int | None = None,
    prompt: int = PROMPT,
    generated: int = GENERATED,
    repetitions: int = REPETITIONS,
) -> Benchmark:
    """Measure with llama-bench of the patched runtime how many tokens per second a GGUF reads and writes here.

    threads: default, the cores of this machine; prompt, generated: tokens; repetitions: of each. MobieError where the
    runtime is missing or does not load the file.
    """
    with gguf_io.open_model(Path(file)) as gguf:
        model = _about(gguf)
    here, n_threads = machine(), threads or cpus()
    rows = speed.rows(Path(file), prompt, generated, repetitions, n_threads)
    first = rows[0]
    kernels = libggml.kernel_names()[-1]
    build = {"mobie_export": __version__, "llama_cpp": upstream.read_pin().llama_cpp, "kernels": kernels}
    backends = {"backends": first["backends"], "gpu": first["gpu_info"], "gpu_layers": first["n_gpu_layers"]}
    found = {}
    for row in rows:
        name = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
        rates = [float(x) for x in row["samples_ts"]]
        found[name] = {"median": statistics.median(rates), "least": min(rates), "most": max(rates), "samples": rates}
    data = {"format": FORMAT, "at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": here}
    data |= {"threads": n_threads, "build": build | backends, "model": model, "speed": found}
    if finite(data) != data:
        raise MobieError(VERIFY_FAILED, "llama-bench measured what is no number", str(found))
    return Benchmark(data)


def _about(gguf: Gguf) -> dict[str, Any]:
    experts = layout.experts(gguf)
    types: dict[str, int] = {}
    for tensor in gguf.tensors.values():
        kind = gguf_io.type_name(tensor.type_id)
        types[kind] = types.get(kind, 0) + tensor.n_bytes
    of_experts = {gguf_io.type_name(x.tensor.type_id) for x in experts.values()}
    bpw, expert_bpw = layout.bits_per_weight(gguf)
    return {
        "file": gguf.paths[0].name,
        "name": gguf.value("general.name"),
        "architecture": gguf.architecture,
        "layers": gguf.value(f"{gguf.architecture}.block_count"),
        "width": gguf.value(f"{gguf.architecture}.embedding_length"),
        "experts": max((x.n_expert for x in experts.values()), default=0),
        "used": gguf.value(f"{gguf.architecture}.expert_used_count"),
        "bytes": gguf.file_size,
        "bpw": bpw,
        "expert_bpw": expert_bpw,
        "expert_types": sorted(of_experts),
        "types": dict(sorted(types.items(), key=lambda item: -item[1])),
        "method": gguf.value(metadata.METHOD.name),
        "seal": gguf.value(metadata.SEAL.name),
    }


# ---- the row ---------------------------------------------------------------------------------------------------------


def _machine(data: dict[str, Any]) -> str:
    m, gpu = data["machine"], data["build"]["gpu"]
    parts = [m["cpu"] + (f" ({m['details']})" if m["details"] else "")]
    parts += [gpu] if gpu and data["build"]["backends"] != "CPU" else []
    parts.append(f"{m['cores']} cores")
    parts += [f"{m['memory'] / 2**30:.0f} GiB"] if m["memory"] else []
    parts.append(f"{data['threads']} threads")
    parts += [f"beside other programs, load {m['load']:.1f}"] if (m["load"] or 0) > BUSY else []
    return ", ".join(parts)


def _build(build: dict[str, Any]) -> str:
    where = "" if build["backends"] == "CPU" else f", {build['backends']}"
    return f"{build['mobie_export']}, llama.cpp {build['llama_cpp']}, {build['kernels']}{where}"


def _model(m: dict[str, Any]) -> str:
    shapes = f"{m['architecture']}, {m['layers']} layers, width {m['width']}"
    if m["expert_bpw"] is not None:
        shapes += f", {m['experts']} experts, {m['used']} used"
    rest = [kind for kind in m["types"] if kind not in m["expert_types"]][:2]
    types = ", ".join(rest)
    if m["expert_bpw"] is not None:
        types = f"experts {' and '.join(m['expert_types'])} at {m['expert_bpw']:.3f} bits, the rest {types}"
    return f"{m['name'] or m['file']}: {shapes}; {m['bytes'] / 1e9:.2f} GB; {types}"


def _rate(name: str, found: dict[str, Any]) -> str:
    """The name, as llama-bench has it, where it is not what everybody measures."""
    other = "" if name in (f"pp{PROMPT}", f"tg{GENERATED}") else f"{name}: "
    return f"{other}{found['median']:.1f} ({found['least']:.1f} to {found['most']:.1f})"
