"""A Mamba-2 layer between its projections: convolution, scan and gate as one differentiable function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_pretrain.kernels.native.layout import empty_tokens, tokens, wide, written_tokens
from nano_pretrain.kernels.native.library import Library
from nano_pretrain.kernels.native.scan import ScanInputs, scan_backward, scan_forward, scan_inputs


@dataclass(frozen=True)
class Sizes:
    """Widths of the parts of in_proj's output."""

    heads: int
    channels: int
    groups: int
    state: int

    @property
    def inner(self) -> int:
        """d_inner."""
        return self.heads * self.channels

    def split(self, zxbcdt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views: gate z [..., d_inner], the convolution's input [..., d_inner + 2 groups state], dt [..., heads]."""
        z, xbc, dt = zxbcdt.split([self.inner, self.inner + 2 * self.groups * self.state, self.heads], -1)
        return z, xbc, dt

    def split_convolved(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views: x [..., heads, channels], B and C [..., groups, state]."""
        x, b, c = xbc.split([self.inner, self.groups * self.state, self.groups * self.state], -1)
        by_head: Tensor = x.unflatten(-1, (self.heads, self.channels))
        by_group = [t.unflatten(-1, (self.groups, self.state)) for t in (b, c)]
        return by_head, by_group[0], by_group[1]


def native_mixer(
    library: Library,
    sizes: Sizes,
    zxbcdt: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dt_bias: Tensor,
    a: Tensor,
    d: Tensor,
    seq_idx: Tensor | None,
) -> Tensor:
    """`mamba_split_conv1d_scan_combined` with the native kernels.

    Keeps its input, the scan's output before the gate and one state in 1,024 tokens; the convolution is computed again
    in the backward pass. All gradients of in_proj's output are written to their places in one tensor.

    Args:
        library: the native kernels.
        sizes: what zxbcdt is made of.
        zxbcdt: in_proj's output [batch, length, 2 d_inner + 2 groups state + heads] in any order of batch and length.
        weight: of the convolution [d_inner + 2 groups state, width].
        bias: of the convolution [d_inner + 2 groups state], or None.
        dt_bias: [heads].
        a: decay rates [heads].
        d: skip weights [heads].
        seq_idx: document of each token [batch, length], or None.

    Returns:
        gated output before the norm [batch, length, d_inner], in memory in the order of zxbcdt.
    """
    out: Tensor = _Mixer.apply(library, sizes, zxbcdt, weight, bias, dt_bias, a, d, seq_idx)  # type: ignore[no-untyped-call]
    return out


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        library: Library,
        sizes: Sizes,
        zxbcdt: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dt_bias: Tensor,
        a: Tensor,
        d: Tensor,
        seq_idx: Tensor | None,
    ) -> Tensor:
        z = sizes.split(zxbcdt)[0]
        y = empty_tokens(z)
        layer = _Layer(library, sizes, zxbcdt, weight, bias, dt_bias, a, d, seq_idx)
        inputs = layer.scan_inputs(layer.convolved())
        _, kept = scan_forward(library, inputs, None, y, keep=any(ctx.needs_input_grad))
        out = torch.empty_like(y)
        library.call("gate_forward", y.dtype, *tokens(y, y), *tokens(z, y), *written_tokens(out, y), *y.shape)
        ctx.save_for_backward(zxbcdt, weight, bias, dt_bias, a, d, seq_idx, y, kept)
        ctx.library, ctx.sizes = library, sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        zxbcdt, weight, bias, dt_bias, a, d, seq_idx, y, kept = ctx.saved_tensors
        library, sizes = ctx.library, ctx.sizes
        layer = _Layer(library, sizes, zxbcdt, weight, bias, dt_bias, a, d, seq_idx)
        dzxbcdt = empty_tokens(zxbcdt)
        (z, xbc, _), (dz, dxbc, ddt) = sizes.split(zxbcdt), sizes.split(dzxbcdt)
        dy = torch.empty_like(y)
        library.call(
            "gate_backward", y.dtype, *tokens(y, y), *tokens(z, y), *tokens(grad, y), *written_tokens(dy, y),
            *written_tokens(dz, y), *y.shape,
        )  # fmt: skip

        convolved = layer.convolved()
        inputs = layer.scan_inputs(convolved)
        dconvolved = torch.empty_like(convolved)
        dx, db, dc = sizes.split_convolved(dconvolved)
        dy_ = dy.unflatten(-1, (sizes.heads, sizes.channels))
        found = scan_backward(library, inputs, kept, dy_, None, dx, initial=False)
        db.copy_(found.b)
        dc.copy_(found.c)
        dweight, dbias = layer.convolution_backward(xbc, dconvolved, dxbc)
        dstep = found.dt * layer.steps_before_softplus().sigmoid()
        ddt.copy_(dstep)
        return (
            None,
            None,
            dzxbcdt,
            dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            dstep.sum((0, 1)).to(dt_bias.dtype),
            found.a.to(a.dtype),
            found.d.to(d.dtype),
            None,
        )


@dataclass(frozen=True)
class _Layer:
    """The inputs of `native_mixer`, and what both passes compute from them."""

    library: Library
    sizes: Sizes
    zxbcdt: Tensor
    weight: Tensor
    bias: Tensor | None
    dt_bias: Tensor
    a: Tensor
    d: Tensor
    seq_idx: Tensor | None

    @property
    def _wide(self) -> torch.dtype:
        return wide(self.zxbcdt.dtype)

    def _convolution(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        bias = None if self.bias is None else self.bias.to(self._wide).contiguous()
        documents = None if self.seq_idx is None else self.seq_idx.to(torch.int32).contiguous()
        return self.weight.to(self._wide).contiguous(), bias, documents

    def convolved(self) -> Tensor:
        """x, B and C [batch, length, d_inner + 2 groups state]."""
        xbc = self.sizes.split(self.zxbcdt)[1]
        out = empty_tokens(xbc)
        self.library.call(
            "conv_forward", xbc.dtype, *tokens(xbc, xbc), *self._convolution(), *written_tokens(out, xbc), *xbc.shape,
            self.weight.shape[1],
        )  # fmt: skip
        return out

    def convolution_backward(self, xbc: Tensor, grad: Tensor, dxbc: Tensor) -> tuple[Tensor, Tensor]:
        """Fill dxbc; gradients of weight and bias, wide."""
        weight, bias, documents = self._convolution()
        dweight, dbias = torch.empty_like(weight), weight.new_empty(weight.shape[0])
        self.library.call(
            "conv_backward", xbc.dtype, *tokens(xbc, xbc), weight, bias, documents, *tokens(grad, xbc),
            *written_tokens(dxbc, xbc), dweight, dbias, *xbc.shape, weight.shape[1],
        )  # fmt: skip
        return dweight, dbias

    def steps_before_softplus(self) -> Tensor:
        """[batch, length, heads], wide."""
        return self.sizes.split(self.zxbcdt)[2].to(self._wide) + self.dt_bias.to(self._wide)

    def scan_inputs(self, convolved: Tensor) -> ScanInputs:
        """Of the scan."""
        x, b, c = self.sizes.split_convolved(convolved)
        return scan_inputs(x, F.softplus(self.steps_before_softplus()), self.a, b, c, self.d, self.seq_idx)
