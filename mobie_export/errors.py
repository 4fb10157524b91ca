"""The errors for everything a user can put right. Exit codes belong to the command line (cli.Exit)."""

from enum import Enum


class Kind(Enum):
    """What an error is about; the value says it in words."""

    USAGE = "wrong usage of the command line"
    BAD_INPUT = "input missing, not a GGUF, damaged, or not belonging together"
    UNSUPPORTED = "a model, tensor type or shape that cannot be exported"
    BAD_OUTPUT = "output exists or cannot be written"
    NO_SPACE = "not enough disk space"
    VERIFY_FAILED = "the file does not say what it should"
    NO_RUNTIME = "patched runtime missing, or unable to run the file"
    NOT_FETCHED = "the model could not be downloaded from the hub"
    CONVERT_FAILED = "llama.cpp's converter failed on the checkpoint"
    NO_MEMORY = "more memory needed than --max-ram allows"
    RANK_LOST = "another of several processes that calibrate together ended; what was computed is kept"


USAGE = Kind.USAGE
BAD_INPUT = Kind.BAD_INPUT
UNSUPPORTED = Kind.UNSUPPORTED
BAD_OUTPUT = Kind.BAD_OUTPUT
NO_SPACE = Kind.NO_SPACE
VERIFY_FAILED = Kind.VERIFY_FAILED
NO_RUNTIME = Kind.NO_RUNTIME
NOT_FETCHED = Kind.NOT_FETCHED
CONVERT_FAILED = Kind.CONVERT_FAILED
NO_MEMORY = Kind.NO_MEMORY
RANK_LOST = Kind.RANK_LOST


class Stopped(KeyboardInterrupt):
    """The process was asked to end by a signal."""

    def __init__(self, signal: int):
        super().__init__()
        self.signal = signal


class MobieError(Exception):
    """Something the user can put right; every other exception is a defect of this program.

    kind: what it is about; what: what happened, one line; found, wanted: what was there and what should have been;
    todo: what to do next. The last three are empty where they would repeat `what`. str() gives them all, a line each.
    """

    def __init__(self, kind: Kind, what: str, found: str = "", wanted: str = "", todo: str = "") -> None:
        super().__init__(what)
        self.kind = kind
        self.what = what
        self.found = found
        self.wanted = wanted
        self.todo = todo

    def __str__(self) -> str:
        parts = [("", self.what), ("  found:  ", self.found), ("  wanted: ", self.wanted), ("  next:   ", self.todo)]
        return "\n".join(label + text for label, text in parts if text)
