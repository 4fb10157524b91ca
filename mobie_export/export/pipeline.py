"""From a source GGUF to a written and checked output: plan, stream, read back, rename.

Every output tensor is a `Job`: a row of the tensor table and a function that makes its bytes, piece by piece. Writing
is one pass over the jobs. Tensors that are no experts are copied; experts are quantized one by one in a few threads and
written in order, so that the bytes depend neither on the number of threads nor on the machine.
"""

import contextlib
import dataclasses
import itertools
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import gguf as gguf_py
import numpy as np

from mobie_export import __version__, disk, gguf_io, loads
from mobie_export.calibration import imatrix
from mobie_export.errors import BAD_INPUT, BAD_OUTPUT, NO_MEMORY, NO_SPACE, UNSUPPORTED, VERIFY_FAILED, MobieError
from mobie_export.export import changes, requantize
from mobie_export.gguf_io import Entry, Gguf, Tensor
from mobie_export.methods.calibrated import calibrated
from mobie_export.methods.sign import quantize
from mobie_export.progress import Progress, peak_memory, size_text
from mobie_export.spec import block, exportable, layout, metadata, verify
from mobie_export.spec.layout import Experts

if TYPE_CHECKING:
    from mobie_export.calibration.passes import Calibration

RUNTIME = "patched llama.cpp; mobie-export runtime build"
PIECE = 1 << 18  # weights decoded at once: a megabyte of float32 stays in a core's cache
MIN_SAMPLES = 64  # fewer are advised to nobody
MAX_THREADS = 8  # that convert and write unless asked for: beyond that the disk is the limit

# For the estimate of memory, measured: interpreter with numpy and gguf; per thread, temporaries of a piece.
BASE_MEMORY = 80 << 20
PIECE_MEMORY = 32 * PIECE

# `dequantize --type`: type of the experts and the value of general.file_type for it (llama.h, LLAMA_FTYPE_*).
FLOAT_TYPES = {"f32": (gguf_io.TYPE_F32, 0), "f16": (gguf_io.TYPE_F16, 1), "bf16": (gguf_io.TYPE_BF16, 32)}


Row = tuple[str, tuple[int, ...], int]  # of a tensor table: name, shape, type
Rows = Sequence[Row]


@dataclass(frozen=True)
class Job:
    """Tensors of the output that are made together: rows that follow each other, and their bytes in this order. No
    piece has bytes of two tensors."""

    rows: Rows
    pieces: Callable[[], Iterable[np.ndarray]]


@dataclass(frozen=True)
class Plan:
    """What an export will do and need. Sizes in bytes."""

    source: Path
    output: Path
    architecture: str
    n_layers: int
    n_expert: int
    n_tensors: int
    expert_types: dict[str, int]  # type name -> expert tensors
    source_size: int
    output_size: int
    source_bpw: float
    bpw: float
    expert_bpw: float
    disk_free: int
    work_size: int  # of the calibration's files, while it runs
    peak_memory: int
    threads: int
    writers: int  # threads that convert and write
    seconds: dict[str, float] = field(default_factory=dict)  # of a calibration, by phase; estimated by `plan` only
    notes: tuple[str, ...] = ()  # what a user should know of the calibration's text


@dataclass
class Report:
    """What was done. Sizes in bytes; `rare` names experts whose importance is their layer's mean, by tensor; `plain`
    are tensors of layers that predict further tokens, of which the importance matrix says nothing."""

    output: Path
    source_size: int
    output_size: int
    bpw: float
    expert_bpw: float | None
    seconds: float
    bytes_per_second: float
    peak_memory: int | None
    rare: dict[str, list[int]] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    calibration: calibrated.Outcome | None = None
    not_loaded: str = ""  # what the installed runtime has against the output; empty where it loads it, or is not there


# ---- commands --------------------------------------------------------------------------------------------------------


def default_output(source: Path) -> Path:
    """`dir/name.gguf` -> `dir/name-mobie.gguf`; the numbers of a shard are left out. Of a file in the hub's cache,
    which keeps nothing but downloads, `name-mobie.gguf` here."""
    match = gguf_io.SHARD_NAME.fullmatch(source.name)
    stem = match["stem"] if match else re.sub(r"\.gguf$", "", source.name)
    name = f"{stem}-mobie.gguf"
    return Path(name) if disk.hub_name(source) else source.with_name(name)


