"""Tensors as the arguments that the native kernels take: shapes are checked here, since a kernel would read beyond."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of `dtype` are computed in: fp32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def tokens(t: Tensor, like: Tensor) -> tuple[Tensor, int, int]:
    """A tensor [batch, length, channels], copied if its channels are not contiguous, and strides of batch and length.

    Args:
        t: of the dtype of `like`, and of its shape or expandable to it.
        like: the tensor whose dtype and shape the kernel is told.

    Raises:
        RuntimeError: the shape does not fit.
    """
    t = _with_dense_channels(t.expand(like.shape))
    return t, t.stride(0), t.stride(1)


def written_tokens(t: Tensor, like: Tensor) -> tuple[Tensor, int, int]:
    """As `tokens`, for a tensor that the kernel fills, and that is never copied.

    Raises:
        ValueError: the shape or dtype does not fit, or channels are not contiguous.
    """
    if t.shape != like.shape or t.dtype != like.dtype or not _has_dense_channels(t):
        raise ValueError(f"cannot write {like.dtype} {tuple(like.shape)} into {t.dtype} {tuple(t.shape)}, {t.stride()}")
    return t, t.stride(0), t.stride(1)


def rows(t: Tensor | None, like: Tensor) -> tuple[Tensor | None, int]:
    """A tensor [..., channels] as [rows, channels] and the stride of its rows; copied if it has no such stride.

    Args:
        t: of the dtype of `like`, and of its shape or expandable to it; None stays None.
        like: the tensor whose dtype and shape the kernel is told.

    Raises:
        RuntimeError: the shape does not fit.
    """
    if t is None:
        return None, 0
    t = _with_dense_channels(t.expand(like.shape).reshape(-1, like.shape[-1]))
    return t, t.stride(0)


def parameter(t: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """A small tensor, dense, in the shape and dtype that the kernel expects; None stays None.

    Raises:
        RuntimeError: the shape does not fit.
    """
    return None if t is None else t.to(dtype).expand(shape).contiguous()


def empty_tokens(like: Tensor) -> Tensor:
    """An empty tensor of this shape and dtype, in the same order of memory but with contiguous channels."""
    out = torch.empty_like(like)
    return out if _has_dense_channels(out) else torch.empty_like(like, memory_format=torch.contiguous_format)


def _with_dense_channels(t: Tensor) -> Tensor:
    return t if _has_dense_channels(t) else t.contiguous()


def _has_dense_channels(t: Tensor) -> bool:
    return t.stride(-1) == 1 or t.shape[-1] == 1
