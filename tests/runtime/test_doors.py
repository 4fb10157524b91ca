"""The runtime's other doors: servers, offloading, adapters, drafts; each with a MoBiE file of the bundled model.

Greedy text of llama-server without options is what the options are held to: they change where and how, not what.
"""

import base64
import json
import re
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest

from mobie_export import gguf_io
from tests import models

REPO = Path(__file__).resolve().parents[2]
TRAINED = REPO / "examples/tiny-moe/tiny-moe-f16.gguf"
PROMPT = "The old man looked at the sea, and"
N_TOKENS = 24


@pytest.fixture(scope="module")
def mobie(tmp_path_factory, runtime_tools) -> Path:
    path = tmp_path_factory.mktemp("doors") / "tiny-mobie.gguf"
    command = [sys.executable, "-m", "mobie_export", str(TRAINED), "-o", str(path), "--method", "sign"]
    subprocess.run(command, check=True)
    return path


class Server:
    """A running server's address and what it has printed."""

    def __init__(self, port: int, log: Path):
        self.port, self.log = port, log

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as r:
            return json.load(r)

    def post(self, path: str, **body) -> dict:
        return json.loads(self.post_text(path, **body))

    def post_text(self, path: str, **body) -> str:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=json.dumps(body).encode(), headers=headers
        )
        with urllib.request.urlopen(request, timeout=60) as r:
            return r.read().decode()

    def write(self) -> dict:
        """Greedy continuation by llama-server's own endpoint."""
        return self.post("/completion", prompt=PROMPT, n_predict=N_TOKENS, temperature=0, cache_prompt=False, n_probs=1)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def served(command: list, log: Path, ready: str):
    """Run a server until the block ends; `ready` is the path that answers once the model is loaded."""
    port = free_port()
    with open(log, "w") as out:
        p = subprocess.Popen([*map(str, command), "--port", str(port)], stdout=out, stderr=subprocess.STDOUT)
    server = Server(port, log)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert p.poll() is None, f"the server ended with {p.returncode}\n{log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                server.get(ready)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        yield server
    finally:
        p.terminate()
        p.wait(timeout=30)


@pytest.fixture
def llama_server(runtime_tools, tmp_path):
    def start(model: Path, *options: str):
        command = [runtime_tools / "llama-server", "-m", model, "-c", "512", "-np", "1", "-t", "2", *options]
        return served(command, tmp_path / "log", "/health")

    return start


@pytest.fixture(scope="module")
def plain(mobie, runtime_tools, tmp_path_factory) -> dict:
    """What llama-server writes without options."""
    command = [runtime_tools / "llama-server", "-m", mobie, "-c", "512", "-np", "1", "-t", "2"]
    with served(command, tmp_path_factory.mktemp("plain") / "log", "/health") as server:
        answer = server.write()
    assert answer["tokens_predicted"] == N_TOKENS and len(answer["content"]) > 20
    return answer


def assert_same(answer: dict, plain: dict) -> None:
    """The same text, by the same probabilities."""
    assert answer["content"] == plain["content"]
    a, b = ([t["logprob"] for t in x["completion_probabilities"]] for x in (answer, plain))
    assert len(a) == N_TOKENS and np.allclose(a, b, rtol=0, atol=1e-3)


# --- servers ----------------------------------------------------------------------------------------------------------


def test_llama_server_speaks_openai(mobie, plain, llama_server):
    with llama_server(mobie) as server:
        assert server.get("/v1/models")["data"][0]["meta"]["size"] < mobie.stat().st_size
        text = server.post("/v1/completions", prompt=PROMPT, max_tokens=N_TOKENS, temperature=0)
        assert text["choices"][0]["text"] == plain["content"]
        messages = [{"role": "user", "content": "Who looked at the sea?"}]
        chat = server.post("/v1/chat/completions", messages=messages, max_tokens=N_TOKENS, temperature=0)
        assert chat["choices"][0]["message"]["content"] and chat["usage"]["completion_tokens"] > 0
        stream = server.post_text(
            "/v1/completions", prompt=PROMPT, max_tokens=N_TOKENS, temperature=0, stream=True
        ).split("\n\n")
        pieces = [json.loads(line[len("data: ") :]) for line in stream if line.startswith("data: {")]
        assert "".join(p["choices"][0]["text"] for p in pieces) == plain["content"]


