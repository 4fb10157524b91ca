"""Methods that read a text: their common options, and what can be said of them without torch.

Torch is imported by the functions that compute (steps.py): options, plans and `--help` need none of it.
"""

import importlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mobie_export import gguf_io
from mobie_export.calibration import ranks, saved
from mobie_export.calibration.saved import Statistics
from mobie_export.errors import BAD_INPUT, UNSUPPORTED, USAGE, MobieError
from mobie_export.gguf_io import Gguf
from mobie_export.methods.base import Encoded, Method, Needs, Row, Run, Writing, option
from mobie_export.spec import block, layout
from mobie_export.spec.block import Coding

if TYPE_CHECKING:
    from mobie_export.calibration.states import Work
    from mobie_export.calibration.statistics import LayerStatistics
    from mobie_export.methods.calibrated import estimate
    from mobie_export.methods.calibrated.refine import Settings
    from mobie_export.methods.calibrated.steps import Layer, Workspace
    from mobie_export.models.twin import Twin

PACKAGES = ("torch", "transformers")
# Least and most of an option; what a model or a text allows is checked with it. A target needs a token before it.
BOUNDS = {
    "samples": (1, math.inf),
    "seq_len": (2, math.inf),
    "steps": (1, 1_000_000),
    "descents": (1, 1000),
    "seed": (0, 2**63 - 1),
}
DEVICE = re.compile(r"cpu|cuda(:\d{1,4})?")
PRESETS: dict[str, float] = {"small": 1.13, "medium": 1.25, "large": 1.5}  # stored bits per expert weight
SELF = Path("self")  # as a text
MIN_SAMPLES = 64  # fewer are advised to nobody
DESCENTS = 8  # sweeps over all signs: docs/measured/real-weights.md


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(f"{text} is not a positive number")
    return value


