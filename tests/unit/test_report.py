"""Reports, as far as they need neither runtime nor PyTorch: how answers are judged, what programs print, the tally, and
what is found in a report's JSON."""

import copy
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

import mobie_export as mobie
from mobie_export import errors, gguf_io
from mobie_export.exporting.requantize import parse
from mobie_export.reporting import behaviour, findings, gather, page, scores, speed, tally
from mobie_export.spec import metadata
from tests import models

pytestmark = pytest.mark.usefixtures("without_runtime")


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "And then " + "the sky is blue and " * 6,
        "once " * 20,
        "It begins well. " + "I will leave you. " * 5 + "I will le",  # cut off
        "word " + "\n" * 200,
        "ha" * 100,
        "天" * 60,
        "a b " * 3 + " ".join(f"w{i}" for i in range(40)) + " " + " ".join([" ".join(f"x{i}" for i in range(50))] * 4),
    ],
)
def test_loops_are_noticed(text):
    assert behaviour.loops(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no, no, no, no",
        "Yes. " * 3,
        "The sky is blue, since air scatters short waves more than long ones; the sun is white.",
        "| a | b |\n|---|---|\n" + "".join(f"| {i} | {i * i} |\n" for i in range(30)),
        "the sky is blue and " * 6 + "then, at last, night fell over the whole of the valley, and no more was said.",
        "def largest(a, b, c):\n    return max(a, b, c)\n" + "-" * 20,
    ],
)
def test_what_is_no_loop(text):
    assert not behaviour.loops(text)


def test_json_is_taken_bare_or_in_a_fence():
    assert not behaviour.json_problem(' {"a": 1}\n') and not behaviour.json_problem("```json\n[1, 2]\n```\n")
    for text in ("", "Sure! {}", '{"a": 1', "```json\n{}\n``` and more", "[" * 100_000):
        assert behaviour.json_problem(text)


SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "year": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string", "enum": ["x", "y"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["title", "year"],
    "additionalProperties": False,
}


def test_schemas():
    good = {"title": "a", "year": 1}
    assert not behaviour.schema_problem(json.dumps(good), SCHEMA)
    assert not behaviour.schema_problem(json.dumps(good | {"tags": ["x", "y"]}), SCHEMA)
    bad = [[], good | {"year": "1"}, good | {"year": True}, good | {"more": 1}, {"title": "a"}]
    bad += [good | {"tags": tags} for tags in ([], ["z"], ["x"] * 3, "x")]
    for value in bad:
        assert behaviour.schema_problem(json.dumps(value), SCHEMA), value
    assert behaviour.schema_problem(json.dumps(good)[:-1], SCHEMA)


def test_calls_of_tools():
    def call(name, arguments):
        return [{"type": "function", "function": {"name": name, "arguments": arguments}}]

    functions = {"f": SCHEMA}
    good = json.dumps({"title": "a", "year": 1})
    assert not behaviour.call_problem(call("f", good), functions)
    for calls in ([], call("g", good), call("f", "{}"), call("f", good[:-1]), [{"type": "function"}]):
        assert behaviour.call_problem(calls, functions)


def test_the_requests_are_ones_that_can_be_judged():
    every, quick = behaviour._requests(False), behaviour._requests(True)
    assert {r["kind"] for r in quick} == {r["kind"] for r in every} == {"answer", "json", "schema", "tools"}
    assert len(quick) < len(every) and [r for r in every if r in quick] == quick
    for request in every:
        if request["kind"] == "schema":
            assert isinstance(behaviour.misfit(None, request["schema"]), str)
            assert request["schema"] == request["body"]["response_format"]["json_schema"]["schema"]
        if request["kind"] == "tools":
            assert {t["function"]["name"] for t in request["body"]["tools"]} == set(request["schema"])


# ---- what programs print ---------------------------------------------------------------------------------------------

PRINTED = """
Mean PPL(Q)                   : 1372.088830 ±  97.832252
Mean PPL(base)                :  27.247986 ±   1.506174
Mean PPL(Q)/PPL(base)         :  50.355605 ±   3.301488
Mean    KLD:   3.761255 ±   0.052291
99.9%   KLD:  19.116743
99.0%   KLD:  13.964754
Median  KLD:   2.878537
Same top p: 17.418 ± 0.686 %
"""


