"""The torch twin of a GGUF model, one layer at a time.

A layer is the module of the `transformers` library with the weights of the GGUF; its experts, one fused module there,
are replaced by `Experts` below, which every pass of the calibration shares: statistics need what goes into and comes
out of every expert, refinement needs to exchange the weights. Embedding, final norm and head are read apart, so that no
more than one layer is in memory. Everything is float32.

architectures.py says how metadata and tensors of an architecture map; nothing else in the package depends on it. Layers
without experts pass by: they have a place here, but nothing to calibrate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobie_export import gguf_io, model
from mobie_export.errors import BAD_INPUT, UNSUPPORTED, MobieError
from mobie_export.gguf_io import Gguf

try:
    import torch
    import torch.nn.functional as F
    import transformers  # noqa: F401 (architectures.py needs it)
    from torch import Tensor, nn
except ImportError as e:
    raise MobieError(
        UNSUPPORTED,
        "calibration needs packages that are not installed",
        str(e),
        "torch and transformers",
        "pip install 'mobie-export[calibrate]', or export with --method sign",
    ) from e

from mobie_export import architectures
from mobie_export.architectures import Made

PROJECTIONS = ("gate", "up", "down")


class Experts(nn.Module):
    """All experts of a layer: y = sum over the token's experts e of p_e down_e(act(gate_e x, up_e x)), biases included.

    Tokens are sorted by expert, so that every expert is three products; sums run in the order of the token's experts,
    and the result does not depend on how tokens are batched beyond float rounding.
    """

    act: Callable[[Tensor, Tensor], Tensor] = staticmethod(architectures.swiglu)
    biases: dict[str, Tensor] = {}  # projection -> float32 [n_expert, rows]  # noqa: RUF012 (set by the twin, not changed)

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor):
        super().__init__()
        self.weights = {"gate": gate, "up": up, "down": down}  # float32 [n_expert, rows, cols] each
        self.n_expert = gate.shape[0]
        self.tap: Callable | None = None  # called with what one forward saw, see Seen

    def weight(self, projection: str, expert: int) -> Tensor:  # [rows, cols]
        return self.weights[projection][expert]

    def forward(
        self,
        x: Tensor,  # [n_tokens, width]
        index: Tensor,  # int64 [n_tokens, k], the experts of a token
        p: Tensor,  # [n_tokens, k], their weights
    ) -> Tensor:  # [n_tokens, width]
        n_tokens, k = index.shape
        flat = index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.n_expert).tolist()
        # a routed token that no expert takes would be a silent zero
        assert len(counts) == self.n_expert and sum(counts) == n_tokens * k, "tokens routed to no expert"
        xs = x[order // k]
        biases = {q: b[flat[order]] for q, b in self.biases.items()}

        def product(projection: str, x: Tensor) -> Tensor:
            y = self._each(projection, x, counts)
            return y + biases[projection] if projection in biases else y

        gate, up = product("gate", xs), product("up", xs)
        down = product("down", self.act(gate, up))
        if self.tap is not None:
            self.tap(Seen(x, index, order, gate, up, down))
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return (down[inverse].view(n_tokens, k, -1) * p.unsqueeze(-1)).sum(1)

    def _each(self, projection: str, x: Tensor, counts: list[int]) -> Tensor:
        parts = x.split(counts)
        return torch.cat([part @ self.weight(projection, e).T for e, part in enumerate(parts) if counts[e]])


@dataclass(frozen=True)
class Seen:
    """One forward of a layer's experts. Rows of gate, up and down are (token, choice) pairs sorted by expert."""

    x: Tensor  # [n_tokens, width]
    index: Tensor  # int64 [n_tokens, k]
    order: Tensor  # int64 [n_tokens * k]: row -> token * k + choice
    gate: Tensor  # [n_tokens * k, ff]
    up: Tensor  # [n_tokens * k, ff]
    down: Tensor  # [n_tokens * k, width]


# ---- the twin --------------------------------------------------------------------------------------------------------


