"""A model behind llama-server, for as long as a block lasts."""

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobie_export.reporting import tools
from mobie_export.runtime.processes import tail, unavailable

STARTS = 900  # seconds; a file of hundreds of gigabytes is read once
ANSWERS = 1800  # seconds for one answer
ENDS = 10  # seconds until it is killed
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the user has


class Refused(Exception):
    """The server answered with an error; str() is its message."""


class Server:
    def __init__(self, port: int, child: "subprocess.Popen[bytes]"):
        self.port, self.child = port, child

    def get(self, path: str, timeout: float = 30) -> Any:
        with DIRECT.open(f"http://127.0.0.1:{self.port}{path}", timeout=timeout) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Refused where the server does not answer as asked."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with DIRECT.open(request, timeout=ANSWERS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as e:
            said = e.read().decode("utf-8", "replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                said = json.loads(said)["error"]["message"]
            raise Refused(" ".join(said.split())[:300]) from None
        except (OSError, ValueError) as e:
            raise Refused(str(e)) from None

    def memory(self) -> int | None:
        """Largest resident size so far in bytes, pages of the mapped file included; None where the system does not
        say."""
        try:
            with open(f"/proc/{self.child.pid}/status") as file:
                return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            return None


@contextlib.contextmanager
def served(model: Path, context: int, threads: int, log: Path) -> Iterator[Server]:
    """A server that has loaded the model, on a free port. MobieError where it does not come up. It is ended with the
    block, however that ends."""
    port = _free_port()
    command = [str(tools.find("llama-server")), "-m", str(model), "-c", str(context), "-np", "1", "-t", str(threads)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--no-ui", "--reasoning", "off"]
    with open(log, "wb") as out:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=tools.environment()
        )
        try:
            server = Server(port, child)
            _wait(server, model, log)
            yield server
        finally:
            child.terminate()
            try:
                child.wait(ENDS)
            except BaseException:
                child.kill()
                child.wait()
                raise


def _wait(server: Server, model: Path, log: Path) -> None:
    began = time.monotonic()
    while time.monotonic() - began < STARTS:
        if server.child.poll() is not None:
            said = tail(log.read_text(errors="replace"), 5)
            raise unavailable(f"llama-server does not serve {model.name}", said, todo=f"mobie-export doctor {model}")
        with contextlib.suppress(OSError, ValueError):
            server.get("/health", timeout=5)
            return
        time.sleep(0.1)
    raise unavailable(f"llama-server does not serve {model.name}", f"not ready after {STARTS} seconds")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
