"""Squared ReLU and the SiLU gate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_pretrain.kernels.native.layout import empty_tokens, tokens, written_tokens
from nano_pretrain.kernels.native.library import Library, active


def squared_relu(x: Tensor) -> Tensor:
    """`relu(x)^2` (So et al. 2021) in the dtype of x; megatron-core's own is compiled at its first call."""
    library = active(x)
    if library is None:
        return torch.relu(x).square()
    out: Tensor = _NativeSquaredRelu.apply(library, x)  # type: ignore[no-untyped-call]
    return out


def silu_gate(y: Tensor, z: Tensor) -> Tensor:
    """`y silu(z)`.

    Args:
        y: [batch, length, channels].
        z: gate [batch, length, channels].

    Returns:
        [batch, length, channels] in the dtype of y.
    """
    library = active(y, z)
    if library is None or y.dtype != z.dtype:
        return (y * F.silu(z)).to(y.dtype)
    out: Tensor = _NativeSiluGate.apply(library, y, z)  # type: ignore[no-untyped-call]
    return out


def native_silu_gate(library: Library, y: Tensor, z: Tensor, out: Tensor) -> None:
    """`silu_gate` into `out`; no gradients."""
    library.call("gate_forward", y.dtype, *tokens(y, y), *tokens(z, y), *written_tokens(out, y), *y.shape)


def native_silu_gate_backward(library: Library, y: Tensor, z: Tensor, grad: Tensor, dy: Tensor, dz: Tensor) -> None:
    """The gradients of `native_silu_gate` into `dy` and `dz`, which may be channels of a wider tensor."""
    gradients = (*tokens(grad, y), *written_tokens(dy, y), *written_tokens(dz, y))
    library.call("gate_backward", y.dtype, *tokens(y, y), *tokens(z, y), *gradients, *y.shape)


class _NativeSquaredRelu(torch.autograd.Function):
    """Keeps only its input."""

    @staticmethod
    def forward(ctx: Any, library: Library, x: Tensor) -> Tensor:
        ctx.library = library
        ctx.save_for_backward(x)
        x = x.contiguous()
        out = torch.empty_like(x)
        library.call("squared_relu_forward", x.dtype, x, out, x.numel())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x = ctx.saved_tensors[0].contiguous()
        dx = torch.empty_like(x)
        ctx.library.call("squared_relu_backward", x.dtype, x, grads[0].contiguous(), dx, x.numel())
        return None, dx


class _NativeSiluGate(torch.autograd.Function):
    """Keeps only its inputs."""

    @staticmethod
    def forward(ctx: Any, library: Library, y: Tensor, z: Tensor) -> Tensor:
        ctx.library = library
        ctx.save_for_backward(y, z)
        out = empty_tokens(y)
        native_silu_gate(library, y, z, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        y, z = ctx.saved_tensors
        dy, dz = empty_tokens(y), empty_tokens(y)
        native_silu_gate_backward(ctx.library, y, z, grads[0], dy, dz)
        return None, dy, dz
