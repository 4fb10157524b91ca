"""How is a command run, and what is said where the runtime, or something that it is built with, is missing?"""

import subprocess
from collections.abc import Mapping
from pathlib import Path

from mobie_export.errors import NO_RUNTIME, MobieError


def unavailable(what: str, found: str = "", wanted: str = "", todo: str = "") -> MobieError:
    return MobieError(NO_RUNTIME, what, found, wanted, todo)


def run(command: list[str], failure: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
    """Run a command; on failure raise MobieError with the end of what it printed."""
    r = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=cwd)
    if r.returncode:
        raise unavailable(
            failure, f"exit code {r.returncode} of {Path(command[0]).name}, which ended with\n{tail(r.stdout)}"
        )


def tail(text: str, lines: int = 40) -> str:
    return "\n".join(text.splitlines()[-lines:])
