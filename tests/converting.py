"""The converter in forks of one process that has its libraries loaded already: a second each, instead of seven.

What the exporter does itself, a process of its own for every conversion, is in test_sources.py.
"""

import multiprocessing
import sys
from pathlib import Path


def convert(checkpoint: Path, path: Path, *options: str) -> None:
    """Write the GGUF of a checkpoint with F32 weights and the pre-tokenizer of GPT-2."""
    from mobie_export.runtime import upstream

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.auto.tokenization_auto"])
    log = path.with_suffix(".log")
    arguments = [str(upstream.converter()), "--pre-tokenizer", "gpt-2", str(checkpoint), "--outfile", str(path)]
    process = context.Process(target=_run, args=([*arguments, "--outtype", "f32", *options], log))
    process.start()
    process.join()
    assert process.exitcode == 0, log.read_text()[-2000:]


def _run(arguments: list[str], log: Path) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "gguf"]:  # the converter brings its own
        del sys.modules[name]
    from mobie_export.sources import hf_convert

    sys.stdout = sys.stderr = open(log, "w")  # noqa: SIM115 (until the process ends)
    sys.argv = ["hf_convert.py", *arguments]
    hf_convert.main()
