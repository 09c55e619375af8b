"""RMSNorm and its gated, group-wise form."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in at least fp32 (Zhang and Sennrich 2019)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_ = x.to(wide)
    scale = torch.rsqrt(x_.square().mean(-1, keepdim=True) + eps)
    return (x_ * scale * weight.to(wide)).to(x.dtype)


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
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    gated = x.to(wide) if z is None else x.to(wide) * F.silu(z.to(wide))
    groups: Tensor = gated.unflatten(-1, (-1, group_size))
    scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    return ((groups * scale).flatten(-2) * weight.to(wide)).to(x.dtype)


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
