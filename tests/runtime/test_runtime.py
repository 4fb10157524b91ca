"""Pin, patch series, installed runtime: what `mobie-export runtime` and `doctor` promise."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mobie_export as mobie
from mobie_export import cli, gguf_io
from mobie_export.cli import Exit
from mobie_export.errors import BAD_INPUT, NO_RUNTIME, MobieError
from mobie_export.runtime import build, cmake, doctor, install, installed, libggml, loads, patching, selftest, upstream
from tests import exporting, models


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """The llama.cpp of the pinned sdist, as released."""
    to = tmp_path_factory.mktemp("pristine") / "src"
    upstream.unpack(upstream.fetch_sdist(upstream.read_pin()), to)
    return to / upstream.LLAMA


def test_series_applies_to_a_clean_copy_and_only_once(pristine):
    header = pristine / "ggml/include/ggml.h"
    assert "GGML_TYPE_MOBIE" not in header.read_text()
    patching.apply_series(pristine, patching.patch_files())
    patched = header.read_text()
    assert patched.count("GGML_TYPE_MOBIE") == 1
    patching.apply_series(pristine, patching.patch_files())
    assert header.read_text() == patched


def test_series_holds_call_sites_only():
    """It makes no files: those come from kernels_cpp/. And the table says of each patch what it is for."""
    texts = {p.stem: p.read_text() for p in patching.patch_files()}
    assert not [
        name for name, text in texts.items() if re.search(r"^(new file|--- /dev/null|rename)", text, re.MULTILINE)
    ]
    table = (upstream.PATCHES / "README.md").read_text().split("\n\nA CPU-only hook")[0]
    assert re.findall(r"^\| `(\d{4}-[\w-]+)` \|", table, re.MULTILINE) == list(texts)


def test_every_backend_of_the_pinned_tree_has_been_read(pristine):
    """A new one is refused the type without a line of ours; patches/README.md says what it would have answered."""
    backends = {p.name for p in (pristine / "ggml/src").glob("ggml-*") if p.is_dir()}
    table = (upstream.PATCHES / "README.md").read_text().split("## Backends")[1].split("## Applying")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `ggml-")]
    assert {name.strip("` ") for row in rows for name in row.split(",")} == backends
    gate = (patching.KERNELS / "ggml_glue/mobie-ggml-backend.h").read_text()
    assert set(re.findall(r'strcmp\(name, "(\w+)"\)', gate)) == {"CPU", "CUDA", "RPC", "Vulkan"}, "and the table"


def test_cuda_without_toolkit_or_card_builds_for_the_cpu(monkeypatch, capsys):
    have = {}
    monkeypatch.setattr(shutil, "which", have.get)
    assert cmake.cuda_flags() == ()
    assert "no nvcc" in capsys.readouterr().err
    assert cmake.cuda_flags("80,90") == ()
    have["nvcc"] = "/opt/cuda/bin/nvcc"
    capsys.readouterr()
    assert cmake.cuda_flags() == ()
    assert "no NVIDIA card" in capsys.readouterr().err
    flags = cmake.cuda_flags("80,90")
    assert "-DGGML_CUDA=ON" in flags and "-DCMAKE_CUDA_ARCHITECTURES=80;90" in flags
    assert "-DCMAKE_CUDA_COMPILER=/opt/cuda/bin/nvcc" in flags
    monkeypatch.setattr(installed, "nvidia_cards", lambda: ["GPU 0: a card"])
    assert "-DCMAKE_CUDA_ARCHITECTURES=native" in cmake.cuda_flags()


def test_vulkan_needs_what_it_is_compiled_with(monkeypatch, tmp_path):
    """The packages of what is missing, in one message; an SDK somewhere else will do."""
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setattr(cmake, "VULKAN_HEADERS", (("vulkan/none.hpp", "libvulkan-dev"), ("cstdint", "spirv-headers")))
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(MobieError) as e:
        cmake.vulkan_flags()
    assert e.value.kind == NO_RUNTIME and "vulkan/none.hpp" in str(e.value) and "cstdint" not in str(e.value)
    assert "apt install glslc libvulkan-dev;" in str(e.value)
    (tmp_path / "include/vulkan").mkdir(parents=True)
    (tmp_path / "include/vulkan/none.hpp").touch()
    monkeypatch.setenv("VULKAN_SDK", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name, path: f"{path.split(':')[0]}/{name}")
    assert cmake.vulkan_flags() == ("-DGGML_VULKAN=ON",)


def test_a_patch_that_does_not_apply_is_an_error(tmp_path):
    (tmp_path / "ggml/include").mkdir(parents=True)
    (tmp_path / "ggml/include/ggml.h").write_text("another file\n")
    with pytest.raises(MobieError, match=r"0001-ggml-type.patch does not apply") as e:
        patching.apply_series(tmp_path, patching.patch_files())
    assert e.value.kind == NO_RUNTIME
    assert not (tmp_path / ".mobie-patched").exists()


def test_a_wrong_sdist_is_refused(tmp_path):
    wrong = tmp_path / upstream.read_pin().sdist
    wrong.write_bytes(b"something else")
    with pytest.raises(MobieError, match="SHA-256"):
        upstream.fetch_sdist(upstream.read_pin(), wrong)
    assert wrong.exists(), "a file of the user's is not ours to remove"


def test_a_wrong_download_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("MOBIE_CACHE", str(tmp_path))
    wrong = tmp_path / upstream.read_pin().sdist
    wrong.write_bytes(b"cut off")
    with pytest.raises(MobieError, match="run the command again"):
        upstream.fetch_sdist(upstream.read_pin())
    assert not wrong.exists()


def test_installed_runtime_has_the_kernels(runtime_tools):
    names = libggml.kernel_names()
    assert "ref" in names
    facts, problems = doctor.status()
    assert not [p for p in problems if "PATH" not in p], problems
    assert any(names[-1] in f for f in facts)


def test_installed_runtime_has_the_search_for_signs(runtime_tools):
    pytest.importorskip("torch")
    from mobie_export.methods.calibrated import compiled

    names, searches = libggml.kernel_names(), [s.name for s in compiled.every()]
    assert searches[0] == "plain" and ("avx2" in names) <= ("avx2" in searches), searches
    assert ("avx512" in names) <= (searches[-1] == "avx512"), searches


def test_amx_is_left_out_unless_asked_for(runtime_tools):
    """Its buffers copy the weights at loading and hold some that no operation reads. Where this machine has no AMX,
    the flags of the build are tried for one that has."""
    build = patching.home() / "build"
    if not build.exists() or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("no build of the runtime for x86-64 here")
    rule = re.search(r"build \S*ggml-cpu\.cpp\.o:.*?\n\n", (build / "build.ninja").read_text(), re.DOTALL)[0]
    flags = re.search(r"FLAGS = (.*)", rule)[1].replace("-march=native", "-march=sapphirerapids").split()
    assert "-march=sapphirerapids" in flags, "not a build for this machine"

    def macros(flags: list[str]) -> str:
        command = [os.environ.get("CXX", "c++"), *flags, "-dM", "-E", "-x", "c++", os.devnull]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "__AMX_INT8__" in macros([f for f in flags if not f.startswith("-mno-amx")])
    assert "__AMX" not in macros(flags) and "__AVX512VNNI__" in macros(flags)
    symbols = (installed.site() / "llama_cpp" / "lib" / "libggml-cpu.so").read_bytes()
    assert b"ggml_cpu_has_amx_int8" in symbols and b"ggml_backend_amx_buffer_type" not in symbols


@pytest.mark.parametrize(
    "key, words", [("kernels", "other kernels"), ("series", "other patches"), ("flags", "other build options")]
)
def test_doctor_notices_what_a_runtime_was_built_from(runtime_tools, monkeypatch, key, words):
    manifest = installed.read_manifest()
    assert not [p for p in doctor.status()[1] if "was built from" in p]
    for found in (manifest | {key: "something else"}, {k: v for k, v in manifest.items() if k != key}):
        monkeypatch.setattr(installed, "read_manifest", lambda found=found: found)
        (problem,) = [p for p in doctor.status()[1] if "was built from" in p]
        assert words in problem and "mobie-export runtime build" in problem


def test_a_kernel_that_changed_changes_the_digest(tmp_path, monkeypatch):
    shutil.copytree(patching.KERNELS, tmp_path / "kernels")
    before = patching.kernels_digest()
    monkeypatch.setattr(patching, "KERNELS", tmp_path / "kernels")
    assert patching.kernels_digest() == before
    (tmp_path / "kernels" / "tests" / "check_kernels.cpp").write_text("")  # no part of the runtime
    assert patching.kernels_digest() == before
    with open(tmp_path / "kernels" / "kernels_avx2.cpp", "a") as f:
        f.write("\n")
    assert patching.kernels_digest() != before


def test_options_for_cmake_do_not_outlive_their_request(tmp_path, monkeypatch):
    """An option of an earlier build stays in cmake's cache unless it is configured afresh."""
    commands = []
    monkeypatch.setattr(cmake, "run", lambda command, *a, **k: commands.append(command))
    monkeypatch.setattr(cmake, "program", lambda name: shutil.which("true"))
    (tmp_path / "build").mkdir()
    for asked in ("-DGGML_LLAMAFILE=OFF '-DCMAKE_CXX_FLAGS=-O1 -g'", "", ""):
        monkeypatch.setenv("CMAKE_ARGS", asked)
        cmake.compile_targets(tmp_path, ("llama",))
    assert commands[0][-2:] == ["-DGGML_LLAMAFILE=OFF", "-DCMAKE_CXX_FLAGS=-O1 -g"]
    assert "--fresh" in commands[1] and "-DGGML_LLAMAFILE=OFF" not in commands[1]
    assert "--fresh" not in commands[2]


