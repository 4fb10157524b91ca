"""Layers and experts on other machines: RPC servers of the same runtime, here on this one.

What a server without the patches makes of a file of ours is in tests/stock.py; here one says that it has none.
"""

from pathlib import Path

import pytest

from mobie_export import gguf_io
from mobie_export.spec import layout
from tests import exporting, models, rpc

TINY = Path(__file__).resolve().parents[2] / "examples/tiny-moe/tiny-moe-f16.gguf"


@pytest.fixture(scope="module", params=["trained", "second", "factors"])
def file(request, tmp_path_factory, runtime_tools) -> Path:
    """The trained model; random ones with second planes of some columns, and with shared factors."""
    folder = tmp_path_factory.mktemp("rpc")
    if request.param == "trained":
        return exporting.export(TINY, folder / "trained.gguf").output
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from mobie_export.methods.calibrated import Calibrated
    from mobie_export.methods.paper import Paper

    few = {"samples": 40, "seq_len": 64}
    method, beside = {
        "second": (Calibrated(bpw=1.6, refine="none", **few), {"expert columns", "expert residual"}),
        "factors": (Paper(**few), {"expert factor", "expert residual"}),
    }[request.param]
    models.write_qwen3moe(folder / "m.gguf", seed=5)
    made = exporting.export(folder / "m.gguf", folder / "made.gguf", method=method, threads=1)
    with gguf_io.open_model(made.output) as gguf:
        assert {layout.kind(n) for n in gguf.tensors} >= beside
    return made.output


@pytest.fixture(scope="module")
def pair(runtime_tools):
    with rpc.servers(runtime_tools, 2) as addresses:
        yield addresses


def test_two_servers_compute_what_one_process_does(file, pair, tmp_path, runtime_tools):
    """Layers split over both; experts on one of them and the rest on the other, with and without what lies beside them:
    the same distributions, bit for bit."""
    first, second = (f"RPC0[{address}]" for address in pair)
    over = ["--rpc", ",".join(pair), "-ngl", "99"]
    ways = {
        "one process": [],
        "layers": [*over, "-ts", "1,1"],
        "experts": [*over, "-ts", "1,0", "-ot", f"exps={second}"],
        "experts without scales": [*over, "-ts", "1,0", "-ot", f"exps.weight={second}"],
        "experts here": [*over, "-ts", "1,0", "-ot", "exps=CPU"],
    }
    with gguf_io.open_model(file) as gguf:
        of_experts = sum(t.n_bytes for n, t in gguf.tensors.items() if "exps" in n) / 2**20
    found, where = {}, {}
    for name, words in ways.items():
        path = tmp_path / name.replace(" ", "-")
        done = rpc.perplexity(runtime_tools, file, *words, logits=path)
        assert done.returncode == 0, done.stdout
        found[name], where[name] = path.read_bytes(), rpc.weights(done.stdout)
    assert len(found["one process"]) > 2 * 2**14
    for name in ways:
        assert found[name] == found["one process"], name
    assert not {first, second} & set(where["one process"])
    assert min(where["layers"][first], where["layers"][second]) > of_experts / 4
    assert where["experts"][second] == pytest.approx(of_experts, abs=0.02)
    assert 0 < where["experts without scales"][second] < where["experts"][second] + 0.01
    assert second not in where["experts here"]


def test_a_server_that_does_not_run_the_type_gets_none_of_it(pair, tmp_path, runtime_tools):
    file = exporting.export(TINY, tmp_path / "trained.gguf").output
    with rpc.saying(pair[0], rpc.STOCK) as address:
        assert not rpc.problems_of_another(runtime_tools, file, address, tmp_path)