class Twin:
    """A GGUF as torch modules, made when asked for and kept by nobody. Raises MobieError for unknown architectures."""

    def __init__(self, gguf: Gguf, device: str = "cpu"):
        self.gguf, self.device = gguf, torch.device(device)
        self.arch = architectures.of(gguf)
        self.config = self.arch.config(gguf)
        self.n_layers = self.config.num_hidden_layers
        self.width = self.config.hidden_size
        self._positions: dict[int, tuple[Tensor, Tensor]] = {}
        self._check()

    def _check(self) -> None:
        """Every tensor of every layer has a place in the module, and the other way round."""
        wanted = {"token_embd.weight", "output_norm.weight"}
        for i in range(self.n_layers):
            for source in self.parameters(i).values():
                wanted |= set(self._names(i, source))
        found = {n for n in self.gguf.tensors if "_exps." not in n and (model.layer(n) or 0) < self.n_layers}
        found -= {"output.weight"}
        if found != wanted:
            raise MobieError(
                UNSUPPORTED,
                f"{self.gguf.paths[0]} is not laid out as {self.gguf.architecture} models are",
                f"missing {sorted(wanted - found)[:3]}, unexpected {sorted(found - wanted)[:3]}",
                todo="export with --method sign",
            )

    def parameters(self, layer: int) -> dict[str, "str | Made"]:
        """Parameter of a layer -> tensor without `blk.N.`, or how it is made of tensors."""
        return self.arch.parameters(self.gguf, self.config, layer)

    @staticmethod
    def _names(layer: int, source: "str | Made") -> list[str]:
        return [f"blk.{layer}.{n}" for n in (source.names if isinstance(source, Made) else [source])]

    def has_experts(self, layer: int) -> bool:
        return f"blk.{layer}.ffn_down_exps.weight" in self.gguf.tensors

    def norms(self, layer: int) -> list[str]:
        """Parameters of a layer that are weights of norms."""
        return [p for p in self.parameters(layer) if "norm" in p]

    def tensor(self, name: str) -> Tensor:
        """A tensor as float32, slowest dimension first."""
        tensor = self.gguf.tensors[name]
        raw = self.gguf.read(tensor).reshape(int(np.prod(tensor.shape[1:], dtype=np.int64)), -1)
        values = gguf_io.decode(raw, tensor.type_id).astype(np.float32, copy=False)
        return torch.from_numpy(values.reshape(tensor.shape[::-1])).to(self.device)

    def tensor_name(self, layer: int, parameter: str) -> str:
        """GGUF name of a layer's parameter."""
        return self._names(layer, self.parameters(layer)[parameter])[0]

    def expert_names(self, layer: int) -> dict[str, tuple[str, slice]]:
        """Projection -> (GGUF tensor, its rows in it); gate comes before up where they are one tensor."""
        fused = f"blk.{layer}.ffn_gate_up_exps.weight"
        down = {"down": (f"blk.{layer}.ffn_down_exps.weight", slice(None))}
        if fused in self.gguf.tensors:
            half = self.gguf.tensors[fused].shape[1] // 2
            return {"gate": (fused, slice(0, half)), "up": (fused, slice(half, None))} | down
        return {p: (f"blk.{layer}.ffn_{p}_exps.weight", slice(None)) for p in ("gate", "up")} | down

    def experts(self, layer: int) -> dict[str, Tensor]:
        """Projection -> float32 [n_expert, rows, cols]. MobieError for weights that are no numbers."""
        weights, whole = {}, {}
        for projection, (name, rows) in self.expert_names(layer).items():
            if name not in whole:
                whole = {name: self.tensor(name)}
                factor = name.removesuffix(".weight") + ".scale"
                if factor in self.gguf.tensors:
                    whole[name] = whole[name] * self.tensor(factor)[:, None, None]
                bad = int((~torch.isfinite(whole[name])).sum())
                if bad:
                    raise MobieError(
                        BAD_INPUT,
                        f"tensor {name} of {self.gguf.paths[0]} has weights that are no numbers",
                        f"{bad} infinite or NaN weights",
                        "finite weights",
                        "download or convert the model again",
                    )
            weights[projection] = whole[name][:, rows]
        return weights

    def biases(self, layer: int) -> dict[str, Tensor]:
        """Projection -> float32 [n_expert, rows], of experts that have them."""
        names = {p: f"blk.{layer}.ffn_{p}_exps.bias" for p in PROJECTIONS}
        return {p: self.tensor(n) for p, n in names.items() if n in self.gguf.tensors}

    def layer(self, index: int, experts: Experts | None = None) -> nn.Module:
        """One layer, frozen but for what `experts` brings; call it as `self.run(layer, hidden)`."""
        with torch.device("meta"):
            module = self.arch.layer(self.config, index).requires_grad_(False)
            self.arch.prepare(module)
        if self.has_experts(index):
            experts = experts or Experts(**self.experts(index))
            experts.act, experts.biases = self.arch.act, self.biases(index)
            getattr(module, self.arch.moe).experts = experts
        shapes = {n: t.shape for n, t in [*module.named_parameters(), *module.named_buffers()]}
        state = {}
        for parameter, source in self.parameters(index).items():
            tensors = [self.tensor(n) for n in self._names(index, source)]
            value = source.make(*tensors) if isinstance(source, Made) else tensors[0]
            state[parameter] = value.reshape(shapes[parameter])
        module.load_state_dict(state, strict=False, assign=True)
        left = [n for n, p in [*module.named_parameters(), *module.named_buffers()] if p.is_meta]
        assert not left, f"parameters without weights: {left}"
        module.window = self.arch.window(self.config, index)
        return module.eval()

    def experts_of(self, layer: nn.Module) -> Experts | None:
        """None in a layer without experts."""
        experts = getattr(getattr(layer, self.arch.moe), "experts", None)
        return experts if isinstance(experts, Experts) else None

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:  # [n, length, width] -> the same
        length = hidden.shape[1]
        if length not in self._positions:
            rotary = self.arch.rotary(self.config).to(self.device)
            self._positions[length] = rotary(hidden[:1], torch.arange(length, device=self.device)[None])
        mask = None if layer.window is None else _mask(length, layer.window).to(self.device)
        return layer(hidden, position_embeddings=self._positions[length], attention_mask=mask)

    def embedding(self) -> Tensor:  # [n_vocab, width]
        return self.tensor("token_embd.weight")

    def head(self) -> "Head":
        name = "output.weight" if "output.weight" in self.gguf.tensors else "token_embd.weight"
        return Head(self.tensor("output_norm.weight"), self.tensor(name), self.config.rms_norm_eps)


