"""Which tensors of a GGUF are experts, and what is stored for them. llama.cpp names them alike in every architecture,
so names decide."""

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
PATCHED = ("expert residual", "expert columns", "expert factor")  # what only the patched runtime reads
BESIDE_EXPERTS = ("expert scale", *PATCHED)  # storage of the experts that is no weights


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
    def layer(self) -> int:
        return layer(self.tensor.name) or 0

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
                        "download or convert the model again",
                    )
            cols, rows, n_expert = (*tensor.shape, 1, 1)[:3]
            columns = model.tensors.get(columns_name(name)) if second is not None and not is_down(name) else None
            factor = model.tensors.get(scale_name(name))
            shared = model.tensors.get(shared_name(name))
            found[name] = Experts(tensor, cols, rows, n_expert, factor, second, columns, shared)
    return found


def bits_per_weight(model: Gguf) -> tuple[float, float | None]:
    """True stored bits per weight: (of all tensors, of the experts or None).

    Scales, second planes and shared factors of experts are storage of the experts, not weights.
    """
    beside = {n: t for n, t in model.tensors.items() if kind(n) in BESIDE_EXPERTS}
    weights = sum(t.n_weights for n, t in model.tensors.items() if n not in beside)
    stored = sum(t.n_bytes for t in model.tensors.values())
    found = experts(model)
    expert_weights = sum(x.n_weights for x in found.values())
    expert_bytes = sum(x.tensor.n_bytes for x in found.values()) + sum(t.n_bytes for t in beside.values())
    return 8 * stored / max(weights, 1), 8 * expert_bytes / expert_weights if expert_weights else None


def active_bits_per_weight(model: Gguf) -> float | None:
    """Bits of experts and of what they share read for one token, per weight of the experts that are active for it.

    None where the file does not say how many those are.
    """
    found = experts(model)
    own, weights = 0.0, 0.0
    for item in found.values():
        used = model.of_layer("expert_used_count", item.layer)
        if used is None:
            return None
        parts = [t for t in (item.tensor, item.factor, item.residual) if t is not None]
        own += sum(t.n_bytes for t in parts) * used / item.n_expert
        weights += item.n_weights * used / item.n_expert
    shared = ("expert factor", "expert columns")
    own += sum(t.n_bytes for n, t in model.tensors.items() if kind(n) in shared)
    return 8 * own / weights if weights > 0 else None
