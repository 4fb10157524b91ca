"""The twin of a model of any architecture: its layers are run by llama.cpp, their experts by PyTorch.

Of a layer llama.cpp computes everything but its experts' products (runtime/graph.py): what they see, which of them a
token takes with which weights, and, with zeros in place of their sum, all else that the layer makes. The experts are
`Experts`, as in every twin, and what they add is put to it. That needs three things of an architecture, which are
looked at before anything else is done:

    the experts are gate, up and down, or up and down, with an activation that is known: what they make is compared
        with llama.cpp's
    their sum is added to the stream, perhaps times a factor, with nothing in between: numbers are put in its place
    a layer is a function of the stream, the positions and nothing else: the graph is followed

There are no gradients.
"""

import contextlib
import functools
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobie_export import gguf_io
from mobie_export.errors import NO_RUNTIME, UNSUPPORTED, MobieError
from mobie_export.gguf_io import Gguf
from mobie_export.models.architecture import Activation, Metadata, clamped, swiglu
from mobie_export.models.twin import PROJECTIONS, Experts, Twin
from mobie_export.runtime import graph, libggml
from mobie_export.runtime.graph import Model, Nodes, Part

STREAM = ("nemotron_h_block_out", "l_out")  # what llama.cpp calls the stream behind a layer; the first that is there
PROBE = 32  # tokens that an architecture is tried with
MOST_ERROR = 0.05  # of the experts' sum against llama.cpp's, which may round their inputs to 8 bits
MOST_BENT = 1e-3  # that what a layer makes differs from a sum


ACTIVATIONS: dict[str, Activation] = {
    "SwiGLU": swiglu,
    "GEGLU": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "ReGLU": lambda gate, up: F.relu(gate) * up,
    "the clamped SwiGLU of GPT-OSS": clamped,
}
WITHOUT_GATE: dict[str, Activation] = {
    "squared ReLU": lambda gate, up: F.relu(up).square(),
    "ReLU": lambda gate, up: F.relu(up),
    "SiLU": lambda gate, up: F.silu(up),
    "GELU": lambda gate, up: F.gelu(up, approximate="tanh"),
}


