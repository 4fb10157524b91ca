"""The figures of the page, as SVG that takes the page's colours: text and lines have the colour of the words around it,
and words stay words."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"  # stands for the page's own colour until the figure is done
SOURCE, EXPORT, THIRD = "#8a8f98", "#2f7ed8", "#d9822b"  # seen on white and on black
WIDTH = 7.6  # inches


class Drawn:
    svg = ""


@contextmanager
def _figure(name: str, height: float, n: int = 1) -> Iterator[tuple[Drawn, "list[Axes]"]]:
    """Axes to draw on, side by side; `svg` is there when the block has ended. name: for ids, of which a page has one
    of each."""
    import matplotlib

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 9,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "legend.frameon": False,
    }
    drawn = Drawn()
    with matplotlib.rc_context(style):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(1, n, squeeze=False)[0]
        yield drawn, list(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%" role="img"', svg, count=1)
    # ids that matplotlib makes of the place in the figure are in every figure
    for attribute in ('id="', "url(#", 'href="#'):
        svg = svg.replace(attribute, f"{attribute}{name}-")
    svg = svg.replace("font: 9px 'sans-serif'", "font: 9px sans-serif")
    drawn.svg = svg


def _whole_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def layers(rows: list[dict[str, Any]]) -> str:
    """Error and routing by layer."""
    with_experts = [r for r in rows if "experts_error" in r]
    at = [r["layer"] for r in with_experts]
    with _figure("layers", 2.7, 2) as (drawn, (left, right)):
        marker = "o" if len(rows) < 3 else None
        left.plot([r["layer"] for r in rows], _values(rows, "stream_error"), color=EXPORT, marker=marker)
        left.plot(at, _values(with_experts, "experts_error"), color=THIRD, marker=marker)
        _ends(left, ["stream, on path", "experts, alone"], [EXPORT, THIRD])
        left.set(xlabel="layer", ylabel="error, relative", ylim=(0, None))
        right.plot(at, [100 * v for v in _values(with_experts, "routing")], color=EXPORT, marker=marker)
        right.plot(at, [100 * v for v in _values(with_experts, "routing_alone")], color=THIRD, marker=marker)
        _ends(right, ["on path", "alone"], [EXPORT, THIRD])
        right.set(xlabel="layer", ylabel="% of the experts as in the source", ylim=(0, 104))
        for axes in (left, right):
            _whole_numbers(axes)
            axes.grid(axis="y", color=SOURCE, alpha=0.25, linewidth=0.6)
    return drawn.svg


def bits(rows: list[dict[str, Any]]) -> str:
    """Bits per expert weight by layer."""
    with _figure("bits", 2.0) as (drawn, (axes,)):
        axes.bar([r["layer"] for r in rows], [r["bpw"] for r in rows], color=EXPORT, width=0.8)
        axes.set(xlabel="layer", ylabel="bits per expert weight")
        _whole_numbers(axes)
        axes.grid(axis="y", color=SOURCE, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    return drawn.svg


def tokens(rows: list[dict[str, Any]]) -> str:
    """Tokens per expert by layer: every expert a mark, the source's and the export's side by side."""
    rows = [r for r in rows if "tokens" in r]
    with _figure("tokens", 2.5) as (drawn, (axes,)):
        for key, color, shift in (("tokens_source", SOURCE, -0.15), ("tokens", EXPORT, 0.15)):
            x = [r["layer"] + shift for r in rows for _ in r[key]]
            axes.plot(x, [n for r in rows for n in r[key]], "_", color=color, markersize=5, alpha=0.8)
        _ends(axes, ["source", "export"], [SOURCE, EXPORT])
        axes.set(xlabel="layer", ylabel="tokens of an expert", ylim=(0, None))
        _whole_numbers(axes)
        axes.grid(axis="y", color=SOURCE, alpha=0.25, linewidth=0.6)
    return drawn.svg


def speed(found: dict[str, Any]) -> str:
    """Tokens per second of both."""
    with _figure("speed", 1.3, 2) as (drawn, both):
        for axes, (key, name) in zip(both, (("prompt", "prompt"), ("generation", "generation")), strict=True):
            values = [found["file"][key], found["source"][key]]
            bars = axes.barh(["export", "source"], values, color=[EXPORT, SOURCE], height=0.6)
            axes.bar_label(bars, [f" {v:.1f}" for v in values], color=INK)
            axes.set(title=f"{name}, tokens per second", xlim=(0, 1.2 * max(values)))
            axes.title.set_fontsize(9)
            axes.invert_yaxis()
            axes.spines["bottom"].set_visible(False)
            axes.set_xticks([])
    return drawn.svg


def _values(rows: list[dict[str, Any]], key: str) -> list[float]:
    """With a gap where there is no number."""
    return [float("nan") if r[key] is None else r[key] for r in rows]


def _ends(axes: "Axes", names: list[str], colors: list[str]) -> None:
    """What lines are, above the axes and in their colours."""
    step = 0.55 if axes.get_position().width < 0.6 else 0.2  # words are drawn by the reader's fonts: room to spare
    for i, (name, color) in enumerate(zip(names, colors, strict=True)):
        axes.text(step * i, 1.03, f"— {name}", color=color, transform=axes.transAxes, fontsize=9)
