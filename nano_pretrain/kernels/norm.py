"""RMSNorm and its gated, group-wise form."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nano_pretrain.kernels.native.layout import parameter, rows, wide
from nano_pretrain.kernels.native.library import Library, active


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in at least fp32 (Zhang and Sennrich 2019)."""
    return gated_rms_norm(x, None, weight, eps, x.shape[-1])


def gated_rms_norm(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """`rms_norm(x silu(z))` over groups of channels: the gate comes before the norm, as in Mamba-2.

    Args:
        x: [..., channels].
        z: gate [..., channels], or None where the gate was applied before.
        weight: [channels].
        eps: added to the mean square.
        group_size: channels that share one scale; divides channels.

    Returns:
        [..., channels] in the dtype of x.

    Raises:
        ValueError: group_size is below 1 or does not divide channels, or there are no channels.
    """
    if not 1 <= group_size <= x.shape[-1] or x.shape[-1] % group_size:
        raise ValueError(f"{x.shape[-1]} channels cannot be divided into groups of {group_size}")
    library = active(x, z)
    if library is None or (z is not None and z.dtype != x.dtype):
        return _plain_norm(x, z, weight, eps, group_size)
    out: Tensor = _NativeNorm.apply(library, x, z, weight, eps, group_size)  # type: ignore[no-untyped-call]
    return out


def _plain_norm(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int) -> Tensor:
    dtype = wide(x.dtype)
    gated = x.to(dtype) if z is None else x.to(dtype) * F.silu(z.to(dtype))
    groups: Tensor = gated.unflatten(-1, (-1, group_size))
    scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    return ((groups * scale).flatten(-2) * weight.to(dtype)).to(x.dtype)


class _NativeNorm(torch.autograd.Function):
    """Keeps only its inputs; the scale is computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, library: Library, x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int
    ) -> Tensor:
        ctx.library, ctx.eps, ctx.group_size = library, eps, group_size
        ctx.save_for_backward(x, z, weight)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        tensors = (*_inputs(x, z, weight), *rows(out, x))
        library.call("norm_forward", x.dtype, *tensors, *_sizes(x, group_size), float(eps))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, z, weight = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dz = None if z is None else torch.empty_like(dx)
        dweight = torch.empty(x.shape[-1], dtype=wide(x.dtype))
        tensors = (*_inputs(x, z, weight), *rows(grads[0], x), *rows(dx, x), *rows(dz, x), dweight)
        ctx.library.call("norm_backward", x.dtype, *tensors, *_sizes(x, ctx.group_size), float(ctx.eps))
        return None, dx, dz, dweight.to(weight.dtype), None, None


def _inputs(x: Tensor, z: Tensor | None, weight: Tensor) -> tuple[Tensor | int | None, ...]:
    return *rows(x, x), *rows(z, x), parameter(weight, x.shape[-1:], wide(x.dtype))


def _sizes(x: Tensor, group_size: int) -> tuple[int, int, int]:
    """Rows, channels and channels of a group."""
    return x.numel() // x.shape[-1], x.shape[-1], group_size


class RMSNorm(nn.Module):
    """RMSNorm with the constructor that megatron-core's layer specs call.

    Its weight is marked for the gradient all-reduce over tensor-parallel ranks that sequence parallelism needs.

    Args:
        config: megatron-core's TransformerConfig.
        hidden_size: channels.
        eps: added to the mean square.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float | None = None) -> None:
        super().__init__()
        self.eps: float = config.layernorm_epsilon if eps is None else eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]."""
        return rms_norm(x, self.weight, self.eps)
