"""The model card of an export: what it is, what was done to it, what it was made from, how it is run."""

import json
import re
from pathlib import Path
from types import ModuleType

from mobie_export import disk, gguf_io
from mobie_export.errors import BAD_OUTPUT, UNSUPPORTED, MobieError
from mobie_export.gguf_io import Gguf
from mobie_export.progress import size_text
from mobie_export.sources.find import Source
from mobie_export.spec import block, layout, metadata
from mobie_export.spec.block import Coding

NAME = "README.md"
# Of the original's card: what holds for this one; and what a GGUF calls it.
TAKEN_OVER = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
    "language": "general.languages",
}


def check(output: Path, wanted: bool, overwrite: bool) -> None:
    """MobieError where a card would replace somebody's file, or cannot be written."""
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
    _library()


def write(output: Path, source: Source, source_size: int, overwrite: bool) -> Path:
    """Write the card of an output beside it. source_size: bytes of what it was made from."""
    path = output.with_name(NAME)
    check(output, True, overwrite)
    with disk.writing(path), open(path, "w" if overwrite else "x", encoding="utf-8") as file:
        file.write(text(output, source, source_size))
    return path


def text(output: Path, source: Source, source_size: int) -> str:
    """With the figures of the report of this very file, where one lies beside it."""
    with gguf_io.open_model(output) as gguf:
        size, (bpw, expert_bpw) = gguf.file_size, layout.bits_per_weight(gguf)
        experts = layout.experts(gguf)
        keys = (metadata.METHOD, metadata.SETTINGS, metadata.EXPORTER, metadata.SEAL)
        (method, settings, exporter, seal), architecture = (k.of(gguf) for k in keys), gguf.architecture
        used = sorted({gguf.of_layer("expert_used_count", layout.layer_of(n), 0) or 0 for n in experts})
        files, done = [p.name for p in gguf.paths], _done(gguf, metadata.settings(gguf))
        front = _front(source, gguf)
        coding = metadata.coding(gguf) or block.MOBIE
    shard = gguf_io.SHARD_NAME.fullmatch(files[0])
    layers, n_expert = len({layout.layer(n) for n in experts}), max(x.n_expert for x in experts.values())
    origin = f"[{source.hub}](https://huggingface.co/{source.hub})" if source.hub else f"`{source.name}`"
    rows = {
        "architecture": f"{architecture}, {layers} layers of {n_expert} experts, {' or '.join(map(str, used))} used",
        "size": f"{size_text(size)}, of {size_text(source_size)}",
        "bits per weight": f"{bpw:.3f}; of the experts {expert_bpw:.4f}",
        "method": f"`{method}`",
        "settings": f"`{settings}`",
        "written by": exporter,
        "SHA-256 of the weights": f"`{seal}`",
    }
    lines = [
        f"---\n{front}\n---",
        f"# {shard['stem'] if shard else files[0].removesuffix('.gguf')}",
        "",
        f"The experts of {origin} in one sign per weight and one {8 * coding.scale.itemsize}-bit scale per "
        f"{coding.length} of them.",
        "",
        *(f"- {line}" for line in done + source.left_out()),
        "",
        *_run(files[0], coding),
        "",
        "| | |",
        "|---|---|",
        *(f"| {k} | {v} |" for k, v in rows.items()),
        f"| files | {', '.join(f'`{f}`' for f in files)} |",
        "",
        *_measured(output, seal),
    ]
    return "\n".join(lines)


def _run(name: str, coding: Coding) -> list[str]:
    """How it is run."""
    command = f"    llama-cli -m {name}"
    if coding.stock:
        return [f"Every llama.cpp that knows the type {coding.type_name} runs it:", "", command]
    words = "A stock llama.cpp refuses the file; the patched one of `mobie-export` runs it:"
    return [words, "", f"    mobie-export doctor {name}", command]


# ---- what was measured -----------------------------------------------------------------------------------------------


def report_path(output: Path, kind: str = "json") -> Path:
    """`dir/name.gguf` -> `dir/name-report.json`; the numbers of a shard are left out."""
    shard = gguf_io.SHARD_NAME.fullmatch(output.name)
    stem = shard["stem"] if shard else output.name.removesuffix(".gguf")
    return output.with_name(f"{stem}-report.{kind}")


