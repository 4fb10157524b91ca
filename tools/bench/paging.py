"""Decode a file that is larger than the memory there is: tokens per second, what is resident, what is read from disk.

    sudo .venv/bin/python -m tools.bench.paging FILE.gguf --limits 0 2 1 0.5     GiB; 0: no limit

Memory is limited by a cgroup (v1 or v2) made for each run and removed afterwards, which needs root. The file is dropped
from the page cache before each run: pages that are in it already are charged to whoever read them first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from mobie_export.errors import NO_RUNTIME, MobieError
from mobie_export.runtime import installed, processes

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


def make_group(gib: float) -> Path:
    """A cgroup that limits memory, page cache included."""
    v2 = (V2 / "cgroup.controllers").exists()
    group = (V2 if v2 else V1) / f"bench-paging-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(str(int(gib * 2**30)))
        if v2 and (group / "memory.swap.max").exists():
            (group / "memory.swap.max").write_text("0")
    except OSError as e:
        sys.exit(f"cannot make a memory cgroup: {e}; be root, in a system whose memory controller may be used")
    return group


def forget(path: Path) -> None:
    """Out of the page cache."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fields(path: Path) -> dict[str, int]:
    """/proc/PID/status and /proc/PID/io: the numbers, in bytes where the kernel says kB."""
    result = {}
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isdigit():
            result[key] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return result


def bench(model: Path, tool: Path, gib: float, args: argparse.Namespace) -> dict:
    """One run: tokens/s of llama-bench, the largest anonymous and file-backed residence in bytes, bytes read."""
    forget(model)
    group = make_group(gib) if gib else None
    command = [tool, "-m", model, "-p", "0", "-n", str(args.tokens), "-r", "1", "-t", str(args.threads), "-o", "json"]
    command += ["--no-warmup"]

    def enter() -> None:
        if group:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=enter)
        peak = {"RssAnon": 0, "RssFile": 0, "read_bytes": 0}
        while p.poll() is None:
            try:
                seen = {**fields(Path(f"/proc/{p.pid}/status")), **fields(Path(f"/proc/{p.pid}/io"))}
            except (FileNotFoundError, ProcessLookupError):
                break
            peak = {key: max(value, seen.get(key, 0)) for key, value in peak.items()}
            time.sleep(0.05)
        out, err = p.communicate()
    finally:
        if group:
            group.rmdir()
    if p.returncode:
        sys.exit(f"llama-bench ended with {p.returncode} at {gib} GiB\n{processes.tail(err)}")
    return {**peak, "tokens_per_second": json.loads(out)[0]["avg_ts"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--limits", type=float, nargs="+", default=[0, 2, 1], help="GiB, 0: none")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--bin", type=Path, default=installed.site() / "llama_cpp" / "bin", help="folder of llama-bench"
    )
    args = parser.parse_args()
    tool = args.bin / "llama-bench"
    if not tool.exists():
        raise MobieError(NO_RUNTIME, f"there is no {tool}", todo="mobie-export runtime build")
    size = args.file.stat().st_size
    print(f"{args.file.name}: {size / 2**30:.2f} GiB, {args.tokens} tokens, {args.threads} threads")
    print("| memory | tokens/s | resident, file | resident, own | read from disk |\n|---|---|---|---|---|")
    for gib in args.limits:
        r = bench(args.file, tool, gib, args)
        cells = [f"{r[key] / 2**30:.2f} GiB" for key in ("RssFile", "RssAnon", "read_bytes")]
        print(f"| {f'{gib} GiB' if gib else 'all'} | {r['tokens_per_second']:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
