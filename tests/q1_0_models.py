"""Models whose experts have rows of whole blocks of Q1_0, 128 weights: the tiny ones of the other tests have not."""

from pathlib import Path

import numpy as np

from mobie_export import gguf_io
from mobie_export.spec import layout

TRAINED = Path(__file__).resolve().parents[1] / "examples/tiny-moe/tiny-moe-f16.gguf"
FF = 256  # of 192

# Family of tests/families.py -> what is changed: plain, with shared experts and a dense layer, with biases, recurrent
# layers and gate and up in one tensor.
WIDTHS = {
    "qwen3moe": {"hidden_size": 256, "moe_intermediate_size": 384},
    "mixtral": {"hidden_size": 256, "intermediate_size": 384},
    "deepseek2": {"hidden_size": 256, "moe_intermediate_size": 384},
    "gpt-oss": {"hidden_size": 256, "intermediate_size": 384},
    "qwen3next": {"hidden_size": 256, "moe_intermediate_size": 384},
}


def trained(path: Path) -> Path:
    """Write the bundled model with neurons that do nothing added to its experts: the same function."""
    with gguf_io.open_model(TRAINED) as gguf:
        tensors = {}
        for name, x in layout.experts(gguf).items():
            weights = gguf_io.decode(gguf.read(x.tensor).reshape(x.n_expert, x.rows, -1), x.tensor.type_id)
            down = layout.is_down(name)
            more = FF - (x.cols if down else x.rows)
            wide = np.pad(weights, ((0, 0), (0, 0), (0, more)) if down else ((0, 0), (0, more), (0, 0)))
            tensors[name] = gguf_io.NewTensor.of(wide.astype("<f2"))
        key = f"{gguf.architecture}.expert_feed_forward_length"
        entries = [gguf_io.make_entry(key, gguf_io.U32, FF)]
        gguf_io.rewrite(gguf, path, tensors=tensors, entries=entries)
    return path
