"""A Hugging Face folder, looked at before anything long is done with it: is it all there, and what will be left out.

Only names, sizes and headers are read; nothing of the folder is executed.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from mobie_export.errors import BAD_INPUT, UNSUPPORTED, MobieError
from mobie_export.gguf_io import first_bytes
from mobie_export.sources import safetensors

AGAIN = "download the model again: what is complete is kept"
# quantization_config.quant_method that the pinned converter undoes or keeps
METHODS = ("bitnet", "fp8", "gptq", "compressed-tensors", "modelopt", "mxfp4")
TOKENIZERS = ("tokenizer.json", "*.model", "*.model.v3", "*.tiktoken", "tekken.json", "vocab.json", "vocab.txt")
SHARD = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.(?P<suffix>safetensors|bin)")
# Weights of what llama.cpp keeps in a file of its own (mmproj), or not at all: part of a tensor's name -> what it is.
TOWERS = (
    (r"audio|speech|talker|token2wav|code2wav|sound", "audio"),
    (r"visual|vision|image|(^|\.)vit\.|mm_projector|multi_modal_projector|(^|\.)mlp1\.", "vision"),
)


@dataclass(frozen=True)
class Tower:
    """A part of a model that the export leaves out. Sizes in weights."""

    kind: str  # vision or audio
    weights: int
    of: int  # the whole checkpoint


def weights(folder: Path) -> list[Path]:
    """The files of a folder that hold the weights of a checkpoint."""
    return sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))


def check(folder: Path, name: str) -> list[Tower]:
    """What of the checkpoint will not be converted. MobieError where it cannot be. name: as the user calls it."""
    config = _json(folder / "config.json")
    _check_quantization(config, name)
    found_weights = weights(folder)
    if not found_weights:
        adapter = (folder / "adapter_config.json").exists()
        raise MobieError(
            BAD_INPUT,
            f"{name} has no weights",
            "config.json alone",
            "model*.safetensors",
            "give the model that the adapter belongs to" if adapter else "download the whole model",
        )
    _check_tokenizer(folder, name)
    _check_shards(folder, name, found_weights)
    sizes: dict[str, int] = {}
    for path in found_weights:
        if path.suffix == ".safetensors":
            sizes |= {name: t.n_weights for name, t in safetensors.read(path, AGAIN).tensors.items()}
        elif first_bytes.is_pointer(first_bytes.read(path)):
            raise first_bytes.other(path, "a file of weights", AGAIN)
    found: dict[str, int] = {}
    for tensor, n in sizes.items():
        kind = next((k for pattern, k in TOWERS if re.search(pattern, tensor)), None)
        if kind:
            found[kind] = found.get(kind, 0) + n
    return [Tower(kind, n, sum(sizes.values())) for kind, n in sorted(found.items(), reverse=True)]


def _json(path: Path) -> dict:
    """A JSON object of the checkpoint."""
    if first_bytes.is_pointer(first_bytes.read(path)):
        raise first_bytes.other(path, "a JSON file", AGAIN)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise MobieError(BAD_INPUT, f"{path} is damaged", str(e)[:200], "a JSON object", AGAIN) from None
    if not isinstance(found, dict):
        raise MobieError(BAD_INPUT, f"{path} is damaged", type(found).__name__, "a JSON object", AGAIN)
    return found


def _check_quantization(config: dict, name: str) -> None:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        how = part.get("quantization_config")
        method = how.get("quant_method") if isinstance(how, dict) else None
        if part.get("quantization") and method is None:
            method = "mlx"
        if method is not None and method not in METHODS:
            raise MobieError(
                UNSUPPORTED,
                f"{name} is quantized in a way that the converter does not know",
                f"{method}",
                f"16-bit weights, or one of {', '.join(METHODS)}",
                "export from the model that this one was quantized from",
            )


def _check_tokenizer(folder: Path, name: str) -> None:
    files = [p for pattern in TOKENIZERS for p in folder.glob(pattern)]
    if not files:
        raise MobieError(
            BAD_INPUT,
            f"{name} has no tokenizer",
            f"none of {', '.join(TOKENIZERS)}",
            "the files that the model was published with",
            AGAIN,
        )
    for path in [*files, *folder.glob("*token*.json"), *folder.glob("generation_config.json")]:
        if first_bytes.is_pointer(first_bytes.read(path)):
            raise first_bytes.other(path, "a tokenizer", AGAIN)


def _check_shards(folder: Path, name: str, weights: list[Path]) -> None:
    """Every file that an index or the name of another one promises is there."""
    wanted = set()
    for index in folder.glob("*.index.json"):
        names = _json(index).get("weight_map")
        if isinstance(names, dict) and index.name.startswith(("model.", "pytorch_model.")):
            wanted |= {str(n) for n in names.values()}
    for path in weights:
        if shard := SHARD.fullmatch(path.name):
            many = range(1, int(shard["count"]) + 1)
            wanted |= {f"{shard['stem']}-{i:05d}-of-{shard['count']}.{shard['suffix']}" for i in many}
    missing = sorted(wanted - {p.name for p in weights})
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise MobieError(
            BAD_INPUT,
            f"{name} is not complete",
            f"not there: {', '.join(missing[:3])}{more}",
            f"{len(wanted)} files of weights",
            AGAIN,
        )
