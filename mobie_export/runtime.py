"""The patched llama.cpp: find its sources, build it, put it into this Python environment, check it, take it out again.

Layout while building (the folder survives, so that a second build is incremental):

    $MOBIE_CACHE or ~/.cache/mobie-export/
        llama_cpp_python-0.3.36.tar.gz          the pinned sdist, verified
        runtime-<digest of pin and patches>/
            src/                                unpacked, patched, kernels copied in
            build/                              cmake (build-cuda/ with --cuda)
        converter-<digest of pin and parts>/    upstream's convert_hf_to_gguf.py, see `converter`

and once installed, inside the environment's site-packages:

    llama_cpp/lib/*.so          the libraries, loaded by llama_cpp without any environment variable
    llama_cpp/bin/llama-*       the tools; links in the environment's bin/ make them commands
    llama_cpp/mobie-runtime.json    what was installed, for `doctor` and `restore`
    llama_cpp.stock/            what was there before, if anything
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from mobie_export import __version__, selftest
from mobie_export.errors import BAD_INPUT, BAD_OUTPUT, NO_RUNTIME, MobieError


def shipped(name: str) -> Path:
    """A folder of the project beside the package in a checkout, inside it in an installed wheel (pyproject.toml)."""
    package = Path(__file__).resolve().parent
    return package / name if (package / name).is_dir() else package.parent / name


PATCHES = shipped("patches")
KERNELS = shipped("kernels_cpp")
LLAMA = Path("vendor") / "llama.cpp"  # in the sdist
CONVERTER = (
    "convert_hf_to_gguf.py",
    "conversion",
    "gguf-py/gguf",
    "models/templates",
    "src/llama-vocab.cpp",  # which pre-tokenizers there are
    "LICENSE",
)  # in llama.cpp; the script finds the rest
TOOLS = (
    "llama-cli",
    "llama-completion",
    "llama-bench",
    "llama-perplexity",
    "llama-quantize",
    "llama-imatrix",
    "llama-server",
)
PLAINEST_CPUS = ("sse42", "armv8.0_1")  # of the wheels' variants, see tools/build_wheels.py
UPSTREAM_TESTS = ("test-quantize-fns", "test-backend-ops", "test-gguf", "test-llama-archs")
CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_BUILD_SERVER=ON",  # llama-cli is made of server parts
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # would download
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN;$ORIGIN/../lib",
)


def unavailable(what: str, found: str = "", wanted: str = "", todo: str = "") -> MobieError:
    return MobieError(NO_RUNTIME, what, found, wanted, todo)


# --- the pin ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pin:
    """The upstream release everything is built from (patches/pin.toml)."""

    package: str
    version: str
    sha256: str
    llama_cpp: str
    ggml: str

    @property
    def sdist(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}.tar.gz"


def read_pin() -> Pin:
    return Pin(**tomllib.loads((PATCHES / "pin.toml").read_text()))


def cache_dir() -> Path:
    """MOBIE_CACHE, or the user's cache folder as XDG defines it; made where it is not there. Raises MobieError."""
    given = os.environ.get("MOBIE_CACHE")
    folder = Path(given).resolve() if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = folder if given else folder / "mobie-export"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        todo = "set MOBIE_CACHE to a folder that can be written"
        raise MobieError(BAD_OUTPUT, f"cannot make the cache {folder}", e.strerror or str(e), todo=todo) from None
    return folder


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# --- sources ----------------------------------------------------------------------------------------------------------


