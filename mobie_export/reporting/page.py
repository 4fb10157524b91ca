"""The page of a report: one HTML file from the report's JSON alone, which needs neither scripts nor a network."""

import html
import importlib
import json
from importlib import resources
from typing import Any

from mobie_export.errors import UNSUPPORTED, MobieError
from mobie_export.progress import size_text, time_text

Report = dict[str, Any]
TIMES, NONE = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
SYMBOLS = {"error": "✕", "warning": "!", "note": "i"}


def check_library() -> None:
    """MobieError where the package is missing that draws the figures."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as e:
        raise MobieError(
            UNSUPPORTED,
            "a report needs a package that is not installed",
            str(e),
            "matplotlib",
            "pip install 'mobie-export[report]'",
        ) from None


def page(report: Report) -> str:
    """A whole HTML document."""
    file, source, made = report["file"], report["source"], report["made"]
    style = resources.files("mobie_export").joinpath("data", "report", "style.css").read_text("utf-8")
    title = f"{file['name']} beside {source['name']}"
    machine = made["machine"]
    parts = [
        _findings(report["findings"]),
        _section("At a glance", _glance(report)),
        _section("On a text", _scores(report), _part(report["scores"])),
        *([_section("Tasks", _tasks(report["tasks"]), _part(report["tasks"]))] if report["tasks"] else []),
        _section("Answers", _behaviour(report["behaviour"]), _part(report["behaviour"])),
        _section("Layer by layer", _layers(report["layers"]), _part(report["layers"])),
        _section("Speed on this machine", _speed(report), _part(report["speed"])),
        _section("What is stored how, and why", _tensors(report["tensors"])),
        _section("What else changed", _others(report["tensors"])),
    ]
    quick = ", quick" if made["quick"] else ""
    origin = ", which it was made from" if file["of_source"] else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<h1>{_text(file["name"])}</h1>
<p>beside <b>{_text(source["name"])}</b>{origin} · {_text(file["architecture"])}, {file["layers"]} layers
of {file["experts"]} experts, {_text(_value(file["used"]))} used</p>
</header>
{"".join(parts)}
<footer>
<p>{_text(made["by"])} on {_text(made["at"][:16].replace("T", " "))} UTC{quick}, in {time_text(made["seconds"])} ·
{_text(machine["cpu"])}, {made["threads"]} of {machine["cores"]} cores · all figures are in the JSON file beside this
page</p>
</footer>
</main>
</body>
</html>
"""


# ---- sections --------------------------------------------------------------------------------------------------------


def _findings(found: list[dict[str, Any]]) -> str:
    severe = [f for f in found if f["severity"] == "error"]
    warnings = [f for f in found if f["severity"] == "warning"]
    if severe:
        verdict, state = f"{len(severe)} thing{'s' if len(severe) > 1 else ''} wrong with this export", "error"
    elif warnings:
        verdict, state = "Nothing is broken; look at the warnings", "warning"
    else:
        verdict, state = "Nothing is wrong with this export", "good"
    items = ""
    for f in found:
        severity, where = f["severity"], "" if f["layer"] is None else f"<b>layer {f['layer']}</b> "
        items += (
            f'<li class="{severity}"><span class="mark" title="{severity}">{SYMBOLS[severity]}</span>'
            f"<span>{where}{_text(f['what'])}</span></li>"
        )
    return f"<section class='verdict {state}'><h2>{verdict}</h2>{'<ul>' + items + '</ul>' if items else ''}</section>"


def _glance(report: Report) -> str:
    file, source, scores = report["file"], report["source"], report["scores"]
    tiles = [
        (
            f"{file['bytes'] / source['bytes']:.1%}",
            "of the size",
            f"{size_text(file['bytes'])} of {size_text(source['bytes'])}",
        ),
        (f"{file['expert_bpw']:.3f}", "bits per expert weight", f"{file['bpw']:.2f} over all weights"),
    ]
    memory = report["behaviour"].get("memory") or {}
    if memory.get("file") and memory.get("source"):
        what = f"{size_text(memory['file'])} of {size_text(memory['source'])}"
        tiles.append((f"{memory['file'] / memory['source']:.1%}", "of the memory", what))
    if "ppl" in scores:
        what = f"{_figure(scores['ppl'])} after {_figure(scores['ppl_source'])}"
        tiles.append((f"{TIMES} {_figure(scores['ratio'])}", "perplexity", what))
        tiles.append((f"{_figure(scores['same_top'])} %", "same most likely token", f"KL {_figure(scores['kl'])} nats"))
    speed = report["speed"]
    if "file" in speed:
        a, b = speed["file"]["generation"], speed["source"]["generation"]
        tiles.append((f"{TIMES} {a / b:.2f}", "generation speed", f"{a:.1f} after {b:.1f} tokens per second"))
    return (
        '<div class="tiles">'
        + "".join(
            f"<div><strong>{_text(big)}</strong><span>{_text(what)}</span><small>{_text(small)}</small></div>"
            for big, what, small in tiles
        )
        + "</div>"
    )


