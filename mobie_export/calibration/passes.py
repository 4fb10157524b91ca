"""From calibration text to statistics, one layer in memory at a time.

The forward pass keeps the hidden states between layers in files of a work folder. The backward pass walks the layers
from the last to the first: it reads a layer's input, runs the layer again with gradients, and hands the gradient of its
input on. What the quantizer needs of a layer exists when the walk is at it: the experts' inputs, their routing, and the
squared gradients of the loss at their outputs, averaged over groups of output channels (GuidedQuant, arXiv 2505.07004,
eq. 7; the loss is the next-token cross entropy on the calibration text).

Hidden states are kept in bfloat16: the residual stream of large models has outliers beyond float16's range, and 2 bytes
per token and channel in every layer are enough disk already. The rounding, 2^-9 of a value, is far below what binary
weights change. Gradients have the same form.
"""

import hashlib
import json
import lzma
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mobie_export import disk
from mobie_export.calibration.tokenizer import tokenize
from mobie_export.errors import BAD_INPUT, MobieError
from mobie_export.models.architecture import swiglu
from mobie_export.models.twin import PROJECTIONS, Experts, Seen, Twin

N_SAMPLES, SEQ_LEN, SEED = 1024, 256, 0
BATCH_TOKENS = 2048  # per forward or backward of a layer
HELD_OUT = 16  # every so many-th sequence is kept aside from refinement
MIN_SEQUENCES = 32
PRIOR_TOKENS = 4096  # of a layer, that stand in where an expert saw too few


# ---- text and tokens -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """Token sequences to calibrate with, in an order drawn by the seed."""

    tokens: Tensor  # int64 [n, seq_len]
    sha256: str  # of the text
    notes: tuple[str, ...] = ()  # what a user should know of the text

    @property
    def batches(self) -> list[slice]:
        step = max(1, BATCH_TOKENS // self.tokens.shape[1])
        return [slice(i, min(i + step, len(self.tokens))) for i in range(0, len(self.tokens), step)]


# First bytes of what is no text, and what it is.
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
}
# Byte order marks; UTF-32's little-endian one begins as UTF-16's does.
ENCODINGS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
CONTROLS = bytes(c for c in range(32) if c not in b"\t\n\v\f\r\x1b")  # rare in text; a tenth of random bytes


def read_text(path: Path | None) -> bytes:
    """The calibration text, plain or .xz; the package's own where no path is given. UTF-16 and UTF-32 with a byte order
    mark become UTF-8. MobieError for what cannot be read and for what is no text."""
    return _decoded(_raw_text(path), path)[0]


def _raw_text(path: Path | None) -> bytes:
    try:
        if path is None:
            data = resources.files("mobie_export").joinpath("data", "calibration.txt.xz").read_bytes()
            return lzma.decompress(data)
        if Path(path).exists() and not Path(path).is_file():  # a pipe can be read once, a device for ever
            raise OSError("it is no file")
        data = Path(path).read_bytes()
        return lzma.decompress(data) if Path(path).suffix == ".xz" else data
    except (OSError, EOFError, ValueError, lzma.LZMAError) as e:
        raise MobieError(BAD_INPUT, f"cannot read the calibration text {path}", str(e), "text, or .xz") from e


def _decoded(data: bytes, path: Path | None) -> tuple[bytes, list[str]]:
    """(the text in UTF-8, what was done to it)"""
    kind = next((k for first, k in COMPRESSED.items() if data.startswith(first)), None)
    encoding = next((e for mark, e in ENCODINGS.items() if data.startswith(mark)), None)
    if encoding and not kind:
        try:
            return data.decode(encoding).encode(), [f"{path} is in {encoding.upper()}; it was taken as UTF-8"]
        except UnicodeError as e:
            kind = f"{encoding.upper()} by its first bytes, and damaged: {e}"
    if kind is None and (0 in data or 100 * len(data.translate(None, CONTROLS)) < 99 * len(data)):
        kind = "binary data"
    if kind is not None:
        todo = "decompress it first" if kind in COMPRESSED.values() else "give text with --calibration"
        raise MobieError(
            BAD_INPUT, f"the calibration text {path} is no text", kind, "text in UTF-8, plain or as NAME.xz", todo
        )
    return data, []


