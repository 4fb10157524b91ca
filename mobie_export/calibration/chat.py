"""Dialogues as calibration text, in the words that the model was tuned on: its own chat template."""

import json

from mobie_export.errors import BAD_INPUT, UNSUPPORTED, MobieError
from mobie_export.gguf_io import Gguf

WANTED = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]} on every line'


def dialogues(data: bytes) -> list[list[dict]]:
    """The messages of every line of a JSON Lines file. MobieError for anything else."""
    found = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
            good = bool(messages) and all(map(_is_message, messages))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            good = False
        if not good:
            shown = line[:80].decode("utf-8", "replace")
            raise MobieError(
                BAD_INPUT, "the dialogues to calibrate on cannot be read", f"line {number}: {shown}", WANTED
            )
        found.append(messages)
    if not found:
        raise MobieError(BAD_INPUT, "there are no dialogues to calibrate on", f"{len(data)} bytes", WANTED)
    return found


def _is_message(message: dict) -> bool:
    """Text, or parts, or calls of tools in place of it."""
    content = message.get("content")
    said = isinstance(content, (str, list)) or (content is None and bool(message.get("tool_calls")))
    return isinstance(message["role"], str) and said


def opening(gguf: Gguf) -> str:
    """What the model's template puts before the first message of a user; empty where there is none, or no template."""
    mark = "\u2603"
    line = json.dumps({"messages": [{"role": "user", "content": mark}]})
    try:
        before, found, _ = render(gguf, line.encode()).decode().partition(mark)
    except MobieError:
        return ""
    return before if found else ""


def render(gguf: Gguf, data: bytes) -> bytes:
    """All dialogues of a JSON Lines file one after the other, each wrapped in the model's template (its metadata) as
    transformers wraps it. MobieError where there is no template, or it does not take them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = gguf.get("tokenizer.chat_template", str)
    if not template or not isinstance(template, str):
        raise MobieError(
            UNSUPPORTED,
            f"{gguf.paths[0]} has no chat template",
            "no tokenizer.chat_template",
            "a model tuned for dialogue",
            "leave --chat out and calibrate on plain text",
        )
    words = gguf.get_list("tokenizer.ggml.tokens", str) or []

    def word(end: str) -> str:
        number = gguf.get(f"tokenizer.ggml.{end}_token_id", int)
        return words[number] if number is not None and 0 <= number < len(words) else ""

    conversations = dialogues(data)
    try:
        found = render_jinja_template(
            conversations, chat_template=template, bos_token=word("bos"), eos_token=word("eos")
        )
        rendered = "".join(found[0])  # one text for each dialogue; next to them, where the answers are
    except Exception as e:  # a template is a program of the model's: it fails in its own ways
        raise MobieError(
            BAD_INPUT,
            "the model's chat template does not take the dialogues",
            str(e) or type(e).__name__,
            "roles in the order that the template knows",
            "leave --chat out, or give the dialogues that the model's card describes",
        ) from e
    return rendered.encode("utf-8", "replace")