def plan(
    source: Path,
    output: Path | None = None,
    *,
    imatrix_file: Path | None = None,
    calibration: calibrated.Options | None = None,
    tensor_types: Sequence[requantize.Rule] = (),
    threads: int | None = None,
    overwrite: bool = False,
    max_bytes: int | None = None,
    max_ram: int | None = None,
) -> Plan:
    """All checks of an export and its figures, without writing anything. Errors as `export` raises them."""
    with gguf_io.open_model(Path(source)) as gguf:
        ready = _prepare(
            gguf, Path(source), output, imatrix_file, calibration, tensor_types, threads, overwrite, max_bytes, max_ram
        )
        if ready.calibration is None:
            return ready.plan
        from mobie_export.export import estimate

        return dataclasses.replace(ready.plan, seconds=estimate.seconds(gguf, ready.calibration))


def export(
    source: Path,
    output: Path | None = None,
    *,
    imatrix_file: Path | None = None,
    calibration: calibrated.Options | None = None,
    tensor_types: Sequence[requantize.Rule] = (),
    threads: int | None = None,
    overwrite: bool = False,
    max_bytes: int | None = None,
    max_ram: int | None = None,
    show_progress: bool = False,
    part: Path | None = None,
) -> Report:
    """Write the MoBiE version of a GGUF (of its first shard, if split) and check it. Raises MobieError.

    `output` appears complete and checked or not at all; a file already there stays until then. tensor_types: of
    tensors that are no experts, the first match is taken; the others keep theirs. max_bytes: of tensor data in one
    file; a larger output becomes shards, named after `output`, of which the first appears last. max_ram: bytes that
    may be resident at most. part: what `claimed` gave a caller that had work to do before.
    """
    started = time.perf_counter()
    with gguf_io.open_model(Path(source)) as gguf:
        ready = _prepare(
            gguf, Path(source), output, imatrix_file, calibration, tensor_types, threads, overwrite, max_bytes, max_ram
        )
        made, options = ready.plan, ready.calibration
        outcome, entries, makers = None, ready.entries, {}
        with contextlib.ExitStack() as stack:
            part = part or stack.enter_context(claimed(ready.output))
            if options is not None:
                folder = stack.enter_context(
                    calibrated.work_folder(
                        made.output.parent, gguf, options, ready.sequences.sha256, show_progress, max_ram
                    )
                )
                store, outcome = calibrated.run(gguf, options, ready.sequences, folder, show_progress, max_ram)
                known = {n: x for n, x in ready.experts.items() if store.has(layout.layer(n))}
                ready = dataclasses.replace(ready, beside=_beside_rows(known, store))
                bpw = _expert_bpw(_export_rows(gguf, ready.experts, ready.types, ready.beside), ready.experts)
                found = [_settings_entry(outcome.settings, tensor_types), metadata.EXPERT_BPW.entry(bpw)]
                entries = gguf_io.merged(entries, found)
            total = sum(t.n_bytes for t in gguf.tensors.values())
            progress = stack.enter_context(Progress("export", total, show_progress, max_ram=max_ram))
            if outcome is not None:
                makers = _calibrated(known, store, progress)
            pool = stack.enter_context(ThreadPoolExecutor(made.writers))
            # all of them, or those a calibration passes by: layers that predict further tokens
            rest = {n: x for n, x in ready.experts.items() if n not in makers}
            makers |= _signs(gguf, rest, ready.importance, pool, made.writers, progress)
            makers |= _converted(gguf, ready, makers, pool, made.writers, progress)
            jobs = _export_jobs(gguf, ready, makers, progress)
            first = _produce(
                ready.output, part, entries, jobs, gguf.alignment, overwrite, show_progress, max_bytes, max_ram
            )
    report = _report(first, made.source_size, started, ready.rare)
    report.plain, report.calibration = ready.plain, outcome
    report.not_loaded = loads.problem(first)
    return report


