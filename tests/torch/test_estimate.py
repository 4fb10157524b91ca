"""The estimate of a calibration's time: what is counted, and that `plan` shows it."""

from dataclasses import replace
from pathlib import Path

import pytest

from mobie_export import cli, gguf_io
from mobie_export.methods.calibrated import Calibrated, estimate
from mobie_export.models.twin import Twin

TINY = Path(__file__).resolve().parents[2] / "examples/tiny-moe/tiny-moe-f16.gguf"


def test_operations_follow_from_the_shapes():
    with gguf_io.open_model(TINY) as gguf:
        twin = Twin(gguf)
        options = Calibrated(refine="streamed", samples=64, seq_len=128, steps=10)
        found = estimate.phases(twin, options)
        twice = estimate.phases(twin, replace(options, steps=20))
        without = estimate.phases(twin, replace(options, refine="none"))
        in_memory = estimate.phases(twin, replace(options, refine="end-to-end"))
        k, n_layers = twin.config.num_experts_per_tok, twin.n_layers
        weights = {n: t.n_weights for n, t in gguf.tensors.items() if n.startswith("blk.") and len(t.shape) > 1}
        active = sum(n * k // 10 if "_exps." in name else n for name, n in weights.items())
    assert list(found) == ["statistics and error propagation", "layer by layer", "all layers together"]
    assert list(without) == list(found)[:1] and without["statistics and error propagation"] == found[next(iter(found))]
    least = 64 * 128 * 2 * (3 * active + 3 * 4096 * 256)  # forward, forward again and backward; head three times
    moments = 64 * 128 * k * n_layers * 2 * (256**2 + 192**2)
    propagation = n_layers * 10 * (5 * 3 * 256**2 * 192) * 0.5
    assert least + moments + propagation < found["statistics and error propagation"].products < 2 * (least + moments)
    assert twice["all layers together"].products == pytest.approx(2 * found["all layers together"].products, rel=0.05)
    assert in_memory["all layers together"].products < found["all layers together"].products


def test_speed_turns_work_into_seconds(monkeypatch):
    here = estimate.Speed(products=2e9, copies=1e9, reads=1e8)
    assert here.seconds(estimate.Work(4e9, 3e9, 2e8)) == 7.0
    assert (
        here.seconds(estimate.Work(small=3e9)) == 3.0
        and replace(here, small=5e8).seconds(estimate.Work(small=3e9)) == 6.0
    )
    both = estimate.Work(1, 2, 3, 4) + estimate.Work(10, 20, 30, 40)
    assert both == estimate.Work(11, 22, 33, 44) and both.of_rank(11) == estimate.Work(1, 2, 33, 4)
    clock = [0.0]
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: clock[0])
    durations = iter([0.5, 0.125, 0.25])
    assert estimate._seconds(lambda: clock.__setitem__(0, clock[0] + next(durations)), "cpu") == 0.125, "the best"

    made = []
    monkeypatch.setattr(estimate, "_seconds", lambda work, device: made.append(work()) or 0.5 * len(made))
    with gguf_io.open_model(TINY) as gguf:
        measured = estimate.speed("cpu", 1, Twin(gguf))
        product, copy = made
        two = estimate.speed("cpu", 2, Twin(gguf))  # column by column a second thread gains nothing
        assert measured.small is None and two.small is not None and len(made) == 5
    operations = 2 * product.shape[0] * product.shape[1] * estimate.PROBE[1]
    assert measured.products == pytest.approx(estimate.SUSTAINED * operations / 0.5)
    assert measured.copies == copy.numel() / 1.0


def test_plan_says_how_long(tmp_path, capsys):
    assert (
        cli.main(["plan", str(TINY), "-o", str(tmp_path / "m.gguf"), "--method", "calibrated", "--refine", "layerwise"])
        == 0
    )
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("time")]
    assert line.startswith("time         about ") and "layer by layer" in line and "together" not in line
    assert cli.main(["plan", str(TINY), "-o", str(tmp_path / "m.gguf"), "--method", "sign"]) == 0
    assert "time" not in capsys.readouterr().out
