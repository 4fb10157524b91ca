"""An export from top to bottom: plan, collect statistics, encode, tune, write, check."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobie_export import gguf_io
from mobie_export.calibration import ranks
from mobie_export.exporting import tensors, write
from mobie_export.exporting.options import ExportOptions
from mobie_export.exporting.plan import Ready, final_entries, prepare
from mobie_export.methods.base import Encoded, Makers, Method, Outcome, Writing
from mobie_export.methods.sign import Sign
from mobie_export.progress import Callback, peak_memory
from mobie_export.runtime import loads
from mobie_export.sources.find import Source
from mobie_export.spec import layout


@dataclass(frozen=True)
class Report:
    """What was done. Sizes in bytes."""

    output: Path  # or its first shard
    source_size: int
    output_size: int
    bpw: float  # stored bits per weight
    expert_bpw: float | None  # of the experts alone, with all that is stored for them; None where there are none
    seconds: float
    peak_memory: int | None  # resident, where the system says so
    outcome: Outcome = field(default_factory=Outcome)
    not_loaded: str = ""  # what the installed runtime has against the output; empty where it loads it, or is not there

    @property
    def bytes_per_second(self) -> float:
        """Of the source."""
        return self.source_size / self.seconds


def export(
    path: Path,
    source: Source,
    output: Path,
    options: ExportOptions,
    part: Path,
    progress: Callback | None,
) -> Report:
    """Write the MoBiE version of the GGUF at `path` and check it. Raises MobieError.

    source: what the GGUF was made from; part: the private folder that `write.claimed` gave.
    `output` appears complete and checked or not at all; a file already there stays until then. Of several ranks the
    first one writes it, and the others return what it reports.
    """
    started = time.perf_counter()
    with gguf_io.open_model(path) as gguf:
        ready = prepare(gguf, source, output, options, progress)
        run, method = ready.run, ready.plan.method
        with method.workspace(run) as work:
            for layer in method.collect(run, work):
                method.encode(work, layer)
                del layer  # its weights and statistics, before the next one's are there
            method.tune(run, work)
            return ranks.from_first(lambda: _written(ready, work, output, part, started))


def _written(ready: Ready, work: Any, output: Path, part: Path, started: float) -> Report:
    """What the method found, as the output."""
    run, plan, gguf = ready.run, ready.plan, ready.run.source
    total = sum(t.n_bytes for t in gguf.tensors.values())
    with run.phase("export", total) as shown, ThreadPoolExecutor(plan.writers) as pool:
        writing = Writing(run, pool, plan.writers + 1, shown)
        encoded = plan.method.encoded(work, writing)
        rows = tensors.table(gguf, run.experts, ready.types, encoded.beside, run.coding)
        entries = final_entries(ready, encoded.settings, rows)
        makers = _all_makers(encoded, ready.types, writing, plan.method)
        first = write.produce(
            output,
            part,
            entries,
            tensors.jobs(rows, makers, gguf, shown),
            gguf.alignment,
            plan.options.overwrite,
            run.progress,
            plan.options.split_max_size,
            plan.options.max_ram,
        )
    return report(first, plan.source_size, started, encoded.outcome, loads.problem(first))


def _all_makers(encoded: Encoded, types: dict[str, int], writing: Writing, method: Method) -> Makers:
    """The method's, signs for the experts that it passes by (layers that predict further tokens), other types."""
    rest = {n: x for n, x in writing.run.experts.items() if n not in encoded.makers}
    makers = encoded.makers | Sign().makers(rest, writing)
    other = {n: t for n, t in types.items() if n not in makers}
    return makers | tensors.converted(other, method.importance(), writing)


def report(
    output: Path, source_size: int, started: float, outcome: Outcome | None = None, not_loaded: str = ""
) -> Report:
    """Of a file just written. started: by time.perf_counter."""
    with gguf_io.open_model(output) as gguf:
        bpw, expert_bpw = layout.bits_per_weight(gguf)
        size = gguf.file_size
    seconds = time.perf_counter() - started
    return Report(output, source_size, size, bpw, expert_bpw, seconds, peak_memory(), outcome or Outcome(), not_loaded)