def test_python_server_speaks_openai(mobie, plain, tmp_path):
    command = [sys.executable, "-m", "llama_cpp.server", "--model", mobie, "--n_ctx", "512", "--n_threads", "2"]
    with served(command, tmp_path / "log", "/v1/models") as server:
        text = server.post("/v1/completions", prompt=PROMPT, max_tokens=N_TOKENS, temperature=0)
        assert text["choices"][0]["text"] == plain["content"]
        messages = [{"role": "user", "content": "Who looked at the sea?"}]
        chat = server.post("/v1/chat/completions", messages=messages, max_tokens=N_TOKENS, temperature=0)
        assert chat["choices"][0]["message"]["content"]


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, layers",
    [
        (["--cpu-moe"], {0, 1, 2, 3}),
        (["--n-cpu-moe", "2"], {0, 1}),
        (["--override-tensor", r"blk\.[13]\.ffn_.*_exps=CPU"], {1, 3}),
    ],
    ids=["cpu-moe", "n-cpu-moe", "override-tensor"],
)
def test_experts_are_placed(mobie, plain, llama_server, options, layers):
    with llama_server(mobie, "-v", *options) as server:
        assert_same(server.write(), plain)
        log = server.log.read_text()
    moved = set(re.findall(r"tensor (blk\.\d+\.\S+) .*buffer type overridden to CPU", log))
    with_experts = {f"blk.{i}.ffn_{kind}_exps.weight" for i in layers for kind in ("gate", "up", "down")}
    assert {name for name in moved if name.endswith(".weight")} == with_experts


@pytest.mark.parametrize(
    "options",
    [["--load-mode", "mmap+mlock"], ["--load-mode", "none"], ["--no-repack"]],
    ids=["mlock", "no-mmap", "no-repack"],
)
def test_options_leave_the_text(mobie, plain, llama_server, options):
    with llama_server(mobie, *options) as server:
        assert_same(server.write(), plain)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantized_cache(mobie, plain, llama_server, kind):
    with llama_server(mobie, "-v", "-fa", "on", "-ctk", kind, "-ctv", kind) as server:
        first = server.write()["completion_probabilities"][0]
        assert re.search(rf"K \({kind}\).*V \({kind}\)", server.log.read_text())
    exact = plain["completion_probabilities"][0]
    assert first["id"] == exact["id"]
    assert abs(first["logprob"] - exact["logprob"]) < 0.2


def test_the_file_is_mapped_not_copied(mobie, llama_server):
    """Weights stay where the file is mapped: no other buffer of a weight's size is made at loading."""
    with llama_server(mobie, "-v") as server:
        server.write()
        log = server.log.read_text()
    sizes = {name: float(mib) for name, mib in re.findall(r"(\S+) model buffer size = +([\d.]+) MiB", log)}
    assert {name for name, mib in sizes.items() if mib > 0} == {"CPU_Mapped"}
    assert sizes["CPU_Mapped"] <= mobie.stat().st_size / 2**20 + 0.01


# --- images -----------------------------------------------------------------------------------------------------------


