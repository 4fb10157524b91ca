"""What do an export and its source answer to the same requests, in the model's chat template? Asked of llama-server.

Answers are drawn twice: greedily, and as the model's makers recommend (`general.sampling.*` in its metadata; where
there is nothing, as llama-server samples), from a fixed seed. Models that think are asked not to: what they answer is
looked at.
"""

import json
import re
import statistics
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from mobie_export.gguf_io import Gguf
from mobie_export.reporting.server import Refused, Server, served

LENGTH, QUICK_LENGTH = 256, 64  # tokens of an answer at most
CONTEXT = 4096
SEED = 1
UNIT = 60  # words of what is looked at as the unit of a loop, at most
TIMES = 4  # that a unit must stand at the end of a text
LEAST, CHARACTERS = 12, 40  # that a loop has at least, so that "no, no, no, no" is none
CHAT = "/v1/chat/completions"
SAMPLING = "general.sampling."
SHOWN = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")  # of llama-server's settings


def compare(
    file: Gguf, source: Gguf, work: Path, threads: int, quick: bool, step: Callable[[str], None]
) -> dict[str, Any]:
    """The part "behaviour" of the report. MobieError where llama-server is missing or does not load a model."""
    requests = _requests(quick)
    length = QUICK_LENGTH if quick else LENGTH
    context = min(CONTEXT, source.get(f"{source.architecture}.context_length", int, CONTEXT))
    said: dict[str, list[dict[str, Any]]] = {}
    memory: dict[str, int | None] = {}
    sampling: dict[str, Any] = {}
    for which, gguf in (("source", source), ("file", file)):
        name = "source" if which == "source" else "export"
        step(f"loading the {name}")
        with served(gguf.paths[0], context, threads, work / f"server-{which}.log") as server:
            if which == "source":  # what holds for both: the export's metadata are the source's
                params = server.get("/props")["default_generation_settings"].get("params", {})
                sampling = {k: params[k] for k in SHOWN if k in params}
            said[which] = []
            for request in requests:
                step(f"{request['kind']} of the {name}")
                said[which].append(_ask(server, request, length))
            memory[which] = server.memory()
    own = {k.removeprefix(SAMPLING): source.value(k) for k in source.entries if k.startswith(SAMPLING)}
    rows = [
        {k: v for k, v in request.items() if k not in ("body", "schema")} | {"source": a, "file": b}
        for request, a, b in zip(requests, said["source"], said["file"], strict=True)
    ]
    return {
        "template": "tokenizer.chat_template" in source.entries,
        "sampling": {"from": "the model's metadata" if own else "llama-server", "seed": SEED, **sampling},
        "length": length,
        "context": context,
        "memory": memory,
        "requests": rows,
        "summary": {which: summary(rows, which) for which in ("source", "file")},
    }


def summary(rows: list[dict[str, Any]], which: str) -> dict[str, Any]:
    """Counts over the requests to one of both models, as [how many, of how many]; tokens: the median of an answer."""
    of = {kind: [r[which] for r in rows if r["kind"] == kind] for kind in ("answer", "json", "schema", "tools")}
    answers = of["answer"]

    def share(items: list[dict[str, Any]], key: str) -> list[int]:
        return [sum(bool(x[key]) for x in items), len(items)]

    return {
        "ended": share(answers, "ended"),
        "loops": share(answers, "loops"),
        "tokens": statistics.median(x["tokens"] for x in answers) if answers else None,
        "json": share(of["json"], "good"),
        "schema": share(of["schema"], "good"),
        "tools": share(of["tools"], "good"),
    }


def n_requests(quick: bool) -> int:
    """To each of the models."""
    return len(_requests(quick))


# ---- requests --------------------------------------------------------------------------------------------------------


def _requests(quick: bool) -> list[dict[str, Any]]:
    """kind, prompt, how it is drawn, and the body of the request."""
    data = json.loads(resources.files("mobie_export").joinpath("data", "report", "behaviour.json").read_bytes())
    if quick:
        data |= {kind: data[kind][:n] for kind, n in data["quick"].items()}
    tools = [{"type": "function", "function": f} for f in data["functions"]]
    parameters = {f["name"]: f["parameters"] for f in data["functions"]}
    found: list[dict[str, Any]] = []

    def add(kind: str, prompt: str, drawn: str = "greedy", schema: Any = None, **more: Any) -> None:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], "cache_prompt": False, "seed": SEED}
        body |= {"temperature": 0} if drawn == "greedy" else {}
        found.append({"kind": kind, "prompt": prompt, "drawn": drawn, "body": body | more, "schema": schema})

    for prompt in data["answers"]:
        for drawn in ("greedy", "sampled"):
            add("answer", prompt, drawn)
    for prompt in data["json"]:
        add("json", prompt)
    for item in data["schema"]:
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": item["schema"]}}
        add("schema", item["prompt"], schema=item["schema"], response_format=form)
    for item in data["tools"]:
        add("tools", item["prompt"], schema=parameters, tools=tools)
    return found


