"""CUDA: NCCL, Transformer Engine and mamba-ssm. Written against their sources; not run on a GPU so far."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from nano_pretrain.platform.base import LayerModules, Memory, PlatformName
from nano_pretrain.platform.cuda_limits import FP32_SCALES, NEEDS, CudaFacts
from nano_pretrain.platform.limits import guard_chunk_scan, guard_split_scan
from nano_pretrain.platform.versions import ON_CUDA, check_versions
from nano_pretrain.recipe.derived import parameter_dtype, stage_layout
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.schema import ParallelConfig, Recipe

PEAK_TFLOPS_BF16 = {"H100 80GB HBM3": 989.4, "H200": 989.4, "B200": 2250.0, "A100-SXM": 312.0}
"""Dense BF16 peak of one GPU in TFLOP/s, by a part of its name: the SXM rows of NVIDIA's data sheets."""


GUARDS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "mamba_split_conv1d_scan_combined": guard_split_scan,
    "mamba_chunk_scan_combined": guard_chunk_scan,
}
"""mamba-ssm's scans as megatron-core's mixer calls them, and what keeps them within their 32 bits."""


def cuda_facts(local_rank: int) -> CudaFacts:
    """Of this process's GPU and environment, and of the CUDA that torch was built with."""
    major, minor = (int(part) for part in str(torch.version.cuda).split(".")[:2])
    fp32_scales = os.environ.get(FP32_SCALES) == "1"
    expandable = "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    segments_in_graphs = expandable and os.environ.get("NCCL_GRAPH_REGISTER") != "0"
    capability = torch.cuda.get_device_capability(local_rank)
    return CudaFacts(capability, (major, minor), fp32_scales, segments_in_graphs)


class CudaPlatform:
    """NCCL, Transformer Engine's modules, mamba-ssm's kernels."""

    name: PlatformName = "cuda"
    backend = "nccl"

    def __init__(self) -> None:
        # Before the CUDA context is made. One queue: what is sent starts before the product that it runs behind, which
        # megatron-core's linears rely on (tensor_parallel/layers.py).
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    def memory(self, local_rank: int) -> Memory:
        """The GPU's, all of it."""
        properties = torch.cuda.get_device_properties(local_rank)
        return Memory(properties.name, properties.total_memory)

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
        _name_final_norm_as_on_a_cpu()
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

        attention = with_documents(TEDotProductAttention)
        return LayerModules(TELayerNormColumnParallelLinear, TERowParallelLinear, None, attention)

    def prepare_model(self, recipe: Recipe, layout: ParallelConfig) -> dict[str, Any]:
        """User buffers and generators for graphs where the layout asks for them; else megatron-core's own defaults."""
        if layout.tensor_overlap:
            _allocate_user_buffers(recipe, layout)
        if layout.cuda_graphs:
            _make_generators_graphable()
        return {
            "tp_comm_overlap": layout.tensor_overlap,
            "cuda_graph_impl": "local" if layout.cuda_graphs else "none",
        }

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


def _name_final_norm_as_on_a_cpu() -> None:
    """Leave the final norm's FP8 state, which is always empty, out of checkpoints, where a CPU's norm has none."""
    names = importlib.import_module("megatron.core.ssm.mamba_block").__dict__
    if not hasattr(names["TENorm"], "__wrapped__"):
        names["TENorm"] = without_extra_state(names["TENorm"])


def without_extra_state(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The constructor of a module, whose module then has no `_extra_state` in its state."""

    @wraps(build)
    def built(*args: Any, **kwargs: Any) -> nn.Module:
        module = build(*args, **kwargs)
        own = type(module)
        none = {"get_extra_state": nn.Module.get_extra_state, "set_extra_state": nn.Module.set_extra_state}
        module.__class__ = type(own.__name__, (own,), none)
        return module

    return built


def _allocate_user_buffers(recipe: Recipe, layout: ParallelConfig) -> None:
    """Transformer Engine's buffers of a micro-batch's tokens, from which its linears send while they compute.

    As `_initialize_tp_communicators` of Megatron-LM (megatron/training/initialize.py, core_r0.16.0), whose groups are
    bootstrapped by NCCL too.
    """
    base = importlib.import_module("transformer_engine.pytorch.module.base")
    # Every stage of this layout has the same micro-batches: a rule of the recipe.
    stage = next(stage for stage in recipe.stages.values() if stage_layout(recipe, stage) == layout)
    tokens = stage.sequence_length * stage.micro_batch_size // layout.context
    modes = base.UserBufferQuantizationMode
    base.initialize_ub(
        shape=[tokens, recipe.model.hidden_size],
        tp_size=layout.tensor,
        # Under FP8 the first and last linears stay BF16.
        quantization_modes=[modes.FP8, modes.NONE] if recipe.precision.name in NEEDS else [modes.NONE],
        dtype=getattr(torch, parameter_dtype(recipe.precision)),
        bootstrap_backend="nccl",
    )


def _make_generators_graphable() -> None:
    """Seed megatron-core's random states again, as generators that a CUDA graph can register; nothing draws from them.

    Its CudaGraphManager refuses the other kind.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1, use_cudagraphable_rng=True, force_reset_rng=True)


def with_documents(base: type[nn.Module]) -> type[nn.Module]:
    """Transformer Engine's attention, and flex_attention for the documents that it would ignore as a padding mask.

    Args:
        base: megatron-core's TEDotProductAttention.
    """
    from nano_pretrain.kernels.document_attention import document_attention

    class DocumentAttention(base):  # type: ignore[misc,valid-type]
        """Causal attention, within documents where there are any."""

        def __init__(self, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
            super().__init__(*args, pg_collection=pg_collection, **kwargs)
            self.context_group = pg_collection.cp if pg_collection.cp.size() > 1 else None

        def forward(self, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
            """As the base class; `attention_mask` is the document of each token of the whole sequence, or None."""
            if attention_mask is None:
                return super().forward(query, key, value, None, *args, **kwargs)
            return document_attention(query, key, value, attention_mask, self.context_group).flatten(2)

    return DocumentAttention
