"""Several processes that calibrate one model together, as `torchrun` starts them; alone, nothing here does anything.

Every process, a rank, reads the whole model and keeps a work folder of its own. It has a part of the sequences, so that
what is a sum over tokens is summed over the ranks; what has no tokens, the search for the signs of experts and rows, is
divided among them, and everybody gets what everybody found. All ranks take the same decisions from the same numbers.
The first one writes the output and speaks for all.

The order of sums depends on how many ranks there are, and on nothing else: the same number gives the same bytes.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from mobie_export.errors import RANK_LOST, MobieError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# For each other: while one writes the output, the others wait. One that ends is noticed at once, by its connection.
PATIENCE = timedelta(days=7)


def world() -> int:
    """How many ranks there are."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """This one's number, from 0."""
    return _number("RANK", 0)


def first() -> bool:
    return rank() == 0


def on_this_machine() -> int:
    """How many of the ranks share this machine's cores, memory and disk."""
    return _number("LOCAL_WORLD_SIZE", 1)


def device(name: str) -> str:
    """`cuda` is another card for every rank of a machine."""
    return f"cuda:{_number('LOCAL_RANK', 0)}" if name == "cuda" and world() > 1 else name


def _number(name: str, alone: int) -> int:
    """Others set these names, too: schedulers of clusters, for programs that know nothing of them."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone


# ---- what is whose ---------------------------------------------------------------------------------------------------


def divide(n: int) -> slice:
    """This rank's part of n things, one after the other; every other rank has as many, or one more or less."""
    return slice(rank() * n // world(), (rank() + 1) * n // world())


def spaced(n: int, most: int) -> range:
    """This rank's ones of evenly spaced things, `most` or somewhat more among those of all ranks, of which it has n."""
    if world() == 1:
        return range(0, n, max(1, n // most))
    import torch

    each = gathered(torch.tensor([n])).tolist()
    step = max(1, sum(each) // most)
    return range(-sum(each[: rank()]) % step, n, step)


# ---- together --------------------------------------------------------------------------------------------------------
# Every rank calls these in the same order, with tensors of the same shape but where it says otherwise.


def summed(values: "Tensor") -> "Tensor":
    """The sum over all ranks; in place, where the tensor is contiguous."""
    if world() == 1:
        return values
    values = values.contiguous()
    with _others() as dist:
        dist.all_reduce(values)
    return values


def total(value: float) -> float:
    """The sum of numbers, exact for integers below 2^53."""
    if world() == 1:
        return value
    import torch

    return float(summed(torch.tensor(value, dtype=torch.float64)))


def mean(values: "Tensor", dim: int | None = None) -> "Tensor":
    """Over all values, or along a dimension; it is there that the tensors of the ranks may have different sizes."""
    if dim is None:
        return values.mean() if world() == 1 else summed(values.sum()) / total(values.numel())
    return values.mean(dim) if world() == 1 else summed(values.sum(dim)) / total(values.shape[dim])


def own_sum(values: "Tensor") -> "Tensor":
    """The sums over all ranks of this rank's part of the first dimension, `divide`d; `values` is used up."""
    if world() == 1:
        return values
    values = values.contiguous()
    parts = [values[r * len(values) // world() : (r + 1) * len(values) // world()] for r in range(world())]
    with _others() as dist:
        for r, part in enumerate(parts):
            dist.reduce(part, r)
    return parts[rank()].clone()


def gathered(part: "Tensor") -> "Tensor":
    """The parts of all ranks, one after the other along the first dimension, in which they may differ."""
    if world() == 1:
        return part
    import torch

    sizes = summed(torch.nn.functional.one_hot(torch.tensor(rank()), world()) * len(part)).tolist()
    kind = part.dtype
    padded = part.new_zeros(max(sizes), *part.shape[1:])
    padded[: len(part)] = part
    padded = padded.view(torch.uint8) if kind == torch.bool else padded  # which every backend sends
    found = [torch.empty_like(padded) for _ in sizes]
    with _others() as dist:
        dist.all_gather(found, padded)
    return torch.cat([t[:n] for t, n in zip(found, sizes, strict=True)]).view(kind)


def everywhere(value: bool) -> bool:
    """Whether it holds for all ranks."""
    return total(float(value)) == world()


def wait() -> None:
    """Until all ranks are here."""
    total(0)


def from_first(make: Callable[[], T]) -> T:
    """What the first rank makes of it; the others wait for it."""
    if world() == 1:
        return make()
    import torch

    box: list[Any] = [make() if first() else None]
    with _others() as dist:
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
    made: T = box[0]
    return made


def of_all(value: T) -> list[T]:
    """What every rank has."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    with _others() as dist:
        dist.all_gather_object(found, value)
    return found


@contextlib.contextmanager
def _others() -> Iterator[Any]:
    """torch.distributed, connected; MobieError where another rank has ended."""
    import torch.distributed as dist

    try:
        if not dist.is_initialized():
            import torch

            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        yield dist
    except RuntimeError as e:
        raise MobieError(
            RANK_LOST,
            "another process of this calibration has ended",
            f"rank {rank()} of {world()}: {(str(e).splitlines() or [type(e).__name__])[0]}",
            "all of them, to the end",
            "see what it said, and what torchrun says of it; the same command with as many processes goes on",
        ) from e