def dequantize(
    source: Path, output: Path, *, type_name: str = "f32", overwrite: bool = False, show_progress: bool = False
) -> Report:
    """Write a MoBiE file with its experts as ordinary floats, which every llama.cpp reads. Raises MobieError.

    Weights are scale * decoded blocks of both planes, multiplied by the factor that the layer's experts share where
    there is one, rounded to the type; what lies beside the experts' tensors and mobie.* entries are left out.
    """
    started = time.perf_counter()
    type_id, file_type = FLOAT_TYPES[type_name]
    with gguf_io.open_model(Path(source)) as gguf:
        experts = {n: x for n, x in layout.experts(gguf).items() if x.tensor.type_id == block.TYPE_ID}
        if not experts:
            raise MobieError(
                UNSUPPORTED, f"{source} has nothing to dequantize", "no tensor of type mobie", "a MoBiE file"
            )
        for item in experts.values():
            if problems := item.problems(gguf):
                raise gguf_io.damaged(gguf.paths[0], problems[0], "what FORMAT.md says")
        beside = {n for n in gguf.tensors if layout.kind(n) in layout.BESIDE_EXPERTS}
        output = Path(output)
        with Progress("dequantize", sum(t.n_bytes for t in gguf.tensors.values()), show_progress) as progress:
            jobs = []
            for name, tensor in gguf.tensors.items():
                if name in experts:
                    make = _dequantized(gguf, experts[name], type_id, progress)
                    jobs.append(Job([(name, tensor.shape, type_id)], make))
                elif name not in beside:
                    jobs.append(_copy(gguf, tensor, progress))
            entries = [e for k, e in gguf.entries.items() if not k.startswith(metadata.PREFIX)]
            entries = gguf_io.merged(entries, [metadata.FILE_TYPE.entry(file_type)])
            with claimed(output) as part:
                _check_output(output, [output], gguf.paths, _file_size(entries, jobs, gguf.alignment), overwrite)
                _produce(output, part, entries, jobs, gguf.alignment, overwrite, show_progress)
    return _report(output, gguf.file_size, started)


def edit(
    source: Path,
    output: Path,
    changed: list[changes.Change],
    *,
    overwrite: bool = False,
    max_bytes: int | None = None,
    show_progress: bool = False,
) -> Report:
    """Write a GGUF of any kind with other metadata and the same tensors. Raises MobieError.

    A MoBiE file is checked as after an export: against the digests that it has, which stay.
    """
    started, output = time.perf_counter(), Path(output)
    with gguf_io.open_model(Path(source)) as gguf:
        entries = changes.applied(gguf, changed)
        with Progress("copy", sum(t.n_bytes for t in gguf.tensors.values()), show_progress) as progress:
            jobs = [_copy(gguf, tensor, progress) for tensor in gguf.tensors.values()]
            outputs = gguf_io.file_paths(output, _rows(jobs), max_bytes)
            size = _file_size(entries, jobs, gguf.alignment)
            with claimed(output) as part:
                _check_output(output, outputs, gguf.paths, size, overwrite)
                first = _produce(
                    output, part, entries, jobs, gguf.alignment, overwrite, show_progress, max_bytes, seals={}
                )
    report = _report(first, gguf.file_size, started)
    report.not_loaded = loads.problem(first)
    return report


# ---- planning --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """A plan and what it was made from."""

    plan: Plan
    output: Path  # as asked for; the plan has the first shard where there are several
    experts: dict[str, Experts]
    entries: list[Entry]
    importance: imatrix.Imatrix | None
    rare: dict[str, list[int]]
    plain: list[str]
    calibration: calibrated.Options | None
    sequences: "Calibration | None"  # what is calibrated on
    types: dict[str, int]  # of tensors that are no experts, where they get another one
    beside: Rows = ()  # of second planes, their columns and shared factors; final after the calibration


