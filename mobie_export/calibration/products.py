"""What products of matrices are computed in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def product_type(device: str) -> str:
    """What products of matrices are computed in: bf16 where the CPU has instructions for it (AVX-512 BF16 or
    AMX), three to six times as fast, inputs rounded to 8 bits and sums in float32; what binary weights change is a
    hundred times as much."""
    found = torch.cpu.get_capabilities() if device == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if found.get("avx512_bf16") or found.get("amx_bf16") else "float32"


@contextmanager
def products(device: str) -> Iterator[None]:
    """Products of float32 matrices as `product_type` says, for the time of a calibration."""
    with _computed_in("bf16" if product_type(device) == "bf16" else None):
        yield


@contextmanager
def exact() -> Iterator[None]:
    """Products of float32 matrices in float32 all the same: where differences of products are what counts."""
    with _computed_in("ieee"):
        yield


@contextmanager
def _computed_in(precision: str | None) -> Iterator[None]:  # as torch names it; None: as it is
    mkldnn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = mkldnn.fp32_precision
    mkldnn.fp32_precision = precision or before
    try:
        yield
    finally:
        mkldnn.fp32_precision = before
