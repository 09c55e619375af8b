"""CUDA: NCCL, Transformer Engine and mamba-ssm. Written against their sources; not run on a GPU so far."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from nano_pretrain.platform.base import LayerModules

PEAK_TFLOPS_BF16 = {"H100": 989.4, "H200": 989.4, "B200": 2250.0, "A100": 312.0}
"""Dense BF16 peak of one GPU in TFLOP/s: the SXM rows of NVIDIA's data sheets (half of the figure with sparsity)."""


class CudaPlatform:
    """NCCL, Transformer Engine's modules, mamba-ssm's kernels."""

    name = "cuda"
    backend = "nccl"

    def prepare(self, local_rank: int, threads: int | None) -> torch.device:
        """Choose the rank's GPU."""
        torch.cuda.set_device(local_rank)
        if threads:
            torch.set_num_threads(threads)
        return torch.device("cuda", local_rank)

    def layer_modules(self) -> LayerModules:
        """Transformer Engine's linears with the norm fused in, and its attention."""
        from megatron.core.extensions.transformer_engine import (
            TEDotProductAttention,
            TELayerNormColumnParallelLinear,
            TERowParallelLinear,
        )

        return LayerModules(TELayerNormColumnParallelLinear, TERowParallelLinear, None, TEDotProductAttention)

    def config_overrides(self) -> dict[str, Any]:
        """megatron-core's own defaults are made for this platform."""
        return {}

    def optimizer_scope(self) -> AbstractContextManager[None]:
        """Nothing to adapt."""
        return nullcontext()

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """From the data sheet, by the device's name; FP32 counts as TF32, half of BF16."""
        name = torch.cuda.get_device_name()
        for key, tflops in PEAK_TFLOPS_BF16.items():
            if key in name:
                return tflops * 1e12 / (1 if dtype == torch.bfloat16 else 2)
        return None

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize()
