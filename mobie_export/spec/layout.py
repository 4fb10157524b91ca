"""Which tensors of a GGUF are experts. llama.cpp names them alike in every architecture, so names decide."""

import re
from dataclasses import dataclass

import numpy as np

from mobie_export import gguf_io
from mobie_export.errors import UNSUPPORTED, MobieError
from mobie_export.gguf_io import Gguf, Tensor
from mobie_export.spec import block

# First match wins. `chexps` are the second, smaller set of experts of GroveMoE.
KINDS = (
    ("expert", re.compile(r"blk\.(?P<layer>\d+)\.ffn_(gate|up|gate_up|down)_(ch)?exps\.weight")),
    ("expert scale", re.compile(r"blk\.\d+\.ffn_(gate|up|gate_up|down)_(ch)?exps\.scale")),
    ("expert residual", re.compile(r"blk\.\d+\.ffn_(gate|up|gate_up|down)_(ch)?exps\.residual")),
    ("expert columns", re.compile(r"blk\.\d+\.ffn_exps\.columns")),
    ("expert factor", re.compile(r"blk\.\d+\.ffn_moe_(in|out)\.weight")),
    ("router", re.compile(r"blk\.\d+\.(ffn_gate_inp|exp_probs_b)(\.\w+)?")),
    ("shared expert", re.compile(r"blk\.\d+\.ffn_\w+_shexp\.\w+")),
)
# storage of the experts that is no weights
BESIDE_EXPERTS = ("expert scale", "expert residual", "expert columns", "expert factor")
# One tensor per expert, as converters wrote before 2024-04.
OLD_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")
# Formats with a factor for the activations of a projection. Signs times an 8-bit activation have no use for it.
INPUT_SCALE = re.compile(r"blk\.\d+\.ffn_(gate|up|gate_up|down)_(ch)?exps\.input_scale")

# GGUFs that are no models, by general.type: what they are, what to do.
NO_MODELS = {
    "mmproj": (
        "the vision or audio part of a model (mmproj)",
        "export the model; this file is used beside it as it is",
    ),
    "adapter": ("a LoRA adapter", "export the model that it belongs to"),
    "imatrix": ("an importance matrix", "export a model, with --imatrix and this file"),
    "vocab": ("a vocabulary without weights", "export a model"),
}


@dataclass(frozen=True)
class Experts:
    """The expert matrices of one tensor: W[e] is [rows, cols], stored row by row."""

    tensor: Tensor
    cols: int
    rows: int
    n_expert: int
    factor: Tensor | None  # float32 [n_expert]: factors that the source keeps beside the weights
    residual: Tensor | None = None  # second plane [k, rows, n_expert] of a MoBiE tensor
    columns: Tensor | None = None  # int32 [>= k]: its columns, where they are not the first k
    shared: Tensor | None = None  # [width, width]: what all experts of the layer read or write through, FORMAT.md

    @property
    def n_weights(self) -> int:
        return self.cols * self.rows * self.n_expert

    @property
    def expert_bytes(self) -> int:
        return self.tensor.n_bytes // self.n_expert

    def second_columns(self, model: Gguf) -> np.ndarray:
        """int64 [k]: the columns with a second sign, of tensors without `problems`."""
        if self.residual is None:
            return np.empty(0, np.int64)
        k = self.residual.shape[0]
        return np.arange(k) if self.columns is None else model.read(self.columns).view("<i4")[:k].astype(np.int64)

    def problems(self, model: Gguf) -> list[str]:
        """What of the tensors beside a MoBiE tensor is not laid out as FORMAT.md says, a line each."""
        tensor, found = self.tensor, []

        def expect(beside: Tensor, good: bool, wanted: str) -> bool:
            if not good:
                kind = gguf_io.type_name(beside.type_id)
                found.append(f"{beside.name} is {kind} {list(beside.shape)}, wanted {wanted}")
            return good

        scale, second, columns, shared = self.factor, self.residual, self.columns, self.shared
        if scale is not None:
            good = scale.type_id == gguf_io.TYPE_F32 and scale.shape == (self.n_expert,)
            expect(scale, good, f"F32 [{self.n_expert}]")
        if second is not None:
            good = second.type_id == block.TYPE_ID and second.shape[1:] == tensor.shape[1:]
            wanted = f"mobie {['k', *tensor.shape[1:]]} with k at most {self.cols}"
            expect(second, good and second.shape[0] <= self.cols, wanted)
        if columns is not None and second is not None:
            k = second.shape[0]
            good = columns.type_id == gguf_io.TYPE_I32 and len(columns.shape) == 1 and columns.n_weights >= k
            if expect(columns, good, f"I32, {k} or more"):
                chosen = model.read(columns).view("<i4")
                if len(np.unique(chosen)) != len(chosen) or chosen.min() < 0 or chosen.max() >= self.cols:
                    found.append(f"{columns.name} names a column twice, or one that {tensor.name} has not")
        if shared is not None:
            width = self.rows if is_down(tensor.name) else self.cols
            good = gguf_io.can_decode(shared.type_id) and shared.type_id != block.TYPE_ID
            expect(shared, good and shared.shape == (width, width), f"floats or a type of them [{width}, {width}]")
        return found


