"""How does what was compiled come into this Python environment, and out of it again?"""

import importlib.metadata
import json
import os
import shutil
import sys
from pathlib import Path

from mobie_export.runtime import installed, upstream
from mobie_export.runtime.cmake import CMAKE_FLAGS, asked_flags
from mobie_export.runtime.installed import TOOLS, BuiltFrom
from mobie_export.runtime.patching import kernels_digest, series_digest
from mobie_export.runtime.processes import run, unavailable
from mobie_export.runtime.upstream import Pin


def built_from(pin: Pin) -> BuiltFrom:
    """Of this package's pin, patches, kernels and flags."""
    return {
        "package": pin.package,
        "version": pin.version,
        "series": series_digest(pin),
        "kernels": kernels_digest(),
        "flags": [*CMAKE_FLAGS],
    }


def install(home: Path, binaries: Path, flags: tuple[str, ...] = ()) -> None:
    """Put the libraries and tools in `binaries` and the binding of the sources in `home` into this environment.

    flags: what cmake was told besides CMAKE_FLAGS and CMAKE_ARGS
    """
    pin = upstream.read_pin()
    links = [installed.scripts() / name for name in TOOLS]
    for link in links:
        if link.exists() and not link.is_symlink():
            raise unavailable(f"{link} is in the way", "a file that is not ours", "a free name", "move it away")
    if installed.read_manifest() is None and installed.binding_files() and not installed.stock_dir().exists():
        # somebody's own llama-cpp-python: keep it for `restore`
        installed.stock_dir().mkdir(exist_ok=True)
        for p in installed.binding_files():
            p.rename(installed.stock_dir() / p.name)
    if installed.read_manifest() is None or installed.binding_version() != pin.version:
        install_binding(home)

    package = installed.site() / "llama_cpp"
    lib, tools = package / "lib", package / "bin"
    for folder in (lib, tools):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for library in sorted(binaries.glob("lib*")):
        shutil.copy2(library, lib / library.name, follow_symlinks=False)
    for link in links:
        shutil.copy2(binaries / link.name, tools / link.name)
        link.unlink(missing_ok=True)
        link.symlink_to(tools / link.name)
    manifest = {**built_from(pin), "wheel": False, "asked": [*flags, *asked_flags()], "links": [*map(str, links)]}
    installed.manifest_path().write_text(json.dumps(manifest, indent=1) + "\n")
    print(
        f"installed: llama_cpp {pin.version} with MoBiE, and {', '.join(TOOLS)} in {installed.scripts()}",
        file=sys.stderr,
    )


def install_binding(home: Path) -> None:
    """The llama_cpp package without libraries: those come from our build. Nothing is compiled."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-warn-script-location"]
    env = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}
    command = [*pip, "--force-reinstall", "--no-deps", str(home / "src")]
    run(command, "installing the llama_cpp binding failed", env=env)
    needs = [r for r in importlib.metadata.requires("llama-cpp-python") or [] if "extra ==" not in r]
    run([*pip, *needs], "installing what llama_cpp needs failed")


def restore() -> None:
    """Take the patched runtime out of this environment and bring back what was there before."""
    manifest = installed.read_manifest()
    if manifest is None:
        raise unavailable("nothing to restore", "no patched runtime in this environment")
    if manifest.get("wheel"):
        raise unavailable(
            "nothing to restore", "the runtime was installed as a wheel", todo=f"pip uninstall {manifest['package']}"
        )
    for link in map(Path, manifest["links"]):
        if link.is_symlink() and link.resolve().parent == (installed.site() / "llama_cpp" / "bin").resolve():
            link.unlink()
    for p in installed.binding_files():
        shutil.rmtree(p)
    if installed.stock_dir().exists():
        for p in installed.stock_dir().iterdir():
            p.rename(installed.site() / p.name)
        installed.stock_dir().rmdir()
        print(f"restored: llama-cpp-python {installed.binding_version()}", file=sys.stderr)
    else:
        print(
            "removed: there was no llama-cpp-python before; "
            f"`pip install llama-cpp-python=={manifest['version']}` compiles the stock one",
            file=sys.stderr,
        )
