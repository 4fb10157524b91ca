"""The calibrated method: from a GGUF and a text to packed experts, layer by layer, and tuned routers and norms.

    forward    the original's hidden states before every layer, to disk
    backward   from the last layer to the first: statistics, error propagation, packed experts to disk
    refine     none, streamed (one layer after the other) or end-to-end (the whole model in memory)

The result lies in a `Store`, from which the pipeline takes tensors when it writes them.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mobie_export import __version__, format, gguf_io, model
from mobie_export.errors import BAD_OUTPUT, NO_MEMORY, NO_SPACE, MobieError
from mobie_export.gguf_io import Gguf
from mobie_export.progress import Progress, peak_memory, size_text, time_text

REFINEMENTS = ("none", "streamed", "end-to-end")
BASE_MEMORY = 700 << 20  # torch and transformers
EXPERTS_AT_ONCE = 4  # of one projection, in error propagation: their blocks stay in the cache


@dataclass(frozen=True)
class Options:
    """What a calibration can be asked for. `text`: a file, or None for the package's own."""

    text: Path | None = None
    chat: bool = False  # the text is dialogues, to be wrapped in the model's template
    samples: int = 1024
    seq_len: int = 256
    seed: int = 0
    recipe: str | None = None  # "paper": MoBiE as published, as far as the file can hold it; None: our own
    refine: str = "streamed"
    tune_router: bool = True
    tune_norms: bool = True
    max_ram: int | None = None  # bytes that may be resident at most
    threads: int = 2

    def __post_init__(self):
        if self.recipe:  # which has none
            object.__setattr__(self, "refine", "none")

    @property
    def method(self) -> str:  # as mobie.method has it
        if self.recipe:
            return self.recipe
        return "glas" if self.refine == "none" else f"glas+{self.refine}"


