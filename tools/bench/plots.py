"""The figures of README and docs/measured, from the tables of docs/measured: nothing is measured here.

pip install 'mobie-export[plot]'
python -m tools.bench.plots
"""

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
MODEL = "### Qwen3-30B-A3B"  # the section of docs/measured/speed.md that is drawn
OURS, OTHERS, PEERS = "#d1495b", "#7d8ca3", "#3366cc"
TICKS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1)  # of a divergence

Bars = tuple[str, list[tuple[str, float]]]  # title, (label, value)
Point = tuple[str, float, float]  # label, x, y


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]

    def column(self, name: str) -> list[tuple[str, float]]:
        """(first cell, first number of the cell in this column) of every row."""
        at = self.head.index(name)
        return [(row[0], float(re.match(r"-?[\d.]+", row[at])[0])) for row in self.rows]


def section(text: str, heading: str) -> str:
    """From a heading that begins so to the next of its level or a higher one."""
    level = heading.split(" ", 1)[0]
    return re.split(rf"^#{{1,{len(level)}}} ", text.split(f"\n{heading}", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def tables(text: str, first: str = "") -> list[Table]:
    """The tables of a text, or those whose first column's name begins so."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = ([c.strip(" *") for c in line.strip().strip("|").split("|")] for line in block.splitlines())
        if head[0].startswith(first):
            found.append(Table(head, rows))
    return found


def short(values: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Labels without "(r)", and with the other program's in a line of its own."""
    return [(name.removesuffix(" (r)").replace(" in ", "\nin "), value) for name, value in values]


def overview(text: str) -> list[Bars]:
    found = tables(section(text, MODEL))[0]
    titles = {"GB": "file, GB", "tg64": "generated tokens per second, two cores"}
    return [(title, found.column(name)) for name, title in titles.items()]


def speed(text: str) -> list[Bars]:
    """With as many threads as there are tables or columns for."""
    products = section(text, "## MUL_MAT_ID")
    (one,), many = tables(products, "1 token"), tables(products, "tokens, ")[-1]
    threads = [name for name in one.head if re.fullmatch(r"\d+ threads?", name)][-1]
    model = tables(section(text, MODEL), "experts, ")[-1]
    return [
        ("Experts, 1 token, Gweights/s", short(one.column(threads))),
        ("Experts, 512 tokens, GMAC/s", short(many.column("512"))),
        ("Generation, tokens/s", short(model.column("tg64"))),
        ("Prompt of 512, tokens/s", short(model.column("pp512"))),
    ]


def quality(text: str) -> dict[str, list[Point]]:
    """By text, (type, stored bits, mean KL divergence) of everything but the original."""
    found = tables(section(text, "### llama.cpp's types and ours"))[0]
    bits = found.column("bits stored / active")
    wanted = re.compile(r"(.+): KL mean\b")
    return {
        match[1]: [(a, x, y) for (a, x), (_, y) in zip(bits, found.column(name), strict=True) if a != "F16"]
        for name in found.head
        if (match := wanted.match(name))
    }


# --- figures ----------------------------------------------------------------------------------------------------------


def is_ours(name: str) -> bool:
    return name.startswith(("mobie", "ours", "recipe"))


def pyplot():
    """matplotlib.pyplot, so that the same figure gives the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "mobie", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    return plt


def draw_bars(panels: list[Bars], path: Path, size: tuple[float, float], title: str = "") -> None:
    """Two panels in a row; panels of one row have the same labels."""
    plt = pyplot()
    figure, axes = plt.subplots(-(-len(panels) // 2), 2, figsize=size, sharey="row", layout="constrained")
    for axis, (heading, values) in zip(axes.flat, panels, strict=True):
        names = [name for name, _ in values]
        bars = axis.barh(
            names, [v for _, v in values], color=[OURS if is_ours(n) else OTHERS for n in names], height=0.65
        )
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.set_title(heading, loc="left", fontsize=9)
        axis.set_xlim(0, 1.15 * max(v for _, v in values))
        axis.xaxis.set_visible(False)
        axis.spines[:].set_visible(False)
        axis.tick_params(left=False)
    for row in axes.reshape(-1, 2):
        row[0].invert_yaxis()
    if title:
        figure.suptitle(title, fontsize=10)
    save(plt, figure, path)


def draw_points(points: list[Point], path: Path, x: str, y: str) -> None:
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, bits, value in points:
        color = OURS if is_ours(name) else PEERS
        axis.plot(bits, value, "o", color=color, markersize=5)
        axis.annotate(name, (bits, value), xytext=(6, 0), textcoords="offset points", va="center", color=color)
    axis.set_yscale("log")
    axis.set_yticks([t for t in TICKS if min(p[2] for p in points) < t < max(p[2] for p in points)], minor=False)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.2, y=0.08)
    axis.set(xlabel=x, ylabel=y)
    save(plt, figure, path)


def save(plt, figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(f"written: {path}")


def main() -> None:
    measured = DOCS / "measured"
    text = (measured / "speed.md").read_text(encoding="utf-8")
    title = "Qwen3-30B-A3B's shapes with random weights, by type of the experts; the rest Q4_0"
    draw_bars(overview(text), DOCS / "overview.svg", (8, 2.9), title)
    draw_bars(speed(text), measured / "speed.svg", (8, 6))
    for name, points in quality((measured / "quality.md").read_text(encoding="utf-8")).items():
        path = measured / f"quality-{name}.svg"
        draw_points(points, path, "stored bits per expert weight", f"mean KL divergence, {name}")


if __name__ == "__main__":
    main()
