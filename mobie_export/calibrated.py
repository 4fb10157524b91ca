"""The calibrated method: from a GGUF and a text to packed experts, layer by layer, and tuned routers and norms.

    forward    the original's hidden states before every layer, to disk
    backward   from the last layer to the first: statistics
    quantize   error propagation, packed experts to disk; with bits to spare, second signs where they pay most
    refine     none, layerwise (one layer after the other), streamed (then all together by the KL divergence, one layer
               in memory at a time) or end-to-end (the same with the whole model in memory)

The result lies in a `Store`, from which the pipeline takes tensors when it writes them.
"""

import importlib
import io
import json
import math
import os
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mobie_export import __version__, disk, format, gguf_io, model
from mobie_export.errors import BAD_INPUT, UNSUPPORTED, USAGE, MobieError
from mobie_export.gguf_io import Gguf
from mobie_export.progress import Progress, time_text

REFINEMENTS = ("none", "layerwise", "streamed", "end-to-end")
NUMBERS = 32 * format.BLOCK_LEN  # bits of the numbers of 64 columns
BASE_MEMORY = 700 << 20  # torch and transformers, measured;
CUDA_MEMORY = 300 << 20  # ... what torch's build for CUDA takes more, on a machine without a card too
EXPERTS_AT_ONCE = 4  # of one projection, in error propagation: their blocks stay in the cache
PACKAGES = ("torch", "transformers")
# Least and most of an option; what a model or a text allows is checked with it. A target needs a token before it.
BOUNDS = {"samples": (1, math.inf), "seq_len": (2, math.inf), "steps": (1, 1_000_000), "seed": (0, 2**63 - 1)}
DEVICE = re.compile(r"cpu|cuda(:\d{1,4})?")


@dataclass(frozen=True)
class Options:
    """What a calibration can be asked for. `text`: a file, or None for the package's own. MobieError for what makes no
    sense with any model and text."""

    text: Path | None = None
    chat: bool = False  # the text is dialogues, to be wrapped in the model's template
    samples: int = 1024
    seq_len: int = 256
    seed: int = 0
    recipe: str | None = None  # "paper": MoBiE as published, as far as the file can hold it; None: our own
    refine: str = "streamed"
    bpw: float | None = None  # stored bits per expert weight at most; None: one sign for every weight and no more
    steps: int | None = None  # of the refinement of all layers together
    device: str = "cpu"  # where torch computes
    tune_router: bool = True
    tune_norms: bool = True
    threads: int = 2

    def __post_init__(self):
        if self.recipe:  # which has none
            object.__setattr__(self, "refine", "none")
        for name, (least, most) in BOUNDS.items():
            value, option = getattr(self, name), "--" + name.replace("_", "-")
            if value is not None and not least <= value <= most:
                wanted = f"at least {least}" + ("" if most == math.inf else f", at most {most}")
                raise MobieError(USAGE, f"{option} is out of range", str(value), wanted)
        if self.refine != "none" and self.samples < 2:
            raise MobieError(
                USAGE,
                "--samples 1 leaves a refinement nothing to check itself on",
                "1",
                "at least 2",
                "or --refine none",
            )
        if self.bpw is not None and not (math.isfinite(self.bpw) and self.bpw > 0):
            raise MobieError(USAGE, "--bpw is no number of bits", f"{self.bpw:g}", "a number such as 1.25")
        if not DEVICE.fullmatch(self.device):
            raise MobieError(USAGE, "--device names no device", self.device, "cpu, cuda, or cuda:N for one of several")

    @property
    def text_name(self) -> str:
        return "the calibration text" + (f" {self.text}" if self.text is not None else "")

    @property
    def whole(self):
        """refine.Settings of the refinement of all layers together, or None."""
        from mobie_export import refine

        if self.refine not in ("streamed", "end-to-end"):
            return None
        return replace(refine.WHOLE, seed=self.seed, steps=self.steps or refine.WHOLE.steps)

    @property
    def method(self) -> str:  # as mobie.method has it
        if self.recipe:
            return self.recipe
        return "glas" if self.refine == "none" else f"glas+{self.refine}"


@dataclass
class Outcome:
    """What a calibration did, for the report."""

    settings: dict  # everything with an influence on the bytes
    lines: list[str] = field(default_factory=list)  # for people: losses before and after
    thin: dict[int, dict[int, int]] = field(default_factory=dict)  # layer -> expert -> its tokens, where too few


