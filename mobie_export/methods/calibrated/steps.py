"""The steps of the methods that read a text: from a GGUF and its tokens to packed experts, layer by layer.

    forward    the original's hidden states before every layer, to disk
    backward   from the last layer to the first: statistics
    propagate  error propagation, packed experts to disk; with bits to spare, second signs where they pay most
    refine     none, layerwise (one layer after the other), streamed (then all together by the KL divergence, one layer
               in memory at a time) or end-to-end (the same with the whole model in memory)

What they find lies in a `Store`; what is there already is not done again.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from mobie_export import __version__, disk, gguf_io
from mobie_export.calibration import bundled, chat, own_text, passes, ranks, states, text
from mobie_export.calibration.products import product_type, products
from mobie_export.calibration.saved import Statistics
from mobie_export.calibration.statistics import LayerStatistics
from mobie_export.calibration.store import Store, columns, complete, note, noted, second_columns, written
from mobie_export.calibration.text import Calibration
from mobie_export.errors import BAD_INPUT, NO_MEMORY, USAGE, MobieError
from mobie_export.methods.base import Encoded, Makers, Needs, Outcome, Rows, Run, Writing
from mobie_export.methods.calibrated import compiled, glas, refine, saving
from mobie_export.methods.calibrated.layer import quantize_layer
from mobie_export.methods.calibrated.options import (
    MIN_SAMPLES,
    TextMethod,
    context_length,
    spare_bits,
    vocabulary_bytes,
)
from mobie_export.methods.calibrated.second_signs import allocate, curve, gains
from mobie_export.models.twin import PROJECTIONS, Twin
from mobie_export.progress import available_memory, size_text, time_text
from mobie_export.runtime import loads
from mobie_export.spec import block, layout
from mobie_export.spec.block import Coding
from mobie_export.spec.layout import Experts

if TYPE_CHECKING:
    from mobie_export.methods.calibrated.method import Calibrated

NUMBERS = 32 * block.BLOCK_LEN  # bits of the numbers of 64 columns
BASE_MEMORY = 700 << 20  # torch and transformers, measured;
CUDA_MEMORY = 300 << 20  # ... what torch's build for CUDA takes more, on a machine without a card too
SAID_BY_STEPS = 2048  # bytes of mobie.settings, at most: the steps' own settings, names of tuned tensors
MIN_TOKENS = 8  # an expert that saw fewer has hardly been reached: next to all it is fitted to is its layer's prior
MAX_THIN = 0.25  # of a layer's experts that may be hardly reached


class Layer(NamedTuple):
    """What `collect` hands out."""

    number: int
    statistics: LayerStatistics
    second: dict[str, int] | None  # projection -> columns that get a second sign


@dataclass
class Workspace:
    """Where a calibration keeps what it has; everything lies in `files.folder`."""

    files: states.Work
    every: Calibration  # for the refinement of all layers together; the first sequences are those of `files`
    store: Store
    settings: dict[str, object]
    coding: Coding
    source: str  # digest of the model's bytes
    known: Statistics | None = None  # that an earlier run saved
    sensitivity: dict[int, float] | None = None  # of the layers, in nats
    targets: states.States | None = None  # that were computed here
    made: dict[str, dict[str, object]] = field(default_factory=dict)  # how these were
    outcome: Outcome = field(default_factory=Outcome)


# ---- planning --------------------------------------------------------------------------------------------------------


def sequences(method: TextMethod, gguf: gguf_io.Gguf) -> Calibration:
    """All that a calibration with these options reads. Raises MobieError.

    The first `samples` of them are for the statistics; `notes` says what a user should know.
    """
    method.check()
    notes = text.text_notes(None if method.own else method.text, method.chat)
    context = context_length(gguf)
    if method.seq_len > context:
        raise MobieError(
            USAGE, "--seq-len is longer than the model's context", str(method.seq_len), f"at most {context}"
        )
    n, known = method.all_samples, method.known
    most = max(n, refine.WHOLE.sequences(method.seq_len)) if method.save_statistics else n
    if known is not None:
        every = known.calibration(n, int(method.twin(gguf).config.vocab_size))
    elif method.text is None or method.own:
        if method.own:
            check_writer(method, gguf)
        every = bundled.load(gguf, most, method.seq_len, method.seed)
    else:
        data = text.read_text(method.text)
        if method.chat:
            data = chat.render(gguf, data)
        name = method.text_name
        every = text.load(gguf.paths[0], data, most, method.seq_len, method.seed, special=method.chat, name=name)
    if len(every.tokens) > n:
        every = replace(every, tokens=every.tokens[:n], rest=every.tokens[n:])
    has = len(every.tokens)
    if has < method.samples:
        found = f"{has} of {method.samples} sequences of {method.seq_len} tokens"
        if method.samples > text.N_SAMPLES:
            wanted = f"--samples {has}, or more text"
            raise MobieError(USAGE, f"{method.text_name} is too short for --samples {method.samples}", found, wanted)
        notes.append(f"{method.text_name} is short: it has {found}")
    return replace(every, notes=tuple(notes))


def check_writer(method: TextMethod, gguf: gguf_io.Gguf) -> None:
    """MobieError where what is to write the text is another model, or larger than the memory that is free."""
    path, size, words = gguf.paths[0], gguf.file_size, "tokenizer.ggml.tokens"
    if method.writer is not None:
        with gguf_io.open_model(method.writer) as writer:
            path, size = method.writer, writer.file_size
            if writer.get_list(words, str) != gguf.get_list(words, str):
                raise MobieError(
                    BAD_INPUT, f"--writer {path} is another model", "other tokens", f"those of {gguf.paths[0]}"
                )
    memory = available_memory()
    if memory is not None and size > memory:
        raise MobieError(
            NO_MEMORY,
            "--calibration self needs a model that fits into memory",
            f"{path}: {size_text(size)}, {size_text(memory)} are free",
            todo="name a smaller GGUF of the same model with --writer, made by llama-quantize or by an export",
        )


def written_by_itself(method: TextMethod, run: Run, folder: Path, every: Calibration) -> Calibration:
    """`every` with the model's own sequences in their places."""
    places, length = bundled.own_places(method.samples), every.tokens.shape[1]
    with run.phase("writing", len(places) * length // ranks.world(), "token") as progress:
        found = own_text.write(
            method.writer or run.source.paths[0],
            chat.opening(run.source),
            len(places),
            length,
            method.seed,
            run.computing_threads,
            folder,
            progress.update,
        )
    tokens = every.tokens.clone()
    tokens[places] = torch.from_numpy(found)
    return replace(every, tokens=tokens, sha256=text.tokens_digest(tokens))


def needs(method: TextMethod, run: Run) -> Needs:
    """MobieError where the model cannot be calibrated, or its text is none."""
    sizes(method, run)  # what is wrong with the model, before the text is read
    loads.check(run.source.paths[0], str(run.source.paths[0]))
    method.twin(run.source, method.device).prepare()
    every = sequences(method, run.source)
    found = sizes(method, run, len(every.tokens))
    _check_ranks(method, run, every)
    left = _left(run.output.parent, _decides(method, run, every.sha256))
    there = sum(map(disk.size_of, left)) * ranks.on_this_machine()
    more = saving.disk_bytes(method, run, every, left)
    return replace(found, disk=found.disk + more, disk_there=there, notes=every.notes, sequences=every)


def _check_ranks(method: TextMethod, run: Run, every: Calibration) -> None:
    """MobieError where there is not something to do for every rank at every time."""
    least = {"--samples": method.samples, "experts of a layer": min(x.n_expert for x in run.experts.values())}
    if method.whole:
        n = min(method.whole.per_step(method.seq_len), len(refine.held_out(len(every.tokens))[0]))
        least["sequences in a step of the refinement"] = n
    name = min(least, key=lambda x: least[x])
    if ranks.world() > least[name]:
        raise MobieError(
            USAGE, "there are more processes than work for them", f"{ranks.world()}", f"at most {least[name]}: {name}"
        )


def sizes(method: TextMethod, run: Run, n_sequences: float = math.inf) -> Needs:
    """What a calibration takes, in memory each of several ranks. n_sequences: that the text has, where it is known."""
    gguf, whole = run.source, method.whole
    twin, base = method.twin(gguf), BASE_MEMORY + (CUDA_MEMORY if torch.version.cuda else 0)
    n_tokens, config = method.own_samples * method.seq_len, twin.config
    weights = sum(t.n_weights for n, t in gguf.tensors.items() if "_exps." in n)
    layer = 4 * weights // twin.n_layers  # in float32
    vocabulary = vocabulary_bytes(twin)
    memory = base + method.collecting_bytes(run, twin)
    spare = spare_bits(gguf, method.bits, run.coding)
    files = method.states_bytes(twin, n_tokens, spare > 0) + _store_bytes(method, run, spare)
    if method.refines:
        memory = max(memory, base + 2 * layer)
    refining = 0
    if whole is not None:
        if not method.targets_known:  # the text that the statistics do not need: two boundaries at a time
            more = int(min(whole.sequences(method.seq_len), n_sequences)) // ranks.world()
            files += 2 * 2 * more * method.seq_len * twin.width
        # latent weights, gradients, Adam's two moments in half the bytes
        tuned = 3 * layer if whole.free_signs else layer // 8
        k, ff = config.num_experts_per_tok, max(x.cols for n, x in run.experts.items() if layout.is_down(n))
        # what a step computes in a layer and needs for its gradient
        passing = 4 * whole.batch_tokens * (k * 4 * (ff + twin.width) + 10 * twin.width)
        between = 4 * whole.batch_tokens * twin.width * twin.n_layers
        if method.refinement == "streamed":
            refining = base + layer + tuned + passing + between + vocabulary
        elif method.refinement == "magnitudes":
            # signs of a layer as they come from the disk; signs; magnitudes and their moments
            refining = base + layer // 2 + weights // 8 + 8 * (weights // 64) + passing + between + vocabulary
        else:
            refining = base + layer + (tuned + passing) * twin.n_layers + vocabulary
        # states, without the gradients: the newest, the best, and one that is written or worked on
        files += 3 * (2 * layer if whole.free_signs else tuned) * twin.n_layers
    more_files, beside = method.more_needs(run)
    return Needs(
        memory=max(memory, refining),
        base=base,
        disk=(files + more_files) * ranks.on_this_machine(),
        spare=int(spare) // 8,
        said=_said_later(method, run, twin),
        tuned=tuple(_tuned_names(twin, method)),
        beside=beside,
    )


def _store_bytes(method: TextMethod, run: Run, spare: float) -> int:
    """What the store takes: of every plane signs and magnitudes in float32, and the neurons' order where it may be
    another. What a refinement makes lies beside it."""
    weights, coding = sum(x.n_weights for x in run.experts.values()), run.coding
    both = weights + spare * coding.length / (8 * coding.block_bytes)
    neurons = sum(x.n_expert * x.cols for n, x in run.experts.items() if layout.is_down(n))
    order = 8 * neurons if spare > 0 else 0
    planes = both * (1 / 8 + 4 / coding.length)
    return int(planes * (2 if method.refines else 1)) + order


def _said_later(method: TextMethod, run: Run, twin: Twin) -> int:
    """Bytes of mobie.settings that only the calibration decides, at most: thin experts, columns with a second sign."""
    experts = dict.fromkeys(range(max(x.n_expert for x in run.experts.values())), method.samples * method.seq_len)
    widths = dict.fromkeys(PROJECTIONS, max(x.cols for x in run.experts.values()))
    layers = range(twin.n_layers)
    return len(json.dumps([dict.fromkeys(layers, experts), dict.fromkeys(layers, widths)])) + SAID_BY_STEPS


def _tuned_names(twin: Twin, method: TextMethod) -> list[str]:
    if not method.refines:
        return []
    router, norms = method.tunes
    return [
        twin.tensor_name(i, p)
        for i in range(twin.n_layers)
        for p in refine.beside(twin, i, router, norms, method.refinement != "layerwise")
    ]


def smaller(method: TextMethod, run: Run) -> str:
    """What to do about a calibration that needs too much memory."""
    samples = method.samples
    while samples > MIN_SAMPLES and run.max_ram is not None:
        samples //= 2
        if sizes(replace(method, samples=samples), run).memory <= run.max_ram:
            return f"calibrate with --samples {samples}, which fits"
    return "allow more, or export with --method sign, which needs next to nothing"


def _decides(method: TextMethod, run: Run, sha256: str) -> str:
    """A digest of all that decides what a calibration computes, but for the weights: `_contents`. Every rank's is its
    own."""
    options = vars(method) | {"text": sha256, "method": method.name, "threads": run.computing_threads}
    models = {name: True for name, value in options.items() if value in method.models}  # by content: `_contents`
    options |= models
    if ranks.world() > 1:
        options["ranks"] = [ranks.rank(), ranks.world()]
    options["type"] = run.coding.option
    options |= {"products": product_type(method.device), "loops": compiled.name(method.device)}
    options |= {"own": method.own, "statistics": method.known and method.known.digest}
    for name in ("allow_thin", "save_statistics"):  # decide whether an export goes on, and what else it writes
        del options[name]
    return disk.digest(__version__, torch.__version__, run.source.sha256, options)


def _contents(method: TextMethod, run: Run) -> list[str]:
    """Digests of the source's bytes, and of those of further models that it reads."""
    with contextlib.ExitStack() as opened:
        models = [run.source, *(opened.enter_context(gguf_io.open_model(path)) for path in method.models)]
        total = sum(t.n_bytes for gguf in models for t in gguf.tensors.values())
        with run.phase("digest of the source", total) as progress:
            return [gguf.content(progress.update) for gguf in models]


def _left(folder: Path, decides: str) -> list[Path]:
    """Work folders that runs of this calibration have left there."""
    return list(Path(folder).glob(f".mobie-{disk.WORK}-{decides}-*"))


@contextmanager
def workspace(method: TextMethod, run: Run) -> Iterator[Workspace]:
    """A folder for the time of the calibration and of the writing of its output, on the output's disk.

    Its name is a digest of all that decides what comes into it, every weight included, also of a model that writes the
    text, so that a run that did not finish is continued by the same command, and by no other; of the text, what is
    calibrated on, chat template applied: one may write the date. MobieError when such a run is still going on.
    """
    gguf, every = run.source, run.needs.sequences
    assert isinstance(every, Calibration)
    contents, known = _contents(method, run), method.known
    if known is not None and known.about.source != contents[0]:
        raise MobieError(
            BAD_INPUT,
            f"the statistics {known.path} are of another model",
            f"content {known.about.source[:80]}",
            f"{contents[0]}, {gguf.paths[0]}",
            "leave --statistics out, and save others",
        )
    content = disk.digest(*contents)
    _check_same(method, every, content)
    name = f".mobie-{disk.WORK}-{_decides(method, run, every.sha256)}-{content}"
    about = f"calibration of {gguf.paths[0].name}"
    if ranks.world() > 1:
        about += f", rank {ranks.rank()} of {ranks.world()}"
    with (
        disk.private(run.output.parent / name, about, "the same calibration is running already", keep=True) as folder,
        products(method.device),
        contextlib.closing(method.twin(gguf, ranks.device(method.device))) as twin,
    ):
        torch.set_num_threads(run.computing_threads)
        torch.manual_seed(method.seed)
        twin.prepare()
        if not disk.complete_files(folder):
            _check_weights(run, twin)
        if method.own:
            every = written_by_itself(method, run, folder, every)
        files = states.Work(folder, twin, replace(every, tokens=every.tokens[: method.samples]))
        for note in every.notes if ranks.first() else ():
            print(f"mobie-export: warning: {note}", file=sys.stderr)
        settings, store = _settings(method, files.every, run.computing_threads), Store(folder)
        work = Workspace(files, every, store, settings, run.coding, contents[0], known)
        work.outcome.lines += every.notes
        if known is not None:
            work.sensitivity, work.made = known.sensitivity, dict(known.about.made)
        yield work


def _check_same(method: TextMethod, every: Calibration, content: str) -> None:
    """MobieError where the ranks are not about the same calibration."""
    statistics = method.known.digest if method.known else "none"
    found = ranks.of_all((__version__, torch.__version__, content, every.sha256, statistics, repr(method)))
    named = ("version of mobie-export", "version of torch", "weights", "text", "statistics", "options")
    for name, *values in zip(named, *found, strict=True):
        if len(set(values)) > 1:
            shown = "; ".join(f"rank {r}: {value}" for r, value in enumerate(values))
            raise MobieError(BAD_INPUT, f"the processes do not have the same {name}", shown, "the same everywhere")


def _check_weights(run: Run, twin: Twin) -> None:
    """MobieError for weights that are no numbers: what is wrong with the last layer would be said hours later."""
    tensors = run.source.tensors
    with run.phase("check of the weights", sum(t.n_bytes for t in tensors.values())) as progress:
        for name, tensor in tensors.items():
            twin.check_numbers(name)
            progress.update(tensor.n_bytes, name)


def _settings(method: TextMethod, calibration: Calibration, threads: int) -> dict[str, object]:
    """For mobie.settings: everything with an influence on the bytes."""
    n, length = calibration.tokens.shape
    settings: dict[str, object] = {
        "calibration": calibration.sha256,
        "chat": method.known.about.chat if method.known else method.chat,
        "sequences": n,
        "seq_len": length,
        "seed": method.seed,
        "recipe": None if method.name == "calibrated" else method.name,
        "refine": method.refinement,
        "bpw": method.bits,
        "device": method.device.split(":")[0],
        "tune_router": method.tunes[0],
        "tune_norms": method.tunes[1],
        "threads": threads,  # the order of float sums
        "products": product_type(method.device),
        "loops": compiled.name(method.device),
        "torch": torch.__version__,
    }
    if ranks.world() > 1:
        settings["ranks"] = ranks.world()  # of these, too
    return settings | method.more_settings()


# ---- statistics ------------------------------------------------------------------------------------------------------


def collect(method: TextMethod, run: Run, work: Workspace) -> Iterator[Layer]:
    """Forward and backward: statistics of the layers that the store has not yet.

    With bits to spare the layers share them: all statistics wait on the disk until all gains are known.
    """
    gguf, files, store = run.source, work.files, work.store
    twin, n_tokens, spare = files.twin, files.calibration.tokens.numel(), spare_bits(gguf, method.bits, run.coding)
    if method.whole is None:
        saving.save(method, run, work)
    notes = files.folder / "noted.json"  # of every layer that is done: thin experts, curves
    thin, curves = noted(notes, 2)
    waiting = str(files.folder / "statistics-{}.pt")

    def done(i: int) -> bool:
        return store.has(i) or (i in curves and Path(waiting.format(i)).exists())

    with run.phase("forward", n_tokens * twin.n_layers, "token") as progress:
        passes.forward(files, progress.update)
    with run.phase("backward", 2 * n_tokens * twin.n_layers, "token") as progress:
        for i, statistics in method.backward(files, progress.update, done):
            check_reached(method, i, statistics)
            thin[i] = thin_experts(statistics)
            if spare > 0:
                curves[i] = curve(gains(statistics), block.BLOCK_LEN)
                if statistics.biases:  # they would have to follow the neurons into down's order; they are copied
                    curves[i]["down"] = []
                with complete(Path(waiting.format(i))) as file:
                    statistics.save(file)
                note(notes, thin, curves)
            else:
                note(notes, thin, curves)  # before the layer counts as done
                yield Layer(i, statistics, None)
            progress.update(n_tokens, f"layer {i}")
    work.outcome.thin = {i: thin[i] for i in sorted(thin) if thin[i]}
    if not curves:
        return
    second = _second(gguf, twin, curves, spare)
    work.settings["second"] = {str(i): second[i] for i in sorted(second)}
    with run.phase("error propagation", len(curves), "layer") as progress:
        for i in sorted(curves):
            path = Path(waiting.format(i))
            if not store.has(i):
                yield Layer(i, LayerStatistics.load(path, twin, i), second[i])
            path.unlink(missing_ok=True)
            progress.update(1, f"layer {i}")
            if any(second[i].values()):
                wide = ", ".join(f"{p} {k}" for p, k in second[i].items())
                work.outcome.lines.append(f"layer {i}: columns with a second sign: {wide}")


def _second(
    gguf: gguf_io.Gguf, twin: Twin, curves: dict[int, dict[str, list[float]]], spare: float
) -> dict[int, dict[str, int]]:
    """Layer -> projection -> columns with a second sign."""
    fused = any("gate_up" in n for n in gguf.tensors)
    names = {i: twin.expert_names(i) for i in curves}
    experts = layout.experts(gguf)

    def cost(i: int, p: str) -> int:  # 72 bits for 64 signs of a row and their magnitude
        item = experts[names[i][p][0]]
        rows = item.rows // 2 if fused and p != "down" else item.rows
        return item.n_expert * rows * 8 * block.BLOCK_BYTES

    return allocate(curves, {i: {p: cost(i, p) for p in curves[i]} for i in curves}, spare, fused, NUMBERS)


def thin_experts(statistics: LayerStatistics) -> dict[int, int]:
    """Expert -> tokens, for experts with fewer tokens than columns."""
    counts = statistics.counts.tolist()
    cols = statistics.x.shape[1]
    return {e: n for e, n in enumerate(counts) if n < cols}


def check_reached(method: TextMethod, layer: int, statistics: LayerStatistics) -> None:
    """MobieError where the text hardly reaches too many of a layer's experts, unless the user allows it."""
    counts = sorted(statistics.counts.tolist())
    few, most = sum(n < MIN_TOKENS for n in counts), int(MAX_THIN * len(counts))
    if few <= most or method.allow_thin:
        return
    # so much text that all but so many experts would see enough, were it like this one
    samples = math.ceil(method.samples * MIN_TOKENS / max(counts[most], 1))
    raise MobieError(
        BAD_INPUT,
        "the calibration text hardly reaches the experts of a layer",
        f"layer {layer}: {few} of {len(counts)} experts saw fewer than {MIN_TOKENS} tokens",
        f"at most {most} of them",
        f"calibrate with --samples {samples}, or on other text; --allow-thin goes on from here, and those experts are "
        "fitted to what the others of their layer see",
    )


# ---- signs and refinement --------------------------------------------------------------------------------------------


def propagate(work: Workspace, layer: Layer) -> None:
    with numbers(layer.number):
        work.store.put(layer.number, *quantize_layer(layer.statistics, layer.second, work.coding))


@contextmanager
def numbers(layer: int) -> Iterator[None]:
    """Second moments that cannot be worked with, as an error that names the layer."""
    try:
        yield
    except (glas.NotFactorized, torch.linalg.LinAlgError) as e:
        raise states.overflow(f"second moments of what the experts of layer {layer} read ({e})") from e


def refine_layers(method: "Calibrated", run: Run, work: Workspace) -> None:
    """Layer by layer, then all layers together, as the method asks for."""
    started = time.perf_counter()
    files, store, router, norms = work.files, work.store, method.tune_router, method.tune_norms
    n_layers, lines = files.twin.n_layers, work.outcome.lines

    def original(i: int) -> dict[str, torch.Tensor]:
        return store.original(files.twin, i)

    s = replace(refine.LAYERWISE, seed=method.seed)
    work.settings["layerwise"] = vars(s).copy()
    notes = files.folder / "layerwise.json"  # of the layers that are done
    (said,) = noted(notes, 1)
    with run.phase("layerwise refinement", n_layers * s.steps, "step") as progress:
        done = refine.layers_done(files)
        for i in (i for i in range(done) if files.twin.has_experts(i)):
            store.take_refined(i, "layerwise")
            progress.update(s.steps, f"layer {i}, done before")
        for i, packed, tuned, result in refine.layerwise(
            files, store.tensors, s, router, norms, progress.update, original, work.coding
        ):
            said[i] = f"layer {i}: error on sequences kept aside {result.before:.4g} -> {result.after:.4g}"
            note(notes, said)
            store.put_refined(i, "layerwise", packed, tuned)
    lines += [said[i] for i in sorted(said)]
    if method.whole is not None:
        refine_together(method, run, work)
    lines.append(f"refinement took {time_text(time.perf_counter() - started)}")


def targets(method: TextMethod, run: Run, work: Workspace) -> states.Work:
    """Files with the original's hidden states behind the last layer, of all of the text: from the steps before or from
    the statistics of an earlier run; computed where neither has all."""
    files, every, last = work.files, work.every, work.files.twin.n_layers
    if last not in files.hidden or len(every.tokens) > len(files.every.tokens):
        with disk.writing(files.folder / "targets"):
            (files.folder / "targets").mkdir(exist_ok=True)
        files = states.Work(files.folder / "targets", files.twin, every)
        n, at_once = len(every.tokens), max(1, text.BATCH_TOKENS // every.tokens.shape[1])
        here = saving.made(method, run, sequences=n)
        if work.known is not None and method.targets_known:
            with run.phase("check of the statistics", work.known.tensors["targets"].n_bytes) as progress:
                work.known.check_bytes("targets", progress.update)
            files.hidden[last] = work.known.targets(files.shape, files.own.start, files.twin.device)
            if n % at_once == 0:  # sums of a batch depend on nothing but what is in it
                here["sequences"] = work.made["targets"].get("sequences")
            saving.taken(work, "targets", here)
        else:
            with run.phase("targets", files.calibration.tokens.numel() * last, "token") as progress:
                passes.targets(files, progress.update)
            work.targets, work.made["targets"] = files.hidden[last], here
    saving.save(method, run, work)
    return files


def refine_together(method: TextMethod, run: Run, work: Workspace) -> None:
    """All layers together, by the divergence."""
    files, store, every, s = work.files, work.store, work.every, method.whole
    assert s is not None
    router, norms = method.tunes
    work.settings["whole"] = vars(s) | {"sequences": len(every.tokens)}
    files = targets(method, run, work)
    with run.phase(f"{method.refinement} refinement", s.steps, "step") as progress:
        results, result = refine.whole(
            files,
            store.tensors,
            store.tuned,
            s,
            router,
            norms,
            progress.update,
            method.refinement,
            lambda i: store.original(work.files.twin, i),
            work.coding,
        )
    for i, packed, tuned in results:
        store.put_refined(i, "together", packed, tuned)
    work.outcome.lines.append(
        f"all layers: KL divergence on sequences kept aside {result.before:.4f} -> {result.after:.4f} nats"
    )


# ---- for the writer --------------------------------------------------------------------------------------------------


def encoded(work: Workspace, writing: Writing) -> Encoded:
    store = work.store
    experts = {n: x for n, x in writing.run.experts.items() if store.has(layout.layer_of(n))}
    work.settings["tuned"] = sorted({name.split(".", 2)[2] for name in store.tuned})
    if work.outcome.thin:
        thin = work.outcome.thin.items()
        work.settings["thin"] = {str(i): {str(e): n for e, n in experts.items()} for i, experts in thin}
    return Encoded(_makers(experts, store, writing), _beside(experts, store), work.settings, work.outcome)


def _beside(experts: dict[str, Experts], store: Store) -> Rows:
    rows = {name: (shape, kind) for name, shape, kind in store.factors()}
    for name, item in experts.items():
        k = second_columns(store, name)
        if k:
            rows[layout.residual_name(name)] = (k, item.rows, item.n_expert), block.TYPE_ID
            chosen = columns(store, layout.layer_of(name))
            if chosen is not None:
                rows[layout.columns_name(name)] = (len(chosen),), gguf_io.TYPE_I32
    return [(name, *row) for name, row in rows.items()]


def _makers(experts: dict[str, Experts], store: Store, writing: Writing) -> Makers:
    makers: Makers = {n: (1, partial(list, [values])) for n, values in store.tuned.items()}
    makers |= {n: (1, partial(_factor, store, n)) for n, *_ in store.factors()}
    for name, item in experts.items():
        n = 3 if second_columns(store, name) else 1 if writing.run.coding.stock else 2
        makers[name] = n, partial(_planes, store, item, writing)
        makers[layout.columns_name(name)] = 1, partial(_columns, store, name)
    return makers


def _planes(store: Store, item: Experts, writing: Writing) -> Iterator[np.ndarray]:
    """Blocks, scales and the second plane's blocks of one expert tensor, where the type has such."""
    name = item.tensor.name
    for piece in written(store, name, writing.run.coding):
        yield piece
        writing.progress.update(0, name)
    writing.progress.update(item.tensor.n_bytes, name)


def _factor(store: Store, name: str) -> list[np.ndarray]:
    return [store.factor(name)]


def _columns(store: Store, name: str) -> list[np.ndarray]:
    found = columns(store, layout.layer_of(name))
    return [] if found is None else [found]
