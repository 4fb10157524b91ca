"""`make check-wheels`: install the wheels into an empty environment without a compiler, and run them on old CPUs.

    python -m tools.release.check_wheels [--dist dist] [--arch x86_64|aarch64]

pip installs both wheels, `mobie-export` exports the bundled model, every command starts, `doctor` finds nothing wrong,
and llama-completion and llama_cpp write. Then the same two on other CPUs, which are qemu-user's (Debian, Ubuntu: apt
install qemu-user): each must take the variant meant for it, and an instruction it does not have would end the process.
AVX-512 is beyond qemu; there the machine at hand is the test.

For another architecture everything runs in qemu, Python and pip too. They are Debian's or Ubuntu's packages for that
architecture, fetched with apt-get and unpacked to build/system-ARCH; nothing is installed.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from mobie_export.runtime import installed, processes

REPO = Path(__file__).resolve().parents[2]
MODEL = REPO / "examples/tiny-moe/tiny-moe-f16.gguf"
PROMPT = "The old man looked at the sea, and"
WRITE = ["-p", PROMPT, "-n", "16", "--temp", "0", "-no-cnv", "--no-warmup", "-t", "2"]

# qemu's CPU model and the variant it should get
OLD_CPUS = {
    "x86_64": {"Nehalem": "sse42", "SandyBridge": "sse42", "Haswell": "haswell"},
    "aarch64": {
        "cortex-a53": "armv8.0_1",
        "cortex-a72": "armv8.0_1",
        "cortex-a76": "armv8.2_2",
        "neoverse-n1": "armv8.2_2",
        "a64fx": "armv8.0_1",  # SVE, but no dot product
        "max,sve-default-vector-length=16": "armv8.6_1",
        "max,sve-default-vector-length=32": "armv8.6_1",
    },
}
EXPORT = "mobie-export"
PACKAGES = ("python3-venv", "libstdc++6")
DEBIAN = {"aarch64": "arm64", "x86_64": "amd64"}
PYTHON_CODE = f"""
import llama_cpp
llama = llama_cpp.Llama(MODEL, n_ctx=256, n_threads=2, verbose=True)
print({PROMPT!r} + llama({PROMPT!r}, max_tokens=16, temperature=0)["choices"][0]["text"])
"""


def call(*command: str | Path, env: dict[str, str]) -> tuple[str, str]:
    """Run; returns stdout and stderr. A failure ends the check."""
    r = subprocess.run([*map(str, command)], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if r.returncode:
        words = " ".join(map(str, command))
        sys.exit(f"FAILED: exit {r.returncode} of {words}\n{processes.tail(r.stdout + r.stderr)}")
    return r.stdout, r.stderr


def only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"need one {pattern} in {folder}, found {len(found)}: make wheels")
    return found[0]


def variant(log: str) -> str:
    """Which of ggml's CPU variants was loaded."""
    found = re.findall(r"loaded CPU backend from \S*libggml-cpu-([\w.]+)\.so", log)
    if len(found) != 1:
        sys.exit(f"FAILED: not one CPU backend but {found}\n{processes.tail(log)}")
    return found[0]


class Environment:
    """A virtual environment with nothing else on the PATH, of this machine or, with system given, emulated."""

    def __init__(self, folder: Path, arch: str, system: Path | None):
        self.folder, self.arch, self.system = folder, arch, system
        self.emulated = [emulator(arch), "-L", system] if system else []
        self.python = folder / "bin/python"
        self.env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")}
        self.env["PATH"] = str(folder / "bin")
        if system:
            # no ensurepip: it starts python by itself, which only the emulator can
            call(*self.emulated, system / "usr/bin/python3", "-m", "venv", "--without-pip", folder, env=self.env)
            (wheel,) = (system / "usr/share/python-wheels").glob("pip-*.whl")
            self.pip = [*self.emulated, self.python, wheel / "pip"]
        else:
            venv.create(folder, with_pip=True)
            self.pip = [self.python, "-m", "pip"]
        for compiler in ("cc", "c++", "gcc", "g++", "clang", "clang++", "cmake"):
            assert shutil.which(compiler, path=self.env["PATH"]) is None

    @property
    def package(self) -> Path:
        (package,) = self.folder.glob("lib/python*/site-packages/llama_cpp")
        return package

    def command(self, name: str) -> list[str | Path]:
        """A command as the user gives it; emulated, what its script would start."""
        if not self.system:
            return [self.folder / "bin" / name]
        return [
            *self.emulated,
            *([self.python, "-m", "mobie_export"] if name == EXPORT else [self.package / "bin" / name]),
        ]


