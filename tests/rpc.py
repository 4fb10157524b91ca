"""llama.cpp's RPC servers on this machine, and what llama-perplexity computes over them."""

import contextlib
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

TEXT = Path(__file__).resolve().parents[1] / "mobie_export/data/held-out.txt"
# Of what a server says first: 8 bytes of length, three of version, then one that upstream leaves zero.
ANSWER, STOCK, OURS = 11, 0, ord("M")


@contextlib.contextmanager
def servers(tools: Path, n: int) -> Iterator[list[str]]:
    """The addresses of n servers of a build, each with one thread of the CPU."""
    started, addresses = [], []
    try:
        for _ in range(n):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command = [tools / "ggml-rpc-server", "-H", "127.0.0.1", "-p", str(port), "-t", "1", "-d", "CPU"]
            started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            _wait(started[-1], port)
            addresses.append(f"127.0.0.1:{port}")
        yield addresses
    finally:
        for server in started:
            server.terminate()
            server.wait()


def _wait(server: subprocess.Popen, port: int) -> None:
    """Until somebody answers."""
    for _ in range(600):
        assert server.poll() is None, f"the server ended with {server.returncode}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)
    raise AssertionError("the server does not answer")


@contextlib.contextmanager
def saying(address: str, answer: int) -> Iterator[str]:
    """An address behind which the same server gives another answer to the question whether it runs the type."""
    host, port = address.split(":")

    def carry(source: socket.socket, to: socket.socket, answers: bool) -> None:
        at = 0
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                if answers and at <= ANSWER < at + len(data):
                    data[ANSWER - at] = answer
                at += len(data)
                to.sendall(data)
        for end in (source, to):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listening.accept()
                server = socket.create_connection((host, int(port)))
                for ends in ((client, server, False), (server, client, True)):
                    threading.Thread(target=carry, args=ends, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


def weights(log: str) -> dict[str, float]:
    """Buffer -> MiB of the model in it, of what llama-perplexity says."""
    return {name: float(size) for name, size in re.findall(r"(\S+) model buffer size = +([\d.]+) MiB", log)}


def perplexity(tools: Path, model: Path, *words: str, logits: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Of two pieces of text. logits: where to write the next-token distributions of every position."""
    command = [tools / "llama-perplexity", "-m", model, "-f", TEXT, "-c", 64, "--chunks", 2, "-t", 1, "-fa", "off"]
    command += ["-lv", 4, *(["--kl-divergence-base", logits] if logits else [])]
    return subprocess.run([*map(str, command), *words], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def problems_of_another(tools: Path, model: Path, address: str, folder: Path) -> list[str]:
    """What is wrong, a line each, with how llama-perplexity goes about a server that does not run the type: it says so
    once, experts stay here, the numbers are those of one process; against the user's word they stay not, an error."""
    here, there, at = folder / "here", folder / "there", f"RPC0[{address}]"
    alone = perplexity(tools, model, logits=here)
    done = perplexity(tools, model, "--rpc", address, "-ngl", "99", logits=there)
    found = []
    if alone.returncode or done.returncode or here.read_bytes() != there.read_bytes() or not weights(done.stdout)[at]:
        found.append(f"exit {alone.returncode}, {done.returncode}, or other numbers: {done.stdout[-2000:]}")
    if done.stdout.count(f"RPC0 ({address}) does not run tensors of type mobie") != 1:
        found.append(f"a warning is missing: {done.stdout[-2000:]}")
    done = perplexity(tools, model, "--rpc", address, "-ngl", "99", "-ot", f"exps={at}")
    if done.returncode != 1 or f"of type mobie cannot be on {at}" not in done.stdout:
        found.append(f"exit {done.returncode} and no reason: {done.stdout[-2000:]}")
    return found
