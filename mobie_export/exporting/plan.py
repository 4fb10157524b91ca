"""What an export will do and need: everything that can go wrong before the work does so here."""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from mobie_export import __version__, disk, gguf_io
from mobie_export.calibration import ranks
from mobie_export.errors import NO_MEMORY, USAGE, MobieError
from mobie_export.exporting import requantize, tensors, write
from mobie_export.exporting.effort import Effort, choose
from mobie_export.exporting.options import ExportOptions
from mobie_export.gguf_io import Entry, Gguf
from mobie_export.methods.base import Method, Needs, Rows, Run, cpus, expert_bits
from mobie_export.methods.stream import PIECE
from mobie_export.progress import Callback, size_text
from mobie_export.sources.find import Source
from mobie_export.spec import block, exportable, layout, metadata
from mobie_export.spec.block import Coding
from mobie_export.spec.layout import Experts

RUNTIME = "patched llama.cpp; mobie-export runtime build"
STOCK_RUNTIME = "any llama.cpp that knows Q1_0"
MAX_THREADS = 8  # that convert and write unless asked for: beyond that the disk is the limit

# For the estimate of memory, measured: interpreter with numpy and gguf; per thread, temporaries of a piece.
BASE_MEMORY = 80 << 20
PIECE_MEMORY = 32 * PIECE


@dataclass(frozen=True)
class Plan:
    """What an export will do and need, and all that it was asked for. Sizes in bytes; nothing has been written."""

    source: Source
    output: Path  # or its first shard
    asked: Path  # the output as it was asked for, without numbers of shards
    options: ExportOptions  # with the method that was chosen
    effort: str | None  # that the method stands for, where none was named
    architecture: str
    n_layers: int
    n_expert: int
    n_tensors: int
    expert_types: dict[str, int]  # type name -> expert tensors
    source_size: int
    output_size: int
    source_bpw: float  # stored bits per weight
    bpw: float
    expert_bpw: float
    disk_free: int
    work_size: int  # of unfinished work, while there is some
    peak_memory: int
    threads: int
    writers: int  # threads that convert and write
    seconds: dict[str, float]  # by phase, estimated; empty where the disk decides
    notes: tuple[str, ...]  # what a user should know

    @property
    def method(self) -> Method:
        assert isinstance(self.options.method, Method)
        return self.options.method

    @property
    def settings(self) -> dict[str, object]:
        """The method and all of its options, defaults included."""
        return {"method": self.method.name} | vars(self.method)


@dataclass(frozen=True)
class Ready:
    """A plan and what it was made from."""

    plan: Plan
    run: Run
    entries: list[Entry]
    types: dict[str, int]  # of tensors that are no experts, where they get another one


def default_output(source: Path, coding: Coding, suffix: str = "") -> Path:
    """`dir/name.gguf` -> `dir/name-mobie.gguf`, or what the type is called, the suffix behind it; the numbers of a
    shard are left out. Of a file in the hub's cache, which keeps nothing but downloads, `name-mobie.gguf` here."""
    match = gguf_io.SHARD_NAME.fullmatch(source.name)
    stem = match["stem"] if match else re.sub(r"\.gguf$", "", source.name)
    name = f"{stem}-{coding.option}{suffix}.gguf"
    return Path(name) if disk.hub_name(source) else source.with_name(name)


