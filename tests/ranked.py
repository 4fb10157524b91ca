"""What a test has done by several processes, as torchrun starts them.

    with ranked.started() as ranks:
        done = ranks.run(2, "export", MODEL, ...)

A process imports torch once and forks the ranks of every run. `sums MODEL OUT` writes what all of them together
compute: sums over tokens, gradients of a refinement. `export ARGUMENT...` is the command line; with
MOBIE_TEST_DIES=RANK:LAYER a rank ends when it would store a layer, with MOBIE_TEST_OTHER=RANK:MODEL one is given
another model.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mobie_export import cli, gguf_io
from mobie_export.calibration import passes, ranks
from mobie_export.calibration.planes import Planes
from mobie_export.calibration.states import Work
from mobie_export.calibration.store import Store
from mobie_export.calibration.text import Calibration
from mobie_export.methods.calibrated import refine
from mobie_export.methods.ordered import steps
from mobie_export.models.twin import PROJECTIONS, Twin

LENGTH, SEQUENCES = 32, 21  # no multiple of the ranks
EXPERTS = (0, 3)
SETTINGS = refine.Settings(steps=2, batch_tokens=7 * LENGTH, rising=0.5)


@dataclass(frozen=True)
class Done:
    codes: list[int]  # exit code of every rank, negative for a signal
    stdout: str  # of all of them
    stderr: str


@dataclass(frozen=True)
class Ranks:
    server: subprocess.Popen[str]

    def run(self, n: int, *words: object, **environment: str) -> Done:
        assert self.server.stdin and self.server.stdout
        with tempfile.TemporaryDirectory() as folder:
            task = {"n": n, "words": list(map(str, words)), "environment": environment, "folder": folder}
            print(json.dumps(task), file=self.server.stdin, flush=True)
            codes = json.loads(self.server.stdout.readline())
            said = [[(Path(folder) / f"{name}-{r}").read_text() for r in range(n)] for name in ("out", "err")]
        return Done(codes, *map("".join, said))


@contextlib.contextmanager
def started() -> Iterator[Ranks]:
    command = [sys.executable, "-m", "tests.ranked"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe, root = subprocess.PIPE, Path(__file__).resolve().parents[1]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=root) as server:
        yield Ranks(server)
        assert server.stdin
        server.stdin.close()


def _serve() -> None:
    for line in sys.stdin:
        task = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        world = {name: str(task["n"]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        common = task["environment"] | address | world | {"TORCHELASTIC_RUN_ID": "test"}
        children = []
        for r in range(task["n"]):
            child = os.fork()
            if not child:
                os.environ.update(common | {"RANK": str(r), "LOCAL_RANK": str(r)})
                _become(task["words"], Path(task["folder"]), r)
            children.append(child)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children]), flush=True)


def _become(words: list[str], folder: Path, rank: int) -> None:
    """A rank, to its end."""
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_CREAT | os.O_WRONLY), number)
    code = 1
    try:
        code = main(*words)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(ValueError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def computed(model: Path, folder: Path) -> dict[str, Tensor]:
    """By name, the same on all ranks."""
    torch.set_num_threads(1)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (SEQUENCES, LENGTH)))
    with gguf_io.open_model(model) as gguf:
        work = Work(folder, Twin(gguf), Calibration(tokens, ""))
        with torch.no_grad():
            found = _sums(work)
        return found | _gradients(work)


def _sums(work: Work) -> dict[str, Tensor]:
    """Of the first layer's experts, on the original's path."""
    twin, calibration = work.twin, work.calibration
    before, behind = work.states("original-0"), work.states("original-1")
    table, layer = twin.embedding(), twin.layer(0)
    for where in calibration.batches:
        before.write(where, table[calibration.tokens[where]])
        behind.write(where, twin.run(layer, before.read(where)))
    experts = twin.experts_of(layer)
    assert experts is not None
    s = steps._paths(twin, layer, experts, calibration, behind, before)
    found = {"counts": s.counts, "target": ranks.gathered(s.target), "p": ranks.gathered(s.p)}
    for e in EXPERTS:
        for p in PROJECTIONS:
            found[f"moment {p} {e}"] = ranks.summed(s.second_moment(p, e, s.saliency[p])[0])
            found[f"energy {p} {e}"] = s.energy(p, e)
        if (prior := steps._prior(s, e, int(s.counts[e]))) is not None:
            found[f"moment prior {e}"] = prior
    assert any(name.startswith("moment prior") for name in found)
    every = torch.cat([s.second_moment("gate", e, s.saliency["gate"]) for e in range(s.n_expert)])
    own = ranks.own_sum(every)
    assert len(own) == len(range(s.n_expert)[ranks.divide(s.n_expert)])
    return found | {f"moment own {e}": ranks.gathered(own)[e] for e in EXPERTS}


def _gradients(work: Work) -> dict[str, Tensor]:
    """Of the steps of a refinement, and the losses on the sequences kept aside."""
    passes.targets(work)
    found: dict[str, Tensor] = {}
    step = refine.Adam.step

    def noted(optimizer: refine.Adam) -> None:
        for group in optimizer.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                found[f"gradient {len(found)} of {group['kind']}"] = p.grad.clone()
        step(optimizer)

    def packed(i: int) -> dict[str, Planes]:
        blocks = {p: w.unflatten(-1, (-1, 64)) for p, w in work.twin.experts(i).items()}
        return {p: Planes((w >= 0).flatten(-2), w.abs().mean(-1)) for p, w in blocks.items()}

    refine.Adam.step = noted  # type: ignore[method-assign, assignment]
    try:
        _, outcome = refine.whole(work, packed, {}, SETTINGS)
    finally:
        refine.Adam.step = step  # type: ignore[method-assign]
    return found | {"losses": torch.tensor([loss for _, loss in outcome.curve])}


def main(what: str, *words: str) -> int:
    if what == "sums":
        model, out = map(Path, words)
        folder = out.with_name(f"rank-{ranks.rank()}")
        folder.mkdir()
        found = computed(model, folder)
        if ranks.first():
            torch.save(found, out)
        return 0
    words = _another(words)
    if "MOBIE_TEST_DIES" in os.environ:
        rank, layer = map(int, os.environ["MOBIE_TEST_DIES"].split(":"))
        put = Store.put

        def dies(store: Store, i: int, *arguments: object) -> None:
            if (ranks.rank(), i) == (rank, layer):
                os.kill(os.getpid(), signal.SIGKILL)
            put(store, i, *arguments)  # type: ignore[arg-type]

        Store.put = dies  # type: ignore[method-assign, assignment]
    return cli.main([*words])


def _another(words: tuple[str, ...]) -> tuple[str, ...]:
    rank, _, model = os.environ.get("MOBIE_TEST_OTHER", "").partition(":")
    return (model, *words[1:]) if rank == str(ranks.rank()) else words


if __name__ == "__main__":
    _serve()