def _prepare(
    gguf: Gguf,
    source: Path,
    output: Path | None,
    imatrix_file: Path | None,
    calibration: calibrated.Options | None,
    tensor_types: Sequence[requantize.Rule],
    threads: int | None,
    overwrite: bool,
    max_bytes: int | None,
    max_ram: int | None,
) -> Ready:
    """Everything that can go wrong before the work does so here."""
    experts = exportable.check(gguf)
    output = Path(output) if output is not None else default_output(source)
    importance = imatrix.load(Path(imatrix_file)) if imatrix_file is not None else None
    rare, plain = {}, []
    if importance is not None:
        known = {name: importance.of(item, layout.is_further(gguf, name)) for name, item in experts.items()}
        rare = {name: found.rare for name, found in known.items() if found.rare}
        plain = [name for name, found in known.items() if found.columns is None and not found.rare]
    writers = threads or min(_cpus(), MAX_THREADS)
    types = requantize.chosen(gguf, tuple(tensor_types), importance)
    requantize.check_library(types)
    beside, work, there, sequences = [], 0, 0, None
    memory = _memory_estimate(gguf, experts, importance, writers)
    if calibration is not None:
        if importance is not None:
            raise MobieError(
                UNSUPPORTED,
                "an importance matrix has no use in a calibrated export",
                "--imatrix with a calibration",
                "one of them",
                "leave one out",
            )
        loads.check(source, str(source))
        calibration = dataclasses.replace(calibration, threads=threads or _cpus())
        calibrated.needs(gguf, calibration)  # what is wrong with the model, before the text is read
        sequences = calibrated.sequences(gguf, calibration)
        needs = calibrated.needs(gguf, calibration, len(sequences.tokens))
        memory = max(memory - BASE_MEMORY + needs.base, needs.memory)
        beside, work = needs.beside, needs.disk
        there = calibrated.work_done(output.parent, gguf, calibration, sequences.sha256)
        types |= dict.fromkeys(needs.tuned, gguf_io.TYPE_F32)
    if max_ram is not None and memory > max_ram:
        raise MobieError(
            NO_MEMORY,
            "the export needs more memory than --max-ram allows",
            size_text(memory),
            size_text(max_ram),
            _smaller(gguf, calibration, writers, max_ram),
        )
    rows = _export_rows(gguf, experts, types, beside)
    spare = int(calibrated.spare_bits(gguf, calibration.bpw)) // 8 if calibration is not None else 0  # bytes, at most
    stored = sum(gguf_io.tensor_bytes(shape, kind) for _, shape, kind in rows) + spare
    expert_bpw = _expert_bpw(rows, experts) + 8 * spare / sum(x.n_weights for x in experts.values())
    scales = {layout.scale_name(n) for n in experts}
    weights = sum(t.n_weights for t in gguf.tensors.values() if t.name not in scales)
    entries = _export_entries(gguf, importance, calibration, tensor_types, expert_bpw)
    size = len(gguf_io.make_header(entries, rows, gguf.alignment)) + gguf_io.data_size(rows, gguf.alignment) + spare
    inputs = [*gguf.paths, *([importance.path] if importance else [])]
    if calibration is not None and calibration.text is not None:
        inputs.append(Path(calibration.text))
    outputs = gguf_io.file_paths(output, rows, max_bytes)
    free = _check_output(output, outputs, inputs, size + max(0, work - there), overwrite)
    expert_types: dict[str, int] = {}
    for item in experts.values():
        name = gguf_io.type_name(item.tensor.type_id)
        expert_types[name] = expert_types.get(name, 0) + 1
    made = Plan(
        source=source,
        output=outputs[0],
        architecture=gguf.architecture,
        n_layers=len({layout.layer(n) for n in experts}),
        n_expert=max(x.n_expert for x in experts.values()),
        n_tensors=len(gguf.tensors),
        expert_types=expert_types,
        source_size=gguf.file_size,
        output_size=size,
        source_bpw=layout.bits_per_weight(gguf)[0],
        bpw=8 * stored / weights,
        expert_bpw=expert_bpw,
        disk_free=free,
        work_size=work,
        peak_memory=memory,
        threads=calibration.threads if calibration is not None else writers,
        writers=writers,
        notes=sequences.notes if sequences is not None else (),
    )
    return Ready(made, output, experts, entries, importance, rare, plain, calibration, sequences, types, beside)


def _smaller(gguf: Gguf, calibration: calibrated.Options | None, writers: int, max_ram: int) -> str:
    """What to do about an export that needs too much memory."""
    if calibration is None:
        return "allow more" if writers == 1 else "allow more, or take fewer --threads, each of which holds an expert"
    samples = calibration.samples
    while samples > MIN_SAMPLES:
        samples //= 2
        fewer = dataclasses.replace(calibration, samples=samples)
        if calibrated.needs(gguf, fewer).memory <= max_ram:
            return f"calibrate with --samples {samples}, which fits"
    return "allow more, or export with --method sign, which needs next to nothing"


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_estimate(gguf: Gguf, experts: dict[str, Experts], importance: imatrix.Imatrix | None, threads: int) -> int:
    """Upper estimate of the resident memory of an export in bytes."""
    # An expert at work: its stored bytes, a byte per sign, and the blocks twice (pieces, joined). Done ones wait in
    # line as blocks.
    largest = max(x.expert_bytes + 1.5 * x.rows * x.cols for x in experts.values())
    columns = max(x.n_expert * x.cols for x in experts.values()) * 24 if importance else 0
    fixed = BASE_MEMORY + 4 * gguf.header_size + 3 * gguf_io.COPY_CHUNK + columns
    return int(fixed + threads * (largest + PIECE_MEMORY))