def prepare(
    gguf: Gguf,
    source: Source,
    output: Path,
    options: ExportOptions,
    progress: Callback | None = None,
    estimate_time: bool = False,
) -> Ready:
    """All checks of an export and its figures. Raises MobieError."""
    experts = exportable.check(gguf, options.coding)
    writers = options.threads or min(cpus(), MAX_THREADS)
    run = Run(
        gguf,
        experts,
        output,
        Needs(),
        options.threads,
        options.max_ram,
        progress,
        options.coding,
        options.overwrite,
    )
    effort: str | None = None
    left_out: tuple[str, ...] = ()
    if isinstance(options.method, Effort):
        asked = options.method
        chosen = ranks.from_first(lambda: choose(asked, run))
        method, effort, left_out = chosen.method, chosen.level, chosen.left_out
        options = replace(options, method=method)
    else:
        method = options.method
    if ranks.world() > 1 and not method.several:
        raise MobieError(
            USAGE,
            f"--method {method.name} runs in one process",
            f"{ranks.world()} of them, started by torchrun",
            "one, or --method ordered",
        )
    importance = method.importance()
    types = requantize.chosen(gguf, options.tensor_types, importance)
    requantize.check_library(types)
    needs = method.needs(run)
    run = replace(run, needs=needs)
    types |= dict.fromkeys(needs.tuned, gguf_io.TYPE_F32)
    memory = _memory(gguf, experts, writers, needs)
    if options.max_ram is not None and memory > options.max_ram:
        raise MobieError(
            NO_MEMORY,
            "the export needs more memory than --max-ram allows",
            size_text(memory),
            size_text(options.max_ram),
            method.smaller(run),
        )
    rows = tensors.table(gguf, experts, types, needs.beside, options.coding)
    stored = sum(gguf_io.tensor_bytes(shape, kind) for _, shape, kind in rows) + needs.spare
    expert_bpw = expert_bits(rows, experts) + 8 * needs.spare / sum(x.n_weights for x in experts.values())
    scales = {layout.scale_name(n) for n in experts}
    weights = sum(t.n_weights for t in gguf.tensors.values() if t.name not in scales)
    entries = _entries(gguf, options, method, expert_bpw)
    size = tensors.file_size(entries, rows, gguf.alignment) + needs.spare + needs.said
    outputs = gguf_io.file_paths(output, rows, options.split_max_size)
    work = max(0, needs.disk - needs.disk_there)
    inputs = [*gguf.paths, *method.inputs]
    free = write.check_output(output, outputs, inputs, size, options.overwrite, work)
    plan = Plan(
        source=source,
        output=outputs[0],
        asked=output,
        options=options,
        effort=effort,
        architecture=gguf.architecture,
        n_layers=len({layout.layer(n) for n in experts}),
        n_expert=max(x.n_expert for x in experts.values()),
        n_tensors=len(gguf.tensors),
        expert_types=dict(Counter(gguf_io.type_name(x.tensor.type_id) for x in experts.values())),
        source_size=gguf.file_size,
        output_size=size,
        source_bpw=layout.bits_per_weight(gguf)[0],
        bpw=8 * stored / weights,
        expert_bpw=expert_bpw,
        disk_free=free,
        work_size=needs.disk,
        peak_memory=memory,
        threads=run.computing_threads if needs.base else writers,
        writers=writers,
        seconds=method.seconds(run) if estimate_time else {},
        notes=(*left_out, *needs.notes),
    )
    return Ready(plan, run, entries, types)


def _memory(gguf: Gguf, experts: dict[str, Experts], threads: int, needs: Needs) -> int:
    """Upper estimate of the resident memory of an export in bytes."""
    # An expert at work: its stored bytes, a byte per sign, and the blocks twice (pieces, joined). Done ones wait in
    # line as blocks.
    largest = max(x.expert_bytes + 1.5 * x.rows * x.cols for x in experts.values())
    fixed = max(BASE_MEMORY, needs.base) + 4 * gguf.header_size + 3 * gguf_io.COPY_CHUNK
    writing = int(fixed + threads * (largest + PIECE_MEMORY))
    return max(writing, needs.memory) if needs.base else writing + needs.memory


# ---- metadata --------------------------------------------------------------------------------------------------------


def _entries(gguf: Gguf, options: ExportOptions, method: Method, expert_bpw: float) -> list[Entry]:
    coding = options.coding
    return gguf_io.merged(
        list(gguf.entries.values()),
        [
            metadata.FILE_TYPE.entry(coding.file_type),
            metadata.QUANTIZATION_VERSION.entry(2),
            metadata.FORMAT_VERSION.entry(block.FORMAT_VERSION),
            metadata.TYPE_ID.entry(coding.type_id),
            metadata.METHOD.entry(method.label),
            _settings_entry(options, method.settings()),
            metadata.EXPORTER.entry(f"mobie-export {__version__}"),
            metadata.RUNTIME.entry(STOCK_RUNTIME if coding.stock else RUNTIME),
            metadata.SOURCE_SEAL.entry(gguf.sha256),
            *metadata.UNSEALED,
            metadata.EXPERT_BPW.entry(expert_bpw),
        ],
    )


def final_entries(ready: Ready, settings: dict[str, object], rows: Rows) -> list[Entry]:
    """The plan's metadata with what is known when all signs are."""
    bpw = metadata.EXPERT_BPW.entry(expert_bits(rows, ready.run.experts))
    return gguf_io.merged(ready.entries, [_settings_entry(ready.plan.options, settings), bpw])


def _settings_entry(options: ExportOptions, settings: dict[str, object]) -> Entry:
    rules = options.tensor_types
    return metadata.settings_entry(settings | ({"tensor_types": [str(r) for r in rules]} if rules else {}))