def _measured(output: Path, seal: str | None) -> list[str]:
    """Lines of a table of the report's figures; none where there is no report, or one of other weights."""
    path = report_path(output)
    try:
        report = json.loads(path.read_bytes())
        if report["file"]["seal"] != seal:
            return []
        return _figures(report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or what a user made of it
        return []


def _figures(report: dict) -> list[str]:
    scores, speed, behaviour = (report[k] for k in ("scores", "speed", "behaviour"))
    rows: list[tuple[str, ...]] = []
    if "ppl" in scores:
        rows += [
            ("perplexity", f"{scores['ppl_source']:.4g}", f"{scores['ppl']:.4g}"),
            ("KL divergence, mean / median / 99 %", "", " / ".join(f"{scores[k]:.4g}" for k in KL)),
            ("same most likely token", "", f"{scores['same_top']:.1f} %"),
        ]
    for task, found in report["tasks"].items():
        if task != "left_out" and task != "todo":
            rows.append((task, *(f"{found[k]['score']:.1f} %" for k in ("source", "file"))))
    if "file" in speed:
        for kind in ("prompt", "generation"):
            rows.append((f"{kind}, tokens per second", *(f"{speed[k][kind]:.1f}" for k in ("source", "file"))))
    if "summary" in behaviour:
        both = [behaviour["summary"][k] for k in ("source", "file")]
        for key, what in BEHAVIOUR.items():
            rows.append((what, *(f"{s[key][0]} of {s[key][1]}" for s in both)))
    if not rows:
        return []
    made, machine = report["made"], report["made"]["machine"]
    return [
        "## Measured",
        "",
        f"By `mobie-export report`{' --quick' if made['quick'] else ''} on {made['at'][:10]}, {machine['cpu']}, "
        f"{made['threads']} threads; text: `{report['text']['name']}`.",
        "",
        "| | original | this file |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


KL = ("kl", "kl_median", "kl_99")
BEHAVIOUR = {
    "ended": "answers that end by themselves",
    "loops": "answers that run in loops",
    "json": "valid JSON on a plain request",
    "schema": "valid JSON of a schema",
    "tools": "tool calls well formed",
}


# ---- what was done ---------------------------------------------------------------------------------------------------


def _done(gguf: Gguf, settings: dict) -> list[str]:
    """What was done to the model, a line each, as metadata and tensors say."""
    method = metadata.METHOD.of(gguf) or ""
    lines = [_method(method, settings), *_beside(gguf)]
    tuned = [name for name in settings.get("tuned", []) if isinstance(name, str)]
    if tuned:
        names = {"routers": [n for n in tuned if "ffn_gate_inp" in n], "norms": [n for n in tuned if "norm" in n]}
        rest = [n for n in tuned if not any(n in found for found in names.values())]
        named = [*(kind for kind, found in names.items() if found), *rest]
        lines.append(f"Tuned together with the experts, and stored in F32: {', '.join(named)}.")
    types = settings.get("tensor_types")
    if types:
        lines.append(f"Tensors that are no experts in other types than the original's: `{' '.join(types)}`.")
    return [*lines, "Everything else is as it was in the original."]


METHODS = {
    "sign": "signs of the weights",
    "ordered": "layers in order, each fitted to make up for what the binarized ones before it lost",
    "glas": "error propagation weighted by the loss",
    "paper": "MoBiE as it was published (arXiv 2604.06798), as far as the file can hold it",
}
TOGETHER = "refinement of all layers together"
REFINEMENTS = {
    "layerwise": "refinement layer by layer",
    "streamed": TOGETHER,
    "end-to-end": TOGETHER,
    "magnitudes": f"{TOGETHER}, its signs as they were",
}


def _method(method: str, settings: dict) -> str:
    first, *refined = method.split("+")
    if refined or not method.startswith("sign"):
        steps = [METHODS.get(first, first), *(REFINEMENTS.get(name, name) for name in refined)]
        chat = " of dialogues in the model's chat template" if settings.get("chat") else ""
        return (
            f"Calibrated: {', then '.join(steps)}; on {settings.get('sequences')} sequences of "
            f"{settings.get('seq_len')} tokens{chat}, of a text with SHA-256 `{settings.get('calibration')}`."
        )
    if settings.get("imatrix"):
        return "Not calibrated: signs are the weights' own, scales weighted by an importance matrix (`llama-imatrix`)."
    return "Uncalibrated: signs and scales come from the weights alone."


def _beside(gguf: Gguf) -> list[str]:
    """Second signs and shared factors, where there are some."""
    experts, lines = layout.experts(gguf), []
    second = [x.residual for x in experts.values() if x.residual is not None]
    if second:
        share = sum(x.n_weights for x in second) / sum(x.n_weights for x in experts.values())
        lines.append(f"{share:.1%} of the experts' weights have a second sign and scale, in columns where they count.")
    if any(layout.kind(n) == "expert factor" for n in gguf.tensors):
        lines.append("The experts of a layer share matrices that they read and write through.")
    return lines


# ---- front matter ----------------------------------------------------------------------------------------------------


def _library() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as e:
        raise MobieError(
            UNSUPPORTED,
            "--card needs a package that is not installed",
            str(e),
            "huggingface_hub",
            "pip install 'mobie-export[convert]', or leave --card out",
        ) from None
    return huggingface_hub


def _front(source: Source, gguf: Gguf) -> str:
    """The head of the card, in YAML."""
    base = source.hub or _repository(gguf)
    found: dict[str, object] = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    found |= {"pipeline_tag": "text-generation", "tags": ["gguf", "mobie", "moe"]}
    return _library().ModelCardData(**_inherited(source, gguf), **found).to_yaml()


def _repository(gguf: Gguf) -> str | None:
    """The model of the hub that a GGUF says it was converted from."""
    url = gguf.value("general.source.repo_url")
    match = re.fullmatch(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?", url) if isinstance(url, str) else None
    return match[1] if match else None


def _inherited(source: Source, gguf: Gguf) -> dict:
    """What the card of the original says that holds for this one as well; of a GGUF, its metadata."""
    import yaml  # of huggingface_hub's dependencies

    card = source.checkpoint / NAME if source.checkpoint else None
    if card is None or not card.is_file():
        values = {key: gguf.value(entry) for key, entry in TAKEN_OVER.items()}
        return {key: value for key, value in values.items() if isinstance(value, str | list) and value}
    try:
        data = _library().ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError):  # a card that nobody can read has nothing to say
        return {}
    return {key: data[key] for key in TAKEN_OVER if key in data}