class RuntimeTwin(Twin):
    """A GGUF in llama.cpp, layer by layer; on the CPU. Raises MobieError for what cannot be taken apart so, when it is
    made where metadata says it, otherwise in `prepare`."""

    def __init__(self, gguf: Gguf, device: str = "cpu"):
        self.gguf, self.device = gguf, torch.device(device)
        if self.device.type != "cpu":
            raise self._not(f"--device {device}", "the CPU: its layers are run by llama.cpp")
        key = Metadata(gguf)
        self.n_layers = key("block_count") - key("nextn_predict_layers", 0)
        self.width = key("embedding_length")
        vocabulary = gguf.tensors.get("token_embd.weight")
        if vocabulary is None or vocabulary.shape[0] != self.width:
            raise self._not("no token_embd.weight of the model's width", "one")
        self.config = SimpleNamespace(  # type: ignore[assignment]  # what estimates ask for
            num_experts_per_tok=key("expert_used_count"),
            vocab_size=vocabulary.shape[1],
        )
        self.act: Activation = swiglu
        self._model: Model | None = None
        self._places: dict[tuple[int, int], _Places] = {}
        self.factors: dict[int, float] = {}
        if not any(map(self.has_experts, range(self.n_layers))):
            raise self._not("no layer with experts", "one")
        for i in filter(self.has_experts, range(self.n_layers)):
            self._check_experts(i)

    def _not(self, found: str, wanted: str) -> MobieError:
        what = f"{self.gguf.paths[0]}, architecture {self.gguf.architecture}, cannot be calibrated"
        return MobieError(UNSUPPORTED, what, found, wanted, "export with --method sign")

    def _check_experts(self, i: int) -> None:
        tensors, names = self.gguf.tensors, self.expert_names(i)
        for name, _ in names.values():
            if name not in tensors:
                raise self._not(f"layer {i} has no {name}", "experts of gate, up and down, or up and down")
        down = tensors[names["down"][0]].shape
        fused = "gate_up" in names["gate"][0]
        for name in {names["gate"][0], names["up"][0]}:
            if tensors[name].shape != (self.width, down[0] * (1 + fused), down[2]) or down[1] != self.width:
                raise self._not(f"{name} {list(tensors[name].shape)}, down {list(down)}", f"a width of {self.width}")
        if len(self._biases(i)) not in (0, len(PROJECTIONS)):
            raise self._not(f"biases of {', '.join(self._biases(i))} alone in layer {i}", "of all or none")

    # ---- what a twin does

    def expert_names(self, layer: int) -> dict[str, tuple[str, slice]]:
        """Of experts without a gate it is a part of up, without rows."""
        found = super().expert_names(layer)
        if found["gate"][0] not in self.gguf.tensors:
            found["gate"] = (found["up"][0], slice(0, 0))
        return found

    def layer(self, index: int, experts: Experts | None = None) -> nn.Module:
        if self.has_experts(index):
            experts = experts or Experts(**self.experts(index))
            experts.act, experts.biases = self.act, self.biases(index)
        return _Layer(self, index, experts if self.has_experts(index) else None)

    def experts_of(self, layer: nn.Module) -> Experts | None:
        assert isinstance(layer, _Layer)
        return layer.experts

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        out: Tensor = layer(hidden)
        return out

    def head(self) -> "RuntimeHead":  # type: ignore[override]  # it is called, no more
        return RuntimeHead(self)

    def prepare(self) -> None:
        """MobieError for an architecture that cannot be taken apart; finds activation and factors. llama.cpp can abort,
        so that it is tried in a process of its own."""
        if not libggml.kernel_names():
            raise MobieError(
                NO_RUNTIME,
                f"{self.gguf.paths[0]}, architecture {self.gguf.architecture}, needs llama.cpp to be calibrated",
                todo="mobie-export runtime build",
            )
        path = self.gguf.paths[0]
        found = _tried(path, path.stat().st_mtime_ns, torch.get_num_threads())
        if "found" in found:
            raise self._not(found["found"], found["wanted"])
        self.act = (ACTIVATIONS | WITHOUT_GATE)[found["activation"]]
        self.factors = {int(i): factor for i, factor in found["factors"].items()}

    def find(self) -> dict[str, Any]:
        """What `prepare` wants to know; MobieError. Reads the layers in front of the first experts, these, and of the
        others what is no expert."""
        layers = [i for i in range(self.n_layers) if self.has_experts(i)]
        tokens = np.random.default_rng(0).integers(0, self.config.vocab_size, PROBE).tolist()
        with torch.no_grad():
            return {"activation": self._activation(layers[0], tokens), "factors": {i: self._factor(i) for i in layers}}

    def scores_bytes(self, n: int, length: int) -> int:
        """Memory of llama.cpp, which has one sequence at a time: logits twice, hidden states, caches, scores; what it
        maps and reads."""
        rows = 4 * self.config.vocab_size + 16 * self.width + 4 * self.n_layers * self.width
        mapped = sum(t.n_bytes for t in self.gguf.tensors.values() if "_exps." not in t.name)
        return mapped + 2 * rows * length + 4 * 64 * length**2

    # ---- a layer in llama.cpp

    def split(self, i: int, hidden: Tensor, total: Tensor | None = None) -> "Split":
        """What a layer makes of one sequence's stream, float32 [length, width] both, with `total` in place of what its
        experts add."""
        n = len(hidden)
        model, places = self.model(n), self.places(i, n)
        given = {"stream": hidden.numpy(), "sum": (torch.zeros_like(hidden) if total is None else total).numpy()}
        found = model.run([0] * n, places.part, given)
        return Split(torch.from_numpy(found["out"]).reshape(hidden.shape), *(_routed(found) if "x" in found else ()))

    def places(self, i: int, n_tokens: int) -> "_Places":
        """Where a layer is in the graph of so many tokens. MobieError where it does not stand apart."""
        model = self.model(n_tokens)
        if (i, n_tokens) not in self._places:
            nodes = model.nodes(n_tokens)
            start, end = (self.boundary(nodes, j) for j in (i, i + 1))
            ends: set[int | str] = {end}
            take: dict[str, tuple[int, int | None]] = {"out": (end, None)}
            put, total = {start: "stream"}, None
            if self.has_experts(i):
                seen, total = self._experts_in(nodes, i)
                ends |= {nodes.every[at].sources[source] for at, source in seen.values()}
                take.update(seen)
                put[total] = "sum"
            compute, others = nodes.needed(ends, put)
            if "inp_tokens" in others:
                raise self._not(f"layer {i} looks at the tokens", "layers that see the stream alone")
            self._places[i, n_tokens] = _Places(end, total, take, Part(frozenset(compute), put, take))
        return self._places[i, n_tokens]

    def _experts_in(self, nodes: Nodes, i: int) -> tuple[dict[str, tuple[int, int]], int]:
        """(what is taken: name -> an operation and which of its sources, where their sum is)."""
        experts = {f"blk.{i}.ffn_{p}_exps.weight" for p in ("gate_up", "gate", "up")}
        first = nodes.where(lambda node: node.op_name == "MUL_MAT_ID" and node.sources[0] in experts)
        down = nodes.where(lambda n: n.op_name == "MUL_MAT_ID" and n.sources[0] == f"blk.{i}.ffn_down_exps.weight")
        weighted = nodes.find(f"ffn_moe_weighted-{i}")
        if not first or not down or weighted is None or weighted < down[0]:
            raise self._not(f"layer {i} does not weight what its experts make", "llama.cpp's usual experts")
        # a view for each of a token's experts, which are summed up one after the other
        parts, last = {weighted}, weighted
        for at in range(weighted + 1, len(nodes.every)):
            node = nodes.every[at]
            if node.op_name in ("VIEW", "ADD", "CONT") and node.sources and set(node.sources) <= parts:
                parts.add(at)
                last = at if node.op_name != "VIEW" else last
        if last == weighted:
            raise self._not(f"no sum of the experts of layer {i} in its graph", "llama.cpp's usual experts")
        return {"x": (first[0], 1), "index": (first[0], 2), "p": (weighted, 1)}, last

    def boundary(self, nodes: Nodes, i: int) -> int:
        """The stream before layer i."""
        if i == 0:
            found = nodes.where(lambda node: node.op_name == "GET_ROWS" and "token_embd.weight" in node.sources)
            at = found[0] if found else None
        else:
            named = (nodes.find(f"{name}-{i - 1}") for name in STREAM)
            at = next((n for n in named if n is not None), None)
        if at is None:
            raise self._not(f"no stream before layer {i} in its graph", "llama.cpp's name for it")
        return at

    def model(self, length: int) -> Model:
        if self._model is None or self._model.length < length:
            self.close()
            self._model = Model(self.gguf.paths[0], length, torch.get_num_threads())
        return self._model

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
        self._model, self._places = None, {}

    # ---- what an architecture does

    def _activation(self, i: int, tokens: list[int]) -> str:
        """Its name, by what llama.cpp makes of the tokens in the first layer with experts."""
        model, places = self.model(len(tokens)), self.places(i, len(tokens))
        assert places.total is not None
        compute, _ = model.nodes(len(tokens)).needed({places.end}, ())
        seen = model.run(tokens, Part(frozenset(compute), {}, places.take | {"sum": (places.total, None)}), {})
        x, index, p = _routed(seen)
        truth, experts = torch.from_numpy(seen["sum"]).reshape(x.shape), Experts(**self.experts(i))
        experts.biases, error = self.biases(i), dict[str, float]()
        activations = ACTIVATIONS if experts.weights["gate"].shape[1] else WITHOUT_GATE
        for name, act in activations.items():
            experts.act = act
            off = float((experts(x, index, p) - truth).norm() / truth.norm().clamp_min(1e-30))
            error[name] = off if math.isfinite(off) else math.inf
        name = min(error, key=lambda x: error[x])
        if error[name] > MOST_ERROR:
            raise self._not(
                f"the experts of layer {i} make something else than with {name}: {error[name]:.0%} off",
                f"experts with {', '.join(activations)}",
            )
        return name

    def _factor(self, i: int) -> float:
        """What the sum of a layer's experts is multiplied by. MobieError where what they add is changed otherwise
        before it reaches the stream: found out by numbers in its place."""
        random = torch.Generator().manual_seed(i)
        hidden, added = (torch.randn(PROBE, self.width, generator=random) for _ in range(2))
        change = self.split(i, hidden, added).rest - self.split(i, hidden).rest
        factor = float((change * added).sum() / added.square().sum())
        bent = float((change - factor * added).norm() / added.norm())
        if not bent <= MOST_BENT * abs(factor):
            raise self._not(f"what the experts of layer {i} add is changed before it reaches the stream", "a sum")
        return factor


