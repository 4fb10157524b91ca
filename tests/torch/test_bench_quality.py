"""The quality benchmark reads what llama-perplexity prints and writes tables into a document, whose prose stays."""

import argparse
from math import log

import pytest

from tools import bench_quality

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


@pytest.fixture
def tool():
    return bench_quality


def test_figures_are_read(tool):
    found = tool.statistics(PRINTED)
    assert found == {"ppl": 61.94, "ratio": 1.092609, "kl": 0.0871, "kl99": 0.65, "top1": 80.7}
    with pytest.raises(tool.Failed, match="kl99"):
        tool.statistics(PRINTED.replace("99.0%   KLD", ""))


def test_tables_go_between_the_marks(tool, tmp_path):
    (tmp_path / "text.txt").write_text("a b c")
    (tmp_path / "quality.md").write_text(f"# Before\n{tool.BEGIN}\nold table\n{tool.END}\n# After\n")
    args = argparse.Namespace(
        work=tmp_path / "work", text=[str(tmp_path / "text.txt")], calibration=tmp_path / "text.txt", model=None
    )
    args.output = tmp_path / "quality.md"
    bench = tool.Bench(args)
    chosen = [
        tool.Variant("Q1_0", "peer", None),
        tool.Variant("ours", "ours", None),
        tool.Variant("later", "ours", None),
    ]
    for name, bpw, ratio in (("Q1_0", 1.125, 1.651), ("ours", 1.126, 1.05)):
        figures = {"ppl": 56 * ratio, "ratio": ratio, "kl": ratio - 1, "kl99": 1.0, "top1": 80.0}
        bench.save(f"score {name}", {"bpw": bpw, "active": bpw, "text": figures, "router": [1.0, 0.9]})
    tool.write(bench, chosen)
    text = args.output.read_text()
    assert text.startswith("# Before\n") and text.endswith("# After\n") and "old table" not in text
    share = 1 - log(1.05) / log(1.651)
    assert f"1.050 ({share:.0%})" in text and "1.651 (0%)" in text and "later" not in text
    assert tool.closed({"text": {"ratio": 1.05}}, "text", bench.results) == pytest.approx(share)
    assert (tmp_path / "quality-text.svg").read_text().count("<circle") == 2
    assert tool.Bench(args).results == bench.results, "the next run takes them from the work folder"
