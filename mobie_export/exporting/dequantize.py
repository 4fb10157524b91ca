"""Other GGUFs from a GGUF: a MoBiE file with its experts as floats, any file with other metadata."""

import time
from pathlib import Path

from mobie_export import gguf_io
from mobie_export.errors import UNSUPPORTED, MobieError
from mobie_export.exporting import changes, tensors, write
from mobie_export.exporting.flow import Report, report
from mobie_export.progress import Callback, Progress
from mobie_export.runtime import loads
from mobie_export.spec import block, layout, metadata

# Type of the experts, and the value of general.file_type for it (llama.h, LLAMA_FTYPE_*).
FLOAT_TYPES = {"f32": (gguf_io.TYPE_F32, 0), "f16": (gguf_io.TYPE_F16, 1), "bf16": (gguf_io.TYPE_BF16, 32)}


def dequantize(
    source: Path,
    output: Path,
    *,
    type_name: str = "f32",
    overwrite: bool = False,
    progress: Callback | None = None,
) -> Report:
    """Write a MoBiE file, or one with experts in Q1_0, with its experts as floats, which every llama.cpp reads. Raises
    MobieError.

    Weights are scale * decoded blocks of both planes, multiplied by the factor that the layer's experts share where
    there is one, rounded to the type (f32, f16 or bf16); what lies beside the experts' tensors and mobie.* entries are
    left out.
    """
    started, output = time.perf_counter(), Path(output)
    type_id, file_type = FLOAT_TYPES[type_name]
    with gguf_io.open_model(Path(source)) as gguf:
        metadata.check_version(gguf)
        experts = {n: x for n, x in layout.experts(gguf).items() if x.tensor.type_id in block.BY_TYPE}
        if not experts:
            raise MobieError(
                UNSUPPORTED,
                f"{source} has nothing to dequantize",
                "no expert tensor of type mobie or Q1_0",
                "a MoBiE file",
            )
        for item in experts.values():
            if problems := item.problems(gguf):
                raise gguf_io.damaged(gguf.paths[0], problems[0], "what FORMAT.md says")
        beside = {n for n in gguf.tensors if layout.kind(n) in layout.BESIDE_EXPERTS}
        total = sum(t.n_bytes for n, t in gguf.tensors.items() if n not in beside)
        with Progress("dequantize", total, progress) as shown:
            jobs = []
            for name, tensor in gguf.tensors.items():
                if name in experts:
                    make = tensors.dequantized(gguf, experts[name], type_id, shown)
                    jobs.append(tensors.Job([(name, tensor.shape, type_id)], make))
                elif name not in beside:
                    jobs.append(tensors.copied(gguf, tensor, shown))
            entries = [e for k, e in gguf.entries.items() if not k.startswith(metadata.PREFIX)]
            entries = gguf_io.merged(entries, [metadata.FILE_TYPE.entry(file_type)])
            size = tensors.file_size(entries, tensors.rows_of(jobs), gguf.alignment)
            with write.claimed(output) as part:
                write.check_output(output, [output], gguf.paths, size, overwrite)
                write.produce(output, part, entries, jobs, gguf.alignment, overwrite, progress)
    return report(output, gguf.file_size, started)


def edit(
    source: Path,
    output: Path,
    changed: list[changes.Change],
    *,
    overwrite: bool = False,
    max_bytes: int | None = None,
    progress: Callback | None = None,
) -> Report:
    """Write a GGUF of any kind with other metadata and the same tensors. Raises MobieError.

    A MoBiE file is checked as after an export: against the digests that it has, which stay.
    """
    started, output = time.perf_counter(), Path(output)
    with gguf_io.open_model(Path(source)) as gguf:
        entries = changes.applied(gguf, changed)
        with Progress("copy", sum(t.n_bytes for t in gguf.tensors.values()), progress) as shown:
            jobs = [tensors.copied(gguf, tensor, shown) for tensor in gguf.tensors.values()]
            rows = tensors.rows_of(jobs)
            outputs = gguf_io.file_paths(output, rows, max_bytes)
            size = tensors.file_size(entries, rows, gguf.alignment)
            with write.claimed(output) as part:
                write.check_output(output, outputs, gguf.paths, size, overwrite)
                first = write.produce(
                    output, part, entries, jobs, gguf.alignment, overwrite, progress, max_bytes, seals={}
                )
    return report(first, gguf.file_size, started, not_loaded=loads.problem(first))