def _ask(server: Server, request: dict[str, Any], length: int) -> dict[str, Any]:
    """What a model says to a request: text, tokens, ended (by itself), loops; of a request with a form, good, why."""
    try:
        answer = server.post(CHAT, request["body"] | {"max_tokens": length})
        choice, tokens = answer["choices"][0], int(answer["usage"]["completion_tokens"])
    except (Refused, KeyError, IndexError, TypeError) as e:
        return {"text": "", "tokens": 0, "ended": False, "loops": False, "good": False, "why": f"refused: {e}"}
    message, ended = choice["message"], choice["finish_reason"] != "length"
    text = (message.get("reasoning_content") or "") + (message.get("content") or "")
    calls = message.get("tool_calls") or []
    found = {"text": text, "tokens": tokens, "ended": ended, "loops": loops(text)}
    match request["kind"]:
        case "json":
            why = json_problem(text)
        case "schema":
            why = schema_problem(text, request["schema"])
        case "tools":
            why = call_problem(calls, request["schema"])
            found["text"] = json.dumps([c.get("function") for c in calls], ensure_ascii=False) if calls else text
        case _:
            return found
    return found | {"good": not why, "why": why}


# ---- judged ----------------------------------------------------------------------------------------------------------

FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


def loops(text: str) -> bool:
    """Whether a text ends in the same words, or characters where it has no spaces, over and over."""
    words = text.split()
    # the last word may have been cut off
    for parts, least in ((words, LEAST), (words[:-1], LEAST), (list(text[-CHARACTERS * TIMES :]), CHARACTERS)):
        for size in range(1, min(UNIT, len(parts) // TIMES) + 1):
            times = max(TIMES, -(-least // size))
            last = parts[-size * times :]
            if len(last) == size * times and last == last[-size:] * times:
                return True
    return False


def json_problem(text: str) -> str:
    """Why a text is no JSON; empty where it is, bare or in a fence."""
    fenced = FENCE.fullmatch(text)
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError) as e:
        return f"no JSON: {e}"
    return ""


def schema_problem(text: str, schema: dict[str, Any]) -> str:
    """Why a text is no JSON of a schema; empty where it is."""
    try:
        return misfit(json.loads(text), schema)
    except (ValueError, RecursionError) as e:
        return f"no JSON: {e}"


def call_problem(calls: list[dict[str, Any]], functions: dict[str, dict[str, Any]]) -> str:
    """Why calls of tools cannot be carried out; empty where all can. functions: name -> schema of its arguments."""
    if not calls:
        return "no tool called"
    for call in calls:
        try:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
        except (KeyError, TypeError):
            return "a call without name or arguments"
        if name not in functions:
            return f"there is no tool {name}"
        if why := schema_problem(arguments, functions[name]):
            return f"arguments of {name}: {why}"
    return ""


TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
}


def misfit(value: Any, schema: dict[str, Any]) -> str:
    """What of a value does not fit a schema of the kinds that data/report/behaviour.json has; empty where all does."""
    kind = schema["type"]
    if not TYPES[kind](value):
        return f"{json.dumps(value)[:40]} is no {kind}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{json.dumps(value)[:40]} is none of {', '.join(map(str, schema['enum']))}"
    if kind == "array":
        least, most = schema.get("minItems", 0), schema.get("maxItems", len(value))
        if not least <= len(value) <= most:
            return f"{len(value)} items"
        return next((why for v in value if (why := misfit(v, schema["items"]))), "")
    if kind == "object":
        properties = schema["properties"]
        missing = [k for k in schema.get("required", []) if k not in value]
        unknown = [k for k in value if k not in properties] if schema.get("additionalProperties") is False else []
        if missing or unknown:
            return ", ".join([*(f"{k} is missing" for k in missing), *(f"{k} is unknown" for k in unknown)])
        return next((why for k, v in value.items() if k in properties and (why := misfit(v, properties[k]))), "")
    return ""
