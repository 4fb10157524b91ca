"""mobie_export/data/selftest.json: what the self-test's F32 models should say, from the torch implementation.

python -m tools.assets.make_selftest            # write it; the tests compare it with a new computation
"""

import json
import tempfile
from pathlib import Path

import torch

from mobie_export import gguf_io
from mobie_export.models.twin import Twin
from mobie_export.runtime import selftest


def logits(attention: str) -> torch.Tensor:  # float32 [PROMPT + SINGLE, N_VOCAB]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        selftest.write(path, attention, selftest.stored(attention, "F32"))
        with gguf_io.open_model(path) as gguf, torch.no_grad():
            twin = Twin(gguf)
            hidden = twin.embedding()[torch.tensor([selftest.TOKENS])]
            for i in range(twin.n_layers):
                hidden = twin.run(twin.layer(i), hidden)
            return twin.head()(hidden)[0]


def computed() -> dict[str, list[list[float]]]:
    """Attention -> logits at the end of the prompt and at the last position, six digits."""
    positions = [selftest.PROMPT - 1, -1]
    return {a: [[round(x, 6) for x in row] for row in logits(a)[positions].tolist()] for a in selftest.ATTENTIONS}


if __name__ == "__main__":
    selftest.KEPT.write_text(json.dumps(computed()) + "\n")
    print(f"wrote {selftest.KEPT}")
