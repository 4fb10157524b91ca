"""Advice on presets: memory is what llama.cpp takes, and the best preset that fits is named."""

import pytest

from mobie_export import advise, cli, gguf_io
from mobie_export.errors import UNSUPPORTED, USAGE, MobieError
from tests import models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("advise") / "m.gguf"
    models.write_qwen3moe(path)
    return path


def test_sizes_are_read_as_people_write_them():
    assert advise.size("8G") == 8 << 30 and advise.size("1.5g") == 3 << 29 and advise.size("512MiB") == 512 << 20
    assert advise.size("100") == 100
    for text in ("8X", "", "-1G", "G"):
        with pytest.raises(MobieError) as e:
            advise.size(text)
        assert e.value.code == USAGE


def test_what_a_preset_takes(model):
    every = advise.choices(model, cli.PRESETS, 1000)
    found = [c for c in every if c.rest is None]
    assert [c.preset for c in found] == ["small", "medium", "large"]
    with gguf_io.open_model(model) as g:
        rest = sum(t.n_bytes for n, t in g.tensors.items() if "_exps." not in n)
        experts = sum(t.n_weights for n, t in g.tensors.items() if "_exps." in n)
    assert found[0].weights == rest + int(1.13 * experts / 8)
    assert found[0].context == models.N_LAYER * 2 * models.N_HEAD_KV * models.HEAD * 1000 * 2  # float16 keys and values
    totals = [c.total for c in found]
    assert totals == sorted(totals) and advise.best(found, totals[1]) == found[1]
    assert advise.best(found, totals[2] + 1) == found[2] and advise.best(found, totals[0] - 1) is None


def test_the_rest_in_smaller_types(model, tmp_path, capsys):
    found = advise.choices(model, cli.PRESETS, 1000)
    order = [(p, r) for p in ("small", "medium", "large") for r in ("q8_0", None)]
    assert [(c.preset, c.rest) for c in found] == [(p, "q4_0") for p in ("small", "medium", "large")] + order
    for c in found:  # what fits best is said as a command
        best = advise.best(found, c.total)
        assert cli.main(["advise", str(model), "--ram", str(c.total), "-c", "1000"]) == 0
        rest = f" --tensor-type .={best.rest}" if best.rest else ""
        assert capsys.readouterr().out.splitlines()[-1] == f"mobie-export {model} --preset {best.preset}{rest}"
    assert advise.best(found, found[2].total) == found[2] and advise.best(found, found[3].total) == found[3]
    out = tmp_path / "m.gguf"
    assert cli.main([str(model), "-o", str(out), "--tensor-type", ".=q8_0", "-q"]) == 0
    assert out.stat().st_size == pytest.approx(found[3].weights, rel=0.03)  # header and padding beside the weights


def test_command(model, capsys):
    assert cli.main(["advise", str(model), "--ram", "8G"]) == 0
    assert "--preset large" in capsys.readouterr().out
    assert cli.main(["advise", str(model), "--ram", "1M"]) == UNSUPPORTED
    assert cli.main(["advise", str(model), "--ram", "much"]) == USAGE