def test_figures_of_a_divergence():
    found = scores.figures(PRINTED)
    assert (found["ppl"], found["ppl_source"], found["ratio"]) == (1372.08883, 27.247986, 50.355605)
    assert (found["kl"], found["kl_median"], found["kl_99"]) == (3.761255, 2.878537, 13.964754)
    assert (found["same_top"], found["same_top_error"]) == (17.418, 0.686)
    assert np.isnan(scores.figures(PRINTED.replace("3.761255", "nan"))["kl"])
    with pytest.raises(mobie.MobieError, match="kl_99"):
        scores.figures(PRINTED.replace("99.0%", ""))


def test_scores_of_tasks():
    printed = "1\t0.00000000%\t[0.0%, 79.3%]\n2\t50.00000000%\t[9.4531%, 90.5469%]\n"
    assert scores.score("hellaswag", printed) == {"n": 2, "score": 50, "low": 9.4531, "high": 90.5469}
    printed = "Final Winogrande score(40 tasks): 55.0000 +/- 7.9666\n"
    assert scores.score("winogrande", printed) == {"n": 40, "score": 55, "error": 7.9666}
    printed = "Final result: 31.2500 +/- 11.9678\nRandom chance: 25.0000 +/- 11.1803\n"
    assert scores.score("multiple-choice", printed) == {"score": 31.25, "error": 11.9678}
    printed = "1\t0.0000\t -3.09  -2.95  2  1\n2\t50.0000\t -3.10  -3.00  2  2\n\n"
    assert scores.score("winogrande", printed) == {"n": 2, "score": 50}
    assert scores.score("multiple-choice", "1\t0.00000000\n2\t50.00000000\n") == {"n": 2, "score": 50}
    with pytest.raises(mobie.MobieError):
        scores.score("winogrande", "failed")


def test_speed_of_a_bench():
    rows = [{"n_prompt": 64, "n_gen": 0, "avg_ts": 100.5}, {"n_prompt": 0, "n_gen": 16, "avg_ts": 20}]
    printed = f"load: [1] of 2\n{json.dumps(rows, indent=2)}\nbye\n"
    assert speed.tokens_per_second(speed.parsed(printed)) == {"prompt": 100.5, "generation": 20}


# ---- the tally -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "m.gguf"
    models.write_qwen3moe(path, seed=5)
    return path


@pytest.fixture(scope="module")
def exported(source) -> Path:
    made = mobie.plan(source, source.with_name("e.gguf"), method="sign", tensor_types=(parse("attn_v=f32"),))
    return mobie.export(made).output


def counted(file: Path, source: Path) -> dict:
    with gguf_io.open_model(file) as a, gguf_io.open_model(source) as b:
        return gather.finite(tally.tally(a, b))


def changed(file: Path, output: Path, **options) -> Path:
    with gguf_io.open_model(file) as gguf:
        gguf_io.rewrite(gguf, output, **options)
    return output


def found(tensors: dict) -> list[dict]:
    return findings._tensors(tensors)


def test_every_expert_weight_is_accounted_for(exported, source):
    tensors = counted(exported, source)
    experts = tensors["experts"]
    n = models.N_LAYER * models.N_EXPERT * 3 * models.N_FF * models.N_EMBD
    assert experts["accounted"] and experts["source_weights"] == experts["weights"]["binary"] == n
    assert sum(experts["weights"].values()) == n and len(experts["tensors"]) == 3 * models.N_LAYER
    assert experts["companions"]["expert scale"] == {"source": 0, "file": 3 * models.N_LAYER * models.N_EXPERT}
    assert [r["bpw"] for r in experts["by_layer"]] == [pytest.approx(1.125, abs=0.01)] * models.N_LAYER
    assert {r["why"] for r in tensors["others"]["changed"]} == {"tensor type"}
    assert len(tensors["others"]["changed"]) == models.N_LAYER
    assert tensors["metadata"] == {"added": {}, "removed": {}, "changed": {}}
    assert sum(r["bytes"] for r in tensors["types"]) == sum(r.bytes for r in mobie.inspect(exported).tensors)
    assert not found(tensors)