@dataclass(frozen=True)
class TextMethod(Method):
    """text: a file, or None for the package's own. MobieError for options that make no sense with any model and text.

    A method of this kind says in `encode` what it does with a layer's statistics.
    """

    groups: ClassVar[int] = 1  # of output channels whose squared gradients are averaged

    text: Path | None = option(
        None,
        "--calibration",
        "text, or text.xz (default: a bundled one); self: two sequences of three are written by the model itself",
        metavar="FILE",
        parse=Path,
    )
    writer: Path | None = option(
        None,
        "--writer",
        "a smaller GGUF of the same model that writes the text of --calibration self (default: the source)",
        metavar="FILE",
        parse=Path,
    )
    chat: bool = option(
        False,
        "--chat",
        "the text of --calibration is dialogues, a JSON object with messages per line; wrap them in the model's chat "
        "template",
        const=True,
    )
    samples: int = option(
        1024, "--samples", "sequences of the text (default: 1024; of ordered 256)", metavar="N", parse=positive
    )
    seq_len: int = option(256, "--seq-len", "tokens in each (default: 256)", metavar="N", parse=positive)
    seed: int = option(0, "--seed", "of their order (default: 0)", metavar="N", parse=int)
    device: str = option(
        "cpu", "--device", "where torch computes: cpu (default), cuda, cuda:1", metavar="NAME", parse=str
    )
    statistics: Path | None = option(
        None,
        "--statistics",
        "of the same model, saved by an earlier run: with its text, and without the passes that are in it",
        metavar="FILE",
        parse=Path,
    )
    save_statistics: Path | None = option(
        None,
        saved.OPTION,
        "write the text, and what of the calibration holds for every size and type, for --statistics",
        metavar="FILE",
        parse=Path,
    )
    allow_thin: bool = option(
        False,
        "--allow-thin",
        "go on where the text hardly reaches more than a quarter of a layer's experts",
        const=True,
    )

    def __post_init__(self) -> None:
        if known := self.known:
            self._take(known)
        for name, (least, most) in BOUNDS.items():
            value, flag = getattr(self, name, None), "--" + name.replace("_", "-")
            if value is not None and not least <= value <= most:
                wanted = f"at least {least}" + ("" if most == math.inf else f", at most {most}")
                raise MobieError(USAGE, f"{flag} is out of range", str(value), wanted)
        if self.bits is not None and not (math.isfinite(self.bits) and self.bits > 0):
            raise MobieError(USAGE, "--bpw is no number of bits", f"{self.bits:g}", "a number such as 1.25")
        if self.refines and self.samples < 2:
            raise MobieError(
                USAGE,
                "--samples 1 leaves a refinement nothing to check itself on",
                "1",
                "at least 2",
                "or --refine none",
            )
        if not DEVICE.fullmatch(self.device):
            raise MobieError(USAGE, "--device names no device", self.device, "cpu, cuda, or cuda:N for one of several")
        if self.writer is not None and not self.own:
            raise MobieError(USAGE, "--writer writes the text of --calibration self", todo="give both, or neither")
        if self.chat and (self.text is None or self.own):
            raise MobieError(
                USAGE, "--chat needs dialogues, and the bundled text has none", todo="give some with --calibration FILE"
            )

    def _take(self, known: Statistics) -> None:
        """The options that the text of the statistics decides are those that it was made with: MobieError where others
        were asked for."""
        taken = {"--calibration": self.text is not None, "--chat": self.chat, "--writer": self.writer is not None}
        if any(taken.values()):
            raise MobieError(
                USAGE,
                "--statistics has a text already",
                ", ".join(flag for flag, given in taken.items() if given),
                todo="leave these out, or --statistics",
            )
        for name, has in (("seq_len", known.seq_len), ("seed", known.about.seed)):
            value, flag = getattr(self, name), "--" + name.replace("_", "-")
            if value not in (has, self._default(name)):
                raise MobieError(
                    USAGE, f"the statistics {known.path} were made with another {flag}", str(value), f"{has}, or none"
                )
            object.__setattr__(self, name, has)
        if self.samples == self._default("samples"):
            object.__setattr__(self, "samples", min(self.samples, known.about.samples))
        if self.samples > known.about.samples:
            raise MobieError(
                USAGE,
                f"the statistics {known.path} have fewer sequences than --samples",
                str(self.samples),
                f"at most {known.about.samples}",
                "take fewer, or save others: more --samples with --save-statistics",
            )

    @classmethod
    def _default(cls, name: str) -> Any:
        return cls.__dataclass_fields__[name].default

    @classmethod
    def of_effort(cls, level: Mapping[str, Any], given: Mapping[str, Any]) -> Self:
        if given.get("statistics") is not None:  # with its text, as far as it goes
            most = Statistics(given["statistics"]).about.samples
            level = {k: min(v, most) if k == "samples" else v for k, v in level.items() if k != "text"}
        return super().of_effort(level, given)

    @property
    def known(self) -> Statistics | None:
        """What --statistics names."""
        return None if self.statistics is None else Statistics(self.statistics)

    @property
    def refinement(self) -> str:
        """One of REFINEMENTS."""
        return "none"

    @property
    def refines(self) -> bool:
        return self.refinement != "none"

    @property
    def tunes(self) -> tuple[bool, bool]:
        """Whether a refinement tunes (routers, norms)."""
        return True, True

    @property
    def bits(self) -> float | None:
        """Stored bits per expert weight at most; None: one sign for every weight and no more."""
        return None

    @property
    def whole(self) -> "Settings | None":
        """Of a refinement of all layers together, where there is one."""
        return None

    @property
    def own_samples(self) -> int:
        """The most of them that one of several ranks has."""
        return -(-self.samples // ranks.world())

    @property
    def all_samples(self) -> int:
        """Sequences that are read, where the text has so many: those of a refinement of all layers, too."""
        return max(self.samples, self.whole.sequences(self.seq_len) if self.whole else 0)

    @property
    def targets_known(self) -> bool:
        """Whether the statistics have the original's states for all that a refinement reads."""
        known = self.known
        return known is not None and 0 < min(self.all_samples, known.n) <= known.n_targets

    @property
    def own(self) -> bool:
        """Whether the model writes the text."""
        return self.text == SELF

    @property
    def models(self) -> list[Path]:
        """Files of models that it reads besides the source."""
        return [] if self.writer is None else [self.writer]

    @property
    def inputs(self) -> list[Path]:
        texts = [p for p in (None if self.own else self.text, self.statistics) if p is not None]
        return [*texts, *self.models]

    @property
    def text_name(self) -> str:
        if self.statistics is not None:
            return f"the text of the statistics {self.statistics}"
        return "the calibration text" + (f" {self.text}" if self.text is not None and not self.own else "")

    def check(self) -> None:
        check_packages()
        import torch

        from mobie_export.calibration.text import text_notes

        if self.device != "cpu":
            n = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if int(self.device.partition(":")[2] or 0) >= n:
                raise MobieError(
                    UNSUPPORTED,
                    f"--device {self.device} is not here",
                    f"{n} devices of CUDA, torch {torch.__version__}",
                    todo="leave --device out, or install a torch that finds the card",
                )
        text_notes(None if self.own else self.text, self.chat)

    def twin(self, gguf: Gguf, device: str = "cpu") -> "Twin":
        """The model as torch modules. MobieError where there is no such thing."""
        from mobie_export.models.twin import Twin

        return Twin(gguf, device)

    def needs(self, run: Run) -> Needs:
        check_packages()
        from mobie_export.methods.calibrated import steps

        return steps.needs(self, run)

    def states_bytes(self, twin: "Twin", n_tokens: int, second: bool) -> int:
        """What hidden states take on the disk at most, and statistics that wait there where there are second signs."""
        from mobie_export.calibration import states

        waiting = twin.n_layers * n_tokens * (2 * twin.width + 20 * twin.config.num_experts_per_tok) if second else 0
        return states.disk_bytes(twin.n_layers, n_tokens, twin.width) + waiting

    def collecting_bytes(self, run: Run, twin: "Twin") -> int:
        """Memory of the pass over the layers, besides interpreter and packages."""
        n_tokens, layer = self.own_samples * self.seq_len, layer_bytes(run, twin)
        statistics = 4 * n_tokens * (twin.width + 8 * twin.config.num_experts_per_tok) + layer // 2
        return layer + max(vocabulary_bytes(twin), statistics + self.scores_bytes(twin))

    def scores_bytes(self, twin: "Twin") -> int:
        """What a batch takes beside the layer, its states and its experts."""
        from mobie_export.calibration.text import BATCH_TOKENS

        return twin.scores_bytes(max(1, BATCH_TOKENS // self.seq_len), self.seq_len)

    def more_needs(self, run: Run) -> tuple[int, tuple[Row, ...]]:
        """(disk, tensors of the output) besides those of every method that reads a text."""
        return 0, ()

    def more_settings(self) -> dict[str, object]:
        """What else decides the bytes."""
        return {}

    def backward(
        self, files: "Work", step: Callable[[int, str], None], done: Callable[[int], bool]
    ) -> "Iterator[tuple[int, LayerStatistics]]":
        """Statistics of the layers, from the last to the first."""
        from mobie_export.calibration import passes

        return passes.backward(files, step, done=done)

    def seconds(self, run: Run) -> dict[str, float]:
        from mobie_export.methods.calibrated import estimate

        twin = self.twin(run.source)
        written = {"writing": estimate.writing(twin, self)} if self.own else {}
        work = {"check": estimate.checking(run)} | written | self.operations(twin, run.coding)
        return estimate.seconds(work, self, run)

    def operations(self, twin: "Twin", coding: Coding) -> "dict[str, estimate.Work]":
        """Phase -> what it computes, for estimates of the time."""
        from mobie_export.methods.calibrated import estimate

        return estimate.phases(twin, self)

    def smaller(self, run: Run) -> str:
        from mobie_export.methods.calibrated import steps

        return steps.smaller(self, run)

    @contextmanager
    def workspace(self, run: Run) -> "Iterator[Workspace]":
        from mobie_export.methods.calibrated import steps

        with steps.workspace(self, run) as work:
            yield work

    def collect(self, run: Run, work: "Workspace") -> "Iterator[Layer]":
        from mobie_export.methods.calibrated import steps

        return steps.collect(self, run, work)

    def encoded(self, work: "Workspace", writing: Writing) -> Encoded:
        from mobie_export.methods.calibrated import steps

        return steps.encoded(work, writing)


class Refining(TextMethod):
    """A method that refines what it found. These two are options of each, with defaults of its own."""

    refine: str
    steps: int | None

    @property
    def refinement(self) -> str:
        return self.refine

    @property
    def whole(self) -> "Settings | None":
        from mobie_export.methods.calibrated import refine

        return refine.together(self.refine, self.steps, self.seed)


def layer_bytes(run: Run, twin: "Twin") -> int:
    """The experts of a layer in float32."""
    return 4 * sum(x.n_weights for x in run.experts.values()) // twin.n_layers


def vocabulary_bytes(twin: "Twin") -> int:
    """Embedding and head in float32."""
    return 2 * 4 * int(twin.config.vocab_size) * twin.width


def check_packages() -> None:
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


def context_length(gguf: Gguf) -> int:
    """Tokens that the model was made for."""
    key = f"{gguf.architecture}.context_length"
    value = gguf.value(key)
    if not isinstance(value, int) or value < 1:
        raise MobieError(
            BAD_INPUT,
            f"{gguf.paths[0]} has odd metadata",
            f"{key} = {value}",
            "a number of tokens",
            "convert the model again",
        )
    return value


def least_bits(gguf: Gguf, coding: Coding = block.MOBIE) -> int:
    """Of the experts with one sign per weight, in all: blocks, and an expert's scale where the type has one."""
    experts, scale = layout.experts(gguf).values(), 0 if coding.stock else 32
    return sum(gguf_io.tensor_bytes(x.tensor.shape, coding.type_id) * 8 + scale * x.n_expert for x in experts)


def spare_bits(gguf: Gguf, bpw: float | None, coding: Coding = block.MOBIE) -> float:
    """What `bpw` bits per expert weight leave for second signs. MobieError where they do not suffice for the first
    ones, or are more than second signs of all weights take; where the type has no second signs, for more than the
    first ones take."""
    experts = layout.experts(gguf)
    weights, least = sum(x.n_weights for x in experts.values()), least_bits(gguf, coding)
    signs = least - sum(32 * x.n_expert for x in experts.values())
    columns = {layout.layer(n): 32 * x.cols for n, x in experts.items() if not layout.is_down(n)}
    most = least + signs + sum(columns.values())
    if bpw is None:
        return 0.0
    if coding.stock and bpw * weights > least:
        raise MobieError(
            USAGE,
            f"--type {coding.option} has one sign per weight and no second ones: more bits have no use",
            f"{bpw:g} bits per expert weight",
            f"{least / weights:g}, which is what it takes without --bpw and --preset",
            f"leave them out, or take --type {block.MOBIE.option}",
        )
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
