"""The torch twin of a GGUF model, one layer at a time.

A layer is the module of the `transformers` library with the weights of the GGUF; its experts, one fused module there,
are replaced by `Experts` below, which every pass of the calibration shares: statistics need what goes into and comes
out of every expert, refinement needs to exchange the weights. Embedding, final norm and head are read apart, so that no
more than one layer is in memory. Everything is float32.

architecture.py and families/ say how metadata and tensors of an architecture map; nothing else depends on them. Layers
without experts pass by: they have a place here, but nothing to calibrate.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobie_export import gguf_io
from mobie_export.errors import UNSUPPORTED, MobieError
from mobie_export.gguf_io import Gguf
from mobie_export.models import architecture
from mobie_export.models.architecture import Activation, Made, Parameters, swiglu
from mobie_export.spec import layout

PROJECTIONS = ("gate", "up", "down")
READ_AT_ONCE = 1 << 23  # bytes
DECODED_AT_ONCE = 1 << 18  # weights


class Experts(nn.Module):
    """All experts of a layer: y = sum over the token's experts e of p_e down_e(act(gate_e x, up_e x)), biases included.

    Tokens are sorted by expert, so that every expert is three products; sums run in the order of the token's experts,
    and the result does not depend on how tokens are batched beyond float rounding.
    """

    act: Activation = staticmethod(swiglu)
    biases: dict[str, Tensor] = {}  # projection -> float32 [n_expert, rows]  # noqa: RUF012 (set by the twin, not changed)

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor):
        super().__init__()
        self.weights = {"gate": gate, "up": up, "down": down}  # float32 [n_expert, rows, cols] each
        self.n_expert = gate.shape[0]
        self.tap: Callable[[Seen], None] | None = None  # called with what one forward saw, see Seen

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


def same_choices(index: Tensor, other: Tensor) -> float:  # int64 [n_tokens, k] each
    """The share of the first ones' experts that the others have as well, token by token, in any order."""
    return float((index[:, :, None] == other[:, None, :]).any(-1).float().mean())


# ---- the twin --------------------------------------------------------------------------------------------------------