def _check_output(output: Path, outputs: list[Path], inputs: list[Path], size: int, overwrite: bool) -> int:
    """Free bytes where the output, or its shards, go; MobieError when they cannot go there."""
    folder = output.parent
    disk.check_folder(folder)
    for path in outputs:
        disk.check_target(path, overwrite=True)
        if path.exists() and any(p.exists() and path.samefile(p) for p in inputs):
            raise MobieError(
                BAD_OUTPUT, f"the output would replace an input: {path}", "", "", "choose another name with -o"
            )
        disk.check_target(path, overwrite)
    _check_other_shards(output, outputs)
    free = shutil.disk_usage(folder).free + disk.size_of(part_path(output))  # of a run that was killed; it will go
    if size > free:
        raise MobieError(
            NO_SPACE,
            f"not enough space in {folder}",
            f"{size_text(free)} free",
            f"{size_text(size)} for the output",
            "free some space, or write to another disk with -o",
        )
    return free


def _check_other_shards(output: Path, outputs: list[Path]) -> None:
    """MobieError where shards of the same name, but of another number of them, would lie among those of the output."""
    if len(outputs) == 1:
        return
    names, stem = {p.name for p in outputs}, output.name.removesuffix(".gguf")
    for path in sorted(output.parent.glob("*.gguf")):
        match = gguf_io.SHARD_NAME.fullmatch(path.name)
        if match and match["stem"] == stem and path.name not in names:
            raise MobieError(
                BAD_OUTPUT,
                f"shards of another output of this name lie in {output.parent}",
                path.name,
                f"{len(outputs)} shards, {outputs[0].name} and so on",
                "remove them, or choose another name with -o",
            )


def part_path(output: Path) -> Path:
    """The private folder in which the output, or its shards, grow. Whoever writes the same files has the same."""
    match = gguf_io.SHARD_NAME.fullmatch(output.name)
    return output.with_name(
        f".mobie-{disk.PART}-{disk.digest(match['stem'] if match else output.name.removesuffix('.gguf'))}"
    )


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[Path]:
    """The output for this process alone; MobieError while another one writes it. Yields the folder where it grows."""
    disk.check_folder(output.parent)
    disk.check_target(output, overwrite=True)
    busy = f"{output} is being written by another process"
    with disk.private(part_path(output), f"the unfinished {output.name}", busy, keep=False) as part:
        yield part


def _file_size(entries: list[Entry], jobs: list[Job], alignment: int) -> int:
    rows = _rows(jobs)
    return len(gguf_io.make_header(entries, rows, alignment)) + gguf_io.data_size(rows, alignment)


def _rows(jobs: list[Job]) -> list[Row]:
    return [row for job in jobs for row in job.rows]


# ---- metadata --------------------------------------------------------------------------------------------------------


def _export_entries(
    gguf: Gguf,
    importance: imatrix.Imatrix | None,
    calibration: calibrated.Options | None,
    tensor_types: Sequence[requantize.Rule],
    expert_bpw: float,
) -> list[Entry]:
    return gguf_io.merged(
        list(gguf.entries.values()),
        [
            metadata.FILE_TYPE.entry(block.TYPE_ID),
            metadata.QUANTIZATION_VERSION.entry(2),
            metadata.FORMAT_VERSION.entry(block.FORMAT_VERSION),
            metadata.TYPE_ID.entry(block.TYPE_ID),
            metadata.METHOD.entry(calibration.method if calibration else "sign"),
            _settings_entry({"imatrix": importance.sha256 if importance else None}, tensor_types),
            metadata.EXPORTER.entry(f"mobie-export {__version__}"),
            metadata.RUNTIME.entry(RUNTIME),
            metadata.SOURCE_SEAL.entry(gguf.sha256),
            *metadata.UNSEALED,
            metadata.EXPERT_BPW.entry(expert_bpw),
        ],
    )


