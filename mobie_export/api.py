"""What a Python program calls; docs/api.md has examples. The command line maps onto it and does nothing more."""

from pathlib import Path
from typing import Unpack

from mobie_export import gguf_io
from mobie_export.calibration import ranks
from mobie_export.errors import USAGE, MobieError
from mobie_export.exporting import flow, write
from mobie_export.exporting import plan as planning
from mobie_export.exporting.dequantize import dequantize as dequantize
from mobie_export.exporting.dequantize import edit as edit
from mobie_export.exporting.effort import Effort
from mobie_export.exporting.flow import Report
from mobie_export.exporting.options import ExportOptions, Keywords, options
from mobie_export.exporting.plan import Plan
from mobie_export.methods.base import Method
from mobie_export.progress import Callback
from mobie_export.reporting.bench import Benchmark as Benchmark
from mobie_export.reporting.bench import bench as bench
from mobie_export.reporting.gather import Compared as Compared
from mobie_export.reporting.gather import report as report
from mobie_export.sources import convert, find
from mobie_export.sources.find import Source
from mobie_export.spec.block import MOBIE, Coding
from mobie_export.spec.inspect import inspect as inspect
from mobie_export.spec.verify import verify as verify


def plan(source: str | Path, output: str | Path | None = None, **keywords: Unpack[Keywords]) -> Plan:
    """What an export would do and need: sizes, memory, disk, time, all settings. Writes nothing.

    source: a GGUF (of a split one, the first shard), a folder with a Hugging Face checkpoint, or org/name on the hub,
    which is downloaded. output: a file, by default beside the source (`default_output`). keywords: the fields of
    ExportOptions; method may be a name, or a method with its options, as Calibrated(bpw=1.25). Raises MobieError for
    everything that can be known to go wrong.
    """
    asked = options(**keywords)
    asked.method.check()  # before anything is downloaded or converted
    found = find.find(str(source), asked.revision, asked.pre_tokenizer, asked.trust_remote_code)
    to = Path(output) if output is not None else default_output(found, asked.method, asked.coding)
    with convert.opened(found, to.parent, header_only=True) as path, gguf_io.open_model(path) as gguf:
        return planning.prepare(gguf, found, to, asked, estimate_time=True).plan


def default_output(source: Source, method: Method | Effort | None = None, coding: Coding = MOBIE) -> Path:
    """MODEL-mobie.gguf beside a GGUF, MODEL-MOBIE.gguf for checkpoints, by which llama.cpp finds it on the hub, or with
    the name of the experts' other type; -uncalibrated behind it where the method is none that calibrates."""
    suffix = method.suffix if isinstance(method, Method) else ""
    if source.gguf:
        return planning.default_output(source.gguf, coding, suffix)
    to = source.default_output(coding, suffix)
    assert to is not None
    return to


def export(made: Plan, output: str | Path | None = None, *, progress: Callback | None = None) -> Report:
    """Do what was planned: write the output, read it back, check it. Raises MobieError.

    output: where to, if not where the plan says. The output appears complete and checked or not at all; a file already
    there stays until then, and is replaced only with the option overwrite. Work that did not finish is kept, and the
    next call with the same plan goes on from it. progress: is told how far it has come. Of several processes
    (docs/scale.md) the first one writes.
    """
    if ranks.world() > 1 and not made.source.gguf:
        raise MobieError(
            USAGE,
            "several processes start from a GGUF, which all of them read",
            str(made.source.hub or made.source.checkpoint),
            todo="convert it first, with convert_hf_to_gguf.py of llama.cpp",
        )
    to, asked = Path(output) if output is not None else made.asked, made.options

    def reserve(header: Path) -> int:
        with gguf_io.open_model(header) as gguf:
            plan = planning.prepare(gguf, made.source, to, asked).plan
        return plan.output_size + plan.work_size

    with write.claimed(to) as part, convert.opened(made.source, to.parent, reserve, progress=progress) as path:
        return flow.export(path, made.source, to, asked, part, progress)


__all__ = [
    "Benchmark",
    "Compared",
    "Effort",
    "ExportOptions",
    "Plan",
    "Report",
    "bench",
    "dequantize",
    "edit",
    "export",
    "inspect",
    "plan",
    "report",
    "verify",
]
