"""Fabricated models: every shape loads in the installed runtime and decodes."""

import ctypes
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mobie_export import gguf_io
from mobie_export.errors import MobieError
from tools.assets import fabricate_gguf as fab

N_VOCAB = 512


def small(name: str) -> fab.Shape:
    """Two layers and few experts, so that the files stay small."""
    shape = fab.SHAPES[name]
    return replace(shape, n_layer=2, n_vocab=N_VOCAB, n_expert=shape.n_used + 1)


@pytest.mark.parametrize("experts", ["F16", "mobie"])
@pytest.mark.parametrize("name", fab.SHAPES)
def test_shapes_load_and_decode(runtime_tools, tmp_path, name, experts):
    from llama_cpp import llama_cpp as api

    path = tmp_path / "model.gguf"
    fab.fabricate(path, small(name), "F16", experts)
    errors = []
    log = api.llama_log_callback(lambda level, text, _: errors.append(text.decode()) if level >= 4 else None)
    api.llama_log_set(log, None)
    model = api.llama_model_load_from_file(bytes(path), api.llama_model_default_params())
    assert model, errors
    params = api.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
    context = api.llama_init_from_model(model, params)
    tokens = (api.llama_token * 5)(*range(5))
    assert api.llama_decode(context, api.llama_batch_get_one(tokens, 5)) == 0
    logits = np.ctypeslib.as_array(api.llama_get_logits(context), (N_VOCAB,))
    assert np.isfinite(logits).all() and logits.std() > 0
    api.llama_free(context)
    api.llama_model_free(model)
    api.llama_log_set(ctypes.cast(None, api.llama_log_callback), None)
    path.unlink()  # pytest keeps the folders of its last runs


def test_seed_decides_all_but_the_experts(tmp_path):
    shape = small("qwen3-30b-a3b")
    digests = []
    for experts, seed in (("F16", 0), ("mobie", 0), ("mobie", 0), ("mobie", 1)):
        fab.fabricate(tmp_path / "a.gguf", shape, "F16", experts, seed)
        with gguf_io.open_model(tmp_path / "a.gguf") as model:
            digests.append({name: hash(bytes(model.read(t))) for name, t in model.tensors.items()})
    f16, first, again, other = digests
    assert first == again
    shared = [n for n in f16 if "exps" not in n and not n.endswith("norm.weight")]
    assert shared and all(f16[n] == first[n] for n in shared) and all(f16[n] != other[n] for n in shared)


def test_types_of_the_runtime(runtime_tools, tmp_path):
    """Quantized by ggml, read back: not zero, of the size asked for."""
    shape = replace(small("qwen3-30b-a3b"), n_layer=1)
    fab.fabricate(tmp_path / "a.gguf", shape, "Q4_0", "TQ2_0")
    with gguf_io.open_model(tmp_path / "a.gguf") as model:
        for name, kind in (("blk.0.attn_q.weight", "Q4_0"), ("blk.0.ffn_down_exps.weight", "TQ2_0")):
            t = model.tensors[name]
            assert gguf_io.type_name(t.type_id) == kind
            values = gguf_io.decode(model.read(t).reshape(math.prod(t.shape[1:]), -1), t.type_id)
            assert 0.5 * fab.SPREAD < values.std() < 2 * fab.SPREAD


def test_widths_that_blocks_do_not_divide():
    qwen, gpt = fab.SHAPES["qwen1.5-moe-a2.7b"], fab.SHAPES["gpt-oss-20b"]
    assert fab.expert_types(qwen, "IQ1_S") == {
        "ffn_gate_exps": "IQ1_S",
        "ffn_up_exps": "IQ1_S",
        "ffn_down_exps": "IQ4_NL",
    }
    assert set(fab.expert_types(gpt, "Q4_K").values()) == {"Q5_0"}
    assert set(fab.expert_types(gpt, "mobie").values()) == {"mobie"}
    assert set(fab.expert_types(qwen, "Q1_0").values()) == {"Q1_0"}
    with pytest.raises(MobieError, match="Q1_0"):
        fab.expert_types(gpt, "Q1_0")


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(fab.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(MobieError, match="cannot write"):
        fab.fabricate(tmp_path / "a.gguf", small("olmoe-1b-7b"), "F16")
    assert not (tmp_path / "a.gguf").exists()