def text_notes(path: Path | None, chat: bool = False) -> list[str]:
    """What a user should know of a text before anything is calibrated on it. Errors as `read_text` raises them."""
    if path is None:
        return []
    data, notes = _decoded(_raw_text(path), path)
    try:
        data.decode()
    except UnicodeDecodeError as e:
        if e.end < len(data):  # a last character that was cut is no matter
            notes.append(f"{path} is not in UTF-8: byte {e.start} is 0x{data[e.start]:02x}; iconv makes it UTF-8")
    lines = [x for x in data[: 1 << 20].splitlines() if x.strip()][:3]
    if not chat and lines and all(map(_is_object, lines)):
        notes.append(
            f"{path} is JSON Lines, taken as it stands; with --chat, dialogues are wrapped as the model has them"
        )
    return notes


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def load(
    model: Path,
    text: bytes,
    n_samples: int = N_SAMPLES,
    seq_len: int = SEQ_LEN,
    seed: int = SEED,
    special: bool = False,
    name: str = "the calibration text",
) -> Calibration:
    """At most n_samples sequences of seq_len tokens: disjoint windows of the text, drawn by the seed.

    special, name: as `tokenize` has them. MobieError when the text has fewer than MIN_SEQUENCES windows.
    """
    tokens, first = tokenize(model, text, special, name)
    body = seq_len - (first is not None)
    n = len(tokens) // body
    if n < MIN_SEQUENCES:
        raise MobieError(
            BAD_INPUT,
            f"{name} is too short",
            f"{len(tokens)} tokens",
            f"at least {MIN_SEQUENCES * body}: {MIN_SEQUENCES} sequences of {seq_len}",
            "give more text with --calibration, or shorter sequences with --seq-len",
        )
    windows = torch.from_numpy(tokens[: n * body].reshape(n, body)).long()
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:n_samples]
    windows = windows[chosen]
    if first is not None:
        windows = torch.cat([torch.full((len(windows), 1), first), windows], 1)
    return Calibration(windows, hashlib.sha256(text).hexdigest())


# ---- hidden states on disk -------------------------------------------------------------------------------------------


# What is in a file of states, by the first part of its name.
STATES = {"hidden": "hidden states", "gradient": "loss gradients", "quantized": "hidden states of the binary model"}


def overflow(what: str) -> MobieError:
    """For numbers that a model makes on its way and that are none."""
    return MobieError(
        BAD_INPUT,
        "the model computes values that are no numbers",
        f"infinite or NaN: {what}",
        "a model whose activations stay in float32's range",
        "check the model with llama-perplexity; --method sign does not compute activations",
    )


class States:
    """Hidden states, or gradients of them, in one file: [n_sequences, seq_len, width].

    The file has another name until `finish`; one that is there under its own name is complete and is taken as it is.
    Its disk space is taken at once, and it is read and written, not mapped: on a full disk a write into mapped memory
    is a signal that ends the process. MobieError where that fails, and for values that are infinite or NaN; the file's
    name says whose they are.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, device: str = "cpu"):
        self.path, self.shape, self.dtype, self.device = Path(path), tuple(shape), dtype, device
        self.number = np.dtype(np.uint16 if dtype == torch.bfloat16 else np.float32)
        self.row_bytes = math.prod(self.shape[1:]) * self.number.itemsize  # of a sequence
        self.finished = self.path.exists()
        if self.finished:
            with disk.reading_back(self.path):
                self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (closed by `delete`, or with the object)
                size, wanted = os.fstat(self._file.fileno()).st_size, self.shape[0] * self.row_bytes
                if size != wanted:
                    raise ValueError(f"{size} bytes in place of {wanted}")
        else:
            with disk.writing(self.path):
                self._file = open(self._part, "w+b", buffering=0)  # noqa: SIM115
                disk.reserve(self._file, self.shape[0] * self.row_bytes)

    @property
    def _part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    def finish(self) -> None:
        """On the disk, and under its own name."""
        if not self.finished:
            with disk.writing(self.path):
                os.fsync(self._file.fileno())
                self._part.rename(self.path)
            self.finished = True

    def write(self, where: slice, values: Tensor) -> None:
        if self.finished:  # by an earlier run, with the same values
            return
        values = values.detach().to(self.dtype).contiguous()
        if not torch.isfinite(values).all():
            kind, boundary = self.path.name.split("-")
            place = f"behind layer {int(boundary) - 1}" if int(boundary) else "before the first layer"
            raise overflow(f"{STATES[kind]} {place}")
        data = (values.view(torch.uint16) if self.dtype == torch.bfloat16 else values).cpu().numpy()
        rest = memoryview(data).cast("B")
        with disk.writing(self.path):
            self._file.seek(where.indices(self.shape[0])[0] * self.row_bytes)
            while rest:
                rest = rest[self._file.write(rest) :]

    def read(self, where: slice | Tensor) -> Tensor:
        """float32 [n, seq_len, width], on the device, of a range of sequences or of those with the given numbers."""
        if isinstance(where, slice):
            start, stop, _ = where.indices(self.shape[0])
            ranges, n = [(start, stop - start)], stop - start
        else:
            ranges, n = [(i, 1) for i in where.tolist()], len(where)
        values = np.empty((n, *self.shape[1:]), self.number)
        rest = memoryview(values).cast("B")
        with disk.reading_back(self.path):
            for first, count in ranges:
                self._file.seek(first * self.row_bytes)
                rest = self._filled(rest, count * self.row_bytes)
        found = torch.from_numpy(values).to(self.device)
        return found.view(self.dtype).float() if self.dtype == torch.bfloat16 else found

    def _filled(self, buffer: memoryview, size: int) -> memoryview:
        """What of the buffer comes behind the `size` bytes that are read into it."""
        while size > 0:
            n = self._file.readinto(buffer[:size])
            if not n:
                raise EOFError(f"the file ends {size} bytes early")
            buffer, size = buffer[n:], size - n
        return buffer

    def delete(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)
        self._part.unlink(missing_ok=True)


def save(value, file: BinaryIO) -> None:
    """torch.save, which hides what interrupted it, the system's error or a signal, behind an error of its own."""
    try:
        torch.save(value, file)
    except RuntimeError as e:
        if isinstance(e.__context__, (OSError, KeyboardInterrupt)):
            raise e.__context__ from None
        raise