def picture(*colour: int) -> str:
    """A PNG of one colour as a data URL."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 28, 28, 8, 2, 0, 0, 0)
    rows = (b"\0" + bytes(colour) * 28) * 28
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def test_a_projector_beside_the_file(mobie, plain, llama_server, tmp_path):
    """It is used as it is; what it makes of an image reaches the experts."""
    projector = tmp_path / "mmproj.gguf"
    with gguf_io.open_model(mobie) as model:
        models.write_projector(projector, model.get(f"{model.architecture}.embedding_length", int))
    with llama_server(mobie, "--mmproj", str(projector)) as server:
        assert_same(server.write(), plain)
        seen = []
        for colour in ((255, 0, 0), (255, 0, 0), (0, 0, 255)):
            content = [{"type": "image_url", "image_url": {"url": picture(*colour)}}]
            content.append({"type": "text", "text": "What is it?"})  # llama-server wants text behind an image
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
            answer = server.post("/v1/chat/completions", **body, logprobs=True, cache_prompt=False)
            seen.append([t["logprob"] for t in answer["choices"][0]["logprobs"]["content"]])
    assert len(seen[0]) == 4 and np.isfinite(seen).all()
    assert np.allclose(seen[0], seen[1], rtol=0, atol=1e-3) and abs(seen[0][0] - seen[2][0]) > 1e-2


# --- drafts and adapters ----------------------------------------------------------------------------------------------


def test_a_mobie_draft_speeds_its_original_up(mobie, llama_server):
    """Speculative decoding is exact: the text is the original's own, and some of the draft's tokens are accepted. What
    is checked together is computed token by token here: sums of several at once may round otherwise."""
    draft = ("-md", str(mobie), "--spec-type", "draft-simple", "--spec-draft-n-max", "4")
    with llama_server(TRAINED, "-ub", "1") as server:
        alone = server.write()
    with llama_server(TRAINED, "-ub", "1", *draft) as server:
        drafted = server.write()
    assert drafted["content"] == alone["content"]
    assert drafted["timings"]["draft_n"] > 0
    assert 0 < drafted["timings"]["draft_n_accepted"] <= drafted["timings"]["draft_n"]


def write_lora(path: Path, rank: int = 4) -> None:
    """A random adapter for the queries and the attention's output of every layer of the bundled model."""
    reader = gguf.GGUFReader(str(TRAINED))
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    w = gguf.GGUFWriter(str(path), reader.get_field("general.architecture").contents())
    w.add_type(gguf.GGUFType.ADAPTER)
    w.add_string(gguf.Keys.Adapter.TYPE, "lora")
    w.add_float32(gguf.Keys.Adapter.LORA_ALPHA, rank)
    for t in reader.tensors:
        if re.fullmatch(r"blk\.\d+\.attn_(q|output)\.weight", t.name):
            n_in, n_out = (int(n) for n in t.shape)  # the fastest dimension first
            w.add_tensor(f"{t.name}.lora_a", matrix(rank, n_in))
            w.add_tensor(f"{t.name}.lora_b", matrix(n_out, rank))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def test_lora_on_attention(mobie, tmp_path):
    """An adapter does to the MoBiE file what it does to the same model with F32 experts."""
    from llama_cpp import Llama

    f32, lora = tmp_path / "f32.gguf", tmp_path / "lora.gguf"
    command = [sys.executable, "-m", "mobie_export", "dequantize", str(mobie), "-o", str(f32)]
    subprocess.run(command, check=True)
    write_lora(lora)

    def log_probabilities(path: Path, adapter: Path | None) -> np.ndarray:
        """-> float64 [n_tokens, n_vocab]"""
        llama = Llama(
            str(path), n_ctx=128, n_threads=2, logits_all=True, verbose=False, lora_path=adapter and str(adapter)
        )
        tokens = llama.tokenize(PROMPT.encode())
        llama.eval(tokens)
        logits = np.asarray(llama.scores[: len(tokens)], dtype=np.float64)
        llama.close()
        logits -= logits.max(axis=-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    def kl(a: np.ndarray, b: np.ndarray) -> float:
        return float((np.exp(a) * (a - b)).sum(axis=-1).mean())

    truth = log_probabilities(f32, lora)
    moved = kl(truth, log_probabilities(mobie, None))
    apart = kl(truth, log_probabilities(mobie, lora))
    assert moved > 0.05, "the adapter does nothing"
    assert apart < 0.01 * moved
