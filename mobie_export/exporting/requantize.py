"""Upstream types for tensors that are no experts, in llama-quantize's spelling: --tensor-type NAME=TYPE.

Which tensors may have another type is llama-quantize's rule: matrices named *weight, but no norms, routers or small
convolutions. The quantizing is ggml's own, `ggml_quantize_chunk` of the library that any llama-cpp-python brings, so
the bytes are those that llama-quantize would write.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import gguf as gguf_py
import numpy as np

from mobie_export import gguf_io
from mobie_export.calibration.imatrix import Imatrix
from mobie_export.errors import NO_RUNTIME, UNSUPPORTED, USAGE, MobieError
from mobie_export.gguf_io import Gguf, Tensor
from mobie_export.runtime import libggml
from mobie_export.spec import layout

FLOATS = ("F32", "F16", "BF16")
TYPES = (
    *FLOATS,
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "TQ1_0", "TQ2_0"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "Q1_0"),
)
NEED_IMPORTANCE = ("IQ1_S", "IQ2_XXS", "IQ2_XS")  # ggml_quantize_requires_imatrix
# parts of names that llama-quantize leaves alone (tensor_allows_quantization)
KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp|ffn_gate_tid2eid|altup|laurel|per_layer_model_proj|position_embd|token_types|ssm_conv1d|"
    r"shortconv\.conv|time_mix_(first|w[0-2]|v[0-2]|a[0-2]|g[12]|decay_w[12]|lerp_fused)|attn_rel_b|indexer\.[kq]_proj"
)


@dataclass(frozen=True)
class Rule:
    """Tensors in whose names `pattern` is found get the type."""

    pattern: str
    type_name: str

    def __str__(self) -> str:
        return f"{self.pattern}={self.type_name}"


def parse(text: str) -> Rule:
    """`attn_q=q8_0` -> Rule. Raises ValueError with what is wrong."""
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise ValueError(f"{text} is not NAME=TYPE, such as attn_v=q6_K")
    try:
        re.compile(pattern)
    except re.error as e:
        raise ValueError(f"{pattern} is no regular expression: {e}") from None
    if name.upper() not in TYPES:
        raise ValueError(f"{name} is none of the types {', '.join(TYPES)}")
    return Rule(pattern, name.upper())


def as_in(file: Gguf) -> tuple[Rule, ...]:
    """What gives a model's tensors the types that they have in a file made from it."""
    names = {t.name: gguf_io.type_name(t.type_id) for t in file.tensors.values() if _free(t)}
    return tuple(Rule(f"^{re.escape(name)}$", kind) for name, kind in names.items() if kind in TYPES)


def chosen(gguf: Gguf, rules: tuple[Rule, ...], importance: Imatrix | None = None) -> dict[str, int]:
    """Tensor -> type that the rules give it, the first match being taken; experts are MoBiE's and not among them.

    Raises MobieError for a rule without a tensor and a type that does not fit.
    """
    found: dict[str, int] = {}
    used = set()
    for name, tensor in gguf.tensors.items():
        rule = next((r for r in rules if re.search(r.pattern, name)), None)
        if rule is None or not _free(tensor):
            continue
        used.add(rule)
        type_id = int(gguf_py.GGMLQuantizationType[rule.type_name])
        if type_id == tensor.type_id:
            continue
        _check(gguf, tensor, rule, type_id, importance)
        found[name] = type_id
    unused = next((r for r in rules if r not in used), None)
    if unused is not None:
        raise MobieError(
            USAGE,
            f"--tensor-type {unused} has no effect",
            "no matrix beside the experts has such a name, or an earlier --tensor-type takes it",
            "part of a name that `mobie-export inspect` lists; norms, routers and experts keep their types",
        )
    return found


def check_library(types: dict[str, int]) -> None:
    """MobieError where a type needs ggml and there is none."""
    if any(gguf_py.GGMLQuantizationType(t).name not in FLOATS for t in types.values()):
        _ggml()