def _scores(report: Report) -> str:
    scores = report["scores"]
    if "left_out" in scores:
        return ""

    def plus(key: str) -> str:
        return f"{_figure(scores[key])} ± {_figure(scores[f'{key}_error'])}"

    rows = [
        ["perplexity", plus("ppl_source"), plus("ppl")],
        ["perplexity, of the source's", "1", plus("ratio")],
        ["KL divergence from the source, mean", "0", f"{plus('kl')} nats"],
        ["… median", "0", f"{_figure(scores['kl_median'])} nats"],
        ["… 99 % of the tokens are below", "0", f"{_figure(scores['kl_99'])} nats"],
        ["same most likely token", "100 %", f"{plus('same_top')} %"],
    ]
    text = report["text"]
    about = (
        f"By llama-perplexity on {_text(text['name'])}, {scores['chunks']} pieces of {scores['context']} tokens, the "
        "second half of each scored."
    )
    return _table(["", "source", "export"], rows, numbers=True) + f"<p class='about'>{about}</p>"


def _tasks(tasks: dict[str, Any]) -> str:
    if "left_out" in tasks:
        return ""
    rows = [
        [name, found["data"], *(f"{_figure(found[k]['score'])} %" for k in ("source", "file"))]
        for name, found in tasks.items()
    ]
    return _table(["task", "file", "source", "export"], rows, numbers=True)


def _behaviour(part: dict[str, Any]) -> str:
    if "left_out" in part:
        return ""
    ours, theirs = part["summary"]["file"], part["summary"]["source"]
    names = {
        "ended": "answers that end by themselves",
        "loops": "answers that run in loops",
        "json": "valid JSON on a plain request",
        "schema": "valid JSON of a schema that is asked for",
        "tools": "tool calls well formed",
    }
    rows = [[what, *(f"{s[k][0]} of {s[k][1]}" for s in (theirs, ours))] for k, what in names.items()]
    rows.append(["tokens of an answer, median", *(_figure(s["tokens"]) for s in (theirs, ours))])
    sampling = part["sampling"]
    drawn = ", ".join(f"{k} {_figure(v)}" for k, v in sampling.items() if k not in ("from", "seed"))
    template = "the model's chat template" if part["template"] else "llama-server's chat template: the model has none"
    about = (
        f"By llama-server, in {template}; at most {part['length']} tokens an answer. Sampled as {sampling['from']} "
        f"has it ({drawn}), seed {sampling['seed']}."
    )
    answers = "".join(_answer(r, i == 0) for i, r in enumerate(part["requests"]))
    return _table(["", "source", "export"], rows, numbers=True) + f"<p class='about'>{_text(about)}</p>{answers}"


def _answer(row: dict[str, Any], shown: bool) -> str:
    """A request and what both say, folded unless it is to be shown at once."""
    kinds = {"answer": row["drawn"], "json": "JSON", "schema": "JSON of a schema", "tools": "tools"}

    def side(name: str, said: dict[str, Any]) -> str:
        marks = [f"{said['tokens']} tokens"]
        marks += [] if said["ended"] else ["cut off"]
        marks += ["loops"] if said["loops"] else []
        bad = ""
        if "good" in said:
            marks.append("good" if said["good"] else said["why"])
            bad = "" if said["good"] else " bad"
        return (
            f"<div class='said{bad}'><h4>{name} <small>{_text(' · '.join(marks))}</small></h4>"
            f"<pre>{_text(said['text']) or '<i>nothing</i>'}</pre></div>"
        )

    return (
        f"<details{' open' if shown else ''}>"
        f"<summary><span class='kind'>{kinds[row['kind']]}</span> {_text(row['prompt'])}</summary>"
        f"<div class='pair'>{side('source', row['source'])}{side('export', row['file'])}</div></details>"
    )


def _layers(part: dict[str, Any]) -> str:
    if "left_out" in part:
        return ""
    from mobie_export.reporting import plots

    rows = [r for r in part["layers"] if "experts_error" in r]
    head = ["layer", "stream error", "experts' error", "cosine", "size", "routing", "alone"]
    head += ["tokens: least", "median", "most"]
    cells = [
        [
            r["layer"],
            *(_figure(r[k]) for k in ("stream_error", "experts_error", "experts_cosine", "experts_size")),
            *(_percent(r[k]) for k in ("routing", "routing_alone")),
            *_spread(r["tokens"]),
        ]
        for r in rows
    ]
    about = (
        f"Over {part['sequences']} sequences of {part['tokens_each']} tokens. <b>Alone</b>: a layer of the export on "
        "what the source's layer sees, which shows its own faults. <b>On path</b>: on what the export's layers before "
        "it make, where losses add up. Cosine and size: of what the experts add alone, with what the source's add. "
        "Tokens: of the export's experts."
    )
    chosen = [r for r in rows if r["used"] < len(r["tokens"])]  # where every token takes all there is nothing to see
    tokens = f"<figure>{plots.tokens(chosen)}</figure>" if chosen else "<p>Every token takes all experts.</p>"
    return (
        f"<p class='about'>{about}</p><figure>{plots.layers(part['layers'])}</figure>{tokens}"
        f"<details><summary>as a table</summary>{_table(head, cells, numbers=True)}</details>"
    )


