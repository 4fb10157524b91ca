#!/usr/bin/env python3
"""Draw docs/overview.svg, the figure at the top of README: size and speed of one model by type of its experts.

    pip install 'mobie-export[plot]'
    python tools/plot_overview.py

Every number is read from the first `llama-bench` table of docs/measured/speed.md; nothing is measured here.
"""

import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
SOURCE, OUTPUT = ROOT / "docs/measured/speed.md", ROOT / "docs/overview.svg"
SECTION = "### Qwen3-30B-A3B"
OURS, OTHERS = "#d1495b", "#7d8ca3"


def rows(text: str) -> list[tuple[str, float, float]]:
    """Type of the experts, file size in GB, generated tokens per second: in the order of the table."""
    section = text.split(SECTION, 1)[1].split("\n### ", 1)[0]
    table = [
        [cell.strip(" *") for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"
    ]
    head, _, *body = table
    size, speed = head.index("GB"), head.index("tg64")
    return [(line[0], float(line[size]), float(re.match(r"[\d.]+", line[speed])[0])) for line in body]


def draw(found: list[tuple[str, float, float]]) -> None:
    plt.rcParams |= {"svg.hashsalt": "mobie", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    figure, panels = plt.subplots(1, 2, figsize=(8, 2.9), sharey=True, layout="constrained")
    names = [name for name, *_ in found]
    colors = [OURS if name == "mobie" else OTHERS for name in names]
    titles = ("file, GB", "generated tokens per second, two cores")
    for axis, title, values in zip(panels, titles, list(zip(*found, strict=True))[1:], strict=True):
        bars = axis.barh(names, values, color=colors, height=0.65)
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_xlim(0, 1.15 * max(values))
        axis.xaxis.set_visible(False)
        axis.spines[:].set_visible(False)
        axis.tick_params(left=False)
    panels[0].invert_yaxis()
    figure.suptitle("Qwen3-30B-A3B's shapes with random weights, by type of the experts; the rest Q4_0", fontsize=10)
    figure.savefig(OUTPUT, metadata={"Date": None})


if __name__ == "__main__":
    found = rows(SOURCE.read_text(encoding="utf-8"))
    draw(found)
    print(f"{OUTPUT}: {len(found)} types", file=sys.stderr)