class Store:
    """Packed experts by layer and tuned tensors by name, in files of a folder.

    A file is there when it is complete. What refinement puts lies beside what it started from, so that a run that was
    killed in it starts it again from the same place.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.tuned: dict[str, np.ndarray] = {}  # GGUF name -> float32, slowest dimension first
        self.refined: set[int] = set()  # layers of which there is a refined version

    def put_factor(self, name: str, rows: np.ndarray, type_id: int) -> None:
        """A factor that the experts of a layer share: its bytes, uint8 [rows, bytes of a row]."""
        with complete(self.folder / f"{name}.{type_id}.npy") as file:
            _save(file, rows)

    def factors(self) -> list[tuple[str, tuple[int, ...], int]]:
        """(GGUF name, shape, type) of the shared factors."""
        found = []
        for path in sorted(self.folder.glob("blk.*.npy")):
            name, kind, _ = path.name.rsplit(".", 2)
            with disk.reading_back(path):
                n = len(np.load(path, mmap_mode="r"))
            found.append((name, (n, n), int(kind)))
        return found

    def factor(self, name: str) -> np.ndarray:
        (path,) = self.folder.glob(f"{name}.*.npy")
        with disk.reading_back(path):
            return np.load(path)

    def has(self, layer: int) -> bool:
        return self._path(layer).exists()

    def put(self, layer: int, packed, order=None, refined: bool = False) -> None:
        """packed: projection -> glas.Planes; order: int64 [E, ff], where the neurons of the planes were originally."""
        arrays = {}
        for projection, planes in packed.items():
            for name, values in planes._asdict().items():
                if values is not None:
                    values = np.ascontiguousarray(values.cpu().numpy())
                    arrays[f"{projection}-{name}"] = np.packbits(values, -1) if "signs" in name else values
        if order is not None:
            with complete(self._path(layer, "order")) as file:
                _save(file, order.cpu().numpy())
        if refined:
            self.refined.add(layer)
        with complete(self._path(layer)) as file:
            np.savez(file, **arrays)

    def get(self, layer: int, names: tuple[str, ...] | None = None):
        """Projection -> glas.Planes, of numpy arrays. names: fields to read, the others are None."""
        from mobie_export.glas import Planes

        path = self._path(layer)
        with disk.reading_back(path), np.load(path) as arrays:
            found: dict[str, dict] = {}
            for key in arrays.files:
                projection, name = key.split("-")
                if names is not None and name not in names:
                    found.setdefault(projection, {})[name] = None
                    continue
                values = arrays[key]
                found.setdefault(projection, {})[name] = (
                    np.unpackbits(values, axis=-1).view(np.bool_) if "signs" in name else values
                )
        return {p: Planes(**planes) for p, planes in found.items()}

    def shape(self, layer: int, projection: str, name: str) -> tuple[int, ...] | None:
        """Of a field of the planes as it is stored, signs 8 to a byte; None where the planes have none."""
        with self._stored(layer, projection, name) as found:
            return found[1] if found else None

    def experts(self, layer: int, projection: str, name: str) -> Iterator[np.ndarray]:
        """A field of the planes expert by expert, read one at a time."""
        with self._stored(layer, projection, name) as (file, (n, *shape), dtype):
            size = dtype.itemsize * int(np.prod(shape))
            for _ in range(n):
                with disk.reading_back(self._path(layer)):
                    values = np.frombuffer(file.read(size), dtype).reshape(shape)
                yield np.unpackbits(values, axis=-1).view(np.bool_) if "signs" in name else values

    @contextmanager
    def _stored(self, layer: int, projection: str, name: str):
        """(file at the first value, shape, dtype) or None."""
        path, key = self._path(layer), f"{projection}-{name}.npy"
        with disk.reading_back(path):
            archive = zipfile.ZipFile(path)
        with archive:
            if key not in archive.namelist():
                yield None
                return
            with archive.open(key) as file:
                with disk.reading_back(path):
                    np.lib.format.read_magic(file)
                    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                yield file, shape, dtype

    def tensors(self, layer: int):
        """The same as torch tensors."""
        import torch

        packed = self.get(layer)
        return {p: type(x)(*(None if a is None else torch.from_numpy(a) for a in x)) for p, x in packed.items()}

    def original(self, twin, layer: int):
        """Projection -> the weights that the planes stand for: the twin's, with the neurons in the planes' order."""
        import torch

        weights, path = twin.experts(layer), self._path(layer, "order")
        if not path.exists():
            return weights
        with disk.reading_back(path):
            order = np.load(path)
        return reordered(weights, torch.from_numpy(order).to(twin.device))

    def _path(self, layer: int, what: str = "planes") -> Path:
        if what == "planes" and layer in self.refined:
            what = "refined"
        return self.folder / f"{what}-{layer}.np{'y' if what == 'order' else 'z'}"


@contextmanager
def complete(path: Path) -> Iterator[BinaryIO]:
    """A file to write that has its name when it is complete and on the disk."""
    part = path.with_name(path.name + ".part")
    with disk.writing(path):
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)


def _save(file: BinaryIO, values: np.ndarray) -> None:
    """np.save; into a file itself it does not say why a write failed."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    file.write(buffer.getbuffer())