class Work:
    """The files of one calibration: the original model's hidden states before layer i, `hidden[i]`, with
    hidden[n_layers] those before the head, and the loss gradients with respect to them, `gradient[i]`.

    What an earlier run with the same settings finished in the same folder is not done again.
    """

    def __init__(self, folder: Path, twin: Twin, calibration: Calibration, dtype: torch.dtype = torch.bfloat16):
        self.folder, self.dtype = Path(folder), dtype
        self.twin, self.calibration = twin, calibration
        self.shape = (*calibration.tokens.shape, twin.width)
        self.hidden: dict[int, States] = {}
        self.gradient: dict[int, States] = {}

    def states(self, name: str) -> States:
        return States(self.folder / name, self.shape, self.dtype, self.twin.device)


def disk_bytes(n_layers: int, n_tokens: int, width: int) -> int:
    """What `Work` takes in its folder at most."""
    return 2 * 2 * (n_layers + 2) * n_tokens * width


def forward(work: Work, step: Callable[[int, str], None] = lambda n, what: None) -> None:
    """Fill work.hidden, and work.gradient of the last boundary. step: called with tokens done and what is going on."""
    twin, calibration = work.twin, work.calibration
    table = twin.embedding()
    work.hidden[0] = work.states("hidden-0")
    if not work.hidden[0].finished:
        for where in calibration.batches:
            work.hidden[0].write(where, table[calibration.tokens[where].to(twin.device)])
        work.hidden[0].finish()
    del table
    with torch.no_grad():
        for i in range(twin.n_layers):
            work.hidden[i + 1] = work.states(f"hidden-{i + 1}")
            if work.hidden[i + 1].finished:
                step(calibration.tokens.numel(), f"layer {i}, done before")
                continue
            layer = twin.layer(i)
            for where in calibration.batches:
                work.hidden[i + 1].write(where, twin.run(layer, work.hidden[i].read(where)))
                step(calibration.tokens[where].numel(), f"layer {i}")
            work.hidden[i + 1].finish()
    last = twin.n_layers
    work.gradient[last] = work.states(f"gradient-{last}")
    if work.gradient[last].finished:
        return
    head = twin.head()
    n_targets = calibration.tokens.shape[0] * (calibration.tokens.shape[1] - 1)
    for where in calibration.batches:
        h = work.hidden[last].read(where).requires_grad_()
        (loss(head, h, calibration.tokens[where].to(twin.device)) / n_targets).backward()
        # The mean over all targets would be lost in bfloat16 no more than anything else: its exponent is float32's.
        work.gradient[last].write(where, h.grad)
    work.gradient[last].finish()


