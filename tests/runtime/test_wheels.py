"""What an installed wheel can do without the checkout it was built from."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mobie_export.runtime import patching, upstream

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The package's wheel, built and unpacked: what pip would put into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "tools.release.build_wheels", "--only", "export", "--out", str(folder)]
    subprocess.run(command, check=True, cwd=REPO)
    (wheel,) = folder.glob("mobie_export-*.whl")
    with zipfile.ZipFile(wheel) as z:
        z.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_patches_and_kernels(installed):
    for folder, left_out in ("patches", ()), ("kernels_cpp", ("tests", "bench")):
        inside = {p.relative_to(installed / "mobie_export") for p in (installed / "mobie_export" / folder).rglob("*")}
        beside = {p.relative_to(REPO) for p in (REPO / folder).rglob("*") if not set(p.parts) & set(left_out)}
        assert inside == beside


def test_the_wheel_builds_from_its_own_files(installed, tmp_path):
    """`runtime build` from the wheel takes its own patches and kernels, and they are the checkout's."""
    code = """if True:
        import sys
        from pathlib import Path
        from mobie_export.runtime import patching, upstream
        print(upstream.PATCHES)
        print(patching.series_digest(upstream.read_pin()))
        patching.copy_kernels(Path(sys.argv[1]))"""
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    r = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    patches, digest = r.stdout.split()
    assert Path(patches).is_relative_to(installed)
    assert digest == patching.series_digest(upstream.read_pin())
    copies = {p.relative_to(tmp_path / "ggml/src/mobie"): p for p in tmp_path.rglob("*") if p.is_file()}
    assert {Path("mobie.h"), Path("ggml_glue/mobie-ggml.cpp"), Path("sources.cmake")} <= set(copies)
    for name, copy in copies.items():
        assert copy.read_bytes() == (patching.KERNELS / name).read_bytes()


def test_the_converter_comes_from_the_sdist(installed, tmp_path, monkeypatch):
    sdist = upstream.fetch_sdist(upstream.read_pin())
    monkeypatch.setenv("MOBIE_CACHE", str(tmp_path))
    folder = upstream.converter(sdist)
    assert folder.parent == tmp_path
    assert "MIT License" in (folder / "LICENSE").read_text()
    assert (folder / "conversion" / "base.py").is_file() and (folder / "gguf-py" / "gguf" / "gguf_writer.py").is_file()
    assert upstream.converter() == folder, "the second call needs no sdist"
    inside = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    shipped = installed / "mobie_export" / "converter"
    assert inside == {p.relative_to(shipped): p.read_bytes() for p in shipped.rglob("*") if p.is_file()}
