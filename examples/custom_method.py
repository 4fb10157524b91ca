"""A method of one's own: every row of an expert gets one magnitude, the mean of its absolute weights.

    python examples/custom_method.py MODEL.gguf OUT.gguf

What docs/porting.md says about methods, done. It touches no other file.
"""

import sys
from dataclasses import dataclass

import numpy as np

import mobie_export as mobie


@mobie.register
@dataclass(frozen=True)
class RowMean(mobie.MatrixMethod):
    """Round to nearest, row by row. `shrink`: of the magnitudes."""

    name = "row-mean"
    summary = "one magnitude for every row"

    shrink: float = mobie.option(1.0, "--shrink", "factor of the magnitudes (default: 1)", metavar="X", parse=float)

    def quantize(
        self,
        weights: np.ndarray,  # float32 [rows, cols]
        importance: np.ndarray | None,  # of an importance matrix; this method asks for none
        block_len: int,  # weights that share a magnitude
    ) -> tuple[np.ndarray, np.ndarray]:  # signs bool [rows, cols], magnitudes float64 [rows, cols / block_len]
        mean = np.abs(weights).mean(axis=1, dtype=np.float64, keepdims=True)
        return weights >= 0, self.shrink * np.repeat(mean, weights.shape[1] // block_len, axis=1)

    def settings(self) -> dict[str, object]:
        return {"shrink": self.shrink}


if __name__ == "__main__":
    plan = mobie.plan(sys.argv[1], sys.argv[2], method=RowMean(shrink=0.9))
    report = mobie.export(plan)
    print(f"{report.output}: {report.expert_bpw:.4f} bits per expert weight by {plan.options.method.name}")