def check_install(dist: Path, e: Environment, model: Path) -> None:
    """Install both wheels, export, run every command."""
    wheels = [only(dist, "mobie_export-*.whl"), only(dist, f"llama_cpp_python-*{e.arch}.whl")]
    call(*e.pip, "install", "--quiet", "--only-binary", ":all:", *wheels, env=e.env)
    call(*e.pip, "check", env=e.env)
    call(*e.command(EXPORT), MODEL, "-o", model, "--method", "sign", env=e.env)
    report = call(*e.command(EXPORT), "doctor", model, env=e.env)[0]
    print("\n".join(f"  {line}" for line in report.splitlines()))
    for name in installed.TOOLS:
        # llama-quantize and llama-imatrix end with 1 after their help
        r = subprocess.run([*e.command(name), "--help"], env=e.env, capture_output=True, text=True)
        if r.returncode not in (0, 1) or "usage" not in (r.stdout + r.stderr).lower():
            sys.exit(f"FAILED: {name} --help, exit {r.returncode}\n{processes.tail(r.stdout + r.stderr)}")
    print(f"  {len(installed.TOOLS)} commands start", flush=True)


def check_writing(e: Environment, model: Path) -> None:
    """llama-completion and llama_cpp here (unless here is emulated) and under every CPU of the table."""
    python = [e.python, "-c", PYTHON_CODE.replace("MODEL", repr(str(model)))]
    texts = set()

    def run(cpu: str, wanted: str | None, prefix: list[str | Path], tool: list[str | Path]) -> None:
        for name, command in ("llama-completion", [*tool, "-m", model, "-v", *WRITE]), ("llama_cpp", python):
            text, log = call(*prefix, *command, env=e.env)
            found = variant(log)
            if wanted and found != wanted:
                sys.exit(f"FAILED: {cpu} took the variant {found}, not {wanted}")
            texts.add(text.strip())
            print(f"  {cpu:<33} {name:<17} variant {found}", flush=True)

    if not e.system:
        run("this machine", None, [], e.command("llama-completion"))
    for cpu, wanted in OLD_CPUS[e.arch].items():
        prefix = [emulator(e.arch), *(["-L", e.system] if e.system else []), "-cpu", cpu]
        run(cpu, wanted, prefix, [e.package / "bin/llama-completion"])
    if len(texts) != 1:
        sys.exit(f"FAILED: the texts differ: {texts}")
    print(f"  all wrote {texts.pop()!r}")


def emulator(arch: str) -> str:
    qemu = shutil.which(f"qemu-{arch}")
    if qemu is None:
        sys.exit(f"need qemu-{arch} (Debian, Ubuntu: apt install qemu-user)")
    return qemu


def foreign_system(arch: str) -> Path:
    """Python, pip and the C++ library of another architecture, as this distribution has them; fetched once.

    apt-get works in a folder of its own, as if nothing were installed, and the packages are only unpacked.
    """
    system = REPO / "build" / f"system-{arch}"
    if system.exists():
        return system
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            sys.exit(f"need {program} to fetch Python for {arch}: run this on Debian or Ubuntu")
    system.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=system.parent) as folder:
        state = Path(folder)
        (state / "status").touch()
        values = {"APT::Architecture": DEBIAN[arch], "APT::Architectures": DEBIAN[arch], "APT::Sandbox::User": ""}
        values |= {"Dir::State": state, "Dir::State::status": state / "status", "Dir::Cache": state}
        apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in values.items())]
        call(*apt, "update", env=dict(os.environ))
        call(*apt, "install", "--yes", "--no-install-recommends", "--download-only", *PACKAGES, env=dict(os.environ))
        for package in sorted((state / "archives").glob("*.deb")):
            call("dpkg-deb", "--extract", package, state / "system", env=dict(os.environ))
        (state / "system").rename(system)
    return system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dist", type=Path, default=Path("dist"))
    parser.add_argument("--arch", choices=[*OLD_CPUS], default=platform.machine())
    args = parser.parse_args()
    system = None if args.arch == platform.machine() else foreign_system(args.arch)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny-mobie.gguf"
        print(f"in an empty environment{', emulated' if system else ''}, no compiler on the PATH:", flush=True)
        e = Environment(Path(folder) / "env", args.arch, system)
        check_install(args.dist, e, model)
        print("on one CPU and another:", flush=True)
        check_writing(e, model)
    print("the wheels work")


if __name__ == "__main__":
    main()
