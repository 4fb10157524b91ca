"""How is the patched tree compiled? With cmake and ninja, as pip installs them."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from mobie_export.runtime import installed
from mobie_export.runtime.processes import run, tail, unavailable
from mobie_export.runtime.upstream import LLAMA

UPSTREAM_TESTS = ("test-quantize-fns", "test-backend-ops", "test-gguf", "test-llama-archs")
CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_BUILD_SERVER=ON",  # llama-cli is made of server parts
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # would download
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DGGML_RPC=ON",  # two files and a tool; does nothing until it is given the address of a server: docs/scale.md
    "-DGGML_OPENMP=OFF",  # ggml's own threads wait less for one that another program holds up: docs/measured/speed.md
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN;$ORIGIN/../lib",
)


def asked_flags() -> list[str]:
    """Further options for cmake, from the environment variable that llama-cpp-python reads, too."""
    return shlex.split(os.environ.get("CMAKE_ARGS", ""))


def cuda_flags(architectures: str | None = None) -> tuple[str, ...]:
    """CMake's flags for the CUDA backend; none, and a line on stderr, where it could not be built or not be used.

    architectures: compute capabilities such as "80,90"; None means those of the cards in this machine
    """
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        missing = "no nvcc found: CUDA's toolkit is not installed, or its bin folder is not on the PATH"
    elif architectures is None and not installed.nvidia_cards():
        missing = "no NVIDIA card found; --cuda-arch 80,90 builds for the cards of another machine"
    else:
        names = "native" if architectures is None else architectures.replace(",", ";")
        return "-DGGML_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={names}"
    print(f"{missing}. Building for the CPU alone.", file=sys.stderr)
    return ()


# What the Vulkan backend is compiled with, beside the compiler glslc: a header of each, and its package.
VULKAN_HEADERS = (("vulkan/vulkan.hpp", "libvulkan-dev"), ("spirv/unified1/spirv.hpp", "spirv-headers"))


def vulkan_flags() -> tuple[str, ...]:
    """CMake's flags for the Vulkan backend. Raises MobieError where something that it is compiled with is not here.

    No device is needed to compile; VULKAN_SDK names the folder of an SDK that lies somewhere else.
    """
    sdk = Path(os.environ.get("VULKAN_SDK", "/usr"))
    glslc = shutil.which("glslc", path=os.pathsep.join([str(sdk / "bin"), os.environ.get("PATH", "")]))
    missing = [] if glslc else [("the shader compiler glslc", "glslc")]
    for header, package in VULKAN_HEADERS:
        command = [os.environ.get("CXX", "c++"), f"-I{sdk / 'include'}", "-x", "c++", "-M", "-"]
        r = subprocess.run(command, input=f"#include <{header}>\n", capture_output=True, text=True)
        missing += [(f"the header {header}", package)] if r.returncode else []
    if missing:
        packages = " ".join(package for _, package in missing)
        raise unavailable(
            f"--vulkan needs {' and '.join(what for what, _ in missing)}",
            "none on the PATH, among the compiler's headers or in VULKAN_SDK",
            todo=f"Debian, Ubuntu: apt install {packages}; or Vulkan's SDK, and its setup-env.sh in this shell",
        )
    return ("-DGGML_VULKAN=ON",)


def program(name: str) -> str:
    """A program of this environment (pip installs cmake and ninja beside python) or of the PATH."""
    path = os.pathsep.join([str(installed.scripts()), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if not found:
        raise unavailable(f"{name} not found", todo=f"pip install {name}")
    return found


def compile_targets(
    home: Path, targets: tuple[str, ...], jobs: int | None = None, flags: tuple[str, ...] = (), folder: str = "build"
) -> Path:
    """Configure and build with cmake and ninja in home/folder; returns the folder of libraries and programs.

    flags, and those of the environment variable CMAKE_ARGS, come after the project's own and so before them in force.
    Progress goes to stderr at every tenth, everything else to build.log. ccache is used where it is installed.
    """
    if not (shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")):
        raise unavailable("no C++ compiler found", wanted="one for C++17", todo="Debian, Ubuntu: apt install g++")
    build, log = home / folder, home / f"{folder}.log"
    env = {**os.environ, "CCACHE_BASEDIR": str(home), "CCACHE_NOHASHDIR": "1", "NINJA_STATUS": "[%f/%t] "}
    cmake = program("cmake")
    configure = [cmake, "-S", str(home / "src" / LLAMA), "-B", str(build), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={program('ninja')}", *CMAKE_FLAGS, *flags]
    if targets and set(targets) & set(UPSTREAM_TESTS):
        configure.append("-DLLAMA_BUILD_TESTS=ON")
    configure += asked_flags()
    used = build / "configured-with.txt"
    if build.exists() and (not used.exists() or used.read_text() != "\n".join(configure)):
        configure.insert(1, "--fresh")  # an option that is not asked for any more would stay in cmake's cache
    run(configure, f"configuring llama.cpp in {build} failed", env=env)

    used.write_text("\n".join(c for c in configure if c != "--fresh"))
    command = [cmake, "--build", str(build), "-j", str(jobs or os.cpu_count() or 2), "--target", *targets]
    print(f"building llama.cpp in {build}, log in {log}", file=sys.stderr)
    shown = -1
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    with open(log, "w") as out, subprocess.Popen(command, env=env, stdout=pipe, stderr=both, text=True) as p:
        for line in p.stdout or ():
            out.write(line)
            step = re.match(r"\[(\d+)/(\d+)\]", line)
            if step and 10 * int(step[1]) // int(step[2]) > shown:
                shown = 10 * int(step[1]) // int(step[2])
                print(f"  {10 * shown:3d} %  ({step[1]} of {step[2]} steps)", file=sys.stderr, flush=True)
    if p.returncode:
        raise unavailable("building llama.cpp failed", tail(log.read_text()), todo=f"see {log}")
    return build / "bin"
