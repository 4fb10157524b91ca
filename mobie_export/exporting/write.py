"""Where an output goes, and how it gets its name: written in a private folder, read back, checked, then renamed."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from mobie_export import disk, gguf_io
from mobie_export.calibration import ranks
from mobie_export.errors import BAD_INPUT, BAD_OUTPUT, NO_SPACE, VERIFY_FAILED, MobieError
from mobie_export.exporting.tensors import Job, rows_of
from mobie_export.gguf_io import Entry
from mobie_export.progress import Callback, size_text
from mobie_export.spec import block, metadata, verify


def part_path(output: Path) -> Path:
    """The private folder in which the output, or its shards, grow. Whoever writes the same files has the same."""
    match = gguf_io.SHARD_NAME.fullmatch(output.name)
    return output.with_name(
        f".mobie-{disk.PART}-{disk.digest(match['stem'] if match else output.name.removesuffix('.gguf'))}"
    )


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[Path]:
    """The output for this process alone; MobieError while another one writes it. Yields the folder where it grows,
    which of several ranks the first one makes."""
    if not ranks.first():
        yield part_path(output)
        return
    disk.check_folder(output.parent)
    disk.check_target(output, overwrite=True)
    busy = f"{output} is being written by another process"
    with disk.private(part_path(output), f"the unfinished {output.name}", busy, keep=False) as part:
        yield part


def check_output(
    output: Path, outputs: list[Path], inputs: list[Path], size: int, overwrite: bool, work: int = 0
) -> int:
    """Free bytes where the output, or its shards, go; MobieError when they cannot go there. size, work: bytes of the
    output, and of what lies beside it until it is done."""
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
    if size + work > free:
        raise MobieError(
            NO_SPACE,
            f"not enough space in {folder}",
            f"{size_text(free)} free",
            f"{size_text(size)} for the output" + (f" and {size_text(work)} for unfinished work" if work else ""),
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


# ---- writing ---------------------------------------------------------------------------------------------------------


def produce(
    output: Path,
    part: Path,
    entries: list[Entry],
    jobs: list[Job],
    alignment: int,
    overwrite: bool,
    progress: Callback | None,
    max_bytes: int | None = None,
    max_ram: int | None = None,
    seals: Mapping[str, Callable] = metadata.SEALS,
) -> Path:
    """Write `output`, or its shards, in the private folder `part`; they are read back and compared before they get
    their names, the first shard, by which the model is opened, last. Returns the file by which to open the output.
    """
    rows = rows_of(jobs)
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
            _read_back(writer.paths[0], entries, jobs, writer.digests, progress, max_ram)
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
    progress: Callback | None,
    max_ram: int | None,
) -> None:
    with gguf_io.open_model(part) as written:
        same, rows = [e.raw for e in written.entries.values()] == [e.raw for e in entries], rows_of(jobs)
        if not same or [(t.name, t.shape, t.type_id) for t in written.tensors.values()] != rows:
            raise MobieError(
                VERIFY_FAILED, f"{part} reads back with another header than was written", todo="check the disk"
            )
        if metadata.is_mobie(written) or any(kind == block.TYPE_ID for _, _, kind in rows):
            verify.check(written, digests, progress, max_ram)
            return
        for name, tensor in written.tensors.items():
            digest = gguf_io.new_digest()
            for chunk in written.chunks(tensor):
                digest.update(chunk.data)
            if digest.digest() != digests[name]:
                raise MobieError(
                    VERIFY_FAILED,
                    f"{part} reads back with other bytes in {name} than were written",
                    todo="check the disk",
                )
