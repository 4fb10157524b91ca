"""What a model card says was done, for every way of exporting."""

import dataclasses

import pytest

from mobie_export import errors
from mobie_export.exporting import card, requantize
from mobie_export.methods.calibrated import Calibrated
from mobie_export.methods.paper import Paper
from mobie_export.sources.checkpoint import Tower
from mobie_export.sources.find import Source
from tests import exporting, models

pytestmark = pytest.mark.usefixtures("without_runtime")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("card") / "m.gguf"
    models.write_qwen3moe(path)
    return path


def said(source, folder, origin=None, **options) -> str:
    report = exporting.export(source, folder / "out.gguf", threads=1, **options)
    return card.write(report.output, origin or Source("m", gguf=source), report.source_size, overwrite=True).read_text()


def test_signs_are_uncalibrated(source, tmp_path):
    text = said(source, tmp_path)
    assert "- Uncalibrated: signs and scales come from the weights alone." in text
    assert "- Everything else is as it was in the original." in text
    for word in ("Calibrated:", "second sign", "Tuned", "other types"):
        assert word not in text


def test_other_types_are_said(source, tmp_path):
    rules = (requantize.parse("attn_v=f32"), requantize.parse("token_embd=bf16"))
    text = said(source, tmp_path, tensor_types=rules)
    assert "no experts in other types than the original's: `attn_v=F32 token_embd=BF16`" in text


def test_a_calibration_says_its_text_and_what_it_tuned(source, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from mobie_export.methods.calibrated import refine

    monkeypatch.setattr(refine, "LAYERWISE", dataclasses.replace(refine.LAYERWISE, steps=2))
    options = Calibrated(samples=96, seq_len=32, refine="layerwise", bpw=1.6)
    text = said(source, tmp_path, method=options)
    assert "- Calibrated: error propagation weighted by the loss, then refinement layer by layer; on 96 seq" in text
    assert "tokens, of a text with SHA-256 `" in text
    assert "% of the experts' weights have a second sign" in text
    assert "- Tuned together with the experts, and stored in F32: routers, norms." in text
    assert "Uncalibrated" not in text


def test_the_recipe_is_named(source, tmp_path):
    pytest.importorskip("torch")

    text = said(source, tmp_path, method=Paper(samples=32, seq_len=32))
    assert "- Calibrated: MoBiE as it was published (arXiv 2604.06798)" in text
    assert "share matrices" in text and "Tuned" not in text


def test_front_matter_is_what_yaml_makes_of_it(source, tmp_path):
    yaml = pytest.importorskip("yaml")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: other\nlanguage:\n- en\n- de\ntags:\n- x\n---\n# Title: with\n")
    origin = Source("m", checkpoint=folder, hub="org/m", towers=(Tower("vision", 5, 50),))
    text = said(source, tmp_path, origin)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "other" and front["language"] == ["en", "de"] and front["base_model"] == "org/m"
    assert front["tags"] == ["gguf", "mobie", "moe"]
    assert "- Not exported: the vision part, 5 of 50 weights" in text and "--mmproj CHECKPOINT" in text
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert "license" not in card.text(exporting.export(source, tmp_path / "b.gguf").output, origin, 1).split("---\n")[1]


def test_front_matter_of_a_gguf_is_what_it_says(tmp_path):
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "m.gguf"

    def keys(writer):
        writer.add_license("apache-2.0")
        writer.add_languages(["en", "de"])
        writer.add_source_repo_url("https://huggingface.co/org/m")

    models.write_qwen3moe(path, keys=keys)
    front = yaml.safe_load(said(path, tmp_path).split("---\n")[1])
    assert front["license"] == "apache-2.0" and front["language"] == ["en", "de"] and front["base_model"] == "org/m"
    models.write_qwen3moe(path, keys=lambda w: w.add_source_repo_url("https://example.org/org/m"))
    front = yaml.safe_load(said(path, tmp_path, overwrite=True).split("---\n")[1])
    assert not {"license", "language", "base_model"} & set(front)


def test_without_the_library_it_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    card.check(tmp_path / "out.gguf", wanted=False, overwrite=False)
    with pytest.raises(errors.MobieError, match="needs a package") as e:
        card.check(tmp_path / "out.gguf", wanted=True, overwrite=False)
    assert e.value.kind == errors.UNSUPPORTED
