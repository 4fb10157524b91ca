"""What of llama.cpp is in this Python environment, and where?"""

import importlib.metadata
import json
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import TypedDict

TOOLS = (
    "llama-cli",
    "llama-completion",
    "llama-bench",
    "llama-perplexity",
    "llama-quantize",
    "llama-imatrix",
    "llama-server",
    "ggml-rpc-server",
)


class BuiltFrom(TypedDict):
    """What decides whether an installed runtime is the one of this package."""

    package: str
    version: str
    series: str  # digest of the patches
    kernels: str  # digest of kernels_cpp
    flags: list[str]


class Manifest(BuiltFrom, total=False):
    """What is kept of a build beside the libraries; those of other versions may lack a key."""

    wheel: bool
    asked: list[str]  # of cmake, besides the project's own flags
    links: list[str]  # made in the environment's bin/


def site() -> Path:
    return Path(sysconfig.get_path("platlib"))


def scripts() -> Path:
    return Path(sysconfig.get_path("scripts"))


def manifest_path() -> Path:
    return site() / "llama_cpp" / "mobie-runtime.json"


def read_manifest() -> Manifest | None:
    return json.loads(manifest_path().read_text()) if manifest_path().exists() else None


def binding_version() -> str | None:
    """Version of llama-cpp-python in this environment."""
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return None


def binding_files() -> list[Path]:
    """The folders that make up an installed llama-cpp-python: the package and its dist-info."""
    return [p for p in (site() / "llama_cpp", *site().glob("llama_cpp_python-*.dist-info")) if p.exists()]


def stock_dir() -> Path:
    return site() / "llama_cpp.stock"


def vulkan_devices() -> list[str]:
    """What the installed llama.cpp calls the devices that it uses through Vulkan: a name and its memory each."""
    tool = site() / "llama_cpp" / "bin" / "llama-cli"
    if not tool.exists():
        return []
    r = subprocess.run([tool, "--list-devices"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return [line.split(":", 1)[1].strip() for line in r.stdout.splitlines() if line.strip().startswith("Vulkan")]


def nvidia_cards() -> list[str]:
    """What the driver says of the cards in this machine, one line each."""
    if not shutil.which("nvidia-smi"):
        return []
    r = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return r.stdout.splitlines() if r.returncode == 0 else []
