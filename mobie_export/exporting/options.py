"""What an export can be asked for, checked when it is made."""

from dataclasses import dataclass, field
from typing import TypedDict, Unpack

from mobie_export import methods
from mobie_export.errors import USAGE, MobieError
from mobie_export.exporting.effort import Effort
from mobie_export.exporting.requantize import Rule
from mobie_export.methods.base import Method
from mobie_export.spec import block
from mobie_export.spec.block import Coding

MOST_THREADS = 1024


@dataclass(frozen=True)
class ExportOptions:
    """Sizes in bytes. MobieError for values that make no sense with any model."""

    method: Method | Effort = field(default_factory=Effort)  # how signs are found; its fields are its own options
    type: str = block.MOBIE.option  # of the experts: mobie, or q1_0, which stock llama.cpp reads
    tensor_types: tuple[Rule, ...] = ()  # of tensors that are no experts: the first match, the others keep theirs
    split_max_size: int | None = None  # tensor data in one file; a larger output becomes shards
    max_ram: int | None = None  # that may be resident
    threads: int | None = None  # None: the cores of this machine, at most 8 of which convert and write
    overwrite: bool = False  # an existing output
    # of checkpoints
    revision: str | None = None  # branch, tag or commit on the hub; None: the newest
    pre_tokenizer: str | None = None  # as llama.cpp calls it, where the converter does not know the checkpoint's
    trust_remote_code: bool = False  # let Python files of the checkpoint run

    def __post_init__(self) -> None:
        for name, most in (("split_max_size", None), ("max_ram", None), ("threads", MOST_THREADS)):
            value = getattr(self, name)
            if value is not None and not (value > 0 and (most is None or value <= most)):
                wanted = "a positive number" + (f", at most {most}" if most else "")
                raise MobieError(USAGE, f"{name} is out of range", str(value), wanted)
        if self.type not in block.CODINGS:
            raise MobieError(USAGE, "there is no such type of experts", self.type, " or ".join(block.CODINGS))
        if isinstance(self.method, Method) and self.coding not in self.method.codings:
            raise MobieError(
                USAGE,
                f"--method {self.method.name} writes what --type {self.type} has no place for",
                wanted=f"--type {' or '.join(c.option for c in self.method.codings)}",
                todo="take this type, or another method",
            )

    @property
    def coding(self) -> Coding:
        return block.CODINGS[self.type]


class Others(TypedDict, total=False):
    """The fields of ExportOptions but for the method, as keyword arguments."""

    type: str
    tensor_types: tuple[Rule, ...]
    split_max_size: int | None
    max_ram: int | None
    threads: int | None
    overwrite: bool
    revision: str | None
    pre_tokenizer: str | None
    trust_remote_code: bool


class Keywords(Others, total=False):
    """All of them; a method may be given by its name, with its defaults, or as the effort that it may take."""

    method: Method | Effort | str


def options(method: Method | Effort | str | None = None, **others: Unpack[Others]) -> ExportOptions:
    """ExportOptions of keyword arguments. Raises MobieError."""
    if method is None:
        method = Effort()
    return ExportOptions(methods.get(method)() if isinstance(method, str) else method, **others)
