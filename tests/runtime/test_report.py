"""Reports of the bundled model: of a sound export, and of one that is broken on purpose, which is told by layer."""

import html.parser
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import mobie_export as mobie
from mobie_export import cli, gguf_io
from mobie_export.cli import Exit
from mobie_export.errors import BAD_INPUT
from mobie_export.exporting import card
from mobie_export.methods.calibrated import Calibrated
from mobie_export.methods.ordered import Ordered
from mobie_export.methods.paper import Paper
from mobie_export.methods.sign import Sign
from mobie_export.reporting import layers, scores, tools
from mobie_export.runtime.processes import unavailable
from tests import exporting, models

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

REPO = Path(__file__).resolve().parents[2]
TRAINED = REPO / "examples/tiny-moe/tiny-moe-f16.gguf"
TEXT = REPO / "mobie_export/data/held-out.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, runtime_tools) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def exported(folder) -> Path:
    return exporting.export(TRAINED, folder / "tiny-mobie.gguf").output


@pytest.fixture(scope="module")
def reported(exported) -> mobie.Compared:
    return mobie.report(exported, TRAINED, quick=True, threads=1)


def broken(exported: Path, output: Path) -> Path:
    """The experts of layer 2 are zero, the rows of layer 1's router are other experts'; the file says nothing of it."""
    with gguf_io.open_model(exported) as gguf:
        new = {}
        for part in ("gate", "up", "down"):
            t = gguf.tensors[f"blk.2.ffn_{part}_exps.weight"]
            new[t.name] = gguf_io.NewTensor.stored(t.shape, t.type_id, np.zeros(t.n_bytes, np.uint8))
        router = gguf.tensors["blk.1.ffn_gate_inp.weight"]
        rows = gguf.read(router).view("<f4").reshape(router.shape[::-1])
        new[router.name] = gguf_io.NewTensor.of(np.roll(rows, 1, axis=0))
        gguf_io.rewrite(gguf, output, tensors=new)
    return output


def left(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".mobie")]


