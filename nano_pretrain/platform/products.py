"""FP32 matrix products on AMD CPUs with AVX-512."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def use_onednn_for_fp32() -> bool:
    """Let torch take oneDNN for FP32 matrix products where MKL leaves half of the CPU idle; says whether it did.

    torch's FP32 products are MKL's, which on AMD CPUs stays at AVX2; oneDNN uses AVX-512. The only switch that torch
    has for it also permits oneDNN to round the factors to BF16. oneDNN does that on CPUs with AMX and nowhere else
    (its brgemm kernels ask for `avx512_core_amx`), so CPUs with AMX are left out, and a product whose factors BF16
    cannot hold is looked at.
    """
    if not _amd_with_avx512() or torch.cpu._is_amx_tile_supported():
        return False
    mkldnn: Any = torch.backends.mkldnn  # torch adds `matmul` to the module at run time
    before = mkldnn.matmul.fp32_precision
    mkldnn.matmul.fp32_precision = "bf16"
    if _rounds_factors():
        mkldnn.matmul.fp32_precision = before
        return False
    return True


def _amd_with_avx512() -> bool:
    try:
        vendor = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return vendor and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _rounds_factors() -> bool:
    """Whether 1 + 2^-12, which BF16 rounds to 1, loses its last bit in a product; in the layouts of a linear."""
    for rows, inner, columns in ((256, 256, 256), (8, 64, 33), (1000, 32, 16)):
        left, right = torch.full((rows, inner), 1 + 2.0**-12), torch.ones(inner, columns)
        exact = inner * (1 + 2.0**-12)
        for product in (left @ right, left @ right.T.contiguous().T, left.T.contiguous().T @ right):
            if not torch.allclose(product, torch.tensor(exact), rtol=1e-6, atol=0):
                return True
    return False
