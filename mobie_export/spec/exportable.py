"""Which models can be exported: Mixture-of-Experts models whose expert tensors are matrices that can be decoded."""

import re

import numpy as np

from mobie_export import gguf_io
from mobie_export.errors import UNSUPPORTED, MobieError
from mobie_export.gguf_io import Gguf, Header
from mobie_export.spec import block, layout, metadata
from mobie_export.spec.block import Coding
from mobie_export.spec.layout import Experts

# One tensor per expert, as converters wrote before 2024-04.
OLD_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")
# Formats with a factor for the activations of a projection. Signs times an 8-bit activation have no use for it.
INPUT_SCALE = re.compile(r"blk\.\d+\.ffn_(gate|up|gate_up|down)_(ch)?exps\.input_scale")

# GGUFs that are no models, by general.type: what they are, what to do.
NO_MODELS = {
    "mmproj": (
        "the vision or audio part of a model (mmproj), which has no experts and needs no export",
        "export the model; this file is used as it is: llama-cli -m MODEL-mobie.gguf --mmproj {path}",
    ),
    "adapter": ("a LoRA adapter", "export the model that it belongs to"),
    "imatrix": ("an importance matrix", "export a model, with --imatrix and this file"),
    "vocab": ("a vocabulary without weights", "export a model"),
}


def check(model: Gguf, coding: Coding = block.MOBIE) -> dict[str, Experts]:
    """The expert tensors of a model that can be exported with experts of this type; MobieError for every other
    model."""
    path, other = model.paths[0], other_than_model(model)
    if other is not None:
        kind = model.get("general.type", str)
        says = f"architecture {model.architecture}" if kind is None else f"general.type {kind}"
        raise MobieError(UNSUPPORTED, f"{path} is {other[0]}", says, "a model", other[1].format(path=path))
    done = [t.name for t in model.tensors.values() if t.type_id == block.TYPE_ID]
    if done or metadata.is_mobie(model):
        raise MobieError(
            UNSUPPORTED,
            f"{path} is a MoBiE file already",
            f"{len(done)} tensors of type mobie" if done else f"{metadata.FORMAT_VERSION.name} in its metadata",
            "a model with F16, BF16, F32 or quantized experts",
            "export from the original model",
        )
    found = layout.experts(model)
    if not found:
        old = next((n for n in model.tensors if OLD_EXPERT.fullmatch(n)), None)
        if old:
            raise MobieError(
                UNSUPPORTED,
                f"{path} has the old layout with one tensor per expert",
                old,
                "blk.N.ffn_up_exps.weight",
                "convert the model again with a current llama.cpp",
            )
        raise MobieError(
            UNSUPPORTED,
            f"{path} is not a Mixture-of-Experts model",
            f"architecture {model.architecture}, {len(model.tensors)} tensors, no expert tensor",
            "tensors named blk.N.ffn_{gate,up,down}_exps.weight",
            "only the experts of MoE models are exported; use llama-quantize for this one",
        )
    extra = [n for n in model.tensors if INPUT_SCALE.fullmatch(n)]
    if extra:
        raise MobieError(
            UNSUPPORTED,
            f"{path} has scales for the experts' activations",
            extra[0],
            "expert weights that stand for themselves",
            "export from the F16 or BF16 model",
        )
    for item in found.values():
        _check_one(model, item, coding)
    return found


def other_than_model(model: Gguf | Header) -> tuple[str, str] | None:
    """What a GGUF is that is no model, and what to do: a row of NO_MODELS. None for a model."""
    if model.get("general.architecture", str) == "clip":
        return NO_MODELS["mmproj"]
    return NO_MODELS.get(model.get("general.type", str) or "model")


def scales(a: np.ndarray, coding: Coding, name: str) -> tuple[np.float32, np.ndarray]:
    """block.encode_scales of the magnitudes of one expert of a tensor; MobieError where the type cannot hold them."""
    try:
        return block.encode_scales(a, coding)
    except block.OutOfRange as e:
        todo = f"export with --type {block.MOBIE.option}" if coding.stock else ""
        what = f"expert tensor {name} cannot be stored as {coding.type_name}"
        raise MobieError(UNSUPPORTED, what, str(e), todo=todo) from None


def _check_one(model: Gguf, item: Experts, coding: Coding) -> None:
    tensor, narrow = item.tensor, item.cols % block.BLOCK_LEN != 0
    if item.cols % coding.length:
        raise MobieError(
            UNSUPPORTED,
            f"expert tensor {tensor.name} is no {coding.type_name}: its rows are no whole blocks of {coding.length}",
            f"rows of {item.cols} weights",
            f"a multiple of {coding.length}",
            "this model cannot be exported"
            if narrow
            else f"export with --type {block.MOBIE.option}, whose blocks have {block.BLOCK_LEN} weights",
        )
    gguf_io.check_decodable(model, tensor)
    factor = item.factor
    if factor is not None and (factor.type_id != gguf_io.TYPE_F32 or factor.n_weights != item.n_expert):
        raise MobieError(
            UNSUPPORTED,
            f"tensor {factor.name} is not one float per expert",
            f"{gguf_io.type_name(factor.type_id)} {list(factor.shape)}",
            f"F32 [{item.n_expert}]",
            "convert the model again with a current llama.cpp",
        )