def _spread(counts: list[int]) -> list[int | str]:
    ordered = sorted(counts)
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]] if ordered else ["", "", ""]


def _speed(report: Report) -> str:
    speed = report["speed"]
    if "left_out" in speed:
        return ""
    from mobie_export.reporting import plots

    load = "" if speed["load"] is None else f"; load of the machine before: {speed['load']:.1f}"
    about = (
        f"By llama-bench, threads: {report['made']['threads']}; {speed['prompt_tokens']} tokens of a prompt and "
        f"{speed['generated_tokens']} generated, medians of {speed['rounds']} rounds, both models in turns{load}."
    )
    return f"<figure>{plots.speed(speed)}</figure><p class='about'>{_text(about)}</p>"


def _tensors(tensors: dict[str, Any]) -> str:
    from mobie_export.reporting import plots

    experts = tensors["experts"]
    rows = [
        [
            r["kind"],
            r["type"],
            f"{r['tensors']:,}",
            f"{8 * r['bytes'] / r['weights']:.3g}",
            size_text(r["bytes"]),
            r["why"],
        ]
        for r in tensors["types"]
    ]
    names = {
        "binary": "one sign",
        "two signs": "two signs",
        "copied": "as in the source",
        "other type": "in another type",
        "left": "missing in the export",
        "padded": "in the export alone",
    }
    counts = [[names[k], f"{n:,}"] for k, n in experts["weights"].items() if n or k in ("binary", "two signs")]
    counts.append(["together, of the source's", f"{experts['source_weights']:,}"])
    settings = ", ".join(
        f"{k} {json.dumps(v)}"
        for k, v in tensors["settings"].items()
        if not isinstance(v, dict | list) and v is not None
    )
    return (
        _table(["tensors", "type", "number", "bits", "size", "why"], rows)
        + "<h3>Every expert weight</h3>"
        + _table(["", "weights"], counts, numbers=True)
        + f"<h3>Bits by layer</h3><figure>{plots.bits(experts['by_layer'])}</figure>"
        + f"<p class='about'>Method {_text(_value(tensors['method']))}: {_text(settings or 'no settings')}.</p>"
    )


def _others(tensors: dict[str, Any]) -> str:
    others, entries = tensors["others"], tensors["metadata"]
    rows = [
        [r["tensor"], r["source_type"], r["type"], _percent(r.get("error")), r["why"] or "the file does not say"]
        for r in others["changed"]
    ]
    found = f"<p>{others['same']:,} tensors that are no experts are the source's, byte for byte.</p>"
    if rows:
        found += _table(["tensor", "source", "export", "off by", "why"], rows)
    lines = [["added", k, "", v] for k, v in entries["added"].items()]
    lines += [["removed", k, v, ""] for k, v in entries["removed"].items()]
    lines += [["changed", k, *v] for k, v in entries["changed"].items()]
    if lines:
        found += "<h3>Metadata</h3>" + _table(["", "entry", "source", "export"], lines)
    else:
        found += "<p>Metadata are the source's, but for what an export adds of its own (<code>mobie.*</code>).</p>"
    thin = tensors["thin"]
    if thin:
        table = [[i, ", ".join(f"{e} ({n})" for e, n in few.items())] for i, few in thin.items()]
        found += (
            "<h3>Experts that few calibration tokens reached</h3>"
            "<p class='about'>They are fitted to what their layer's other tokens say as well; expert (tokens).</p>"
            f"<details><summary>{sum(map(len, thin.values()))} experts</summary>"
            f"{_table(['layer', 'experts'], table)}</details>"
        )
    return found


# ---- pieces ----------------------------------------------------------------------------------------------------------


def _section(title: str, body: str, left_out: str = "") -> str:
    return f"<section><h2>{title}</h2>{left_out or body}</section>"


def _part(part: dict[str, Any]) -> str:
    """Why a part is left out; empty where it is not."""
    if "left_out" not in part:
        return ""
    todo = f" To get it: <code>{_text(part['todo'])}</code>" if part.get("todo") else ""
    return f"<p class='missing'>Left out: {_text(part['left_out'])}.{todo}</p>"


def _table(head: list[str], rows: list[list[Any]], numbers: bool = False) -> str:
    """numbers: whether all columns but the first are to stand right."""
    cells = "".join(f"<tr>{''.join(f'<td>{_text(_value(c))}</td>' for c in row)}</tr>" for row in rows)
    heads = "".join(f"<th>{_text(h)}</th>" for h in head)
    kind = " class='numbers'" if numbers else ""
    return f"<div class='wide'><table{kind}><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table></div>"


def _text(text: object) -> str:
    return html.escape(str(text))


def _value(value: object) -> str:
    return "" if value is None else str(value)


def _figure(value: float | None) -> str:
    """Four digits; a dash where there is no number."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}"