def test_a_failed_self_test_is_the_end_of_a_build(monkeypatch, capsys):
    failure = selftest.Failure("weights in Q8_0 with plain attention", "CPU", "crashed (SIGSEGV)", "leave it out")
    monkeypatch.setattr(selftest, "run", lambda: (["19 of 20"], [failure]))
    for name in ("prepare", "compile_targets", "install"):
        monkeypatch.setattr(build, name, lambda *a: Path())
    with pytest.raises(MobieError, match="does not compute what it should") as e:
        build.build()
    assert e.value.kind == NO_RUNTIME and "Q8_0" in e.value.found
    monkeypatch.setattr(doctor, "status", lambda patched: ([], []))
    assert not doctor.doctor()
    assert "crashed (SIGSEGV)" in capsys.readouterr().out


def test_binding_needs_no_environment_variable(runtime_tools, tmp_path):
    """In a fresh process, from another folder."""
    code = "import llama_cpp, llama_cpp.llama_cpp as c; print(c._lib._name)"
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    r = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert Path(r.stdout.strip()).resolve().parent == (installed.site() / "llama_cpp" / "lib").resolve()


@pytest.mark.parametrize("had_stock", [True, False])
def test_restore_brings_back_what_was_there(tmp_path, monkeypatch, had_stock):
    """install, install again, restore: the environment is as before, byte for byte."""
    site, scripts, binaries = tmp_path / "site", tmp_path / "bin", tmp_path / "built"
    for folder in (site, scripts, binaries):
        folder.mkdir()
    monkeypatch.setattr(installed, "site", lambda: site)
    monkeypatch.setattr(installed, "scripts", lambda: scripts)
    monkeypatch.setattr(installed, "binding_version", lambda: upstream.read_pin().version)

    def put_binding(home):
        (site / "llama_cpp").mkdir()
        (site / "llama_cpp" / "__init__.py").write_text("patched")
        (site / f"llama_cpp_python-{upstream.read_pin().version}.dist-info").mkdir()

    monkeypatch.setattr(install, "install_binding", put_binding)
    for name in ("libllama.so", *installed.TOOLS):
        (binaries / name).write_text(name)
    if had_stock:
        (site / "llama_cpp" / "lib").mkdir(parents=True)
        (site / "llama_cpp" / "lib" / "libllama.so").write_text("stock")
        (site / "llama_cpp_python-0.3.1.dist-info").mkdir()
        (site / "llama_cpp_python-0.3.1.dist-info" / "METADATA").write_text("stock")

    def state():
        return {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}

    before = state()
    install.install(tmp_path, binaries)
    install.install(tmp_path, binaries)
    assert (site / "llama_cpp" / "lib" / "libllama.so").read_text() == "libllama.so"
    assert (scripts / "llama-cli").read_text() == "llama-cli"
    install.restore()
    assert state() == before
    with pytest.raises(MobieError, match="nothing to restore"):
        install.restore()


