"""The model card of an export: what it is, what it was made from, how it is run, in the hub's form."""

import re
from pathlib import Path

from mobie_export import disk, gguf_io, model
from mobie_export.errors import BAD_OUTPUT, MobieError
from mobie_export.pipeline import Report
from mobie_export.progress import size_text
from mobie_export.sources import Source

NAME = "README.md"


def check(output: Path, wanted: bool, overwrite: bool) -> None:
    """MobieError where a card would replace somebody's file."""
    path = output.with_name(NAME)
    if not wanted:
        return
    disk.check_target(path, overwrite=True)
    if path.exists() and not overwrite:
        raise MobieError(
            BAD_OUTPUT,
            f"{path} exists already, and the card is called so",
            todo="leave --card out, choose another folder with -o, or replace it with --overwrite",
        )


def write(report: Report, source: Source, overwrite: bool) -> Path:
    """Write the card of an output beside it."""
    path = report.output.with_name(NAME)
    check(report.output, True, overwrite)
    with disk.writing(path), open(path, "w" if overwrite else "x", encoding="utf-8") as file:
        file.write(text(report, source))
    return path


def text(report: Report, source: Source) -> str:
    with gguf_io.open_model(report.output) as gguf:
        experts = model.experts(gguf)
        method, exporter, seal = (gguf.value(f"mobie.{k}") for k in ("method", "exporter", "data.sha256"))
        settings, architecture = gguf.value("mobie.settings"), gguf.architecture
        used = gguf.value(f"{architecture}.expert_used_count")
        files = [p.name for p in gguf.paths]
    shard = gguf_io.SHARD_NAME.fullmatch(files[0])
    layers, n_expert = len({model.layer(n) for n in experts}), max(x.n_expert for x in experts.values())
    front = [*(f"{k}: {v}" for k, v in _inherited(source).items()), "pipeline_tag: text-generation"]
    origin = f"[{source.hub}](https://huggingface.co/{source.hub})" if source.hub else f"`{source.name}`"
    rows = {
        "architecture": f"{architecture}, {layers} layers of {n_expert} experts, {used} used",
        "size": f"{size_text(report.output_size)}, of {size_text(report.source_size)}",
        "bits per weight": f"{report.bpw:.3f}; of the experts {report.expert_bpw:.4f}",
        "method": f"`{method}`",
        "settings": f"`{settings}`",
        "written by": exporter,
        "SHA-256 of the weights": f"`{seal}`",
    }
    lines = [
        "---",
        *front,
        "tags: [gguf, mobie, moe]",
        "---",
        f"# {shard['stem'] if shard else files[0].removesuffix('.gguf')}",
        "",
        f"The experts of {origin} with one bit per weight and one 8-bit scale per 64 of them; everything else is as it "
        "was.",
        "A stock llama.cpp refuses the file; the patched one of `mobie-export` runs it:",
        "",
        f"    mobie-export doctor {files[0]}",
        f"    llama-cli -m {files[0]}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {k} | {v} |" for k, v in rows.items()),
        f"| files | {', '.join(f'`{f}`' for f in files)} |",
        "",
    ]
    return "\n".join(lines)


def _inherited(source: Source) -> dict[str, str]:
    """What the card of the original says that holds for this one as well: its licence; and which one it was."""
    found = {"base_model": source.hub, "base_model_relation": "quantized"} if source.hub else {}
    card = source.checkpoint / NAME if source.checkpoint else None
    if card and card.is_file():
        front = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        for key in ("license", "license_name", "license_link", "language"):
            line = re.search(rf"^{key}:[ \t]*(\S.*)$", front[1], re.MULTILINE) if front else None
            if line:
                found[key] = line[1]
    return found
