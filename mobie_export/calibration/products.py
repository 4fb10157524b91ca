"""What products of matrices are computed in."""

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@functools.cache
def product_type(device: str) -> str:
    """What products of matrices are computed in: bf16 where the CPU is faster so, inputs rounded to 8 bits and sums in
    float32; what binary weights change is a hundred times as much.

    That is with AMX (437 against 95 GFLOP/s of a core of a Sapphire Rapids), and with AVX-512 BF16 on AMD's CPUs;
    Intel's are slower with it than in float32 (98 against 165, an Emerald Rapids whose virtual machine hides AMX). By
    rule and not measured anew: what is resumed is to be computed in the same type.
    """
    found = torch.cpu.get_capabilities() if device == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if found.get("amx_bf16") or (found.get("avx512_bf16") and not _intel()) else "float32"


def _intel() -> bool:
    try:
        with open("/proc/cpuinfo") as lines:
            return any("GenuineIntel" in line for line in lines)
    except OSError:  # no Linux
        return "GenuineIntel" in platform.processor()


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