def reordered(weights: dict, order) -> dict:  # order int64 [E, ff]
    """Experts with their neurons in another order, which is the same function: rows of gate and up, columns of down."""
    rows = order.unsqueeze(-1)
    return {
        p: w.gather(2, order.unsqueeze(1).expand_as(w)) if p == "down" else w.gather(1, rows.expand_as(w))
        for p, w in weights.items()
    }


@dataclass(frozen=True)
class Needs:
    """What a calibration will change and take. Sizes in bytes, upper estimates."""

    tuned: list[str]  # GGUF names of the tensors beside the experts that get other values
    disk: int
    memory: int
    base: int  # of memory: what the libraries take
    beside: list[tuple[str, tuple[int, ...], int]] = field(default_factory=list)  # further tensors: name, shape, type


def check(options: Options) -> list[str]:
    """What can be said without a model: packages, device, text. Returns what a user should know of the text. Raises
    MobieError."""
    _check_packages()
    import torch

    from mobie_export.calibrate import text_notes

    if options.device != "cpu":
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(options.device.partition(":")[2] or 0) >= n:
            raise MobieError(
                UNSUPPORTED,
                f"--device {options.device} is not here",
                f"{n} devices of CUDA, torch {torch.__version__}",
                todo="leave --device out, or install a torch that finds the card",
            )
    return text_notes(options.text, options.chat)


def _check_packages() -> None:
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as e:  # OSError: a library of torch's that does not load
            raise MobieError(
                UNSUPPORTED,
                "calibration needs packages that are not installed",
                str(e),
                " and ".join(PACKAGES),
                "pip install 'mobie-export[calibrate]', or export with --method sign",
            ) from e


def sequences(gguf: Gguf, options: Options):
    """calibrate.Calibration of all that a calibration with these options reads. Raises MobieError.

    The first `samples` of them are for the statistics; `notes` says what a user should know.
    """
    notes = check(options)
    from mobie_export import calibrate, chat

    context = architecture_context(gguf)
    if options.seq_len > context:
        raise MobieError(
            USAGE, "--seq-len is longer than the model's context", str(options.seq_len), f"at most {context}"
        )
    text = calibrate.read_text(options.text)
    if options.chat:
        text = chat.render(gguf, text)
    n = max(options.samples, options.whole.sequences(options.seq_len) if options.whole else 0)
    every = calibrate.load(
        gguf.paths[0], text, n, options.seq_len, options.seed, special=options.chat, name=options.text_name
    )
    has = len(every.tokens)
    if has < options.samples:
        found = f"{has} of {options.samples} sequences of {options.seq_len} tokens"
        if options.samples > calibrate.N_SAMPLES:
            wanted = f"--samples {has}, or more text"
            raise MobieError(USAGE, f"{options.text_name} is too short for --samples {options.samples}", found, wanted)
        notes.append(f"{options.text_name} is short: it has {found}")
    return replace(every, notes=tuple(notes))


def architecture_context(gguf: Gguf) -> int:
    """Tokens that the model was made for."""
    value = gguf.value(f"{gguf.architecture}.context_length")
    if not isinstance(value, int) or value < 1:
        key = f"{gguf.architecture}.context_length"
        raise MobieError(BAD_INPUT, f"{gguf.paths[0]} has odd metadata", f"{key} = {value}", "a number of tokens")
    return value