def _mask(length: int, window: int) -> Tensor:  # [1, 1, length, length], added to the scores
    """Attention to the token itself and the window - 1 before it."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < window)
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


class Head(nn.Module):
    """Final norm and output matrix: hidden states -> logits."""

    def __init__(self, norm: Tensor, weight: Tensor, eps: float):
        super().__init__()
        self.norm, self.weight, self.eps = norm, weight, eps  # [width], [n_vocab, width]

    def forward(self, hidden: Tensor) -> Tensor:  # [..., width] -> [..., n_vocab]
        return F.linear(F.rms_norm(hidden, (hidden.shape[-1],), self.norm, self.eps), self.weight)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def tokenize(path: Path, text: bytes, special: bool = False) -> tuple[np.ndarray, int | None]:
    """(tokens int32 [n], the token every sequence starts with or None), by the model's own tokenizer in llama.cpp.

    special: whether the names of special tokens in the text are these tokens, as in what a chat template makes.
    """
    try:
        import llama_cpp
    except (ImportError, RuntimeError) as e:
        raise MobieError(
            UNSUPPORTED,
            "calibration tokenizes with llama.cpp, which is not installed",
            str(e),
            todo="mobie-export runtime build",
        ) from e
    llama_cpp.llama_log_set(_quiet, None)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise MobieError(BAD_INPUT, f"llama.cpp cannot load the vocabulary of {path}")
    try:
        vocab = llama_cpp.llama_model_get_vocab(model)
        tokens = np.empty(len(text) + 8, np.int32)
        pointer = tokens.ctypes.data_as(llama_cpp.llama_token_p)
        n = llama_cpp.llama_tokenize(vocab, text, len(text), pointer, len(tokens), False, special)
        if n < 0:
            raise MobieError(BAD_INPUT, "llama.cpp cannot tokenize the calibration text")
        first = llama_cpp.llama_vocab_bos(vocab) if llama_cpp.llama_vocab_get_add_bos(vocab) else None
        return tokens[:n].copy(), first
    finally:
        llama_cpp.llama_model_free(model)


def _make_quiet():
    try:
        import llama_cpp
    except (ImportError, RuntimeError):
        return None
    return llama_cpp.llama_log_callback(lambda level, text, data: None)


_quiet = _make_quiet()  # kept: llama.cpp calls it as long as the process lives
