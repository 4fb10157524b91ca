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
            good = bool(messages) and all(
                isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages
            )
        except (ValueError, KeyError, TypeError):
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


def render(gguf: Gguf, data: bytes) -> bytes:
    """All dialogues of a JSON Lines file one after the other, each wrapped in the model's template (its metadata)."""
    import jinja2.sandbox  # of torch's dependencies

    template = gguf.value("tokenizer.chat_template")
    if not template:
        raise MobieError(
            UNSUPPORTED,
            f"{gguf.paths[0]} has no chat template",
            "no tokenizer.chat_template",
            "a model tuned for dialogue",
            "leave --chat out and calibrate on plain text",
        )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    words = gguf.value("tokenizer.ggml.tokens", [])
    ends = {}
    for end in ("bos", "eos"):
        number = gguf.value(f"tokenizer.ggml.{end}_token_id")
        ends[f"{end}_token"] = words[number] if number is not None and number < len(words) else ""
    parts = []
    try:
        compiled = environment.from_string(template)
        for messages in dialogues(data):
            parts.append(compiled.render(messages=messages, add_generation_prompt=False, **ends))
    except jinja2.TemplateError as e:
        raise MobieError(
            BAD_INPUT,
            "the model's chat template does not take the dialogues",
            str(e),
            "roles in the order that the template knows",
        ) from e
    return "".join(parts).encode()