def needs(gguf: Gguf, options: Options, n_sequences: float = math.inf) -> Needs:
    """n_sequences: that the text has, where it is known. MobieError where the model cannot be calibrated, or a package
    is missing."""
    _check_packages()
    import torch

    from mobie_export.calibrate import BATCH_TOKENS, disk_bytes
    from mobie_export.twin import Twin

    twin, base = Twin(gguf), BASE_MEMORY + (CUDA_MEMORY if torch.version.cuda else 0)
    n_tokens, config = options.samples * options.seq_len, twin.config
    whole = options.whole
    weights = sum(t.n_weights for n, t in gguf.tensors.items() if "_exps." in n)
    layer = 4 * weights // twin.n_layers  # in float32
    vocabulary = 2 * 4 * config.vocab_size * twin.width
    statistics = 4 * n_tokens * (twin.width + 8 * config.num_experts_per_tok) + layer // 2
    if config._attn_implementation == "eager":  # scores of a batch and what their gradient needs
        at_once = max(1, BATCH_TOKENS // options.seq_len)
        statistics += 3 * 4 * config.num_attention_heads * at_once * options.seq_len**2
    memory = base + layer + max(vocabulary, statistics)
    disk = disk_bytes(twin.n_layers, n_tokens, twin.width) + weights * 3 // 8
    if spare_bits(gguf, options.bpw) > 0:
        disk += twin.n_layers * n_tokens * (2 * twin.width + 20 * config.num_experts_per_tok)  # statistics wait
    if options.refine != "none":
        memory = max(memory, base + 2 * layer)
    if whole is not None:  # the text that the statistics do not need: two boundaries at a time
        disk += 2 * 2 * min(whole.sequences(options.seq_len), n_sequences) * options.seq_len * twin.width
    tuned = 4 * layer if whole and whole.free_signs else layer // 8  # latent weights, gradients, Adam's two moments
    if options.refine == "streamed":
        memory = max(memory, base + layer + tuned + 2 * vocabulary)
        disk += 2 * tuned * twin.n_layers
    if options.refine == "end-to-end":
        memory = max(memory, base + layer + (layer // 4 + 2 * tuned) * twin.n_layers + 2 * vocabulary)
    beside = []
    if options.recipe:
        from mobie_export import recipe

        beside = recipe.beside_rows(twin)
        disk += sum(gguf_io.tensor_bytes(shape, kind) for _, shape, kind in beside)
        memory += 2 * layer + 4 * n_tokens * twin.width  # weights and inputs in the factors' basis
    return Needs(_tuned_names(twin, options), disk, memory, base, beside)


def _tuned_names(twin, options: Options) -> list[str]:
    from mobie_export.refine import beside

    if options.refine == "none":
        return []
    every_norm = options.refine != "layerwise"
    return [
        twin.tensor_name(i, p)
        for i in range(twin.n_layers)
        for p in beside(twin, i, options.tune_router, options.tune_norms, every_norm)
    ]


def least_bits(gguf: Gguf) -> int:
    """Of the experts with one sign per weight, in all: blocks and an expert's scale."""
    experts = model.experts(gguf).values()
    return sum(gguf_io.tensor_bytes(x.tensor.shape, format.TYPE_ID) * 8 + 32 * x.n_expert for x in experts)


def spare_bits(gguf: Gguf, bpw: float | None) -> float:
    """What `bpw` bits per expert weight leave for second signs. MobieError where they do not suffice for the first
    ones, or are more than second signs of all weights take."""
    experts = model.experts(gguf)
    weights, least = sum(x.n_weights for x in experts.values()), least_bits(gguf)
    signs = least - sum(32 * x.n_expert for x in experts.values())
    columns = {model.layer(n): 32 * x.cols for n, x in experts.items() if not model.is_down(n)}
    most = least + signs + sum(columns.values())
    if bpw is None:
        return 0.0
    if bpw * weights > most:
        raise MobieError(
            USAGE,
            "so many bits per expert weight have no use",
            f"{bpw:g}",
            f"at most {math.ceil(1e4 * most / weights) / 1e4:.4f}: two signs for every weight",
        )
    if bpw * weights < least:
        raise MobieError(
            USAGE,
            "so few bits per expert weight are not possible",
            f"{bpw:g}",
            f"at least {least / weights:.4f}",
            "leave --bpw out for the smallest file",
        )
    return bpw * weights - least


def _decides(gguf: Gguf, options: Options, text: str) -> str:
    """A digest of all that decides what a calibration computes, but for the weights."""
    import torch

    return disk.digest(__version__, torch.__version__, gguf.sha256, vars(options) | {"text": text})


def work_done(beside: Path, gguf: Gguf, options: Options, text: str) -> int:
    """Bytes on the disk that runs of this calibration have left there; text as in `work_folder`."""
    return sum(map(disk.size_of, Path(beside).glob(f".mobie-{disk.WORK}-{_decides(gguf, options, text)}-*")))


@contextmanager
def work_folder(
    beside: Path, gguf: Gguf, options: Options, text: str, show: bool = False, max_ram: int | None = None
) -> Iterator[Path]:
    """A folder for the time of the calibration and of the writing of its output, on the output's disk.

    Its name is a digest of all that decides what comes into it, every weight included, so that a run that did not
    finish is continued by the same command, and by no other. text: SHA-256 of what is calibrated on, chat template
    applied: one may write the date. MobieError when such a run is still going on.
    """
    total = sum(t.n_bytes for t in gguf.tensors.values())
    with Progress("digest of the source", total, show, max_ram=max_ram) as progress:
        content = gguf.content(progress.update)[:16]
    path = Path(beside) / f".mobie-{disk.WORK}-{_decides(gguf, options, text)}-{content}"
    about = f"calibration of {gguf.paths[0].name}"
    with disk.private(path, about, "the same calibration is running already", keep=True) as folder:
        yield folder


def run(
    gguf: Gguf, options: Options, every, folder: Path, show: bool, max_ram: int | None = None
) -> tuple[Store, Outcome]:
    """Calibrate a model on what `sequences` made; everything it leaves is in `folder`. max_ram: bytes that may be
    resident at most. Raises MobieError."""
    import torch

    from mobie_export import calibrate
    from mobie_export.twin import Twin

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    twin = Twin(gguf, options.device)
    calibration = replace(every, tokens=every.tokens[: options.samples])
    work = calibrate.Work(folder, twin, calibration)
    store, outcome = Store(folder), Outcome(_settings(options, calibration, torch.__version__), list(every.notes))
    for note in every.notes:
        print(f"mobie-export: warning: {note}", file=sys.stderr)
    prepare(gguf, work, store, options, outcome, show, max_ram)
    if options.refine != "none":
        started = time.perf_counter()
        _refine(work, every, store, options, outcome, show, max_ram)
        outcome.lines.append(f"refinement took {time_text(time.perf_counter() - started)}")
    outcome.settings["tuned"] = sorted({name.split(".", 2)[2] for name in store.tuned})
    return store, outcome


def prepare(
    gguf: Gguf,
    work,
    store: Store,
    options: Options,
    outcome: Outcome,
    show: bool = False,
    max_ram: int | None = None,
) -> None:
    """Forward, backward and error propagation: fills the store. What is in the folder already is not done again."""
    from mobie_export import calibrate, recipe

    twin, n_tokens, spare = work.twin, work.calibration.tokens.numel(), spare_bits(gguf, options.bpw)
    noted = work.folder / "noted.json"  # of every layer that is done: thin experts, curves
    thin, curves = _noted(noted)
    waiting = str(work.folder / "statistics-{}.pt")

    def note() -> None:
        with complete(noted) as file:
            file.write(json.dumps([thin, curves]).encode())

    def done(i: int) -> bool:
        return store.has(i) or (i in curves and Path(waiting.format(i)).exists())

    if options.recipe:
        outcome.settings[options.recipe] = vars(recipe.PAPER).copy()
    if not (work.folder / "hidden-0").exists():  # what is wrong with the last tensor would be said hours later
        total = sum(t.n_bytes for t in gguf.tensors.values())
        with Progress("check of the weights", total, show, max_ram=max_ram) as progress:
            for name, tensor in gguf.tensors.items():
                twin.tensor(name)
                progress.update(tensor.n_bytes, name)
    with Progress("forward", n_tokens * twin.n_layers, show, "token", max_ram) as progress:
        calibrate.forward(work, progress.update)
    with Progress("backward", 2 * n_tokens * twin.n_layers, show, "token", max_ram) as progress:
        for i, statistics in (recipe if options.recipe else calibrate).backward(work, progress.update, done=done):
            thin[i] = thin_experts(statistics)
            if spare > 0:  # the layers share the bits: all gains must be known
                curves[i] = curve(gains(statistics), format.BLOCK_LEN)
                if statistics.biases:  # they would have to follow the neurons into down's order; they are copied
                    curves[i]["down"] = []
                with complete(Path(waiting.format(i))) as file:
                    statistics.save(file)
                note()
            else:
                note()  # before the layer counts as done
                with _numbers(i):
                    if options.recipe:
                        recipe.put_layer(store, i, statistics)
                    else:
                        store.put(i, *quantize_layer(statistics))
            progress.update(n_tokens, f"layer {i}")
    outcome.thin = {i: thin[i] for i in sorted(thin) if thin[i]}
    if not curves:
        return
    fused = any("gate_up" in n for n in gguf.tensors)
    names = {i: twin.expert_names(i) for i in curves}
    experts = model.experts(gguf)

    def cost(i: int, p: str) -> int:  # 72 bits for 64 signs of a row and their magnitude
        item = experts[names[i][p][0]]
        rows = item.rows // 2 if fused and p != "down" else item.rows
        return item.n_expert * rows * 8 * format.BLOCK_BYTES

    second = allocate(curves, {i: {p: cost(i, p) for p in curves[i]} for i in curves}, spare, fused, NUMBERS)
    outcome.settings["second"] = {str(i): second[i] for i in sorted(second)}
    with Progress("error propagation", len(curves), show, "layer", max_ram) as progress:
        for i in sorted(curves):
            path = Path(waiting.format(i))
            if not store.has(i):
                with _numbers(i):
                    store.put(i, *quantize_layer(calibrate.LayerStatistics.load(path, twin, i), second[i]))
            path.unlink(missing_ok=True)
            progress.update(1, f"layer {i}")
            if any(second[i].values()):
                wide = ", ".join(f"{p} {k}" for p, k in second[i].items())
                outcome.lines.append(f"layer {i}: columns with a second sign: {wide}")


@contextmanager
def _numbers(layer: int) -> Iterator[None]:
    """Second moments that cannot be worked with, as an error that names the layer."""
    import torch

    from mobie_export import calibrate, glas

    try:
        yield
    except (glas.NotFactorized, torch.linalg.LinAlgError) as e:
        raise calibrate.overflow(f"second moments of what the experts of layer {layer} read ({e})") from e


def _noted(path: Path) -> tuple[dict, dict]:
    """Thin experts and curves of the layers that an earlier run did."""
    if not path.exists():
        return {}, {}
    with disk.reading_back(path):
        thin, curves = json.loads(path.read_bytes())
        return (
            {int(i): {int(e): n for e, n in experts.items()} for i, experts in thin.items()},
            {int(i): found for i, found in curves.items()},
        )


def _refine(
    work, every, store: Store, options: Options, outcome: Outcome, show: bool, max_ram: int | None = None
) -> None:
    """every: the calibration of the refinement of all layers together; the first sequences are those of `work`."""
    from mobie_export import calibrate, refine

    router, norms, n_layers = options.tune_router, options.tune_norms, work.twin.n_layers
    for left in work.folder.glob("refine-*.pt"):  # by a run that was killed; a refinement starts anew
        left.unlink()
    shutil.rmtree(work.folder / "targets", ignore_errors=True)

    def original(i: int):
        return store.original(work.twin, i)

    s = replace(refine.LAYERWISE, seed=options.seed)
    outcome.settings["layerwise"] = vars(s).copy()
    with Progress("layerwise refinement", n_layers * s.steps, show, "step", max_ram) as progress:
        for i, packed, tuned, result in refine.layerwise(
            work, store.tensors, s, router, norms, progress.update, original
        ):
            store.put(i, packed, refined=True)
            store.tuned |= tuned
            outcome.lines.append(f"layer {i}: error on sequences kept aside {result.before:.4g} -> {result.after:.4g}")
    if options.refine == "layerwise":
        return
    s = options.whole
    outcome.settings["whole"] = vars(s) | {"sequences": len(every.tokens)}
    if len(every.tokens) > len(work.calibration.tokens):  # a text that has more than the statistics need
        with disk.writing(work.folder / "targets"):
            (work.folder / "targets").mkdir()
        work = calibrate.Work(work.folder / "targets", work.twin, every)
        with Progress("targets", every.tokens.numel() * n_layers, show, "token", max_ram) as progress:
            calibrate.targets(work, progress.update)
    in_memory = options.refine == "end-to-end"
    with Progress(f"{options.refine} refinement", s.steps, show, "step", max_ram) as progress:
        results, result = refine.whole(
            work, store.tensors, store.tuned, s, router, norms, progress.update, in_memory, original
        )
    for i, packed, tuned in results:
        if packed is not None:
            store.put(i, packed, refined=True)
        store.tuned |= tuned
    outcome.lines.append(
        f"all layers: KL divergence on sequences kept aside {result.before:.4f} -> {result.after:.4f} nats"
    )


def _settings(options: Options, calibration, torch_version: str) -> dict:
    n, length = calibration.tokens.shape
    return {
        "calibration": calibration.sha256,
        "chat": options.chat,
        "sequences": n,
        "seq_len": length,
        "seed": options.seed,
        "recipe": options.recipe,
        "refine": options.refine,
        "bpw": options.bpw,
        "device": options.device.split(":")[0],
        "tune_router": options.tune_router,
        "tune_norms": options.tune_norms,
        "threads": options.threads,  # the order of float sums
        "torch": torch_version,
    }


# ---- one layer -------------------------------------------------------------------------------------------------------


def thin_experts(statistics) -> dict[int, int]:
    """Expert -> tokens, for experts with fewer tokens than columns."""
    counts = statistics.counts.tolist()
    cols = statistics.x.shape[1]
    return {e: n for e, n in enumerate(counts) if n < cols}


def quantize_layer(statistics, second: dict[str, int] | None = None):
    """Error propagation under the loss-weighted second moments, then all magnitudes of a row anew.

    Gate and up read the same inputs and share the mean of their weights. second: projection -> columns that get a
    second sign. Those of gate and up are the hidden channels where it pays most over all experts; the neurons of every
    expert are put in the order in which it pays for down. Returns (projection -> glas.Planes, order of the neurons
    int64 [E, ff] or None).
    """
    import torch

    from mobie_export import glas

    second, order, columns = second or {}, None, None
    if any(second.values()):
        gain = gains(statistics)
        if second.get("down"):
            order = gain["down"].argsort(dim=1, descending=True, stable=True)
            statistics.weights = reordered(statistics.weights, order)
        columns = (gain["gate"] + gain["up"]).argsort(dim=0, descending=True, stable=True)
    W, s = statistics.weights, statistics.saliency
    shared = (s["gate"] + s["up"]) / 2
    at_once = statistics.n_expert if W["gate"].is_cuda else EXPERTS_AT_ONCE
    result = {}
    # Projections with the same inputs and second columns are one matrix.
    together = [("gate", "up")] if second.get("gate", 0) == second.get("up", 0) else [("gate",), ("up",)]
    for projections in [*together, ("down",)]:
        saliency = s["down"] if projections == ("down",) else shared
        k = second.get(projections[0], 0)
        chosen = None
        if k:
            chosen = torch.arange(k, device=shared.device) if projections == ("down",) else columns[:k]
        rows = [W[p].shape[1] for p in projections]
        parts = []
        for first in range(0, statistics.n_expert, at_once):
            some = range(first, min(first + at_once, statistics.n_expert))
            H = torch.cat([statistics.second_moment(projections[0], e, saliency) for e in some])
            U = glas.inverse_factor(H)  # H is damped from here on
            weights = torch.cat([W[p][some.start : some.stop] for p in projections], 1)
            parts.append(binarize(weights, H, U, chosen))
        planes = [torch.cat(x) for x in zip(*parts, strict=True)]
        for p, x in zip(projections, zip(*(t.split(rows, 1) for t in planes), strict=True), strict=True):
            columns_of = chosen if k and p != "down" else None
            result[p] = glas.Planes(*(t.contiguous() for t in x), *([columns_of] if columns_of is not None else []))
    return result, order


def binarize(
    W,  # float32 [batch, rows, cols]
    H,  # float32 [batch, cols, cols], damped
    U,  # float32 [batch, cols, cols]: H^-1 = U^T U
    columns=None,  # int64 [k]
) -> tuple:
    """(signs, magnitudes), and those of the second plane where columns are given, as glas.Planes has them."""
    from mobie_export import glas

    planes = glas.propagate(W, U, columns)
    if columns is None:
        return planes[0], glas.refit(W, H, *planes)
    a, a2 = glas.refit(W, H, *planes, columns)
    return planes[0], a, planes[2], a2


# ---- bits where they count -------------------------------------------------------------------------------------------


def gains(statistics) -> dict:
    """How much less the loss would rise if a column had a second sign: gate and up [cols], down [E, cols].

    The estimate is Fisher's, along the diagonal of the second moments: with r the distance of |w| from the block's
    magnitude a, and a2 the mean r of the block, (r^2 - (r - a2)^2) H_jj, summed over the rows. Its unit is the same in
    all layers.
    """
    import torch

    from mobie_export.format import BLOCK_LEN

    found = {}
    for p, W in statistics.weights.items():
        each = []
        for e in range(statistics.n_expert):
            size = W[e].abs().unflatten(-1, (-1, BLOCK_LEN))
            r = (size - size.mean(-1, keepdim=True)).abs()
            a2 = r.mean(-1, keepdim=True)
            less = (r.square() - (r - a2).square()).sum(0).flatten()
            each.append(less * statistics.energy(p, e) * statistics.fisher[p])
        found[p] = torch.stack(each)
    return found | {p: found[p].sum(0) for p in ("gate", "up")}


def curve(gain, block: int) -> dict[str, list[float]]:
    """Projection -> gain of every further 64 columns, in the order `quantize_layer` takes them in."""
    hidden = (gain["gate"] + gain["up"]).argsort(dim=0, descending=True, stable=True)
    down = gain["down"].sort(dim=1, descending=True).values.sum(0)
    sums = {"gate": gain["gate"][hidden], "up": gain["up"][hidden], "down": down}
    return {p: x.unflatten(0, (-1, block)).sum(1).tolist() for p, x in sums.items()}


def allocate(
    curves: dict[int, dict[str, list[float]]],
    bits: dict[int, dict[str, int]],  # layer -> projection -> what 64 columns cost
    budget: float,
    fused: bool = False,  # gate and up are one tensor: as many columns in one as in the other
    numbers: int = 0,  # what the numbers of 64 columns cost, in a list of the layer that gate and up share
) -> dict[int, dict[str, int]]:
    """Layer -> projection -> columns with a second sign, the budget of bits going where a bit gains most.

    Gate is charged for the list. Where up has more columns that is too little; if it exceeds the budget, whoever makes
    the list longer is charged instead.
    """
    from mobie_export.format import BLOCK_LEN

    units = {}
    for i, of_layer in curves.items():
        groups = [("gate", "up"), ("down",)] if fused else [(p,) for p in of_layer]
        for g in groups:
            units[i, g] = [sum(x) for x in zip(*(of_layer[p] for p in g), strict=True)], sum(bits[i][p] for p in g)

    def spent(exact: bool) -> tuple[dict, float]:
        """(64 columns by unit, what they cost)"""
        taken = dict.fromkeys(units, 0)
        left = budget

        def cost(unit) -> int:
            i, g = unit
            longer = "gate" in g
            if exact and not fused and g != ("down",):
                other = ("up",) if longer else ("gate",)
                longer = taken[unit] >= taken[i, other]
            return units[unit][1] + (numbers if longer else 0)

        def rate(unit) -> float:
            curve = units[unit][0]
            return curve[taken[unit]] / cost(unit) if taken[unit] < len(curve) and cost(unit) <= left else -1.0

        while max(map(rate, units), default=-1.0) >= 0:
            best = max(units, key=rate)
            left -= cost(best)
            taken[best] += 1
        lists = {i: max(n for (j, g), n in taken.items() if j == i and g != ("down",)) for i in curves}
        return taken, sum(n * units[u][1] for u, n in taken.items()) + numbers * sum(lists.values())

    taken, bits_taken = spent(exact=False)
    if bits_taken > budget:
        taken, _ = spent(exact=True)
    return {i: {p: BLOCK_LEN * n for (j, g), n in taken.items() if j == i for p in g} for i in curves}


# ---- tensors for the writer ------------------------------------------------------------------------------------------


def projections(name: str) -> tuple[str, ...]:
    """Of a GGUF tensor; fused ones are gate, then up."""
    return ("gate", "up") if "gate_up" in name else (name.split("ffn_")[1].split("_exps")[0],)


def written(store: Store, name: str) -> Iterator[np.ndarray]:
    """What one GGUF tensor of a store becomes, piece by piece: blocks uint8 [rows, cols / 64 * 9] of every expert,
    scales float32 [E], then, where there is one, the second plane as the first. Both share the scale of the expert.
    """
    layer, parts = model.layer(name), projections(name)
    second = second_columns(store, name) > 0

    def joined(field_name: str) -> Iterator[np.ndarray]:
        of_experts = zip(*(store.experts(layer, p, field_name) for p in parts), strict=True)
        return (np.concatenate(x) for x in of_experts)

    def codes() -> Iterator[tuple[np.float32, np.ndarray, np.ndarray]]:
        """(scale, block scales of the first plane, of the second) of every expert."""
        for a in zip(joined("magnitudes"), *([joined("magnitudes2")] if second else []), strict=True):
            scale, both = format.encode_scales(np.concatenate(a, 1).astype(np.float64))
            n = a[0].shape[1]
            yield scale, np.ascontiguousarray(both[:, :n]), np.ascontiguousarray(both[:, n:])

    scales = []
    for signs, (scale, first, _) in zip(joined("signs"), codes(), strict=True):
        scales.append(scale)
        yield format.pack(signs, first)
    yield np.array(scales, "<f4")
    if second:
        for signs, (_, _, more) in zip(joined("signs2"), codes(), strict=True):
            yield format.pack(signs, more)


def second_columns(store: Store, name: str) -> int:
    """How many columns of a GGUF tensor have a second sign."""
    shape = store.shape(model.layer(name), projections(name)[0], "magnitudes2")
    return shape[2] * format.BLOCK_LEN if shape else 0


def columns(store: Store, layer: int) -> np.ndarray | None:
    """int32 [k]: the hidden channels with a second sign in gate or up, the most important one first."""
    found = [x.columns for x in store.get(layer, ("columns",)).values() if x.columns is not None]
    return max(found, key=len).astype(np.int32) if found else None
