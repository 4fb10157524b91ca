"""What does `mobie-export runtime build` do? Everything, from the release to a runtime that computes what it should."""

import sys
from pathlib import Path

from mobie_export.runtime import installed, selftest, upstream
from mobie_export.runtime.cmake import compile_targets, cuda_flags, vulkan_flags
from mobie_export.runtime.install import install
from mobie_export.runtime.installed import TOOLS
from mobie_export.runtime.patching import prepare
from mobie_export.runtime.processes import unavailable


def build(
    jobs: int | None = None,
    sdist: Path | None = None,
    cuda: bool = False,
    cuda_architectures: str | None = None,
    vulkan: bool = False,
) -> None:
    """Build the patched runtime, install libraries, tools and the Python binding into this environment, and test them.

    cuda: with the CUDA backend where that is possible, see `cuda_flags`
    vulkan: with the Vulkan backend, see `vulkan_flags`
    Raises MobieError; where the self-test fails, what was built stays installed.
    """
    manifest = installed.read_manifest()
    if manifest and manifest.get("wheel"):
        raise unavailable(
            "this environment already has the patched runtime, installed as a wheel",
            wanted="an environment for the one to be built",
            todo=f"pip uninstall {upstream.read_pin().package}",
        )
    with_cuda, with_vulkan = cuda_flags(cuda_architectures) if cuda else (), vulkan_flags() if vulkan else ()
    flags = with_cuda + with_vulkan
    home = prepare(sdist)
    folder = "build" + "-cuda" * bool(with_cuda) + "-vulkan" * bool(with_vulkan)
    install(home, compile_targets(home, ("llama", "mtmd", *TOOLS), jobs, flags, folder), flags)
    facts, failures = selftest.run()
    print("\n".join(facts), file=sys.stderr)
    if failures:
        raise unavailable(
            "the runtime is installed, and does not compute what it should on this machine",
            "\n          ".join(map(str, failures)),
            "a self-test without failures",
            "follow the first of these lines",
        )