def check_memory(options: Options) -> None:
    """MobieError when more was resident than the options allow: a promise to whatever else runs on the machine."""
    peak = peak_memory()
    if options.max_ram is not None and peak is not None and peak > options.max_ram:
        raise MobieError(
            NO_MEMORY,
            "the calibration took more memory than --max-ram allows",
            size_text(peak),
            size_text(options.max_ram),
            "allow more, or calibrate with fewer --samples",
        )


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

    @property
    def factors(self) -> list[str]:
        """GGUF names of the factors that the experts of a layer share."""
        return sorted(p.name.removesuffix(".npy") for p in self.folder.glob("blk.*.npy"))

    def put_factor(self, name: str, rows: np.ndarray) -> None:
        """The bytes of a shared factor, uint8 [rows, bytes of a row]."""
        with complete(self.folder / f"{name}.npy") as file:
            np.save(file, rows)

    def factor(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy")

    def put(self, layer: int, packed, refined: bool = False) -> None:
        arrays = {}
        for projection, (signs, magnitudes) in packed.items():
            arrays[f"{projection}-signs"] = np.packbits(signs.numpy(), axis=-1)
            arrays[f"{projection}-magnitudes"] = magnitudes.float().numpy()
        if refined:
            self.refined.add(layer)
        with complete(self._path(layer)) as file:
            np.savez(file, **arrays)

    def has(self, layer: int) -> bool:
        return self._path(layer).exists()

    def get(self, layer: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Projection -> (signs bool [E, rows, cols], magnitudes float32 [E, rows, cols / 64])."""
        with np.load(self._path(layer)) as arrays:
            names = dict.fromkeys(n.split("-")[0] for n in arrays.files)
            return {
                p: (np.unpackbits(arrays[f"{p}-signs"], axis=-1).view(np.bool_), arrays[f"{p}-magnitudes"])
                for p in names
            }

    def tensors(self, layer: int):
        """The same as torch tensors."""
        import torch

        return {p: tuple(map(torch.from_numpy, pair)) for p, pair in self.get(layer).items()}

    def _path(self, layer: int) -> Path:
        return self.folder / f"{'refined-' if layer in self.refined else ''}layer-{layer}.npz"


@contextmanager
def complete(path: Path) -> Iterator[BinaryIO]:
    """A file to write that has its name when it is complete and on the disk."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


@dataclass(frozen=True)
class Needs:
    """What a calibration will change and take. Sizes in bytes, upper estimates."""

    tuned: list[str]  # GGUF names of the tensors beside the experts that get other values
    disk: int
    memory: int
    factors: list[tuple[str, tuple[int, ...], int]] = field(default_factory=list)  # name, shape, type of shared ones


def needs(gguf: Gguf, options: Options) -> Needs:
    """MobieError where the model cannot be calibrated or a package is missing."""
    from mobie_export.calibrate import disk_bytes
    from mobie_export.twin import Twin

    twin = Twin(gguf)
    n_tokens, config = options.samples * options.seq_len, twin.config
    weights = sum(t.n_weights for n, t in gguf.tensors.items() if "_exps." in n)
    layer = 4 * weights // twin.n_layers  # in float32
    vocabulary = 2 * 4 * config.vocab_size * twin.width
    statistics = 4 * n_tokens * (twin.width + 8 * config.num_experts_per_tok) + layer // 2
    memory = BASE_MEMORY + layer + max(vocabulary, statistics)
    if options.refine == "streamed":  # latent weights, the best ones so far, gradients, Adam's two moments
        memory = max(memory, BASE_MEMORY + 6 * layer)
    if options.refine == "end-to-end":
        memory = max(memory, BASE_MEMORY + 6 * layer * twin.n_layers + 2 * vocabulary)
    disk = disk_bytes(twin.n_layers, n_tokens, twin.width) + weights * 3 // 16
    factors = []
    if options.recipe:
        from mobie_export import recipe

        factors = recipe.factor_rows(twin)
        disk += sum(gguf_io.tensor_bytes(shape, kind) for _, shape, kind in factors)
        memory += 2 * layer + 4 * n_tokens * twin.width  # weights and inputs in the factors' basis
    return Needs(_tuned_names(twin, options), disk, memory, factors)


def _tuned_names(twin, options: Options) -> list[str]:
    if options.refine == "none":
        return []
    arch = twin.arch
    parameters = [arch.router] if options.tune_router else []
    if options.tune_norms:
        parameters += [arch.norm] if options.refine == "streamed" else [n for n in arch.tensors if "norm" in n]
    return [twin.tensor_name(i, p) for i in range(twin.n_layers) for p in parameters]


@contextmanager
def work_folder(beside: Path, gguf: Gguf, options: Options) -> Iterator[Path]:
    """A folder for the time of the calibration, on the output's disk.

    Its name is a digest of all that decides what comes into it, so that a run that was killed is continued by the same
    command, and by no other. MobieError when such a run is still going on.
    """
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in gguf.paths]
    text = options.text and hashlib.sha256(Path(options.text).read_bytes()).hexdigest()
    decides = [__version__, gguf.sha256, files, vars(options) | {"text": text, "max_ram": None}]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()
    folder = Path(beside) / f".mobie-work-{digest[:16]}"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        if not _locked(lock):
            raise MobieError(
                BAD_OUTPUT,
                "the same calibration is running already",
                f"{folder} is in use",
                todo="wait for it, or write into another folder with -o",
            )
        try:
            yield folder
        finally:  # of a run that was killed it stays
            shutil.rmtree(folder, ignore_errors=True)


def _locked(file) -> bool:
    """Whether the file is this process's now; where the system has no such locks it always is."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def run(gguf: Gguf, options: Options, folder: Path, show: bool) -> tuple[Store, Outcome]:
    """Calibrate a model; everything it leaves is in `folder`. Raises MobieError."""
    import torch

    from mobie_export import calibrate, chat, recipe
    from mobie_export.twin import Twin

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    twin = Twin(gguf)
    text = calibrate.read_text(options.text)
    if options.chat:
        text = chat.render(gguf, text)
    calibration = calibrate.load(
        gguf.paths[0], text, options.samples, options.seq_len, options.seed, special=options.chat
    )
    work = calibrate.Work(folder, twin, calibration)
    store, settings = Store(folder), _settings(options, calibration, torch.__version__)
    if options.recipe:
        settings[options.recipe] = vars(recipe.PAPER).copy()
    outcome = Outcome(settings)
    n_tokens = calibration.tokens.numel()
    thin = _thin_before(folder / "thin.json")
    try:
        with Progress("forward", n_tokens * twin.n_layers, show, unit="token") as progress:
            calibrate.forward(work, progress.update)
        with Progress("backward", 2 * n_tokens * twin.n_layers, show, unit="token") as progress:
            walk = (recipe if options.recipe else calibrate).backward(work, progress.update, done=store.has)
            for i, statistics in walk:
                thin[i] = thin_experts(statistics)
                with complete(folder / "thin.json") as file:
                    file.write(json.dumps(thin).encode())
                if options.recipe:
                    recipe.put_layer(store, i, statistics)
                else:
                    store.put(i, quantize_layer(statistics))
                progress.update(n_tokens, f"layer {i}, error propagation")
                check_memory(options)
        outcome.thin = {i: thin[i] for i in sorted(thin) if thin[i]}
        if options.refine != "none":
            started = time.perf_counter()
            _refine(work, store, options, outcome, show)
            outcome.lines.append(f"refinement took {time_text(time.perf_counter() - started)}")
        check_memory(options)
        outcome.settings["tuned"] = sorted({name.split(".", 2)[2] for name in store.tuned})
    except OSError as e:
        raise MobieError(
            NO_SPACE, f"cannot work in {folder}", str(e), f"{size_text(needs(gguf, options).disk)} of disk"
        ) from e
    return store, outcome


def _refine(work, store: Store, options: Options, outcome: Outcome, show: bool) -> None:
    from mobie_export import refine

    router, norms, n_layers = options.tune_router, options.tune_norms, work.twin.n_layers
    s = replace(refine.STREAMED, seed=options.seed)
    outcome.settings["streamed"] = vars(s).copy()
    with Progress("streamed refinement", n_layers * s.steps, show, unit="step") as progress:
        for i, packed, tuned, result in refine.streamed(work, store.tensors, s, router, norms, step=progress.update):
            store.put(i, packed, refined=True)
            store.tuned |= tuned
            outcome.lines.append(f"layer {i}: error on sequences kept aside {result.before:.4g} -> {result.after:.4g}")
    if options.refine == "end-to-end":
        s = replace(refine.END_TO_END, seed=options.seed)
        outcome.settings["end_to_end"] = vars(s).copy()
        with Progress("end-to-end refinement", s.steps, show, unit="step") as progress:
            packed, store.tuned, result = refine.end_to_end(
                work, store.tensors, store.tuned, s, router, norms, step=progress.update
            )
        for i, layer in enumerate(packed):
            store.put(i, layer, refined=True)
        outcome.lines.append(
            f"end to end: KL divergence on sequences kept aside {result.before:.4f} -> {result.after:.4f} nats"
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
        "tune_router": options.tune_router,
        "tune_norms": options.tune_norms,
        "threads": options.threads,  # the order of float sums
        "torch": torch_version,
    }


def _thin_before(path: Path) -> dict[int, dict[int, int]]:
    """What `thin_experts` said of the layers that an earlier run did."""
    if not path.exists():
        return {}
    found = json.loads(path.read_bytes())
    return {int(i): {int(e): n for e, n in experts.items()} for i, experts in found.items()}


# ---- one layer -------------------------------------------------------------------------------------------------------


def thin_experts(statistics) -> dict[int, int]:
    """Expert -> tokens, for experts with fewer tokens than columns."""
    counts = statistics.counts.tolist()
    cols = statistics.x.shape[1]
    return {e: n for e, n in enumerate(counts) if n < cols}


def quantize_layer(statistics):
    """Error propagation under the loss-weighted second moments, then all magnitudes of a row anew.

    Gate and up read the same inputs and share the mean of their weights. Returns projection -> (signs bool
    [E, rows, cols], magnitudes float32 [E, rows, cols / 64]).
    """
    import torch

    from mobie_export import glas

    W, s = statistics.weights, statistics.saliency
    shared = (s["gate"] + s["up"]) / 2
    result = {}
    for projections, saliency in ((("gate", "up"), shared), (("down",), s["down"])):
        rows = [W[p].shape[1] for p in projections]
        signs, magnitudes = [], []
        for first in range(0, statistics.n_expert, EXPERTS_AT_ONCE):
            some = range(first, min(first + EXPERTS_AT_ONCE, statistics.n_expert))
            H = torch.cat([statistics.second_moment(projections[0], e, saliency) for e in some])
            U = glas.inverse_factor(H)  # H is damped from here on
            weights = torch.cat([W[p][some.start : some.stop] for p in projections], 1)
            b, a = glas.propagate(weights, U)
            signs.append(b)
            magnitudes.append(glas.refit(weights, H, b, a))
        for p, b, a in zip(
            projections, torch.cat(signs).split(rows, 1), torch.cat(magnitudes).split(rows, 1), strict=True
        ):
            result[p] = b.contiguous(), a.contiguous()
    return result


# ---- tensors for the writer ------------------------------------------------------------------------------------------


def blocks(gguf: Gguf, store: Store, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(blocks uint8 [E, rows, cols / 64 * 9], scales float32 [E]) of one GGUF tensor; fused ones are gate, then up."""
    packed = store.get(model.layer(name))
    projections = ("gate", "up") if "gate_up" in name else (name.split("ffn_")[1].split("_exps")[0],)
    signs = np.concatenate([packed[p][0] for p in projections], 1)
    magnitudes = np.concatenate([packed[p][1] for p in projections], 1).astype(np.float64)
    made, scales = [], np.empty(len(signs), "<f4")
    for e in range(len(signs)):
        scales[e], codes = format.encode_scales(magnitudes[e])
        made.append(format.pack(signs[e], codes))
    return np.stack(made), scales