def kind(name: str) -> str:
    return next((k for k, pattern in KINDS if pattern.fullmatch(name)), "other")


def layer(name: str) -> int | None:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else None


def layer_of(name: str) -> int:
    """Of a tensor that belongs to a layer."""
    found = layer(name)
    assert found is not None, name
    return found


def scale_name(name: str) -> str:
    """`blk.0.ffn_up_exps.weight` -> `blk.0.ffn_up_exps.scale`"""
    return name.removesuffix(".weight") + ".scale"


def residual_name(name: str) -> str:
    """`blk.0.ffn_up_exps.weight` -> `blk.0.ffn_up_exps.residual`"""
    return name.removesuffix(".weight") + ".residual"


def columns_name(name: str) -> str:
    """`blk.0.ffn_up_exps.weight` -> `blk.0.ffn_exps.columns`, which gate and up share"""
    return f"blk.{layer(name)}.ffn_exps.columns"


def shared_name(name: str) -> str:
    """`blk.0.ffn_up_exps.weight` -> `blk.0.ffn_moe_in.weight`; of a down projection, `blk.0.ffn_moe_out.weight`"""
    return f"blk.{layer(name)}.ffn_moe_{'out' if is_down(name) else 'in'}.weight"


def is_down(name: str) -> bool:
    """Whether an expert tensor writes to the model's width; all others read from it."""
    return ".ffn_down_" in name


def is_further(model: Gguf, name: str) -> bool:
    """Whether a tensor is of a layer that predicts further tokens (nextn, MTP): no run over text passes those."""
    n_layers = model.get(f"{model.architecture}.block_count", int)
    further = model.get(f"{model.architecture}.nextn_predict_layers", int, 0)
    return n_layers is not None and further > 0 and (layer(name) or 0) >= n_layers - further


def experts(model: Gguf) -> dict[str, Experts]:
    """All expert tensors by name, in file order. MobieError where one is no set of matrices."""
    found = {}
    for name, tensor in model.tensors.items():
        if kind(name) == "expert":
            second = model.tensors.get(residual_name(name))
            for matrices in (tensor, second):
                if matrices is not None and not (1 <= len(matrices.shape) <= 3 and matrices.n_weights):
                    raise MobieError(
                        UNSUPPORTED,
                        f"expert tensor {matrices.name} has a shape that is none of a set of matrices",
                        f"{list(matrices.shape)}",
                        "[columns, rows, experts]",
                    )
            cols, rows, n_expert = (*tensor.shape, 1, 1)[:3]
            columns = model.tensors.get(columns_name(name)) if second is not None and not is_down(name) else None
            factor = model.tensors.get(scale_name(name))
            shared = model.tensors.get(shared_name(name))
            found[name] = Experts(tensor, cols, rows, n_expert, factor, second, columns, shared)
    return found


def check_exportable(model: Gguf) -> dict[str, Experts]:
    """The expert tensors of a model that can be exported; MobieError for every other model."""
    path, what = model.paths[0], model.get("general.type", str, "model")
    other = NO_MODELS.get("mmproj" if model.architecture == "clip" else what)
    if other is not None:
        raise MobieError(UNSUPPORTED, f"{path} is {other[0]}", f"general.type {what}", "a model", other[1])
    done = [t.name for t in model.tensors.values() if t.type_id == block.TYPE_ID]
    if done or "mobie.format_version" in model.entries:
        raise MobieError(
            UNSUPPORTED,
            f"{path} is a MoBiE file already",
            f"{len(done)} tensors of type mobie",
            "a model with F16, BF16, F32 or quantized experts",
            "export from the original model",
        )
    found = experts(model)
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
        _check_expert(item)
    return found


def _check_expert(item: Experts) -> None:
    tensor = item.tensor
    if item.cols % block.BLOCK_LEN:
        raise MobieError(
            UNSUPPORTED,
            f"expert tensor {tensor.name} is too narrow for blocks of {block.BLOCK_LEN}",
            f"rows of {item.cols} weights",
            f"a multiple of {block.BLOCK_LEN}",
            "this model cannot be exported",
        )
    if not gguf_io.can_decode(tensor.type_id):
        raise MobieError(
            UNSUPPORTED,
            f"expert tensor {tensor.name} cannot be decoded",
            f"type {gguf_io.type_name(tensor.type_id)}",
            "a type that the gguf package can dequantize",
            "export from an F16, BF16 or Q8_0 version of the model",
        )
    factor = item.factor
    if factor is not None and (factor.type_id != gguf_io.TYPE_F32 or factor.n_weights != item.n_expert):
        raise MobieError(
            UNSUPPORTED,
            f"tensor {factor.name} is not one float per expert",
            f"{gguf_io.type_name(factor.type_id)} {list(factor.shape)}",
            f"F32 [{item.n_expert}]",
        )