def _settings_entry(settings: dict, tensor_types: Sequence[requantize.Rule]) -> Entry:
    more = {"tensor_types": [str(r) for r in tensor_types]} if tensor_types else {}
    return metadata.settings_entry(settings | more)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _export_rows(gguf: Gguf, experts: dict[str, Experts], types: dict[str, int], beside: Rows = ()) -> Rows:
    """The tensor table of the output: the source's, every expert tensor followed by what is stored beside it.

    types: of tensors that are no experts, where the source's do not stay.
    """
    scales = {layout.scale_name(n) for n in experts}
    more, rows = {row[0]: row for row in beside}, []
    for name, tensor in gguf.tensors.items():
        if name in experts:
            rows.append((name, tensor.shape, block.TYPE_ID))
            rows.append((layout.scale_name(name), (experts[name].n_expert,), gguf_io.TYPE_F32))
            names = (layout.residual_name(name), layout.columns_name(name), layout.shared_name(name))
            rows += [more.pop(n) for n in names if n in more]
        elif name not in scales:
            rows.append((name, tensor.shape, types.get(name, tensor.type_id)))
    return rows


def _beside_rows(experts: dict[str, Experts], store: calibrated.Store) -> Rows:
    rows = {name: (shape, kind) for name, shape, kind in store.factors()}
    for name, item in experts.items():
        k = calibrated.second_columns(store, name)
        if k:
            rows[layout.residual_name(name)] = (k, item.rows, item.n_expert), block.TYPE_ID
            columns = calibrated.columns(store, layout.layer(name))
            if columns is not None:
                rows[layout.columns_name(name)] = (len(columns),), gguf_io.TYPE_I32
    return [(name, *row) for name, row in rows.items()]


def _expert_bpw(rows: Rows, experts: dict[str, Experts]) -> float:
    """Stored bits per expert weight: of the experts and of all that lies beside them."""
    kinds = ("expert", *layout.BESIDE_EXPERTS)
    stored = sum(gguf_io.tensor_bytes(shape, kind) for name, shape, kind in rows if layout.kind(name) in kinds)
    return 8 * stored / sum(x.n_weights for x in experts.values())


# Tensor -> how many of the table's tensors, from it on, are made together, and their bytes
Makers = dict[str, tuple[int, Callable[[], Iterable[np.ndarray]]]]


def _export_jobs(gguf: Gguf, ready: Ready, makers: Makers, progress: Progress) -> list[Job]:
    """What has no maker is copied."""
    rows, jobs = iter(_export_rows(gguf, ready.experts, ready.types, ready.beside)), []
    for row in rows:
        if row[0] in makers:
            n, pieces = makers[row[0]]
            jobs.append(Job([row, *itertools.islice(rows, n - 1)], pieces))
        else:
            jobs.append(_copy(gguf, gguf.tensors[row[0]], progress))
    return jobs


def _signs(
    gguf: Gguf,
    experts: dict[str, Experts],
    importance: imatrix.Imatrix | None,
    pool: ThreadPoolExecutor,
    threads: int,
    progress: Progress,
) -> Makers:
    return {n: (2, _quantized(gguf, x, importance, pool, threads, progress)) for n, x in experts.items()}


def _calibrated(experts: dict[str, Experts], store: calibrated.Store, progress: Progress) -> Makers:
    makers: Makers = {n: (1, lambda values=values: [values]) for n, values in store.tuned.items()}
    makers |= {n: (1, lambda name=n: [store.factor(name)]) for n, *_ in store.factors()}
    for name, item in experts.items():

        def pieces(name=name, item=item) -> Iterator[np.ndarray]:
            for piece in calibrated.written(store, name):
                yield piece
                progress.update(0, name)
            progress.update(item.tensor.n_bytes, name)

        makers[name] = 3 if calibrated.second_columns(store, name) else 2, pieces
        makers[layout.columns_name(name)] = 1, lambda name=name: [calibrated.columns(store, layout.layer(name))]
    return makers


def _converted(
    gguf: Gguf, ready: Ready, makers: Makers, pool: ThreadPoolExecutor, threads: int, progress: Progress
) -> Makers:
    """Tensors that get another type and nothing else."""
    return {
        name: (1, _requantized(gguf, ready, gguf.tensors[name], type_id, pool, threads, progress))
        for name, type_id in ready.types.items()
        if name not in makers
    }


