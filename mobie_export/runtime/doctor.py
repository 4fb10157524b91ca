"""Is the installed runtime this package's, does it compute what it should, and can it run a file here?"""

import shutil
import sys
from pathlib import Path

from mobie_export import __version__
from mobie_export.errors import BAD_INPUT, MobieError
from mobie_export.gguf_io import open_model
from mobie_export.progress import available_memory
from mobie_export.runtime import installed, loads, selftest, upstream
from mobie_export.runtime.install import built_from
from mobie_export.runtime.installed import TOOLS
from mobie_export.runtime.libggml import kernel_names
from mobie_export.spec import block as mobie
from mobie_export.spec import metadata

# A key of the manifest -> what it says that the runtime was built from, where it is not what this checkout has.
STALE = {
    "version": "another llama-cpp-python",
    "series": "other patches",
    "kernels": "other kernels",
    "flags": "other build options",
}


def status(patched: bool = True) -> tuple[list[str], list[str]]:
    """(facts, problems): one line each, about what is installed in this environment. patched: whether the patched
    runtime is wanted."""
    facts: list[str] = []
    problems: list[str] = []
    pin, manifest, version = upstream.read_pin(), installed.read_manifest(), installed.binding_version()
    facts.append(f"python      {sys.version.split()[0]} in {sys.prefix}")
    if version is None:
        problems.append("llama_cpp is not installed: run `mobie-export runtime build`")
        return facts, problems
    facts.append(f"llama_cpp   {version} in {installed.site() / 'llama_cpp'}")
    names = kernel_names()
    if not names and not patched:
        return facts, problems
    if not names:
        problems.append("llama_cpp is a stock one that cannot read MoBiE files: run `mobie-export runtime build`")
        return facts, problems
    facts.append(f"kernels     {names[-1]} (this CPU also runs {', '.join(names[:-1]) or 'no other'})")
    if any((installed.site() / "llama_cpp" / "lib").glob("*ggml-cuda*")):
        facts.append(f"cuda        yes; {'; '.join(installed.nvidia_cards()) or 'no card in this machine'}")
    if any((installed.site() / "llama_cpp" / "lib").glob("*ggml-vulkan*")):
        devices = "; ".join(installed.vulkan_devices())
        facts.append(f"vulkan      yes; {devices or 'no GPU with a driver for it in this machine'}")
    if manifest:
        if manifest.get("asked"):
            facts.append(f"built with  {' '.join(manifest['asked'])}")
        wanted = dict(built_from(pin))
        other = [STALE[key] for key in STALE if manifest.get(key) != wanted[key]]
        if other:
            todo = f"pip install the wheel of {__version__}" if manifest.get("wheel") else "mobie-export runtime build"
            problems.append(f"the runtime was built from {' and '.join(other)} than this mobie-export's: {todo}")
    ours, wheel = (installed.site() / "llama_cpp" / "bin").resolve(), bool(manifest and manifest.get("wheel"))
    for name in TOOLS:
        found = shutil.which(name)
        # the wheel's commands are scripts of pip's that start the program
        if found and Path(found).resolve().parent != ours and not (wheel and Path(found).parent == installed.scripts()):
            problems.append(f"{name} on the PATH is {found}, not the patched one: put {installed.scripts()} first")
        elif not (ours / name).exists():
            problems.append(f"{name} is not installed: run `mobie-export runtime build`")
    on_path = any(shutil.which(name) for name in TOOLS)
    facts.append(f"tools       {', '.join(TOOLS)} in {installed.scripts()}")
    if not on_path:
        facts.append("            not on the PATH: activate the environment, or call them with their path")
    return facts, problems


def file_status(path: Path) -> tuple[list[str], list[str], bool]:
    """(facts, problems, whether it needs the patched runtime) of one GGUF: format version, type id, memory."""
    facts: list[str] = []
    problems: list[str] = []
    with open_model(path) as model:
        version, type_id = metadata.FORMAT_VERSION.of(model), metadata.TYPE_ID.of(model)
        exporter, size = metadata.EXPORTER.of(model), model.file_size
        method, coding = metadata.METHOD.of(model), metadata.coding(model)
    if version is None:
        facts.append(f"{path.name}: no MoBiE file; any llama.cpp of its time runs it")
    elif version > mobie.FORMAT_VERSION or coding is None:
        problems.append(
            f"{path.name}: format version {version}, type id {type_id}; this runtime reads versions up to "
            f"{mobie.FORMAT_VERSION}, type ids {' and '.join(map(str, mobie.BY_TYPE))}: install a newer mobie-export"
        )
    elif coding.stock:
        facts.append(f"{path.name}: experts in {coding.type_name}, method {method}, written by {exporter}")
        facts.append("            any llama.cpp that knows this type runs it, patched or not")
    else:
        facts.append(f"{path.name}: MoBiE format {version}, method {method}, written by {exporter}")
    if found := loads.problem(path):
        problems.append(f"{path.name}: llama.cpp does not load it: {found}")
    memory = available_memory()
    if memory is not None:
        facts.append(f"size        {size / 2**30:.2f} GiB, {memory / 2**30:.1f} GiB of memory available")
        if size > memory:
            facts.append("the file is larger than that: it runs, paging from disk, slowly")
    return facts, problems, coding is None or not coding.stock


def doctor(path: Path | None = None) -> bool:
    """Print what is installed, whether it can run the file, and what to do if not. Returns whether all is well."""
    if path is not None and not path.is_file():
        raise MobieError(BAD_INPUT, f"there is no {path}", wanted="a GGUF")
    of_file, against_it, patched = file_status(path) if path is not None else ([], [], True)
    facts, problems = status(patched)
    facts, problems = facts + of_file, problems + against_it
    if kernel_names():
        tested, failures = selftest.run()
        facts, problems = facts + tested, problems + [str(f) for f in failures]
    for line in facts:
        print(line)
    for line in problems:
        print(f"problem: {line}")
    print("all is well" if not problems else f"{len(problems)} problem(s)")
    return not problems
