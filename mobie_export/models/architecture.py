"""How does a GGUF of some architecture become modules of transformers? An entry of the table, and what all share.

An entry is a class in families/, one file per family. The converter of llama.cpp rearranges some weights on the way
from a checkpoint to a GGUF; entries hold the inverse. Everything a layer needs is either a tensor of the file by
another name or a `Made` one. Modules compute what llama.cpp computes for the file, which is not always what the
checkpoint's configuration said.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mobie_export.errors import BAD_INPUT, UNSUPPORTED, MobieError
from mobie_export.gguf_io import Gguf

# general.architecture -> file in families/
FAMILIES = {
    "qwen3moe": "qwen",
    "qwen2moe": "qwen",
    "olmoe": "olmoe",
    "llama": "mixtral",
    "deepseek2": "deepseek",
    "glm4moe": "glm4",
    "gpt-oss": "gpt_oss",
    "qwen3next": "qwen_next",
    "qwen35moe": "qwen_next",
}


@dataclass(frozen=True)
class Made:
    """A parameter computed from tensors of a layer, by their names without `blk.N.`."""

    names: tuple[str, ...]
    make: Callable[..., Tensor]  # of as many tensors as there are names


Value = TypeVar("Value", int, float, bool, str)
Parameters = dict[str, str | Made]  # parameter of a layer -> tensor without `blk.N.`, or how it is made
Activation = Callable[[Tensor, Tensor], Tensor]  # of gate and up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def clamped(gate: Tensor, up: Tensor) -> Tensor:  # GPT-OSS
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


class Architecture(ABC):
    """How one file becomes modules of transformers. Raises MobieError for metadata that may change what it computes
    and that no configuration asks for."""

    config: PreTrainedConfig
    moe = "mlp"  # attribute of a layer with `experts` in it
    router = "mlp.gate.weight"  # parameters in front of the experts
    norm = "post_attention_layernorm.weight"
    act: Activation = staticmethod(swiglu)  # between gate, up and down

    def __init__(self, gguf: Gguf):
        self.gguf = gguf
        key = Metadata(gguf)
        self.config = self.configured(key)
        key.check_rest()

    @abstractmethod
    def configured(self, key: "Metadata") -> PreTrainedConfig:
        """The configuration of the model in transformers."""

    @abstractmethod
    def layer(self, index: int) -> nn.Module:
        """A layer as transformers has it, with weights of no meaning."""

    @abstractmethod
    def rotary(self) -> nn.Module:
        """What makes the position embeddings."""

    @abstractmethod
    def parameters(self, index: int) -> Parameters: ...

    def window(self, index: int) -> int | None:
        """How many tokens back attention sees; None where the module masks by itself."""
        return None

    def prepare(self, layer: nn.Module) -> None:  # noqa: B027 (most layers are used as they are)
        """Changes to a fresh layer."""


# ---- metadata --------------------------------------------------------------------------------------------------------

# Metadata of an architecture that leaves its function as it is: what a tensor's shape says as well, what only tools
# read, and what the pinned llama.cpp reads for none of the architectures in families/. Everything else that no
# configuration asks for is refused: it may change what the model computes.
WITHOUT_INFLUENCE = {
    *("vocab_size", "embedding_length_out", "feed_forward_length", "expert_feed_forward_length", "tensor_data_layout"),
    *("expert_shared_feed_forward_length", "expert_shared_count", "leading_dense_block_count", "decoder_sparse_step"),
    *("rope.scaling.finetuned", "attention.layer_norm_epsilon", "attention.value_length", "pooling_type"),
    *("attention.sliding_window", "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast"),
    *("rope.scaling.yarn_beta_slow", "expert_weights_norm"),
}
# ... and what does so with one value: llama.cpp has it fixed, or computes the same with it.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "expert_gating_func": (0, 1),  # a softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scale_linear": (0.0, 1.0),
}


class Metadata:
    """Metadata of a file's architecture by the rest of its name; it keeps in mind what was asked for.

    All functions raise MobieError for a value of another kind, and where there is neither a value nor a default.
    """

    def __init__(self, gguf: Gguf):
        self.gguf = gguf
        self.read: set[str] = set()

    def __call__(self, name: str, default: int | None = None) -> int:
        """An integer, one for all layers."""
        return self._one(name, int, default)

    def real(self, name: str, default: float | None = None) -> float:
        """A floating-point number, one for all layers."""
        return self._one(name, float, default)

    def flag(self, name: str, default: bool) -> bool:
        return self._one(name, bool, default)

    def word(self, name: str, default: str) -> str:
        return self._one(name, str, default)

    def several(self, name: str, kind: type[Value], default: list[Value] | None = None) -> list[Value]:
        """One for each layer, or whatever else they are for."""
        value = self._value(name, kind, default)
        if not isinstance(value, list):
            raise unsupported(self.gguf, "has one value", self._said(name, value), "a list")
        return value

    def has(self, name: str) -> bool:
        self.read.add(name)
        return self._full(name) in self.gguf.entries

    def check_rest(self) -> None:
        """MobieError for an entry that may change the function and that nobody asked for."""
        start = self._full("")
        for key, entry in self.gguf.entries.items():
            name = key.removeprefix(start)
            if not key.startswith(start) or name in self.read or name in WITHOUT_INFLUENCE:
                continue
            if entry.value not in NEUTRAL.get(name, ()):
                raise unsupported(self.gguf, "has metadata", self._said(name, entry.value), "no such entry")

    def _one(self, name: str, kind: type[Value], default: Value | None) -> Value:
        value = self._value(name, kind, default)
        if isinstance(value, list):
            if not value or value.count(value[0]) != len(value):
                raise unsupported(self.gguf, "has values of its own for every layer", self._said(name, value), "one")
            return value[0]
        return value

    def _value(self, name: str, kind: type[Value], default: Value | list[Value] | None) -> Value | list[Value]:
        self.read.add(name)
        value = self.gguf.get_list(self._full(name), kind)
        if value is None:
            value = default
        if value is None:
            raise MobieError(
                BAD_INPUT,
                f"{self.gguf.paths[0]} lacks metadata",
                f"no {self._full(name)}",
                f"what llama.cpp's {self.gguf.architecture} models have",
                "download or convert the model again; or export with --method sign, which does not read it",
            )
        return value

    def _full(self, name: str) -> str:
        return f"{self.gguf.architecture}.{name}"

    def _said(self, name: str, value: object) -> str:
        return f"{self._full(name)} = {str(value)[:80]}"


def unsupported(gguf: Gguf, what: str, found: str, wanted: str) -> MobieError:
    """For a model that no entry knows; what: "has a layout", ..."""
    return MobieError(
        UNSUPPORTED,
        f"{gguf.paths[0]} {what} that calibration does not know",
        found,
        wanted,
        "export with --method sign",
    )


# ---- the table -------------------------------------------------------------------------------------------------------


def of(gguf: Gguf) -> Architecture:
    """The entry for a file; MobieError for an architecture that is not here."""
    if gguf.architecture not in FAMILIES:
        raise MobieError(
            UNSUPPORTED,
            f"{gguf.paths[0]} cannot be calibrated",
            f"architecture {gguf.architecture}",
            f"one of {', '.join(FAMILIES)}",
            "export with --method sign, which works with every architecture",
        )
    try:  # each family needs modules of transformers that another version may not have
        family = importlib.import_module(f"mobie_export.models.families.{FAMILIES[gguf.architecture]}")
    except ImportError as e:
        raise MobieError(
            UNSUPPORTED,
            f"the installed transformers {transformers.__version__} does not know {gguf.architecture} models",
            str(e),
            "a version that does",
            "pip install 'mobie-export[calibrate]', or export with --method sign",
        ) from e
    entry: Architecture = family.of(gguf)
    return entry
