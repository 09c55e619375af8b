"""Causal depthwise convolution over the sequence, followed by SiLU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_pretrain.kernels.documents import document_numbers
from nano_pretrain.kernels.native.layout import empty_tokens, parameter, tokens, wide, written_tokens
from nano_pretrain.kernels.native.library import Library, active


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None = None) -> Tensor:
    """`silu(bias + sum_k weight[:, k] x[t - width + 1 + k])`; taps do not reach into an earlier document.

    The plain form is shifted multiply-adds in the layout of the linears: on a CPU a grouped convolution takes several
    times as long.

    Args:
        x: [batch, length, channels].
        weight: [channels, width].
        bias: [channels] or None.
        seq_idx: document of each token [batch, length], integers, non-decreasing, or None.

    Returns:
        [batch, length, channels] in the dtype of x; sums are in fp32 (float64 for float64).

    Raises:
        ValueError: the filter has no taps, or seq_idx is not of integers.
    """
    seq_idx = document_numbers(seq_idx)
    library = active(x)
    out: Tensor
    if library is None:
        out = _CausalConvSilu.apply(x, weight, bias, seq_idx)  # type: ignore[no-untyped-call]
    else:
        out = _NativeConvSilu.apply(library, x, weight, bias, seq_idx)  # type: ignore[no-untyped-call]
    return out


def native_conv_silu(
    library: Library, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, out: Tensor
) -> None:
    """`causal_conv_silu` into `out`, which may be channels of a wider tensor; seq_idx is int32; no gradients."""
    filters = _native_parameters(x, weight, bias, seq_idx)
    library.call("conv_forward", x.dtype, *tokens(x, x), *filters, *written_tokens(out, x), *x.shape, _taps(weight))


def native_conv_silu_backward(
    library: Library,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    grad: Tensor,
    dx: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `native_conv_silu`: of x into `dx`, which may be channels of a wider tensor.

    Args:
        library: the native kernels.
        x: as in `causal_conv_silu`.
        weight: as there.
        bias: as there.
        seq_idx: as there, int32.
        grad: [batch, length, channels] in the dtype of x.
        dx: written, [batch, length, channels] in the dtype of x, channels contiguous.

    Returns:
        Gradients of weight and bias, in their dtypes.
    """
    channels, width, dtype = x.shape[2], _taps(weight), wide(x.dtype)
    dweight, dbias = torch.empty(channels, width, dtype=dtype), torch.empty(channels, dtype=dtype)
    gradients = (*tokens(grad, x), *written_tokens(dx, x), dweight, dbias)
    filters = _native_parameters(x, weight, bias, seq_idx)
    library.call("conv_backward", x.dtype, *tokens(x, x), *filters, *gradients, *x.shape, width)
    return dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)


def _taps(weight: Tensor) -> int:
    """Width of the filter.

    Raises:
        ValueError: it has none: there is no last tap, and the native kernels would divide by it.
    """
    width = weight.shape[1]
    if width < 1:
        raise ValueError(f"a convolution with a filter of width {width}: it needs at least one tap")
    return width


def _native_parameters(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    batch, length, channels = x.shape
    return (
        parameter(weight, (channels, weight.shape[1]), wide(x.dtype)),
        parameter(bias, (channels,), wide(x.dtype)),
        parameter(seq_idx, (batch, length), torch.int32),
    )


class _NativeConvSilu(torch.autograd.Function):
    """Keeps only its input, as the plain form."""

    @staticmethod
    def forward(
        ctx: Any, library: Library, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None
    ) -> Tensor:
        ctx.library = library
        ctx.save_for_backward(x, weight, bias, seq_idx)
        out = empty_tokens(x)
        native_conv_silu(library, x, weight, bias, seq_idx, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias, seq_idx = ctx.saved_tensors
        dx = empty_tokens(x)
        dweight, dbias = native_conv_silu_backward(ctx.library, x, weight, bias, seq_idx, grads[0], dx)
        return None, dx, dweight, dbias, None


class _CausalConvSilu(torch.autograd.Function):
    """Keeps only its input; the sum before the SiLU is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias, seq_idx)
        return F.silu(_taps_sum(x, weight, bias, seq_idx)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias, seq_idx = ctx.saved_tensors
        dtype = wide(x.dtype)
        summed = _taps_sum(x, weight, bias, seq_idx)
        sigmoid = summed.sigmoid()
        grad = grads[0].to(dtype) * sigmoid * (1 + summed * (1 - sigmoid))
        x_, width, length = x.to(dtype), weight.shape[1], x.shape[1]
        dx = grad * weight[:, -1].to(dtype)
        dweight = torch.empty_like(weight, dtype=dtype)
        dweight[:, -1] = (grad * x_).sum((0, 1))
        for shift in range(1, min(width, length)):
            tap = width - 1 - shift
            late = _within_document(grad[:, shift:], seq_idx, shift)
            dx[:, :-shift].addcmul_(late, weight[:, tap].to(dtype))
            dweight[:, tap] = (late * x_[:, :-shift]).sum((0, 1))
        dweight[:, : max(0, width - length)] = 0
        dbias = None if bias is None else grad.sum((0, 1)).to(bias.dtype)
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias, None


def _taps_sum(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """The convolution before its SiLU, in at least fp32."""
    dtype = wide(x.dtype)
    x_ = x.to(dtype)
    width, length = _taps(weight), x.shape[1]
    last = weight[:, -1].to(dtype)
    summed = x_ * last if bias is None else torch.addcmul(bias.to(dtype), x_, last)
    for shift in range(1, min(width, length)):
        early = _within_document(x_[:, :-shift], seq_idx, shift)
        summed[:, shift:].addcmul_(early, weight[:, width - 1 - shift].to(dtype))
    return summed


def _within_document(t: Tensor, seq_idx: Tensor | None, shift: int) -> Tensor:
    """Zero where the tokens `shift` apart belong to different documents."""
    if seq_idx is None:
        return t
    return t * (seq_idx[:, shift:] == seq_idx[:, :-shift]).unsqueeze(-1)