def _free(tensor: Tensor) -> bool:
    """Whether a tensor may have another type."""
    matrix = len(tensor.shape) >= 2 and tensor.n_weights > tensor.shape[0]
    ours = layout.kind(tensor.name) == "expert" or layout.kind(tensor.name) in layout.BESIDE_EXPERTS
    return matrix and not ours and tensor.name.endswith("weight") and not KEPT.search(tensor.name)


def _check(gguf: Gguf, tensor: Tensor, rule: Rule, type_id: int, importance: Imatrix | None) -> None:
    block = gguf_io.block_size(type_id)[0]
    if tensor.shape[0] % block:
        raise MobieError(
            UNSUPPORTED,
            f"tensor {tensor.name} cannot be of type {rule.type_name}",
            f"rows of {tensor.shape[0]} weights",
            f"a multiple of {block}",
            f"give it a type with smaller blocks before this one, such as --tensor-type {re.escape(tensor.name)}=q8_0",
        )
    gguf_io.check_decodable(gguf, tensor, "leave it as it is")
    if rule.type_name in NEED_IMPORTANCE and (importance is None or importance.columns(tensor) is None):
        raise MobieError(
            UNSUPPORTED,
            f"type {rule.type_name} needs an importance matrix",
            f"none for {tensor.name}",
            "--imatrix FILE with an entry of this name",
            "choose a larger type",
        )


def quantizer(
    gguf: Gguf, tensor: Tensor, type_id: int, importance: Imatrix | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """float32 [n, cols] -> uint8 [n, bytes of a row] of a type, for rows of this tensor. May run in threads."""
    kind = gguf_py.GGMLQuantizationType(type_id)
    row_bytes = gguf_io.tensor_bytes(tensor.shape[:1], type_id)
    columns = importance.columns(tensor) if importance is not None else None
    ggml = None if kind.name in FLOATS else _ggml()

    def quantize(weights: np.ndarray) -> np.ndarray:
        if ggml is None:
            return as_floats(gguf, tensor, weights, kind).view(np.uint8).reshape(len(weights), row_bytes)
        _check_finite(gguf, tensor, weights)
        return ggml.quantize(type_id, weights, columns)

    return quantize


def as_floats(gguf: Gguf, tensor: Tensor, weights: np.ndarray, kind: gguf_py.GGMLQuantizationType) -> np.ndarray:
    """float32 -> the same values as F32, F16 or BF16. MobieError where one is no number, or becomes infinite."""
    _check_finite(gguf, tensor, weights)
    with np.errstate(over="ignore"):
        stored = gguf_py.quants.quantize(weights, kind)
    if kind.name != "F32" and not np.isfinite(gguf_io.decode(stored.view(np.uint8), int(kind))).all():
        raise MobieError(
            UNSUPPORTED,
            f"tensor {tensor.name} of {gguf.paths[tensor.shard]} does not fit into {kind.name}",
            f"values up to {np.abs(weights).max():.3g}",
            "at most 65504 in F16, 3.38e38 in BF16",
            f"choose {'bf16 or f32' if kind.name == 'F16' else 'f32'} in place of {kind.name.lower()}",
        )
    return stored


def _check_finite(gguf: Gguf, tensor: Tensor, weights: np.ndarray) -> None:
    bad = weights.size - int(np.isfinite(weights).sum())
    if bad:
        raise gguf_io.not_finite(gguf, tensor, f"{bad} infinite or NaN weights")


def _ggml() -> libggml.Quantizers:
    """Those of the installed llama_cpp, patched or not. MobieError where there is none."""
    try:
        return libggml.Quantizers(libggml.base_library())
    except OSError as e:
        raise MobieError(
            NO_RUNTIME,
            "--tensor-type with a quantized type needs llama.cpp's library",
            str(e),
            "an installed llama_cpp",
            "mobie-export runtime build, or pip install llama-cpp-python",
        ) from None