def fetch_sdist(pin: Pin, given: Path | None = None) -> Path:
    """The verified sdist: the file given, the one in the cache, or pip's download. Raises MobieError."""
    path = given or cache_dir() / pin.sdist
    if given is None and not path.exists():
        print(f"fetching {pin.sdist} with pip", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        what = f"{pin.package}=={pin.version}"
        command = ["download", "--no-deps", "--no-binary", pin.package, "--dest", str(path.parent), what]
        run([sys.executable, "-m", "pip", "--quiet", *command], f"could not download {what}")
    if not path.is_file():
        raise unavailable(
            f"there is no {path}", "", f"the release {pin.sdist}", "leave --sdist out to fetch it with pip"
        )
    found = sha256(path)
    if found != pin.sha256:
        if given is None:
            path.unlink()
        todo = "give the right file" if given else "the file has been removed: run the command again"
        raise unavailable(f"{path} is not the release it should be", f"SHA-256 {found}", f"SHA-256 {pin.sha256}", todo)
    return path


def patch_files() -> list[Path]:
    return sorted(PATCHES.glob("*.patch"))


def series_digest(pin: Pin) -> str:
    """Changes with the pin and with the patches, not with the kernels: those are copied anew at every build."""
    h = hashlib.sha256(pin.sha256.encode())
    for p in patch_files():
        h.update(p.read_bytes())
    return h.hexdigest()[:12]


def kernel_files() -> list[Path]:
    """What a build takes of kernels_cpp/, relative to it."""
    files = (p.relative_to(KERNELS) for p in KERNELS.rglob("*") if p.is_file())
    return sorted(p for p in files if "tests" not in p.parts)


def kernels_digest() -> str:
    h = hashlib.sha256()
    for rel in kernel_files():
        h.update(f"{rel.as_posix()}\0".encode() + (KERNELS / rel).read_bytes())
    return h.hexdigest()[:12]


def unpack(sdist: Path, to: Path) -> None:
    """Unpack the sdist so that `to` holds its top level; atomic, so that a killed run leaves no half tree."""
    part = to.with_name(to.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(sdist) as tar:
        tar.extractall(part, filter="data")
    (top,) = part.iterdir()
    top.rename(to)
    part.rmdir()


def unpack_converter(sdist: Path, to: Path) -> None:
    """Take upstream's Hugging Face converter, with its gguf package and its licence, out of the sdist; atomic."""
    part = to.with_name(to.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    inside = re.compile(rf"[^/]+/{LLAMA.as_posix()}/((?:{'|'.join(map(re.escape, CONVERTER))})(?:/.*)?)")
    with tarfile.open(sdist) as tar:
        for member in tar:
            if found := inside.fullmatch(member.name):
                member.name = found[1]
                tar.extract(member, part, filter="data")
    missing = [name for name in CONVERTER if not (part / name).exists()]
    if missing:
        raise unavailable(f"{sdist} holds no converter", f"no {', '.join(missing)} in {LLAMA}")
    part.rename(to)


def converter(sdist: Path | None = None) -> Path:
    """The folder with the pinned tree's convert_hf_to_gguf.py: the wheel's own, or taken from the sdist once.

    The script needs torch and transformers (mobie-export[calibrate]) and puts the gguf package beside it first on its
    path, so run it in a process of its own. Raises MobieError where the sdist has to be fetched and cannot be.
    """
    if shipped("converter").is_dir():
        return shipped("converter")
    pin = read_pin()
    parts = hashlib.sha256("".join((pin.sha256, *CONVERTER)).encode()).hexdigest()
    folder = cache_dir() / f"converter-{parts[:12]}"
    if not folder.exists():
        unpack_converter(fetch_sdist(pin, sdist), folder)
    return folder


def pre_tokenizers() -> list[str]:
    """The names that the pinned llama.cpp knows as tokenizer.ggml.pre. Raises MobieError as `converter` does."""
    text = (converter() / "src" / "llama-vocab.cpp").read_text()
    return sorted(set(re.findall(r'tokenizer_pre == "([^"]+)"', text)))


def apply_series(llama: Path, series: list[Path]) -> None:
    """Apply the patches to a llama.cpp tree, once: a tree that already has this series is left as it is.

    Raises MobieError; the tree may then be half patched and is of no more use.
    """
    import patch_ng

    done = llama / ".mobie-patched"
    want = "".join(f"{p.name} {sha256(p)}\n" for p in series)
    if done.exists():
        if done.read_text() == want:
            return
        raise unavailable(f"{llama} is patched with another series", todo="remove the folder and build again")
    for p in series:
        parsed = patch_ng.fromfile(str(p))
        if not parsed or not parsed.apply(root=str(llama)):
            raise unavailable(
                f"{p.name} does not apply to {llama}",
                wanted=f"the llama.cpp of {read_pin().sdist} as it was released",
                todo="remove the folder and build again",
            )
    done.write_text(want)


def copy_kernels(llama: Path) -> None:
    """Mirror kernels_cpp/ into the tree; files that did not change keep their time, so that nothing is rebuilt."""
    to = llama / "ggml" / "src" / "mobie"
    wanted = set(kernel_files())
    for rel in wanted:
        target = to / rel
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != (KERNELS / rel).read_bytes():
            shutil.copyfile(KERNELS / rel, target)
    for old in [p for p in to.rglob("*") if p.is_file() and p.relative_to(to) not in wanted]:
        old.unlink()


def prepare(sdist: Path | None = None) -> Path:
    """Fetch, verify, unpack and patch. Returns the folder with src/ (and later build/)."""
    pin = read_pin()
    home = cache_dir() / f"runtime-{series_digest(pin)}"
    if not (home / "src").exists():
        archive = fetch_sdist(pin, sdist)
        home.mkdir(parents=True, exist_ok=True)
        fresh = home / "src.new"
        shutil.rmtree(fresh, ignore_errors=True)
        unpack(archive, fresh)
        apply_series(fresh / LLAMA, patch_files())
        fresh.rename(home / "src")
    apply_series(home / "src" / LLAMA, patch_files())
    copy_kernels(home / "src" / LLAMA)
    return home


# --- build ------------------------------------------------------------------------------------------------------------


def run(command: list[str], failure: str, **kwargs) -> None:
    """Run a command; on failure raise MobieError with the end of what it printed."""
    r = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    if r.returncode:
        raise unavailable(
            failure, f"exit code {r.returncode} of {Path(command[0]).name}, which ended with\n{tail(r.stdout)}"
        )


def tail(text: str, lines: int = 40) -> str:
    return "\n".join(text.splitlines()[-lines:])


def asked_flags() -> list[str]:
    """Further options for cmake, from the environment variable that llama-cpp-python reads, too."""
    return shlex.split(os.environ.get("CMAKE_ARGS", ""))


def program(name: str) -> str:
    """A program of this environment (pip installs cmake and ninja beside python) or of the PATH."""
    path = os.pathsep.join([str(scripts()), os.environ.get("PATH", "")])
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
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with open(log, "w") as out, subprocess.Popen(command, env=env, **pipes) as p:
        for line in p.stdout:
            out.write(line)
            step = re.match(r"\[(\d+)/(\d+)\]", line)
            if step and 10 * int(step[1]) // int(step[2]) > shown:
                shown = 10 * int(step[1]) // int(step[2])
                print(f"  {10 * shown:3d} %  ({step[1]} of {step[2]} steps)", file=sys.stderr, flush=True)
    if p.returncode:
        raise unavailable("building llama.cpp failed", tail(log.read_text()), todo=f"see {log}")
    return build / "bin"


# --- install ----------------------------------------------------------------------------------------------------------


def site() -> Path:
    return Path(sysconfig.get_path("platlib"))


def scripts() -> Path:
    return Path(sysconfig.get_path("scripts"))


def manifest_path() -> Path:
    return site() / "llama_cpp" / "mobie-runtime.json"


def read_manifest() -> dict | None:
    return json.loads(manifest_path().read_text()) if manifest_path().exists() else None


def installed_binding() -> str | None:
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


def cuda_flags(architectures: str | None = None) -> tuple[str, ...]:
    """CMake's flags for the CUDA backend; none, and a line on stderr, where it could not be built or not be used.

    architectures: compute capabilities such as "80,90"; None means those of the cards in this machine
    """
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        missing = "no nvcc found: CUDA's toolkit is not installed, or its bin folder is not on the PATH"
    elif architectures is None and not nvidia_cards():
        missing = "no NVIDIA card found; --cuda-arch 80,90 builds for the cards of another machine"
    else:
        names = "native" if architectures is None else architectures.replace(",", ";")
        return "-DGGML_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={names}"
    print(f"{missing}. Building for the CPU alone.", file=sys.stderr)
    return ()


def nvidia_cards() -> list[str]:
    """What the driver says of the cards in this machine, one line each."""
    if not shutil.which("nvidia-smi"):
        return []
    r = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return r.stdout.splitlines() if r.returncode == 0 else []


def build(
    jobs: int | None = None, sdist: Path | None = None, cuda: bool = False, cuda_architectures: str | None = None
) -> None:
    """Build the patched runtime, install libraries, tools and the Python binding into this environment, and test them.

    cuda: with the CUDA backend where that is possible, see `cuda_flags`
    Raises MobieError; where the self-test fails, what was built stays installed.
    """
    if (read_manifest() or {}).get("wheel"):
        raise unavailable(
            "this environment already has the patched runtime, installed as a wheel",
            wanted="an environment for the one to be built",
            todo=f"pip uninstall {read_pin().package}",
        )
    flags = cuda_flags(cuda_architectures) if cuda else ()
    home = prepare(sdist)
    folder = "build-cuda" if flags else "build"
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


def install(home: Path, binaries: Path, flags: tuple[str, ...] = ()) -> None:
    """Put the libraries and tools in `binaries` and the binding of the sources in `home` into this environment.

    flags: what cmake was told besides CMAKE_FLAGS and CMAKE_ARGS
    """
    pin = read_pin()
    links = [scripts() / name for name in TOOLS]
    for link in links:
        if link.exists() and not link.is_symlink():
            raise unavailable(f"{link} is in the way", "a file that is not ours", "a free name", "move it away")
    if read_manifest() is None and binding_files() and not stock_dir().exists():
        # somebody's own llama-cpp-python: keep it for `restore`
        stock_dir().mkdir(exist_ok=True)
        for p in binding_files():
            p.rename(stock_dir() / p.name)
    if read_manifest() is None or installed_binding() != pin.version:
        install_binding(home)

    package = site() / "llama_cpp"
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
    manifest_path().write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"installed: llama_cpp {pin.version} with MoBiE, and {', '.join(TOOLS)} in {scripts()}", file=sys.stderr)


def built_from(pin: Pin) -> dict:
    """What decides whether an installed runtime is the one of this checkout: for the manifest."""
    return {
        "package": pin.package,
        "version": pin.version,
        "series": series_digest(pin),
        "kernels": kernels_digest(),
        "flags": [*CMAKE_FLAGS],
    }


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
    manifest = read_manifest()
    if manifest is None:
        raise unavailable("nothing to restore", "no patched runtime in this environment")
    if manifest.get("wheel"):
        raise unavailable(
            "nothing to restore", "the runtime was installed as a wheel", todo=f"pip uninstall {manifest['package']}"
        )
    for link in map(Path, manifest["links"]):
        if link.is_symlink() and link.resolve().parent == (site() / "llama_cpp" / "bin").resolve():
            link.unlink()
    for p in binding_files():
        shutil.rmtree(p)
    if stock_dir().exists():
        for p in stock_dir().iterdir():
            p.rename(site() / p.name)
        stock_dir().rmdir()
        print(f"restored: llama-cpp-python {installed_binding()}", file=sys.stderr)
    else:
        print(
            "removed: there was no llama-cpp-python before; "
            f"`pip install llama-cpp-python=={manifest['version']}` compiles the stock one",
            file=sys.stderr,
        )


# --- check ------------------------------------------------------------------------------------------------------------


# A key of the manifest -> what it says that the runtime was built from, where it is not what this checkout has.
STALE = {
    "version": "another llama-cpp-python",
    "series": "other patches",
    "kernels": "other kernels",
    "flags": "other build options",
}


def kernel_names() -> list[str]:
    """Instruction sets the installed ggml-cpu has MoBiE kernels for on this CPU, the chosen one last.

    Empty when the library does not know the type. Asking for a symbol is safe on any llama.cpp; asking ggml for the
    name of an unknown type id is not, it would read past a table.
    """
    # One library, or (in the wheel) one for each kind of CPU: each has all our kernels, the plainest loads everywhere.
    lib = site() / "llama_cpp" / "lib"
    names = ("libggml-cpu.so", "libggml-cpu.dylib", "ggml-cpu.dll", *(f"libggml-cpu-{v}.so" for v in PLAINEST_CPUS))
    path = next((lib / name for name in names if (lib / name).exists()), None)
    if path is None:
        return []
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "mobie_kernels_best"):
        return []
    pointer = ctypes.POINTER(ctypes.c_char_p)  # the first member of mobie_kernels is its name
    library.mobie_kernels_all.restype = ctypes.POINTER(pointer)
    library.mobie_kernels_all.argtypes = [ctypes.POINTER(ctypes.c_int)]
    library.mobie_kernels_best.restype = pointer
    n = ctypes.c_int()
    every = library.mobie_kernels_all(ctypes.byref(n))
    names = [every[i][0].decode() for i in range(n.value)]
    best = library.mobie_kernels_best()[0].decode()
    return [*(name for name in names if name != best), best]


def status() -> tuple[list[str], list[str]]:
    """(facts, problems): one line each, about what is installed in this environment."""
    facts, problems = [], []
    pin, manifest, version = read_pin(), read_manifest(), installed_binding()
    facts.append(f"python      {sys.version.split()[0]} in {sys.prefix}")
    if version is None:
        problems.append("llama_cpp is not installed: run `mobie-export runtime build`")
        return facts, problems
    facts.append(f"llama_cpp   {version} in {site() / 'llama_cpp'}")
    names = kernel_names()
    if not names:
        problems.append("llama_cpp is a stock one that cannot read MoBiE files: run `mobie-export runtime build`")
        return facts, problems
    facts.append(f"kernels     {names[-1]} (this CPU also runs {', '.join(names[:-1]) or 'no other'})")
    if any((site() / "llama_cpp" / "lib").glob("*ggml-cuda*")):
        facts.append(f"cuda        yes; {'; '.join(nvidia_cards()) or 'no card in this machine'}")
    if manifest:
        if manifest.get("asked"):
            facts.append(f"built with  {' '.join(manifest['asked'])}")
        wanted = built_from(pin)
        other = [STALE[key] for key in STALE if manifest.get(key) != wanted[key]]
        if other:
            todo = f"pip install the wheel of {__version__}" if manifest.get("wheel") else "mobie-export runtime build"
            problems.append(f"the runtime was built from {' and '.join(other)} than this mobie-export's: {todo}")
    ours, wheel = (site() / "llama_cpp" / "bin").resolve(), bool(manifest and manifest.get("wheel"))
    for name in TOOLS:
        found = shutil.which(name)
        # the wheel's commands are scripts of pip's that start the program
        if found and Path(found).resolve().parent != ours and not (wheel and Path(found).parent == scripts()):
            problems.append(f"{name} on the PATH is {found}, not the patched one: put {scripts()} first")
        elif not (ours / name).exists():
            problems.append(f"{name} is not installed: run `mobie-export runtime build`")
    on_path = any(shutil.which(name) for name in TOOLS)
    facts.append(f"tools       {', '.join(TOOLS)} in {scripts()}")
    if not on_path:
        facts.append("            not on the PATH: activate the environment, or call them with their path")
    return facts, problems


def file_status(path: Path) -> tuple[list[str], list[str]]:
    """(facts, problems) about running one GGUF here: format version, type id, memory."""
    from mobie_export import loads
    from mobie_export.gguf_io import open_model
    from mobie_export.spec import block, metadata

    facts, problems = [], []
    with open_model(path) as model:
        version, type_id = metadata.FORMAT_VERSION.of(model), metadata.TYPE_ID.of(model)
        exporter, size = metadata.EXPORTER.of(model), model.file_size
    if version is None:
        facts.append(f"{path.name}: no MoBiE file; any llama.cpp of its time runs it")
    elif version > block.FORMAT_VERSION or type_id != block.TYPE_ID:
        problems.append(
            f"{path.name}: format version {version}, type id {type_id}; this runtime reads versions up to "
            f"{block.FORMAT_VERSION}, type id {block.TYPE_ID}: install a newer mobie-export"
        )
    else:
        facts.append(f"{path.name}: MoBiE format {version}, written by {exporter}")
    if found := loads.problem(path):
        problems.append(f"{path.name}: llama.cpp does not load it: {found}")
    memory = available_memory()
    if memory is not None:
        facts.append(f"size        {size / 2**30:.2f} GiB, {memory / 2**30:.1f} GiB of memory available")
        if size > memory:
            facts.append("the file is larger than that: it runs, paging from disk, slowly")
    return facts, problems


def available_memory() -> int | None:
    """Bytes of memory free for a process, where the system says so."""
    try:
        with open("/proc/meminfo") as f:
            fields = dict(line.split(":", 1) for line in f)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def doctor(path: Path | None = None) -> bool:
    """Print what is installed, whether it can run the file, and what to do if not. Returns whether all is well."""
    if path is not None and not path.is_file():
        raise MobieError(BAD_INPUT, f"there is no {path}", wanted="a GGUF")
    facts, problems = status()
    if path is not None:
        more = file_status(path)
        facts, problems = facts + more[0], problems + more[1]
    if kernel_names():
        tested, failures = selftest.run()
        facts, problems = facts + tested, problems + [str(f) for f in failures]
    for line in facts:
        print(line)
    for line in problems:
        print(f"problem: {line}")
    print("all is well" if not problems else f"{len(problems)} problem(s)")
    return not problems
