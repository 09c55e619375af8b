"""CUDA: NCCL, Transformer Engine and mamba-ssm. Written against their sources; not run on a GPU so far."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from nano_pretrain.platform.base import LayerModules
from nano_pretrain.platform.cuda_limits import CudaFacts
from nano_pretrain.platform.limits import guard_chunk_scan, guard_split_scan
from nano_pretrain.platform.versions import ON_CUDA, check_versions
from nano_pretrain.recipe.errors import UserError

PEAK_TFLOPS_BF16 = {"H100 80GB HBM3": 989.4, "H200": 989.4, "B200": 2250.0, "A100-SXM": 312.0}
"""Dense BF16 peak of one GPU in TFLOP/s, by a part of its name: the SXM rows of NVIDIA's data sheets."""


GUARDS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "mamba_split_conv1d_scan_combined": guard_split_scan,
    "mamba_chunk_scan_combined": guard_chunk_scan,
}
"""mamba-ssm's scans as megatron-core's mixer calls them, and what keeps them within their 32 bits."""


def cuda_facts(local_rank: int) -> CudaFacts:
    """Of this process's GPU, and of the CUDA that torch was built with."""
    major, minor = (int(part) for part in str(torch.version.cuda).split(".")[:2])
    return CudaFacts(torch.cuda.get_device_capability(local_rank), (major, minor))


class CudaPlatform:
    """NCCL, Transformer Engine's modules, mamba-ssm's kernels."""

    name = "cuda"
    backend = "nccl"

    def prepare(self, local_rank: int, threads: int | None, kernels: str = "auto") -> torch.device:
        """Choose the rank's GPU.

        Raises:
            UserError: a GPU library is missing, megatron-core would put mocks in its place; or of another version.
        """
        for package in ("transformer_engine", "mamba_ssm", "causal_conv1d"):
            if find_spec(package) is None:
                raise UserError(
                    f"{package}: not installed, and a GPU was found; pip install 'nano-pretrain[gpu]', "
                    "or set CUDA_VISIBLE_DEVICES= to train on the CPU"
                )
        check_versions(ON_CUDA)
        _guard_kernels()
        torch.cuda.set_device(local_rank)
        if threads:
            torch.set_num_threads(threads)
        return torch.device("cuda", local_rank)

    def kernels(self) -> str:
        """mamba-ssm's."""
        return "mamba-ssm and Transformer Engine"

    def layer_modules(self) -> LayerModules:
        """Transformer Engine's linears with the norm fused in, and its attention."""
        from megatron.core.extensions.transformer_engine import (
            TEDotProductAttention,
            TELayerNormColumnParallelLinear,
            TERowParallelLinear,
        )

        attention = _without_documents(TEDotProductAttention)
        return LayerModules(TELayerNormColumnParallelLinear, TERowParallelLinear, None, attention)

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


def _guard_kernels() -> None:
    """Put mamba-ssm's scans behind their 32-bit limit, where megatron-core's mixer calls them."""
    names = importlib.import_module("megatron.core.ssm.mamba_mixer").__dict__
    for name, guard in GUARDS.items():
        if not hasattr(names[name], "__wrapped__"):
            names[name] = guard(names[name])


def _without_documents(base: type[nn.Module]) -> type[nn.Module]:
    """Transformer Engine's attention, refusing the documents that it would take for a padding mask and ignore."""

    class WholeSequenceAttention(base):  # type: ignore[misc,valid-type]
        """Causal attention over whole samples."""

        def forward(self, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
            """As the base class.

            Raises:
                UserError: document indices were given.
            """
            if attention_mask is not None:
                raise UserError(
                    "data.document_boundaries: reset is not available with Transformer Engine's attention in this "
                    "version; write data.document_boundaries=ignore"
                )
            return super().forward(query, key, value, attention_mask, *args, **kwargs)

    return WholeSequenceAttention