def _requantized(
    gguf: Gguf, ready: Ready, tensor: Tensor, type_id: int, pool: ThreadPoolExecutor, threads: int, progress: Progress
) -> Callable[[], Iterator[np.ndarray]]:
    cols = tensor.shape[0]
    n_rows, step = tensor.n_weights // cols, max(1, PIECE // cols)
    row_bytes = tensor.n_bytes // n_rows

    def chunks() -> Iterator[np.ndarray]:
        quantized = requantize.quantizer(gguf, tensor, type_id, ready.importance)

        def one(i: int) -> np.ndarray:
            n = min(step, n_rows - i * step)
            raw = gguf.read(tensor, i * step * row_bytes, n * row_bytes).reshape(n, -1)
            return quantized(gguf_io.decode(raw, tensor.type_id))

        for i, data in enumerate(_in_order(pool, one, -(-n_rows // step), threads + 1)):
            yield data
            progress.update(min(step, n_rows - i * step) * row_bytes, tensor.name)

    return chunks


def _copy(gguf: Gguf, tensor: Tensor, progress: Progress) -> Job:
    def chunks() -> Iterator[np.ndarray]:
        for chunk in gguf.chunks(tensor):
            yield chunk
            progress.update(chunk.size, tensor.name)

    return Job([(tensor.name, tensor.shape, tensor.type_id)], chunks)


def _quantized(
    gguf: Gguf,
    item: Experts,
    importance: imatrix.Imatrix | None,
    pool: ThreadPoolExecutor,
    threads: int,
    progress: Progress,
) -> Callable[[], Iterator[np.ndarray]]:
    """Blocks of one expert tensor, expert by expert, then their scales, float32 [n_expert]."""
    tensor, size = item.tensor, item.expert_bytes

    def chunks() -> Iterator[np.ndarray]:
        scales = np.zeros(item.n_expert, "<f4")
        columns = None
        if importance is not None:
            columns = importance.of(item, layout.is_further(gguf, tensor.name)).columns
        factors = gguf.read(item.factor).view("<f4") if item.factor is not None else None

        def one(e: int) -> tuple[np.ndarray, np.float32]:
            raw = gguf.read(tensor, e * size, size).reshape(item.rows, -1)
            pieces = _decoded(raw, tensor.type_id, item.cols, None if factors is None else factors[e])
            try:
                return quantize.expert(pieces, None if columns is None else columns[e])
            except quantize.NonFinite as bad:
                found = f"{bad.count} infinite or NaN weights in expert {e}"
                raise gguf_io.not_finite(gguf, tensor, found) from None

        for e, (blocks, scale) in enumerate(_in_order(pool, one, item.n_expert, threads + 1)):
            scales[e] = scale
            yield blocks
            progress.update(size, tensor.name)
        yield scales

    return chunks


def _decoded(raw: np.ndarray, type_id: int, cols: int, factor: np.float32 | None) -> Iterator[np.ndarray]:
    """float32 pieces, [rows of the piece, cols], of one stored matrix, uint8 [rows, bytes of a row]."""
    step = max(1, PIECE // cols)
    for start in range(0, len(raw), step):
        weights = gguf_io.decode(raw[start : start + step], type_id)
        yield weights if factor is None else weights * factor


def _in_order(pool: ThreadPoolExecutor, work: Callable, n: int, ahead: int) -> Iterator:
    """work(0), work(1), ... in order, at most `ahead` of them begun and not yet taken."""
    begun: deque = deque()
    try:
        for i in range(n):
            begun.append(pool.submit(work, i))
            if len(begun) == ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()


def _dequantized(gguf: Gguf, item: Experts, type_id: int, progress: Progress) -> Callable[[], Iterator[np.ndarray]]:
    kind = gguf_py.GGMLQuantizationType(type_id)

    def chunks() -> Iterator[np.ndarray]:
        scales = np.ones(item.n_expert, "<f4") if item.factor is None else gguf.read(item.factor).view("<f4")
        columns, shared = item.second_columns(gguf), None
        if item.shared is not None:
            raw = gguf.read(item.shared).reshape(item.shared.shape[1], -1)
            shared = gguf_io.decode(raw, item.shared.type_id)

        def pieces(e: int, raw: np.ndarray) -> Iterator[np.ndarray]:
            start = 0
            for weights in _decoded(raw, block.TYPE_ID, item.cols, None):
                if item.residual is not None:
                    size = item.residual.n_bytes // item.n_expert
                    more = gguf.read(item.residual, e * size, size).reshape(item.rows, -1)
                    weights[:, columns] += block.dequantize(more[start : start + len(weights)])
                start += len(weights)
                yield weights * scales[e]

        for e in range(item.n_expert):
            raw = gguf.read(item.tensor, e * item.expert_bytes, item.expert_bytes).reshape(item.rows, -1)
            parts = pieces(e, raw)
            if shared is not None:
                down = layout.is_down(item.tensor.name)
                parts = [shared @ np.concatenate(list(parts))] if down else (w @ shared for w in parts)
            for weights in parts:
                yield requantize.as_floats(gguf, item.tensor, weights, kind)
            progress.update(raw.size, item.tensor.name)

    return chunks


# ---- writing ---------------------------------------------------------------------------------------------------------


def _produce(
    output: Path,
    part: Path,
    entries: list[Entry],
    jobs: list[Job],
    alignment: int,
    overwrite: bool,
    show_progress: bool,
    max_bytes: int | None = None,
    max_ram: int | None = None,
    seals: Mapping[str, Callable[[gguf_io.Writer], str]] = metadata.SEALS,
) -> Path:
    """Write `output`, or its shards, in the private folder `part`; they are read back and compared before they get
    their names, the first shard, by which the model is opened, last. Returns the file by which to open the output.
    """
    rows = _rows(jobs)
    finals = gguf_io.file_paths(output, rows, max_bytes)
    try:
        with gguf_io.Writer(part / output.name, entries, rows, alignment, seals, max_bytes) as writer:
            for job in jobs:
                pieces = iter(job.pieces())
                for name, shape, kind in job.rows:
                    writer.write(name, _taken(pieces, gguf_io.tensor_bytes(shape, kind)))
                for piece in pieces:
                    raise ValueError(f"tensor {name}: {piece.nbytes} bytes more than it has")
            writer.finish()
        entries = gguf_io.merged(entries, writer.sealed)
        try:
            _read_back(writer.paths[0], entries, jobs, writer.digests, show_progress, max_ram)
        except MobieError as e:
            e.kind = VERIFY_FAILED if e.kind == BAD_INPUT else e.kind  # it is no input that cannot be read
            raise
    except MobieError as e:  # the files have the names that the user knows
        e.what = e.what.replace(f"{part}{os.sep}", f"{output.parent}{os.sep}")
        raise
    _place(writer.paths, finals, overwrite)
    disk.sync(output.parent)
    return finals[0]


def _taken(pieces: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The next `size` bytes."""
    while size > 0 and (piece := next(pieces, None)) is not None:
        size -= piece.nbytes
        yield piece


def _place(written: list[Path], finals: list[Path], overwrite: bool) -> None:
    """All get their names, or none where one of them is taken."""
    for final in finals:
        disk.check_target(final, overwrite)
    if overwrite and len(finals) > 1:
        finals[0].unlink(missing_ok=True)  # of an old output, so that no moment mixes it with the new
    placed: list[Path] = []
    try:
        for path, final in reversed(list(zip(written, finals, strict=True))):
            disk.place(path, final, overwrite)
            placed.append(final)
    except BaseException:
        if not overwrite:
            for final in placed:
                final.unlink(missing_ok=True)
        raise


def _read_back(
    part: Path,
    entries: list[Entry],
    jobs: list[Job],
    digests: dict[str, bytes],
    show: bool,
    max_ram: int | None,
) -> None:
    with gguf_io.open_model(part) as written:
        same, rows = [e.raw for e in written.entries.values()] == [e.raw for e in entries], _rows(jobs)
        if not same or [(t.name, t.shape, t.type_id) for t in written.tensors.values()] != rows:
            raise MobieError(
                VERIFY_FAILED, f"{part} reads back with another header than was written", todo="check the disk"
            )
        if any(kind == block.TYPE_ID for _, _, kind in rows):
            verify.check(written, digests, show, max_ram)
            return
        for name, tensor in written.tensors.items():
            digest = gguf_io.new_digest()
            for chunk in written.chunks(tensor):
                digest.update(chunk)
            if digest.digest() != digests[name]:
                raise MobieError(
                    VERIFY_FAILED,
                    f"{part} reads back with other bytes in {name} than were written",
                    todo="check the disk",
                )


def _report(output: Path, source_size: int, started: float, rare: dict[str, list[int]] | None = None) -> Report:
    with gguf_io.open_model(output) as gguf:
        bpw, expert_bpw = layout.bits_per_weight(gguf)
        size = gguf.file_size
    seconds = time.perf_counter() - started
    return Report(output, source_size, size, bpw, expert_bpw, seconds, source_size / seconds, peak_memory(), rare or {})