def targets(work: Work, step: Callable[[int, str], None] = lambda n, what: None) -> None:
    """Fill work.hidden of the last boundary and of no other: what `refine.whole` needs of a text."""
    twin, calibration = work.twin, work.calibration
    before = work.states("hidden-0")
    table = twin.embedding()
    for where in calibration.batches:
        before.write(where, table[calibration.tokens[where].to(twin.device)])
    del table
    with torch.no_grad():
        for i in range(twin.n_layers):
            layer, after = twin.layer(i), work.states(f"hidden-{i + 1}")
            for where in calibration.batches:
                after.write(where, twin.run(layer, before.read(where)))
                step(calibration.tokens[where].numel(), f"layer {i}")
            before.delete()
            before = after
    work.hidden[twin.n_layers] = before


def loss(head: Callable[[Tensor], Tensor], hidden: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy of every next token, summed, in nats."""
    logits = head(hidden[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def backward(
    work: Work,
    step: Callable[[int, str], None] = lambda n, what: None,
    groups: int = 1,
    basis: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    done: Callable[[int], bool] = lambda layer: False,
) -> Iterator[tuple[int, "LayerStatistics"]]:
    """Walk the layers from the last to the first; yields (layer, statistics) and fills work.gradient on the way.

    Layers without experts hand the gradient on and yield nothing.
    basis: experts' weights -> for some projections a matrix M [rows, n]; squared there are the gradients of z' in
    z = M z', the projection's outputs, which are M^T times those of z. done: layers whose statistics nobody needs any
    more; they are passed over where their gradient is there.
    """
    twin, calibration = work.twin, work.calibration
    for i in reversed(range(twin.n_layers)):
        work.gradient[i] = work.states(f"gradient-{i}")
        if work.gradient[i].finished and done(i):
            step(calibration.tokens.numel(), f"layer {i}, done before")
            continue
        layer = twin.layer(i)
        experts = twin.experts_of(layer)
        if experts is None:
            for where in calibration.batches:
                h = work.hidden[i].read(where).requires_grad_()
                (grad,) = torch.autograd.grad(twin.run(layer, h), h, work.gradient[i + 1].read(where))
                work.gradient[i].write(where, grad)
                step(calibration.tokens[where].numel(), f"layer {i}")
            work.gradient[i].finish()
            continue
        seen: list[Seen] = []
        experts.tap = seen.append
        bases = basis(experts.weights) if basis else {}
        parts = []
        for where in calibration.batches:
            h = work.hidden[i].read(where).requires_grad_()
            out = twin.run(layer, h)
            (s,) = seen
            seen.clear()
            # gradients of the inner tensors without keeping them all: they are asked for by name
            wanted = (h, s.gate, s.up, s.down)
            grads = torch.autograd.grad(out, wanted, work.gradient[i + 1].read(where))
            work.gradient[i].write(where, grads[0])
            inner = (g @ bases[p] if p in bases else g for p, g in zip(PROJECTIONS, grads[1:], strict=True))
            parts.append(_part(s, *inner, groups))
            step(calibration.tokens[where].numel(), f"layer {i}")
        experts.tap = None
        work.gradient[i].finish()
        yield i, LayerStatistics.joined(parts, experts)


def _part(seen: Seen, gate: Tensor, up: Tensor, down: Tensor, groups: int) -> tuple[Tensor, ...]:
    """(x, index, saliency per projection) of one batch, detached; saliency rows are token * k + choice."""
    back = torch.empty_like(seen.order)
    back[seen.order] = torch.arange(len(seen.order), device=seen.order.device)

    def squared(g: Tensor) -> Tensor:
        return g.double().square().view(len(g), groups, -1).mean(-1).float()[back]

    return seen.x.detach(), seen.index, squared(gate), squared(up), squared(down)


# ---- statistics ------------------------------------------------------------------------------------------------------


@dataclass
class LayerStatistics:
    """What a layer's experts saw on the calibration text, in the original model.

    Second moments are built when asked for, one expert at a time: all of a large layer's would not fit in memory.
    """

    x: Tensor  # float32 [n_tokens, width], inputs of gate and up
    index: Tensor  # int64 [n_tokens, k], experts of a token
    saliency: dict[str, Tensor]  # projection -> float32 [n_tokens * k, groups], mean squared gradient, scaled to mean 1
    weights: dict[str, Tensor]  # projection -> float32 [n_expert, rows, cols], the original ones
    fisher: dict[str, float]  # projection -> mean squared gradient, by which the saliency was scaled
    biases: dict[str, Tensor] = field(default_factory=dict)  # projection -> float32 [n_expert, rows]
    act: Callable[[Tensor, Tensor], Tensor] = swiglu

    @classmethod
    def joined(cls, parts: list[tuple[Tensor, ...]], experts: Experts) -> "LayerStatistics":
        x, index, *saliency = (torch.cat(column) for column in zip(*parts, strict=True))
        fisher = {p: float(s.mean()) for p, s in zip(PROJECTIONS, saliency, strict=True)}
        scaled = {p: s / max(fisher[p], 1e-30) for p, s in zip(PROJECTIONS, saliency, strict=True)}
        return cls(x, index, scaled, experts.weights, fisher, experts.biases, experts.act)

    def save(self, file: BinaryIO) -> None:
        """Everything but the experts; inputs in bfloat16, as hidden states are."""
        save((self.x.bfloat16().cpu(), self.index.cpu(), self.saliency, self.fisher), file)

    @classmethod
    def load(cls, path: Path, twin: Twin, layer: int) -> "LayerStatistics":
        with disk.reading_back(path):
            x, index, saliency, fisher = torch.load(path, map_location=twin.device)
        return cls(x.float(), index, saliency, twin.experts(layer), fisher, twin.biases(layer), twin.arch.act)

    @property
    def n_expert(self) -> int:
        return len(self.weights["gate"])

    @property
    def counts(self) -> Tensor:  # int64 [n_expert], tokens an expert saw
        return torch.bincount(self.index.flatten(), minlength=self.n_expert)

    def inputs(self, projection: str, rows: Tensor, expert: int) -> Tensor:
        """float32 [len(rows), cols]: inputs of a projection for rows token * k + choice of one expert."""
        x = self.x[rows // self.index.shape[1]]
        if projection != "down":
            return x
        gate, up = (x @ self.weights[p][expert].T for p in ("gate", "up"))
        if self.biases:
            gate, up = gate + self.biases["gate"][expert], up + self.biases["up"][expert]
        return self.act(gate, up)

    def energy(self, projection: str, expert: int) -> Tensor:  # float32 [cols]
        """sum_t s_t x_t^2, the diagonal of the expert's loss-weighted second moment."""
        rows = torch.nonzero(self.index.flatten() == expert).flatten()
        total = self.x.new_zeros(self.weights[projection].shape[2])
        for part in rows.split(4 * BATCH_TOKENS):
            weights = self.saliency[projection][part].mean(1, keepdim=True)
            total += (self.inputs(projection, part, expert).square() * weights).sum(0)
        return total

    def second_moment(
        self,
        projection: str,
        expert: int,
        saliency: Tensor,  # float32 [n_tokens * k, groups]; all ones makes the plain second moment
        shrink: bool = True,
    ) -> Tensor:  # float32 [groups, cols, cols]
        """H_g = sum_t s_tg x_t x_t^T over the expert's tokens (GuidedQuant eq. 8).

        An expert that saw fewer tokens than it has columns is shrunk towards the layer: tokens of the whole layer go
        through it, with the weight of the tokens that are missing. So an expert without tokens has the moments of the
        layer's, and nobody's matrix lacks rank for want of tokens.
        """
        rows = torch.nonzero(self.index.flatten() == expert).flatten()
        cols = self.weights[projection].shape[2]
        moments = saliency.new_zeros(saliency.shape[1], cols, cols)
        for part in rows.split(4 * BATCH_TOKENS):
            x = self.inputs(projection, part, expert)
            for g in range(saliency.shape[1]):
                weighted = x * saliency[part, g].sqrt().unsqueeze(1)
                moments[g].addmm_(weighted.T, weighted)
        missing = cols - len(rows)
        if shrink and missing > 0:
            # evenly spaced; their first choice stands for the token
            every = max(1, len(self.x) // PRIOR_TOKENS)
            some = torch.arange(0, len(self.x), every, device=self.x.device) * self.index.shape[1]
            x = self.inputs(projection, some, expert)
            moments += missing / len(x) * (x.T @ x) * saliency.mean(0)[:, None, None]
        return moments
