"""Exit codes and the errors for everything a user can put right.

A MobieError says four things: what happened, what was found, what was wanted, and what to do next. The command line
prints them and ends with the error's exit code; every other exception is a defect of this program and ends with 1.
"""

OK = 0
INTERNAL = 1
USAGE = 2  # argparse's own
BAD_INPUT = 3
UNSUPPORTED = 4
BAD_OUTPUT = 5
NO_SPACE = 6
VERIFY_FAILED = 7
NO_RUNTIME = 8
NOT_FETCHED = 9
CONVERT_FAILED = 10
NO_MEMORY = 11
HUNG_UP = 129  # 128 + the number of the signal, as shells report it: SIGHUP
INTERRUPTED = 130  # SIGINT
TERMINATED = 143  # SIGTERM

EXIT_CODES = {
    OK: "done",
    INTERNAL: "unexpected internal error (a defect; please report it)",
    USAGE: "wrong usage of the command line",
    BAD_INPUT: "input missing, not a GGUF, damaged, or not belonging together",
    UNSUPPORTED: "a model, tensor type or shape that cannot be exported",
    BAD_OUTPUT: "output exists or cannot be written",
    NO_SPACE: "not enough disk space",
    VERIFY_FAILED: "the file does not say what it should",
    NO_RUNTIME: "patched runtime missing, or unable to run the file",
    NOT_FETCHED: "the model could not be downloaded from the hub",
    CONVERT_FAILED: "llama.cpp's converter failed on the checkpoint",
    NO_MEMORY: "more memory needed than --max-ram allows",
    HUNG_UP: "the terminal went away; what was computed is kept, as after an interrupt",
    INTERRUPTED: "interrupted; the same command goes on from what is kept",
    TERMINATED: "terminated; what was computed is kept, as after an interrupt",
}


class Stopped(KeyboardInterrupt):
    """The process was asked to end by a signal; `code` is its exit code."""

    def __init__(self, signal: int):
        super().__init__()
        self.code = 128 + signal


class MobieError(Exception):
    """An error with an exit code. `found`, `wanted` and `todo` may be empty where they would repeat `what`."""

    def __init__(self, code: int, what: str, found: str = "", wanted: str = "", todo: str = ""):
        super().__init__(what)
        self.code = code
        self.what = what
        self.found = found
        self.wanted = wanted
        self.todo = todo

    def __str__(self) -> str:
        parts = [("", self.what), ("  found:  ", self.found), ("  wanted: ", self.wanted), ("  next:   ", self.todo)]
        return "\n".join(label + text for label, text in parts if text)
