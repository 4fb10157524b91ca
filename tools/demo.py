#!/usr/bin/env python3
"""`make demo`: export the bundled model, look at the result, and let both write, in llama-cli and in Python."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PROMPT = "The old man looked at the sea, and"
OUTPUT = Path("demo/tiny-moe-mobie.gguf")


def step(title: str) -> None:
    print(f"\n\033[1m{title}\033[0m" if sys.stdout.isatty() else f"\n== {title}", flush=True)


def run(*command: str) -> None:
    print("$", " ".join(f"'{c}'" if " " in c else c for c in command), flush=True)
    tool = shutil.which(command[0], path=sysconfig.get_path("scripts"))
    subprocess.run([tool, *command[1:]], check=True, stdin=subprocess.DEVNULL)


def main() -> None:
    model = Path(sys.argv[1])
    OUTPUT.parent.mkdir(exist_ok=True)

    step(
        "1. export, the least effort: every expert weight becomes a sign, every 64 of them share a scale; half a minute"
    )
    run("mobie-export", str(model), "-o", str(OUTPUT), "--effort", "fast", "--overwrite")

    step("2. what is in the file")
    run("mobie-export", "inspect", str(OUTPUT))

    step("3. can this environment run it?")
    run("mobie-export", "doctor", str(OUTPUT))

    sampling = ["--seed", "1", "--temp", "0.7", "--top-k", "40", "-n", "80", "--threads", "2"]
    step("4. llama-cli on the original, then on the binary one")
    for path in (model, OUTPUT):
        run("llama-cli", "-m", str(path), "-p", PROMPT, "--single-turn", "--no-display-prompt", *sampling)

    step("5. the same file in Python")
    print(f'>>> llama_cpp.Llama("{OUTPUT}")("{PROMPT}")', flush=True)
    from llama_cpp import Llama

    llama = Llama(str(OUTPUT), n_ctx=512, n_threads=2, seed=1, verbose=False)
    print(PROMPT + llama(PROMPT, max_tokens=80, temperature=0.7, top_k=40)["choices"][0]["text"])
    print(f"\n{model}: {model.stat().st_size / 1e6:.1f} MB   {OUTPUT}: {OUTPUT.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