def test_the_runtime_of_a_wheel_is_left_to_pip(tmp_path, monkeypatch):
    (tmp_path / "llama_cpp").mkdir()
    manifest = {"package": "llama-cpp-python", "version": "0.3.36", "series": "", "wheel": True, "links": []}
    (tmp_path / "llama_cpp" / "mobie-runtime.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(installed, "site", lambda: tmp_path)
    for command in (build.build, install.restore):
        with pytest.raises(MobieError) as e:
            command()
        assert e.value.kind == NO_RUNTIME and e.value.todo == "pip uninstall llama-cpp-python"
    assert installed.manifest_path().exists()


def test_a_users_own_tool_is_not_overwritten(tmp_path, monkeypatch):
    scripts, binaries = tmp_path / "bin", tmp_path / "built"
    scripts.mkdir(), binaries.mkdir()
    for name in installed.TOOLS:
        (binaries / name).write_text(name)
    (scripts / "llama-cli").write_text("the user's own")
    monkeypatch.setattr(installed, "site", lambda: tmp_path)
    monkeypatch.setattr(installed, "scripts", lambda: scripts)
    monkeypatch.setattr(install, "install_binding", lambda home: (tmp_path / "llama_cpp").mkdir())
    with pytest.raises(MobieError, match="in the way"):
        install.install(tmp_path, binaries)
    assert (scripts / "llama-cli").read_text() == "the user's own"


def test_kernels_can_be_masked(runtime_tools):
    """MOBIE_ISA picks an implementation; asked for in a fresh process, the choice is made once."""
    code = "from mobie_export.runtime import libggml; print(libggml.kernel_names()[-1])"
    for name in libggml.kernel_names():
        r = subprocess.run(
            [sys.executable, "-c", code], env={"MOBIE_ISA": name, "PATH": "/bin"}, capture_output=True, text=True
        )
        assert r.stdout.strip() == name


def test_llama_quantize_leaves_mobie_tensors_alone(runtime_tools, tmp_path):
    from mobie_export.gguf_io import open_model

    source, mobie, mixed = tmp_path / "f16.gguf", tmp_path / "mobie.gguf", tmp_path / "mixed.gguf"
    models.write_qwen3moe(source, experts="F16", seed=2)
    exporting.export(source, mobie)
    subprocess.run([runtime_tools / "llama-quantize", mobie, mixed, "Q8_0"], check=True, capture_output=True)
    with open_model(mobie) as a, open_model(mixed) as b:
        experts = [t for t in a.tensors.values() if t.type_id == 200]
        assert experts
        for t in experts:
            assert bytes(a.read(t)) == bytes(b.read(b.tensors[t.name]))
            scale = t.name.replace(".weight", ".scale")
            assert bytes(a.read(a.tensors[scale])) == bytes(b.read(b.tensors[scale]))
        assert b.tensors["blk.0.attn_q.weight"].type_id == 8, "the rest was quantized"


def test_doctor_on_files(runtime_tools, tmp_path, capsys):
    source, mobie = tmp_path / "f16.gguf", tmp_path / "mobie.gguf"
    models.write_qwen3moe(source, experts="F16", seed=3)
    exporting.export(source, mobie)
    facts, problems, _ = doctor.file_status(mobie)
    assert not problems and any("MoBiE format 1" in f for f in facts)
    facts, problems, _ = doctor.file_status(source)
    assert not problems and any("no MoBiE file" in f for f in facts)
    with pytest.raises(MobieError) as e:
        doctor.doctor(tmp_path / "missing.gguf")
    assert e.value.kind == BAD_INPUT


def test_doctor_refuses_a_newer_format(tmp_path, monkeypatch):
    from mobie_export.spec import block as mobie_format

    source, mobie = tmp_path / "f16.gguf", tmp_path / "mobie.gguf"
    models.write_qwen3moe(source, experts="F16", seed=3)
    exporting.export(source, mobie)
    monkeypatch.setattr(mobie_format, "FORMAT_VERSION", 0)
    _, problems, _ = doctor.file_status(mobie)
    assert problems and "format version 1" in problems[0]


def quantized_again(folder: Path, tools: Path, kind: str) -> tuple[Path, Path]:
    """An export, and what llama-quantize makes of it."""
    source, ours, theirs = folder / "m.gguf", folder / "m-mobie-uncalibrated.gguf", folder / "again.gguf"
    models.write_qwen3moe(source)
    exporting.export(source, ours)
    subprocess.run([tools / "llama-quantize", ours, theirs, kind], check=True, capture_output=True)
    return ours, theirs


def test_a_file_that_llama_quantize_changed_is_known_again(tmp_path, runtime_tools, capsys):
    """Its other tensors are of other types, its experts as they were; damage to an expert is found all the same."""
    _, theirs = quantized_again(tmp_path, runtime_tools, "Q8_0")
    assert cli.main(["verify", str(theirs), "-q"]) == Exit.OK
    said = capsys.readouterr().out
    assert "re-quantized since" in said and "10 Q8_0" in said and "expert tensors are as written" in said
    damage(theirs, "blk.1.ffn_up_exps.weight")
    assert cli.main(["verify", str(theirs), "-q"]) == Exit.VERIFY_FAILED


def test_a_file_that_llama_quantize_copied_is_sound(tmp_path, runtime_tools, capsys):
    """Its tensors lie in another order; damage to any of them is found all the same."""
    ours, theirs = quantized_again(tmp_path, runtime_tools, "COPY")
    with gguf_io.open_model(ours) as a, gguf_io.open_model(theirs) as b:
        assert list(a.tensors) != list(b.tensors)
    assert cli.main(["verify", str(theirs), "-q"]) == Exit.OK and "re-quantized" not in capsys.readouterr().out
    damage(theirs, "blk.1.attn_q.weight")
    assert cli.main(["verify", str(theirs), "-q"]) == Exit.VERIFY_FAILED


def damage(path: Path, name: str) -> None:
    with gguf_io.open_model(path) as gguf:
        at = gguf.tensors[name].offset + 1
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_what_llama_cpp_does_not_load_is_said_of_every_file(tmp_path, runtime_tools, capsys):
    """At the end of an export, by `doctor`, and before a calibration: here a pre-tokenizer that nobody knows."""
    source, out = tmp_path / "m.gguf", tmp_path / "m-mobie-uncalibrated.gguf"
    plain = tmp_path / "plain.gguf"
    models.write_qwen3moe(plain)
    with gguf_io.open_model(plain) as gguf:
        unknown = gguf_io.make_entry("tokenizer.ggml.pre", gguf_io.STRING, "nonsense")
        gguf_io.rewrite(gguf, source, entries=[unknown])
    assert loads.problem(plain) == "" and "nonsense" in loads.problem(source)
    assert cli.main([str(source), "--method", "sign", "-q"]) == Exit.NO_RUNTIME
    assert "does not load" in capsys.readouterr().out and out.exists()
    mobie.verify(out)
    assert "nonsense" in doctor.file_status(out)[1][0] and not doctor.file_status(plain)[1]
    with pytest.raises(MobieError, match="does not load"):
        loads.check(source, "m")


def test_a_runtime_that_aborts_takes_nobody_with_it(tmp_path, monkeypatch, runtime_tools):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho GGML_ASSERT >&2\nkill -ABRT $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert loads.problem(tmp_path / "m.gguf") == f"ended by signal {int(signal.SIGABRT)}; GGML_ASSERT"


def test_bench_measures(runtime_tools):
    """llama-bench itself: its rows are those that `bench` reads."""
    from mobie_export import api

    model = Path(__file__).resolve().parents[2] / "examples/tiny-moe/tiny-moe-f16.gguf"
    found = api.bench(model, threads=1, prompt=16, generated=8, repetitions=2)
    assert list(found.data["speed"]) == ["pp16", "tg8"]
    for rates in found.data["speed"].values():
        assert len(rates["samples"]) == 2 and 0 < rates["least"] <= rates["median"] <= rates["most"] < 1e9


def test_the_runtime_goes_by_types_and_names(tmp_path, runtime_tools):
    """FORMAT.md: no entry of ours is needed, an unknown one is ignored, an unknown tensor is not."""
    source, path, out = tmp_path / "m.gguf", tmp_path / "mobie.gguf", tmp_path / "out.gguf"
    models.write_qwen3moe(source)
    exporting.export(source, path)
    with gguf_io.open_model(path) as gguf:
        gguf_io.rewrite(gguf, out, drop=[k for k in gguf.entries if k.startswith("mobie.")])
        assert loads.problem(out) == ""
        gguf_io.rewrite(gguf, out, entries=[gguf_io.make_entry("mobie.future", gguf_io.STRING, "?")])
        assert loads.problem(out) == ""
        beside = gguf_io.NewTensor.stored((64,), gguf_io.TYPE_F32, np.zeros(256, np.uint8))
        gguf_io.rewrite(gguf, out, tensors={"blk.0.ffn_exps.future": beside})
        assert "wrong number of tensors" in loads.problem(out)