@functools.cache
def _tried(path: Path, changed: int, threads: int) -> dict[str, Any]:
    """What `find` found, or why it did not, in another process. changed: when the file was, for the cache."""
    command = [sys.executable, "-P", "-m", "mobie_export.models.runtime_twin", str(path), str(threads)]
    quiet = os.environ | {"GGML_NO_BACKTRACE": "1"}  # no debugger where it aborts
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=quiet)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    said = next((line for line in lines if "GGML_ASSERT" in line or "error" in line.lower()), "".join(lines[-1:]))
    return {"found": f"{ended}; {said[:300]}", "wanted": "a model of which llama.cpp runs each layer"}


def _main(path: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    with gguf_io.open_model(Path(path)) as gguf, contextlib.closing(RuntimeTwin(gguf)) as twin:
        try:
            found = twin.find()
        except MobieError as e:
            found = {"found": e.found or e.what, "wanted": e.wanted}
    print(json.dumps(found))


@dataclass(frozen=True)
class Split:
    rest: Tensor  # float32 [length, width], behind the layer without its experts
    x: Tensor | None = None  # float32 [length, width], what the experts see
    index: Tensor | None = None  # int64 [length, k]
    p: Tensor | None = None  # float32 [length, k]


@dataclass(frozen=True)
class _Places:
    end: int
    total: int | None  # where the experts' sum is
    take: dict[str, tuple[int, int | None]]
    part: Part


def _routed(found: dict[str, np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """(x, index, p) of tokens, as `Experts` takes them."""
    index = torch.from_numpy(found["index"].astype(np.int64))
    index = index.reshape(-1, index.shape[-1])
    x, p = (torch.from_numpy(np.ascontiguousarray(found[name])) for name in ("x", "p"))
    return x.reshape(len(index), -1), index, p.reshape(index.shape)


class _Layer(nn.Module):
    def __init__(self, twin: RuntimeTwin, index: int, experts: Experts | None):
        super().__init__()
        self.twin, self.index, self.experts = twin, index, experts

    def forward(self, hidden: Tensor) -> Tensor:  # [n, length, width] -> the same
        found = [self.twin.split(self.index, h) for h in hidden]
        rest = torch.stack([s.rest for s in found])
        if self.experts is None:
            return rest
        x, index, p = (torch.cat(parts) for parts in zip(*((s.x, s.index, s.p) for s in found), strict=True))
        return rest + self.experts(x, index, p * self.twin.factors[self.index]).view(rest.shape)


class RuntimeHead(nn.Module):
    """Final norm and output matrix in llama.cpp: hidden states -> logits."""

    def __init__(self, twin: RuntimeTwin):
        super().__init__()
        self.twin, self.n_vocab = twin, twin.config.vocab_size

    def forward(self, hidden: Tensor) -> Tensor:  # [n, width] -> [n, n_vocab]
        n, last = len(hidden), self.twin.n_layers
        model = self.twin.model(n)
        nodes = model.nodes(n)
        start, end = self.twin.boundary(nodes, last), nodes.find(graph.OUTPUT)
        assert end is not None
        compute, _ = nodes.needed({end}, {start})
        found = model.run(
            [0] * n, Part(frozenset(compute), {start: "stream"}, {"logits": (end, None)}), {"stream": hidden.numpy()}
        )
        return torch.from_numpy(found["logits"]).reshape(n, -1)


if __name__ == "__main__":
    _main(*sys.argv[1:])
