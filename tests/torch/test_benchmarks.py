"""Benchmarks: what they read, what they keep, and that the figures show what the tables say."""

import argparse
import json
import re
from math import log
from pathlib import Path

import pytest

from tools.bench import common, plots, quality

DOCS = Path(__file__).resolve().parents[2] / "docs"
PRINTED = """
====== Perplexity statistics ======
Mean PPL(Q)                   :  61.940000 ±   1.852832
Mean PPL(base)                :  56.690000 ±   1.852829
Mean PPL(Q)/PPL(base)         :   1.092609 ±   0.000005

====== KL divergence statistics ======
Mean    KLD:   0.087100 ±   0.000100
99.9%   KLD:    2.500000
99.0%   KLD:    0.650000
95.0%   KLD:    0.300000

====== Token probability statistics ======
99.0%   Δp:  0.002%
Same top p: 80.700 ± 0.200 %
"""


def test_figures_of_llama_perplexity_are_read():
    found = quality.statistics(PRINTED)
    assert found == {"ppl": 61.94, "ratio": 1.092609, "kl": 0.0871, "kl99": 0.65, "top1": 80.7}
    with pytest.raises(common.Failed, match="kl99"):
        quality.statistics(PRINTED.replace("99.0%   KLD", ""))


def test_results_of_runs_side_by_side_are_kept(tmp_path):
    path = tmp_path / "work/results.json"
    one, two = common.Results(path), common.Results(path)
    one.put("a", {"x": 1})
    two.put("b", {"x": 2})
    one.put("c", {"x": 3})
    assert {name: common.Results(path).get(name) for name in "abcd"} == {
        "a": {"x": 1},
        "b": {"x": 2},
        "c": {"x": 3},
        "d": None,
    }
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_results_of_another_build_are_not_taken_and_not_lost(tmp_path):
    path = tmp_path / "results.json"
    common.Results(path, "old").put("a", {"x": 1})
    new = common.Results(path, "new")
    assert new.get("a") is None
    new.put("b", {"x": 2})
    assert common.Results(path, "old").get("a")["x"] == 1 and common.Results(path, "new").get("b")["x"] == 2


def test_a_command_that_fails_says_what_it_printed():
    assert common.run("echo", "a", 1) == "a 1\n"
    with pytest.raises(common.Failed, match=r"(?s)no-such-file.*failed with"):
        common.run("cat", "no-such-file")


@pytest.fixture
def bench(tmp_path):
    """Q1_0 and two of ours scored on one text, one not yet."""
    (tmp_path / "text.txt").write_text("a b c")
    args = argparse.Namespace(
        work=tmp_path / "work", text=[str(tmp_path / "text.txt")], calibration=tmp_path / "text.txt", model=None
    )
    args.output = tmp_path / "quality.md"
    bench = quality.Bench(args)
    for name, bpw, ratio in (
        ("F16", 16, 1.0),
        ("Q1_0", 1.125, 1.651),
        ("ours small", 1.126, 1.05),
        ("sign", 1.125, 1.6),
    ):
        figures = {"ppl": 56 * ratio, "ratio": ratio, "kl": ratio - 1, "kl99": 1.0, "top1": 80.0}
        bench.results.put(f"score {name}", {"bpw": bpw, "active": bpw, "text": figures, "router": [1.0, 0.9]})
    return bench


def test_the_gap_is_closed_between_q1_0_and_the_original(bench):
    share = quality.closed({"text": {"ratio": 1.05}}, "text", bench.results)
    assert share == pytest.approx(1 - log(1.05) / log(1.651))
    for name, wanted in (("F16", 1), ("Q1_0", 0)):
        assert quality.closed(bench.results.get(f"score {name}"), "text", bench.results) == pytest.approx(wanted)
    assert quality.closed({"other": {}}, "other", bench.results) is None
    again = quality.Bench(bench.args)
    assert again.results.entries == bench.results.entries, "the next run takes them from the work folder"


def test_plots_read_the_tables_that_benchmarks_write(bench):
    document = bench.args.output
    document.write_text(f"# Before\n{quality.BEGIN}\nold table\n{quality.END}\n# After\n")
    groups = {"F16": "original", "Q1_0": "peer", "ours small": "ours", "later": "ours", "sign": "part"}
    quality.write(bench, [quality.Variant(name, group, None) for name, group in groups.items()])
    text = document.read_text()
    assert text.startswith("# Before\n") and text.endswith("# After\n") and "old table" not in text
    assert plots.quality(text) == {"text": [("Q1_0", 1.125, 0.651), ("ours small", 1.126, 0.05)]}
    head, rows = ["type", "GB", "tg64"], [["**mobie**", "4.99", "26.5"], ["Q1_0", "5.0", "14.8 (1.70x)"]]
    text = f"# A\n\n## B\n\n### Qwen3-30B-A3B, all\n\n{common.table(head, rows)}\n### Next\n\n{common.table(head, [])}"
    assert [values for _, values in plots.overview(text)] == [
        [("mobie", 4.99), ("Q1_0", 5.0)],
        [("mobie", 26.5), ("Q1_0", 14.8)],
    ]


def drawn(path: Path) -> set[str]:
    return set(re.findall(r">([^<>]+)</(?:text|tspan)>", path.read_text(encoding="utf-8")))


def test_figures_show_what_the_tables_say():
    """A table that was measured anew needs `make plots`."""
    speed, measured = (DOCS / "measured/speed.md").read_text(encoding="utf-8"), DOCS / "measured"
    for path, panels in ((DOCS / "overview.svg", plots.overview(speed)), (measured / "speed.svg", plots.speed(speed))):
        for _, values in panels:
            wanted = {f"{value:.1f}" for _, value in values} | {line for name, _ in values for line in name.split("\n")}
            assert wanted <= drawn(path), path.name
    found = plots.quality((measured / "quality.md").read_text(encoding="utf-8"))
    assert len(found) == 2
    for name, points in found.items():
        assert {label for label, *_ in points} <= drawn(measured / f"quality-{name}.svg")


def test_results_survive_a_write_that_is_cut_off(tmp_path, monkeypatch):
    results = common.Results(tmp_path / "results.json")
    results.put("a", {"x": 1})
    with pytest.raises(TypeError):
        results.put("b", {"x": object()})
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": {"x": 1}}
