"""A Mamba-2 layer between its projections: convolution, scan and gate as one differentiable function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_pretrain.kernels.activation import native_silu_gate, native_silu_gate_backward
from nano_pretrain.kernels.conv import native_conv_silu, native_conv_silu_backward
from nano_pretrain.kernels.native.layout import empty_tokens, wide
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

    def scan_inputs(self, xbc: Tensor, step: Tensor, a: Tensor, d: Tensor, seq_idx: Tensor | None) -> ScanInputs:
        """Of the scan, from the convolution's output."""
        x, b, c = self.split_convolved(xbc)
        return scan_inputs(x, step, a, b, c, d, seq_idx)


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
        seq_idx: document of each token [batch, length], int32, or None.

    Returns:
        gated output before the norm [batch, length, d_inner], in memory in the order of zxbcdt.
    """
    out: Tensor = _Mixer.apply(library, torch.is_grad_enabled(), sizes, zxbcdt, weight, bias, dt_bias, a, d, seq_idx)  # type: ignore[no-untyped-call]
    return out


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        library: Library,
        differentiable: bool,
        sizes: Sizes,
        zxbcdt: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dt_bias: Tensor,
        a: Tensor,
        d: Tensor,
        seq_idx: Tensor | None,
    ) -> Tensor:
        z, xbc, dt = sizes.split(zxbcdt)
        convolved, y = empty_tokens(xbc), empty_tokens(z)
        native_conv_silu(library, xbc, weight, bias, seq_idx, convolved)
        step = F.softplus(_before_softplus(dt, dt_bias))
        inputs = sizes.scan_inputs(convolved, step, a, d, seq_idx)
        _, kept = scan_forward(library, inputs, None, y, keep=differentiable and any(ctx.needs_input_grad))
        out = torch.empty_like(y)
        native_silu_gate(library, y, z, out)
        ctx.save_for_backward(zxbcdt, weight, bias, dt_bias, a, d, seq_idx, y, kept)
        ctx.library, ctx.sizes = library, sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        zxbcdt, weight, bias, dt_bias, a, d, seq_idx, y, kept = ctx.saved_tensors
        library, sizes = ctx.library, ctx.sizes
        dzxbcdt = empty_tokens(zxbcdt)
        (z, xbc, dt), (dz, dxbc, ddt) = sizes.split(zxbcdt), sizes.split(dzxbcdt)
        dy, convolved = torch.empty_like(y), empty_tokens(xbc)
        native_silu_gate_backward(library, y, z, grads[0], dy, dz)
        native_conv_silu(library, xbc, weight, bias, seq_idx, convolved)
        before_softplus = _before_softplus(dt, dt_bias)
        inputs = sizes.scan_inputs(convolved, F.softplus(before_softplus), a, d, seq_idx)
        dconvolved = torch.empty_like(convolved)
        dx, db, dc = sizes.split_convolved(dconvolved)
        found = scan_backward(library, inputs, kept, dy.unflatten(-1, dx.shape[2:]), None, dx, initial=False)
        db.copy_(found.b)
        dc.copy_(found.c)
        dweight, dbias = native_conv_silu_backward(library, xbc, weight, bias, seq_idx, dconvolved, dxbc)
        dstep = found.dt * before_softplus.sigmoid()
        ddt.copy_(dstep)
        ddt_bias = dstep.sum((0, 1)).to(dt_bias.dtype)
        return None, None, None, dzxbcdt, dweight, dbias, ddt_bias, found.a.to(a.dtype), found.d.to(d.dtype), None


def _before_softplus(dt: Tensor, dt_bias: Tensor) -> Tensor:
    """[batch, length, heads], in at least fp32."""
    return dt.to(wide(dt.dtype)) + dt_bias.to(wide(dt.dtype))
