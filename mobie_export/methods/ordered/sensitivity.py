"""Which layers decide? Each alone made binary, signs and means of the weights, and what that does to the output.

On real weights the layers differ by orders of magnitude (docs/measured/real-weights.md): the bits that one sign per
weight leaves are worth most where a layer alone ruins the model. Every layer is read once: the copies of the text that
have another layer binarized go through it together.
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mobie_export import disk
from mobie_export.calibration import ranks
from mobie_export.calibration.store import complete
from mobie_export.models.twin import Head, Twin
from mobie_export.spec import block, layout

if TYPE_CHECKING:
    from mobie_export.gguf_io import Gguf
    from mobie_export.methods.calibrated.steps import Workspace

LOGITS = 1 << 22  # made at once: 16 MB of float32
SHARE = 0.1  # of what the layers in order take
MOST, LENGTH = 8, 256  # sequences, and tokens of each: a copy of them for every layer is in memory
# Of a layer's damage a share (1 - s)^POWER is left where a share s of its columns has second signs: the first columns
# are the ones where it pays most.
POWER = 1.5
PASSES = 4  # over the weights of a layer, to put them into place and to make them binary: counted, in copies


def n_tokens(n_samples: int, seq_len: int, n_layers: int) -> int:
    """That are looked at, in all."""
    return sequences(n_samples, n_layers) * min(seq_len, LENGTH)


def sequences(n_samples: int, n_layers: int) -> int:
    """As many as take SHARE of the passes through the layers, three for every sample; here, a half for every layer. At
    least one for every rank."""
    return max(ranks.world(), min(MOST, max(1, int(SHARE * 3 * n_samples / (n_layers / 2)))))


def damage(work: "Workspace", step: Callable[[int, str], None]) -> dict[int, float]:
    """Layer -> mean KL divergence from the original in nats when it alone is binary. Kept in the work folder."""
    path = work.files.folder / "sensitivity.json"
    if ranks.everywhere(path.exists()):
        with disk.reading_back(path):
            return {int(i): float(x) for i, x in json.loads(path.read_bytes()).items()}
    twin, tokens = work.files.twin, work.files.every.tokens
    tokens = tokens[: sequences(len(tokens), twin.n_layers), :LENGTH]
    tokens = tokens[ranks.divide(len(tokens))]
    with torch.no_grad():
        found = _damage(twin, tokens.to(twin.device), step)
    with complete(path) as file:
        file.write(json.dumps(found).encode())
    return found


def _damage(twin: Twin, tokens: Tensor, step: Callable[[int, str], None]) -> dict[int, float]:
    original: Tensor = twin.embedding()[tokens]
    others: dict[int, Tensor] = {}
    for i in range(twin.n_layers):
        layer = twin.layer(i)
        others = {j: twin.run(layer, h) for j, h in others.items()}
        before, original = original, twin.run(layer, original)
        experts = twin.experts_of(layer)
        if experts is not None:
            for w in (w for of_all in experts.weights.values() for w in of_all):
                blocks = w.unflatten(-1, (-1, block.BLOCK_LEN))  # in place: the layer is read anew when its turn comes
                blocks.copy_(blocks.abs().mean(-1, keepdim=True) * blocks.sign())
            others[i] = twin.run(layer, before)
        step(tokens.numel() * len(others), f"layer {i}")
        del layer, experts  # before the next one is read
    return divergence(twin.head(), original.flatten(0, 1), {i: h.flatten(0, 1) for i, h in others.items()})


def divergence(head: Head, original: Tensor, others: dict[int, Tensor]) -> dict[int, float]:
    """KL from the original in nats, mean over the tokens; hidden states behind the last layer, [n_tokens, width]."""
    total, at_once = dict.fromkeys(others, 0.0), max(1, LOGITS // head.n_vocab)
    for where in torch.arange(len(original), device=original.device).split(at_once):
        truth = F.log_softmax(head(original[where]), -1)
        for i, hidden in others.items():
            found = F.log_softmax(head(hidden[where]), -1)
            total[i] += float(F.kl_div(found, truth, reduction="sum", log_target=True))
    n = ranks.total(len(original))
    return {i: ranks.total(x) / n for i, x in total.items()}


def shares(
    gguf: "Gguf",
    twin: Twin,
    damage: dict[int, float],
    spare: float,  # bits
    numbers: int,  # bits of the numbers of 64 columns
) -> dict[int, dict[str, int]]:
    """Layer -> projection -> columns with a second sign, the bits going where a bit takes away most of the damage.

    Within a layer all projections get the same share of their columns.
    """
    experts = {n: x for n, x in layout.experts(gguf).items() if layout.layer_of(n) in damage}
    of: dict[int, list[layout.Experts]] = {i: [] for i in damage}
    for name, x in experts.items():
        of[layout.layer_of(name)].append(x)
    biases = any(n.endswith("_exps.bias") for n in gguf.tensors)  # would have to follow the neurons; they are copied
    steps = {i: max(x.cols for x in found) // block.BLOCK_LEN for i, found in of.items()}

    def columns(i: int, taken: int, x: layout.Experts) -> int:
        if layout.is_down(x.tensor.name) and biases:
            return 0
        return block.BLOCK_LEN * int(taken * x.cols / block.BLOCK_LEN / steps[i])

    def cost(i: int, taken: int) -> int:
        found = [(x, columns(i, taken, x)) for x in of[i]]
        signs = sum(x.n_expert * x.rows * k // block.BLOCK_LEN * 8 * block.BLOCK_BYTES for x, k in found)
        wide = max((k for x, k in found if not layout.is_down(x.tensor.name)), default=0)
        return signs + numbers * wide // block.BLOCK_LEN

    def gain(i: int) -> float:  # of one step more, for a bit
        more = cost(i, taken[i] + 1) - cost(i, taken[i]) if taken[i] < steps[i] else 0
        if not 0 < more <= left:
            return -1.0
        s, t = taken[i] / steps[i], (taken[i] + 1) / steps[i]
        return max(damage[i], 0.0) * ((1 - s) ** POWER - (1 - t) ** POWER) / more

    taken, left = dict.fromkeys(damage, 0), spare
    while damage and gain(best := max(taken, key=gain)) >= 0:
        left -= cost(best, taken[best] + 1) - cost(best, taken[best])
        taken[best] += 1
    found: dict[int, dict[str, int]] = {}
    for i in damage:
        names = {p: tensor for p, (tensor, _) in twin.expert_names(i).items()}
        found[i] = {p: columns(i, taken[i], experts[name]) for p, name in names.items()}
    return found