class Twin:
    """A GGUF as torch modules, made when asked for and kept by nobody. Raises MobieError for unknown architectures."""

    def __init__(self, gguf: Gguf, device: str = "cpu"):
        self.gguf, self.device = gguf, torch.device(device)
        self._positions: dict[int, tuple[Tensor, Tensor]] = {}
        try:
            self.arch = architecture.of(gguf)
            self.config = self.arch.config
            self.n_layers: int = self.config.num_hidden_layers
            self.width: int = self.config.hidden_size
            self._check()
        except MobieError:
            raise
        except Exception as e:  # transformers and torch refuse shapes that do not fit in many ways
            found = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
            raise self._refused(found) from e

    def _refused(self, found: str) -> MobieError:
        what = f"{self.gguf.paths[0]} is not laid out as {self.gguf.architecture} models are"
        return MobieError(UNSUPPORTED, what, found, todo="export with --method sign")

    def _check(self) -> None:
        """Every tensor of every layer has a place of its size in the module, and the other way round."""
        wanted = {"token_embd.weight", "output_norm.weight"}
        for i in range(self.n_layers):
            for source in self.parameters(i).values():
                wanted |= set(self._names(i, source))
        tensors = self.gguf.tensors
        found = {n for n in tensors if "_exps." not in n and (layout.layer(n) or 0) < self.n_layers}
        found -= {n for n in found if layout.kind(n) in layout.BESIDE_EXPERTS}
        found -= {"output.weight"}
        if found != wanted:
            raise self._refused(f"missing {sorted(wanted - found)[:3]}, unexpected {sorted(found - wanted)[:3]}")
        if not any(map(self.has_experts, range(self.n_layers))):
            raise self._refused(f"no layer with experts among the first {self.n_layers}")
        for i in range(self.n_layers):
            self._check_layer(i)
        table = tensors["token_embd.weight"].shape
        for name, shape in (
            ("token_embd.weight", (self.width, *table[1:])),
            ("output.weight", table),
            ("output_norm.weight", (self.width,)),
        ):
            if name in tensors and tensors[name].shape != shape:
                raise self._refused(f"{name} {list(tensors[name].shape)}, wanted {list(shape)}")
        for tensor in tensors.values():
            if layout.kind(tensor.name) != "expert columns":
                gguf_io.check_decodable(self.gguf, tensor, "export with --method sign")

    def _check_layer(self, index: int) -> None:
        """Shapes of a layer's tensors."""
        tensors = self.gguf.tensors
        shapes = {n: t.shape for n, t in self._states(self._module(index))}
        for parameter, source in self.parameters(index).items():
            parts = [tensors[n] for n in self._names(index, source)]
            if isinstance(source, Made):
                made = tuple(source.make(*(torch.empty(t.shape[::-1], device="meta") for t in parts)).shape)
            else:
                made = parts[0].shape[::-1]
            if [n for n in made if n != 1] != [n for n in shapes[parameter] if n != 1]:
                has = ", ".join(f"{t.name} {list(t.shape)}" for t in parts)
                raise self._refused(f"{has}, wanted {list(shapes[parameter][::-1])}")
        if not self.has_experts(index):
            return
        names = self.expert_names(index)
        n = self.config.num_experts_per_tok
        router = shapes[self.arch.router][0]
        rows = tensors[names["down"][0]].shape[0]
        fused = names["gate"][0] == names["up"][0]
        wanted = {
            names["gate"][0]: (self.width, rows * (1 + fused), router),
            names["down"][0]: (rows, self.width, router),
        }
        wanted[names["up"][0]] = wanted[names["gate"][0]]
        for name, shape in wanted.items():
            if name not in tensors or tensors[name].shape != shape:
                there = f"{list(tensors[name].shape)}" if name in tensors else "missing"
                raise self._refused(f"{name} {there}, wanted {list(shape)}")
        if not 1 <= n <= router:
            raise self._refused(f"expert_used_count {n} of {router} experts")
        biases = self._biases(index)
        if len(biases) not in (0, len(PROJECTIONS)):
            raise self._refused(f"biases of {', '.join(biases)} alone in layer {index}")

    def prepare(self) -> None:
        """What has to be found out before any layer runs. MobieError where that rules the model out."""

    def close(self) -> None:
        """It is not used any more."""

    def scores_bytes(self, n: int, length: int) -> int:
        """Attention's scores of n sequences and what their gradient needs, where they are computed as a whole."""
        if self.config._attn_implementation != "eager":
            return 0
        return 3 * 4 * int(self.config.num_attention_heads) * n * length**2

    def parameters(self, layer: int) -> Parameters:
        """Parameter of a layer -> tensor without `blk.N.`, or how it is made of tensors."""
        return self.arch.parameters(layer)

    @staticmethod
    def _names(layer: int, source: str | Made) -> list[str]:
        return [f"blk.{layer}.{n}" for n in (source.names if isinstance(source, Made) else [source])]

    def has_experts(self, layer: int) -> bool:
        return f"blk.{layer}.ffn_down_exps.weight" in self.gguf.tensors

    def norms(self, layer: int) -> list[str]:
        """Parameters of a layer that are weights of norms."""
        return [p for p in self.parameters(layer) if "norm" in p]

    def tensor(self, name: str) -> Tensor:
        """A tensor as float32, slowest dimension first. MobieError for weights that are no numbers."""
        tensor = self.gguf.tensors[name]
        values = np.empty(tensor.shape[::-1], np.float32)
        flat = values.reshape(-1, tensor.shape[0])
        for first, piece in self._pieces(tensor):
            flat[first : first + len(piece)] = piece
        return torch.from_numpy(values).to(self.device)

    def check_numbers(self, name: str, most: float = math.inf) -> int:
        """MobieError for weights that are no numbers, of `most` or somewhat more of them; how many were looked at."""
        done = 0
        for _, values in self._pieces(self.gguf.tensors[name]):
            done += values.size
            if done >= most:
                break
        return done

    def _pieces(self, tensor: gguf_io.Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 rows) of a tensor, few enough to stay in the cache: six times as fast as all at once, and
        nothing of its size beside it. MobieError at the end for weights that are no numbers."""
        n_rows = int(np.prod(tensor.shape[1:], dtype=np.int64))
        size, bad = tensor.n_bytes // n_rows, 0  # of a row
        read, decoded = max(1, READ_AT_ONCE // size), max(1, DECODED_AT_ONCE // tensor.shape[0])
        for start in range(0, n_rows, read):
            part = self.gguf.read(tensor, start * size, min(read, n_rows - start) * size).reshape(-1, size)
            for first in range(0, len(part), decoded):
                values = gguf_io.decode(part[first : first + decoded], tensor.type_id)
                bad += values.size - int(np.count_nonzero(np.isfinite(values)))
                yield start + first, values
        if bad:
            raise gguf_io.not_finite(self.gguf, tensor, f"{bad} infinite or NaN weights")

    def _finite(self, name: str, values: Tensor) -> Tensor:
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise gguf_io.not_finite(self.gguf, self.gguf.tensors[name], f"{bad} infinite or NaN weights")
        return values

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
                    whole[name] = self._finite(name, whole[name] * self.tensor(factor)[:, None, None])
            weights[projection] = whole[name][:, rows]
        return weights

    def biases(self, layer: int) -> dict[str, Tensor]:
        """Projection -> float32 [n_expert, rows], of experts that have them."""
        return {p: self.tensor(n) for p, n in self._biases(layer).items()}

    def _biases(self, layer: int) -> dict[str, str]:
        names = {p: f"blk.{layer}.ffn_{p}_exps.bias" for p in PROJECTIONS}
        return {p: n for p, n in names.items() if n in self.gguf.tensors}

    def layer(self, index: int, experts: Experts | None = None) -> nn.Module:
        """One layer, frozen but for what `experts` brings; call it as `self.run(layer, hidden)`."""
        module = self._module(index)
        if self.has_experts(index):
            experts = experts or Experts(**self.experts(index))
            experts.act, experts.biases = self.arch.act, self.biases(index)
            getattr(module, self.arch.moe).experts = experts
        shapes = {n: t.shape for n, t in self._states(module)}
        state = {}
        for parameter, source in self.parameters(index).items():
            tensors = [self.tensor(n) for n in self._names(index, source)]
            value = source.make(*tensors) if isinstance(source, Made) else tensors[0]
            state[parameter] = value.reshape(shapes[parameter])
        module.load_state_dict(state, strict=False, assign=True)
        left = [n for n, p in self._states(module) if p.is_meta]
        assert not left, f"parameters without weights: {left}"
        vars(module)["window"] = self.arch.window(index)  # for `run`
        return module.eval()

    def _module(self, index: int) -> nn.Module:
        """A layer without weights."""
        with torch.device("meta"):
            module = self.arch.layer(index).requires_grad_(False)
            self.arch.prepare(module)
        return module

    @staticmethod
    def _states(module: nn.Module) -> list[tuple[str, Tensor]]:
        return [*module.named_parameters(), *module.named_buffers()]

    def experts_of(self, layer: nn.Module) -> Experts | None:
        """None in a layer without experts."""
        experts = getattr(getattr(layer, self.arch.moe), "experts", None)
        return experts if isinstance(experts, Experts) else None

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:  # [n, length, width] -> the same
        length = hidden.shape[1]
        if length not in self._positions:
            rotary = self.arch.rotary().to(self.device)
            self._positions[length] = rotary(hidden[:1], torch.arange(length, device=self.device)[None])
        window: int | None = vars(layer)["window"]
        mask = None if window is None else _mask(length, window).to(self.device)
        out: Tensor = layer(hidden, position_embeddings=self._positions[length], attention_mask=mask)
        return out

    def embedding(self) -> Tensor:  # [n_vocab, width]
        return self.tensor("token_embd.weight")

    def head(self) -> "Head":
        name = "output.weight" if "output.weight" in self.gguf.tensors else "token_embd.weight"
        return Head(self.tensor("output_norm.weight"), self.tensor(name), self.config.rms_norm_eps)


def in_torch(gguf: Gguf, device: str = "cpu") -> Twin | None:
    """The twin, None where PyTorch does not have the model."""
    try:
        return Twin(gguf, device)
    except MobieError as e:
        if e.kind != UNSUPPORTED:
            raise
    return None


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
        self.n_vocab = len(weight)

    def normed(self, hidden: Tensor) -> Tensor:  # [..., width] -> the same
        return F.rms_norm(hidden, (hidden.shape[-1],), self.norm, self.eps)

    def forward(self, hidden: Tensor) -> Tensor:  # [..., width] -> [..., n_vocab]
        return F.linear(self.normed(hidden), self.weight)
