"""Calibration on dialogues: the model's own template, its special tokens as tokens."""

import json

import pytest

from mobie_export import cli, gguf_io
from mobie_export.calibration import chat
from mobie_export.calibration.tokenizer import tokenize
from mobie_export.errors import BAD_INPUT, UNSUPPORTED, MobieError
from tests import models

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
)
DIALOGUE = [{"role": "user", "content": "at t"}, {"role": "assistant", "content": "t"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "m.gguf"
    models.write_qwen3moe(path, keys=lambda w: w.add_string("tokenizer.chat_template", TEMPLATE))
    return path


@pytest.fixture(autouse=True, scope="module")
def one_template():
    """gguf-py refuses a key that is written twice: the models' own template gives way."""
    patch = pytest.MonkeyPatch()
    patch.setattr(models.gguf.GGUFWriter, "add_chat_template", lambda self, value: None)
    yield
    patch.undo()


def lines(*dialogues) -> bytes:
    return "\n".join(json.dumps({"messages": d}) for d in dialogues).encode()


def test_dialogues_are_wrapped(model):
    with gguf_io.open_model(model) as gguf:
        end = "<|endoftext|>"
        text = chat.render(gguf, lines(DIALOGUE, DIALOGUE[:1]) + b"\n\n")
        assert text.decode() == f"{end}<|user|>at t{end}<|assistant|>t{end}{end}<|user|>at t{end}"


# What templates of published models use.
TEMPLATES = {
    "the date": "{{ 'Date: ' + strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "break": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "continue": "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "JSON": "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{% endfor %}",
    "JSON, options": "{% for m in messages %}{{ m | tojson(ensure_ascii=False, indent=1) }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "calls": "{% for m in messages %}{% if m.tool_calls is defined %}{{ m.tool_calls[0].function.name }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "a namespace": "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{{ n.i }}{% endfor %}",
    "no tools": "{% if tools %}never{% endif %}{% if add_generation_prompt %}never{% endif %}{{ messages | length }}",
    "thoughts": "{% for m in messages %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endfor %}",
    "an absent key": "{% for m in messages %}{{ m.content }}{{ m.name }}{% endfor %}",
}
ODD = [
    {"role": "user", "content": 'Is 1 < 2 & "it\'s" ü→?'},
    {"role": "assistant", "content": "<think>so\n</think>\nYes.", "tool_calls": [{"function": {"name": "f"}}]},
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_transformers_renders_them(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE({"<|endoftext|>": 0}, []))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, keys=lambda w: w.add_string("tokenizer.chat_template", TEMPLATES[name]))
    wanted = [fast.apply_chat_template(d, chat_template=TEMPLATES[name], tokenize=False) for d in (ODD, DIALOGUE)]
    with gguf_io.open_model(path) as gguf:
        assert chat.render(gguf, lines(ODD, DIALOGUE)).decode() == "".join(wanted)


def test_special_tokens_are_tokens(model, runtime_tools):
    plain, _ = tokenize(model, b"t<|endoftext|>")
    tokens, _ = tokenize(model, b"t<|endoftext|>", special=True)
    assert len(plain) > len(tokens) == 2 and tokens[1] == models.N_VOCAB - 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no json",
        b'{"text": "x"}',
        b'{"messages": []}',
        b'{"messages": [{"role": 1}]}',
        b"[" * 9999,
        b'{"messages": ["x"]}',
    ],
)
def test_other_files_are_refused(model, data):
    with gguf_io.open_model(model) as gguf, pytest.raises(MobieError) as e:
        chat.render(gguf, data)
    assert e.value.kind == BAD_INPUT and "messages" in e.value.wanted


def test_a_template_that_refuses_is_an_error(model):
    with gguf_io.open_model(model) as gguf, pytest.raises(MobieError, match="does not take") as e:
        chat.render(gguf, lines([{"role": "tool", "content": "x"}]))
    assert e.value.kind == BAD_INPUT and "no role tool" in e.value.found


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 + messages[0].content }}",
        "{{ 1 / 0 }}",
        "{% nonsense %}",
        "{{ x.y.z }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_templates_fail_in_their_own_ways(tmp_path, template):
    path = tmp_path / "m.gguf"
    models.write_qwen3moe(path, keys=lambda w: w.add_string("tokenizer.chat_template", template))
    with gguf_io.open_model(path) as gguf, pytest.raises(MobieError, match="does not take") as e:
        chat.render(gguf, lines(DIALOGUE))
    assert e.value.kind == BAD_INPUT and e.value.found


def test_a_model_without_a_template_is_refused(tmp_path):
    models.write_qwen3moe(tmp_path / "m.gguf")
    with gguf_io.open_model(tmp_path / "m.gguf") as gguf, pytest.raises(MobieError) as e:
        chat.render(gguf, lines(DIALOGUE))
    assert e.value.kind == UNSUPPORTED and "--chat" in e.value.todo


def test_export_on_dialogues(model, tmp_path, runtime_tools, capsys):
    pytest.importorskip("transformers")
    text, output = tmp_path / "dialogues.jsonl", tmp_path / "o.gguf"
    text.write_bytes(lines(*[DIALOGUE] * 200))
    arguments = ["--refine", "none", "--samples", "40", "--seq-len", "64", "--threads", "1", "--quiet"]
    method = ["--method", "calibrated", "--chat"]
    assert cli.main([str(model), "-o", str(output), "--calibration", str(text), *method, *arguments]) == 0
    with gguf_io.open_model(output) as gguf:
        assert json.loads(gguf.value("mobie.settings"))["chat"] is True
    assert cli.main([str(model), "-o", str(tmp_path / "p"), *method]) == 2
    assert "--calibration" in capsys.readouterr().err
