"""Causal depthwise convolution over the sequence, followed by SiLU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None = None) -> Tensor:
    """`silu(bias + sum_k weight[:, k] x[t - width + 1 + k])`; taps do not reach into an earlier document.

    Shifted multiply-adds in the layout of the linears: on a CPU a grouped convolution takes several times as long.

    Args:
        x: [batch, length, channels].
        weight: [channels, width].
        bias: [channels] or None.
        seq_idx: document of each token [batch, length], non-decreasing, or None.

    Returns:
        [batch, length, channels] in the dtype of x; sums are in fp32 (float64 for float64).
    """
    out: Tensor = _CausalConvSilu.apply(x, weight, bias, seq_idx)  # type: ignore[no-untyped-call]
    return out


class _CausalConvSilu(torch.autograd.Function):
    """Keeps only its input; the sum before the SiLU is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias, seq_idx)
        return F.silu(_taps_sum(x, weight, bias, seq_idx)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias, seq_idx = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        summed = _taps_sum(x, weight, bias, seq_idx)
        sigmoid = summed.sigmoid()
        grad = grads[0].to(wide) * sigmoid * (1 + summed * (1 - sigmoid))
        x_, width, length = x.to(wide), weight.shape[1], x.shape[1]
        dx = grad * weight[:, -1].to(wide)
        dweight = torch.empty_like(weight, dtype=wide)
        dweight[:, -1] = (grad * x_).sum((0, 1))
        for shift in range(1, min(width, length)):
            tap = width - 1 - shift
            late = _within_document(grad[:, shift:], seq_idx, shift)
            dx[:, :-shift].addcmul_(late, weight[:, tap].to(wide))
            dweight[:, tap] = (late * x_[:, :-shift]).sum((0, 1))
        dweight[:, : max(0, width - length)] = 0
        dbias = None if bias is None else grad.sum((0, 1)).to(bias.dtype)
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias, None


def _taps_sum(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """The convolution before its SiLU, in at least fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_ = x.to(wide)
    width, length = weight.shape[1], x.shape[1]
    last = weight[:, -1].to(wide)
    summed = x_ * last if bias is None else torch.addcmul(bias.to(wide), x_, last)
    for shift in range(1, min(width, length)):
        early = _within_document(x_[:, :-shift], seq_idx, shift)
        summed[:, shift:].addcmul_(early, weight[:, width - 1 - shift].to(wide))
    return summed


def _within_document(t: Tensor, seq_idx: Tensor | None, shift: int) -> Tensor:
    """Zero where the tokens `shift` apart belong to different documents."""
    if seq_idx is None:
        return t
    return t * (seq_idx[:, shift:] == seq_idx[:, :-shift]).unsqueeze(-1)