def children() -> list[str]:
    """Names of the programs that this process has started and that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = re.match(r"\d+ \((.*)\) (.*)", stat.read_text(), re.DOTALL).groups()
        except OSError:
            continue
        if int(rest.split()[1]) == os.getpid():
            found.append(name)
    return found


# ---- a sound export --------------------------------------------------------------------------------------------------


def test_a_sound_export(exported, reported):
    """Uncalibrated, so far from its source; and nothing is wrong with it."""
    data = reported.data
    assert json.loads(reported.json.read_text()) == data
    assert not [f for f in reported.findings if f["severity"] == "error"]
    assert not [part for part in ("layers", "scores", "speed", "behaviour") if "left_out" in data[part]]
    assert data["tensors"]["experts"]["accounted"] and not data["tensors"]["others"]["changed"]
    assert [r["layer"] for r in data["layers"]["layers"]] == [0, 1, 2, 3]
    for row in data["layers"]["layers"]:
        assert row["routing_alone"] == 1 and 0 < row["experts_error"] < 1 and len(row["tokens"]) == 10
        assert sum(row["tokens"]) == sum(row["tokens_source"]) == 2 * 2 * 128  # sequences, experts of a token, tokens
    assert data["layers"]["layers"][0]["routing"] == 1 > data["layers"]["layers"][3]["routing"] > 0.4
    found = data["scores"]
    assert 20 < found["ppl_source"] < 100 and found["ppl"] > found["ppl_source"] and found["kl"] > 0.1
    assert 0 < found["kl_median"] < found["kl_99"] and 0 < found["same_top"] < 100
    for side in ("file", "source"):
        assert all(v > 0 for v in data["speed"][side].values()) and data["behaviour"]["memory"][side] > 1 << 20
    requests = data["behaviour"]["requests"]
    assert {(r["kind"], r["drawn"]) for r in requests} >= {("answer", "greedy"), ("answer", "sampled")}
    said = [r[side] for r in requests for side in ("file", "source")]
    assert all(x["tokens"] > 0 and "refused" not in x.get("why", "") for x in said)
    assert not left(exported.parent) and "llama-server" not in children()


TEXTS = {"samples": 32, "seq_len": 32}


@pytest.mark.parametrize("method", [Sign(), Ordered(bpw=1.5, **TEXTS), Paper(**TEXTS)], ids=lambda m: m.name)
@pytest.mark.parametrize("fused", [False, True], ids=["three tensors", "two tensors"])
def test_a_model_beside_itself_loses_nothing(tmp_path, runtime_tools, method, fused):
    """An export against the floats that its signs, second signs and shared factors stand for."""
    if fused and method.name != "sign":
        pytest.skip("llama.cpp, which tokenizes for a calibration, loads no such file of this architecture")
    source = tmp_path / "s.gguf"
    models.write_qwen3moe(source, seed=4, fused=fused)
    exported = exporting.export(source, tmp_path / "e.gguf", method=method, threads=1).output
    floats = mobie.dequantize(exported, tmp_path / "floats.gguf").output
    with gguf_io.open_model(exported) as ours, gguf_io.open_model(floats) as theirs:
        found = layers.compare(ours, theirs, TEXT.read_bytes(), 1, True, lambda n, what: None)
    assert len(found["layers"]) == models.N_LAYER
    for row in found["layers"]:
        assert row["experts_error"] < 1e-5 and row["routing_alone"] == row["routing"] == 1
        assert row["tokens"] == row["tokens_source"] and row["stream_error"] < 1e-5


class Parser(html.parser.HTMLParser):
    VOID = ("meta", "br", "link", "img", "hr", "input")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.ids, self.links = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [v for k, v in attrs if k in ("href", "src", "xlink:href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_file_that_needs_no_scripts(reported):
    text = reported.html.read_text()
    parser = Parser()
    parser.feed(text)
    assert not parser.open and "script" not in parser.tags and "img" not in parser.tags
    assert parser.tags.count("svg") == 4 and len(parser.ids) == len(set(parser.ids))
    assert all(link.startswith("#") and link[1:] in parser.ids for link in parser.links)
    assert set(re.findall(r"url\(#(.*?)\)", text)) <= set(parser.ids) and "@import" not in text
    assert f"{reported.data['scores']['kl']:.4g}" in text and "tiny-mobie.gguf" in text


def test_the_page_is_made_from_the_json_alone(reported):
    from mobie_export.reporting import page

    assert page.page(json.loads(reported.json.read_text())) == reported.html.read_text()


def test_the_card_has_the_figures(exported, reported, tmp_path):
    pytest.importorskip("huggingface_hub")
    from mobie_export.sources.find import Source

    source = Source("tiny", gguf=TRAINED)
    text = card.text(exported, source, TRAINED.stat().st_size)
    found = reported.data["scores"]
    assert f"| perplexity | {found['ppl_source']:.4g} | {found['ppl']:.4g} |" in text and "`held-out.txt`" in text
    alone = shutil.copy(exported, tmp_path / exported.name)
    assert "## Measured" not in card.text(alone, source, 1)
    other = json.loads(reported.json.read_text())
    other["file"]["seal"] = "0" * 64
    card.report_path(alone).write_text(json.dumps(other))
    assert "## Measured" not in card.text(alone, source, 1), "figures of other weights"
    card.report_path(alone).write_text("[]")
    assert "## Measured" not in card.text(alone, source, 1)


def test_a_report_that_is_there_stays(exported, reported, capsys):
    before = reported.json.read_bytes()
    assert cli.main(["report", str(exported), "--against", str(TRAINED), "--quick", "-q"]) == Exit.BAD_OUTPUT
    assert "--overwrite" in capsys.readouterr().err and reported.json.read_bytes() == before


# ---- a broken one ----------------------------------------------------------------------------------------------------


def test_a_broken_export_is_told_by_layer(exported, folder, capsys):
    file = broken(exported, folder / "broken.gguf")
    command = ["report", str(file), "--against", str(TRAINED), "--quick", "-q", "--threads", "1"]
    assert cli.main(command) == Exit.OK
    data = json.loads((folder / "broken-report.json").read_text())
    errors = {(f["kind"], f["layer"]) for f in data["findings"] if f["severity"] == "error"}
    assert errors == {("file", None), ("experts zero", 2), ("experts", 2), ("router", 1), ("routing", 1)}
    said = capsys.readouterr().out
    assert re.search(r"^error +layer 2: .*ffn_up_exps", said, re.MULTILINE)
    assert re.search(r"^error +layer 1: .*rows of the router", said, re.MULTILINE)
    assert "<b>layer 2</b>" in (folder / "broken-report.html").read_text()
    rows = data["layers"]["layers"]
    assert rows[2]["experts_size"] == 0 and rows[2]["experts_error"] == 1
    assert [r["layer"] for r in rows if r["routing_alone"] < 0.9] == [1]


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_tasks_are_scored(exported, tmp_path):
    sentences = [s.strip() for s in re.split(r"\.\s", TEXT.read_text()) if 30 < len(s) < 200 and "\n" not in s][:25]
    data = tmp_path / "hellaswag.txt"
    tasks = [[f"Travel: {a}", str(i % 4), *sentences[i : i + 4]] for i, a in enumerate(sentences[:8])]
    data.write_text("\n".join(line for task in tasks for line in task) + "\n")
    winogrande = tmp_path / "winogrande.csv"
    places = ("house", "tree", "road", "hill", "boat", "horse")
    line = "{i},The man saw the river and the {a} because the _ was near.,{a},river,{n}"
    lines = [line.format(i=i, a=a, n=1 + i % 2) for i, a in enumerate(places)]
    winogrande.write_text("\n".join(lines) + "\n\n")  # llama-perplexity takes the last line end off, and the line
    asked = {"hellaswag": data, "winogrande": winogrande}
    found = scores.tasks(exported, TRAINED, asked, 1, False, lambda what: None)
    for name, n in (("hellaswag", 8), ("winogrande", 6)):
        for side in ("file", "source"):
            assert found[name][side]["n"] == n and 0 <= found[name][side]["score"] <= 100


def test_without_the_runtime_the_rest_is_reported(exported, tmp_path, monkeypatch):
    def missing(name):
        raise unavailable(f"{name} is not installed", todo=tools.BUILD)

    monkeypatch.setattr(tools, "find", missing)
    file = shutil.copy(exported, tmp_path / "e.gguf")
    made = mobie.report(file, TRAINED, quick=True, threads=1)
    for part in ("scores", "speed", "behaviour"):
        assert "is not installed" in made.data[part]["left_out"] and made.data[part]["todo"] == tools.BUILD
    assert "layers" in made.data["layers"] and made.data["tensors"]["experts"]["accounted"]
    assert made.html.read_text().count(tools.BUILD) == 3


def test_a_model_without_a_twin_says_why(tmp_path, runtime_tools, monkeypatch):
    def missing(name):
        raise unavailable(f"{name} is not installed", todo=tools.BUILD)

    monkeypatch.setattr(tools, "find", missing)
    source = tmp_path / "s.gguf"
    models.write_qwen3moe(source, keys=lambda w: w.add_rope_scaling_type(models.gguf.RopeScalingType.YARN))
    made = mobie.report(exporting.export(source, tmp_path / "e.gguf").output, source, quick=True, threads=1)
    assert "scal" in made.data["layers"]["left_out"] or "rope" in made.data["layers"]["left_out"]
    assert ("left out", "note") in {(f["kind"], f["severity"]) for f in made.findings}


@pytest.mark.parametrize("where", ["perplexity", "behaviour"])
def test_what_is_interrupted_leaves_nothing(exported, tmp_path, where):
    """No file, no folder, no server."""

    def stop(step: mobie.Step) -> None:
        if step.phase == where and step.done >= 1 and not step.ended:
            raise KeyboardInterrupt

    file = shutil.copy(exported, tmp_path / "e.gguf")
    with pytest.raises(KeyboardInterrupt):
        mobie.report(file, TRAINED, quick=True, threads=1, progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["e.gguf"]
    assert not [name for name in children() if name.startswith("llama-")]


# ---- experts that the text does not reach ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Ordered, Calibrated])
def test_too_few_tokens_stop_an_export(tmp_path, runtime_tools, kind):
    """Unless they are allowed; what was computed until then is kept. They are named in the file."""
    source, output = tmp_path / "s.gguf", tmp_path / "e.gguf"
    models.write_qwen3moe(source, seed=3)
    options = {"samples": 2, "seq_len": 16, "refine": "none"}
    with pytest.raises(mobie.MobieError, match="hardly reaches") as e:
        exporting.export(source, output, method=kind(**options), threads=1)
    samples = int(re.search(r"--samples (\d+)", e.value.todo)[1])
    assert e.value.kind == BAD_INPUT and "--allow-thin" in e.value.todo and samples > 2
    report = exporting.export(source, output, method=kind(**options, allow_thin=True), threads=1)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["e.gguf", "s.gguf"], "the same work, gone on with"
    settings = json.loads(mobie.inspect(output).mobie["mobie.settings"])
    named = {str(i): {str(e): n for e, n in few.items()} for i, few in report.outcome.thin.items()}
    assert settings["thin"] == named and set(named) == {"0", "1"}
    assert "allow_thin" not in settings