def test_what_is_missing_or_more_is_told_by_layer(exported, source, tmp_path):
    name, gone = "blk.1.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight"
    with gguf_io.open_model(exported) as gguf:
        t = gguf.tensors[name]
        half = gguf.read(t).reshape(models.N_EXPERT, -1)[: models.N_EXPERT // 2]
    new = gguf_io.NewTensor.stored((*t.shape[:2], models.N_EXPERT // 2), t.type_id, half)
    tensors = counted(changed(exported, tmp_path / "less.gguf", tensors={name: new}, drop=[gone]), source)
    one = models.N_FF * models.N_EMBD
    rows = {r["tensor"]: r["weights"] for r in tensors["experts"]["tensors"]}
    assert rows[name]["left"] == rows[name]["binary"] == models.N_EXPERT // 2 * one
    assert rows[gone]["left"] == models.N_EXPERT * one and tensors["experts"]["accounted"]
    assert {(f["kind"], f["layer"]) for f in found(tensors)} == {("tally", 1), ("tally", 0)}
    wide = counted(exported, changed(source, tmp_path / "s.gguf", drop=[gone]))
    assert {(f["kind"], f["layer"]) for f in found(wide)} == {("tally", 0)}
    assert wide["experts"]["weights"]["padded"] == models.N_EXPERT * one and wide["experts"]["accounted"]


def test_experts_that_are_zero(exported, source, tmp_path):
    """Those of the source are no fault of the export's."""
    name = "blk.1.ffn_gate_exps"
    with gguf_io.open_model(exported) as gguf, gguf_io.open_model(source) as original:
        scales = gguf.read(gguf.tensors[f"{name}.scale"]).view("<f4").copy()
        weights = original.read(original.tensors[f"{name}.weight"]).view("<f2").copy()
        shape = original.tensors[f"{name}.weight"].shape
    scales[[2, 5]] = 0
    file = changed(exported, tmp_path / "z.gguf", tensors={f"{name}.scale": gguf_io.NewTensor.of(scales)})
    (finding,) = found(counted(file, source))
    assert (finding["kind"], finding["severity"], finding["layer"]) == ("experts zero", "error", 1)
    assert "experts 2, 5 " in finding["what"]
    weights = weights.reshape(shape[::-1])
    weights[[2, 5]] = 0
    zero = changed(source, tmp_path / "s.gguf", tensors={f"{name}.weight": gguf_io.NewTensor.of(weights)})
    assert not found(counted(file, zero))


def test_whatever_else_changed_is_listed(exported, source, tmp_path):
    with gguf_io.open_model(exported) as gguf:
        router = gguf.read(gguf.tensors["blk.0.ffn_gate_inp.weight"]).view("<f4").reshape(models.N_EXPERT, -1)
        norm = gguf.read(gguf.tensors["output_norm.weight"]).view("<f4")
    moved = np.roll(router, 1, axis=0)
    new = {
        "blk.0.ffn_gate_inp.weight": moved,
        "blk.1.ffn_gate_inp.weight": router * 1.5,
        "output_norm.weight": norm + 1,
    }
    file = changed(
        exported,
        tmp_path / "c.gguf",
        tensors={n: gguf_io.NewTensor.of(v) for n, v in new.items()},
        entries=[gguf_io.make_entry("general.name", gguf_io.STRING, "else"), gguf_io.make_entry("x", gguf_io.U32, 3)],
        drop=["blk.1.attn_q_norm.weight", "tokenizer.chat_template"],
    )
    tensors = counted(file, source)
    faults = {(f["kind"], f["severity"], f["layer"]) for f in found(tensors)}
    other = ("other tensors", "error")
    assert faults == {("router", "error", 0), ("router", "error", 1), (*other, None), (*other, 1)}
    rows = {r["tensor"]: r for r in tensors["others"]["changed"]}
    assert rows["blk.0.ffn_gate_inp.weight"]["moved"] == models.N_EXPERT
    assert "moved" not in rows["blk.1.ffn_gate_inp.weight"]
    assert tensors["metadata"]["added"] == {"x": "3"} and tensors["metadata"]["changed"] == {
        "general.name": ["tiny", "else"]
    }
    assert set(tensors["metadata"]["removed"]) == {"tokenizer.chat_template"}
    settings = metadata.settings_entry({"tuned": ["ffn_gate_inp.weight"]})
    declared = counted(changed(file, tmp_path / "d.gguf", entries=[settings]), source)
    assert {f["layer"] for f in found(declared) if f["kind"] == "router"} == {0}, "no tuning moves rows"


def test_thin_experts_are_listed(exported, source, tmp_path):
    settings = metadata.settings_entry({"thin": {"1": {"3": 17}}})
    (finding,) = [
        f
        for f in found(counted(changed(exported, tmp_path / "t.gguf", entries=[settings]), source))
        if f["layer"] == 1 and f["kind"] == "few tokens"
    ]
    assert finding["severity"] == "note" and "3 (17)" in finding["what"]


# ---- findings --------------------------------------------------------------------------------------------------------


def row(layer: int, **other) -> dict:
    usual = {"experts_error": 0.7, "experts_cosine": 0.7, "experts_size": 0.4, "routing_alone": 1.0, "routing": 0.8}
    return {"layer": layer, "stream_error": 0.3, "used": 1, **usual, "tokens": [5, 3], "tokens_source": [4, 4], **other}


def faults(rows: list[dict], declared: bool = False) -> list[tuple[str, int]]:
    return [(f["kind"], f["layer"]) for f in findings._layers({"layers": rows}, declared)]


def test_a_layer_unlike_the_others_is_found():
    assert not faults([row(i) for i in range(6)])
    zero = row(3, experts_error=1.0, experts_cosine=0.0, experts_size=0.0)
    assert faults([row(0), row(1), row(2), zero, row(4)]) == [("experts", 3)]
    assert faults([row(0), row(1, experts_cosine=0.02), row(2)]) == [("experts", 1)]
    assert faults([row(0), row(1), row(2, experts_size=50.0)]) == [("experts", 2)]
    assert faults([zero]) == [("experts", 3)], "without others beside it"
    for value in (None, float("nan"), float("inf")):
        assert faults([row(0), row(1, experts_error=value)]) == [("experts", 1)]


def test_a_router_that_chooses_others_is_found():
    rows = [row(0), row(1, routing_alone=0.2), row(2), row(3)]
    assert faults(rows) == faults(rows, declared=True) == [("routing", 1)]
    tuned = [row(i, routing_alone=0.8) for i in range(4)]
    assert not faults(tuned, declared=True) and len(faults(tuned)) == 4
    assert faults([row(0, routing_alone=None), row(1)]) == [("routing", 0)]


def whole() -> dict:
    """A report in which nothing is found."""
    side = {"ended": [4, 4], "loops": [0, 4], "tokens": 50, "json": [2, 2], "schema": [1, 1], "tools": [1, 1]}
    said = {"text": "<b>yes</b>", "tokens": 3, "ended": True, "loops": False}
    request = {"kind": "answer", "prompt": "a < b?", "drawn": "greedy", "source": said, "file": said}
    about = {
        "files": 1,
        "bpw": 4.0,
        "expert_bpw": 1.1,
        "architecture": "qwen3moe",
        "layers": 2,
        "experts": 2,
        "used": 1,
    }
    figures = {
        "ppl_source": 10.0,
        "ppl": 11.0,
        "ratio": 1.1,
        "kl": 0.1,
        "kl_median": 0.05,
        "kl_99": 1.0,
        "same_top": 90.0,
    }
    return {
        "made": {"by": "x", "at": "2026-01-01T00:00:00", "threads": 1, "quick": True, "seconds": 3.0}
        | {"machine": {"cpu": "c", "cores": 2, "system": "Linux"}},
        "text": {"name": "t", "bytes": 5},
        "file": {"name": "e.gguf", "bytes": 10, "problem": "", "of_source": True, "seal": "5", **about},
        "source": {"name": "s.gguf", "bytes": 100, "seal": None, **about},
        "tensors": {
            "experts": {
                "accounted": True,
                "source_weights": 4,
                "weights": dict.fromkeys(tally.KINDS, 0) | {"binary": 4},
            }
            | {"tensors": [], "by_layer": [{"layer": 0, "bpw": 1.1, "second": {}}], "companions": {}},
            "types": [{"kind": "expert", "type": "mobie", "why": "w", "tensors": 1, "weights": 4, "bytes": 1}],
            "others": {"same": 3, "changed": []},
            "metadata": {"added": {}, "removed": {}, "changed": {}},
            "thin": {},
            "method": "sign",
            "settings": {},
        },
        "layers": {"sequences": 1, "tokens_each": 8, "layers": [row(0), row(1)]},
        "scores": {"context": 8, "chunks": 2, **figures, **{f"{k}_error": 0.1 for k in figures}},
        "tasks": {},
        "speed": {"rounds": 1, "prompt_tokens": 8, "generated_tokens": 8, "load": None}
        | {k: {"prompt": 5.0, "generation": 2.0} for k in ("file", "source")},
        "behaviour": {"template": True, "sampling": {"from": "x", "seed": 1}, "length": 8, "memory": {}}
        | {"requests": [request], "summary": {"source": side, "file": copy.deepcopy(side)}},
    }


def test_the_whole_model():
    assert not findings.find(whole())
    for path, value, kind, severity in [
        (("file", "problem"), "damaged", "file", "error"),
        (("file", "of_source"), False, "source", "warning"),
        (("scores", "kl"), 2.0, "quality", "warning"),
        (("scores", "kl"), None, "quality", "error"),
        (("speed", "file", "prompt"), 1.0, "speed", "note"),
        (("behaviour", "summary", "file", "loops"), [2, 4], "loops", "warning"),
        (("behaviour", "summary", "file", "ended"), [1, 4], "ended", "warning"),
        (("behaviour", "summary", "file", "tools"), [0, 1], "tools", "warning"),
        (("layers",), {"left_out": "no twin"}, "left out", "note"),
    ]:
        report = whole()
        at = report
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        assert [(f["kind"], f["severity"]) for f in findings.find(report)] == [(kind, severity)], path


# ---- the page --------------------------------------------------------------------------------------------------------


def test_a_page_says_what_was_left_out_and_is_no_markup_of_the_model(monkeypatch):
    pytest.importorskip("matplotlib")
    report = whole() | {"findings": []}
    text = page.page(report)
    assert "Nothing is wrong" in text and "&lt;b&gt;yes&lt;/b&gt;" in text and "<b>yes</b>" not in text
    assert "a &lt; b?" in text
    for part in ("layers", "scores", "speed", "behaviour"):
        report[part] = {"left_out": f"{part} <unknown>", "todo": "do this"}
    report["findings"] = findings.find(report)
    text = page.page(report)
    for part in ("layers", "scores", "speed", "behaviour"):
        assert f"Left out: {part} &lt;unknown&gt;. To get it: <code>do this</code>" in text


def test_a_missing_package_is_named_before_anything_is_measured(exported, source, monkeypatch):
    real = importlib.import_module

    def without(name, *more):
        if name == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *more)

    monkeypatch.setattr(page.importlib, "import_module", without)
    monkeypatch.setattr(gather, "_gather", None)
    with pytest.raises(mobie.MobieError, match=r"mobie-export\[report\]") as e:
        gather.report(exported, source)
    assert e.value.kind == errors.UNSUPPORTED


@pytest.mark.parametrize("case", ["no export", "another model", "no source", "no task", "no file of a task"])
def test_bad_input(exported, source, tmp_path, monkeypatch, case):
    monkeypatch.setattr(page, "check_library", lambda: None)
    other = tmp_path / "other.gguf"
    models.write_qwen3moe(other, keys=lambda w: w.add_token_list(["a"] * models.N_VOCAB))
    before = sorted(p.name for p in exported.parent.iterdir())
    arguments, options, kind = {
        "no export": ((source, source), {}, errors.BAD_INPUT),
        "another model": ((exported, other), {}, errors.BAD_INPUT),
        "no source": ((exported, tmp_path / "none.gguf"), {}, errors.BAD_INPUT),
        "no task": ((exported, source), {"tasks": {"arc": source}}, errors.USAGE),
        "no file of a task": ((exported, source), {"tasks": {"hellaswag": tmp_path / "none"}}, errors.BAD_INPUT),
    }[case]
    with pytest.raises(mobie.MobieError) as e:
        mobie.report(*arguments, **options)
    assert e.value.kind == kind and sorted(p.name for p in exported.parent.iterdir()) == before
