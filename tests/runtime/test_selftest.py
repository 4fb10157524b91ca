"""The self-test of the runtime: right numbers pass, wrong ones and crashes are named with what leaves them out."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mobie_export.runtime import selftest
from tools.assets import make_selftest

# A child that answers as the real one does, but for the part that it was told to fail at.
FAKE = """
import json, os, signal, sys
fail_at, features, *arguments = sys.argv[1:]
if arguments == ["--probe"]:
    print(json.dumps({"gpu": False, "features": features}))
    sys.exit()
cured = "--use_extra_bufts=0" in arguments
for number in range(int(arguments[0]), int(arguments[0]) + 1 if "--only" in arguments else 20):
    if number == int(fail_at) and not cured:
        os.kill(os.getpid(), signal.SIGSEGV)
    print(json.dumps({"part": "any", "wrong": ""}), flush=True)
"""


def fake(tmp_path: Path, fail_at: int, features: str = "") -> list[str]:
    (tmp_path / "child.py").write_text(FAKE)
    return [sys.executable, str(tmp_path / "child.py"), str(fail_at), features]


def test_the_installed_runtime_passes(runtime_tools):
    facts, failures = selftest.run()
    assert not failures
    assert f"{len(selftest.PARTS)} of {len(selftest.PARTS)} parts right on the CPU" in facts[0]


def test_the_numbers_kept_are_those_of_the_torch_implementation():
    kept = json.loads(selftest.KEPT.read_text())
    made = make_selftest.computed()
    assert kept.keys() == made.keys() == set(selftest.ATTENTIONS)
    for attention in kept:
        assert selftest.error(np.array(made[attention]), np.array(kept[attention])) < 1e-4


@pytest.mark.parametrize(
    "weights, name",
    [
        ("mobie", "ffn_gate_exps.weight"),  # one sign of 64 in the first block of every row
        ("second plane", "ffn_down_exps.residual"),
        ("shared factors", "ffn_moe_in.weight"),
        ("Q4_0", "attn_output.weight"),
    ],
)
def test_wrong_numbers_are_found(runtime_tools, tmp_path, monkeypatch, weights, name):
    """As a kernel would compute them that reads some bytes wrongly: the file is changed, the truth is not."""
    assert selftest.check("plain", weights, tmp_path, False, {}) == ""
    written = selftest.write

    def write(path, attention, tensors, decoded=False):
        if not decoded:
            raw = tensors[f"blk.0.{name}"].raw.copy()
            raw[..., 2] ^= 1 if weights == "mobie" else 0xFF
            tensors = tensors | {f"blk.0.{name}": dataclasses.replace(tensors[f"blk.0.{name}"], raw=raw)}
        written(path, attention, tensors, decoded)

    monkeypatch.setattr(selftest, "write", write)
    assert "wrong numbers" in selftest.check("plain", weights, tmp_path, False, {})


def test_logits_that_are_no_numbers_are_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(selftest, "logits", lambda *a: np.full((48, selftest.N_VOCAB), np.nan, np.float32))
    for weights in ("F32", "mobie"):
        assert "wrong numbers" in selftest.check("latent", weights, tmp_path, False, {})


@pytest.mark.parametrize(
    "features, option", [("", "-DGGML_CPU_REPACK=OFF"), ("CPU : SSE3 = 1 | AMX_INT8 = 1 |", "-DGGML_AMX_INT8=OFF")]
)
def test_a_crash_is_named_with_what_leaves_it_out(tmp_path, features, option):
    facts, failures = selftest.run(fake(tmp_path, 7, features))
    (failure,) = failures
    attention, weights = selftest.PARTS[7]
    assert f"weights in {weights} with {attention} attention" in str(failure)
    assert "crashed (SIGSEGV)" in str(failure) and f"CMAKE_ARGS={option}" in str(failure)
    assert f"{len(selftest.PARTS) - 1} of {len(selftest.PARTS)} parts right" in facts[0]


def test_a_runtime_that_does_not_load_is_a_failure(tmp_path):
    facts, failures = selftest.run([sys.executable, "-c", "raise SystemExit('no such library')"])
    assert not facts and "no such library" in str(failures[0])


def test_a_child_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(selftest, "TIMEOUT", 0.5)
    facts, failures = selftest.run([sys.executable, "-c", "import time; time.sleep(60)"])
    assert not facts and "gave no answer" in str(failures[0])
