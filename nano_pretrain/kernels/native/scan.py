"""The native scan: scan_forward.cpp and scan_backward.cpp on tensors."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_pretrain.kernels.native.layout import parameter, wide
from nano_pretrain.kernels.native.library import Library

TASKS = 8
"""The heads of a group are divided among as many tasks as make up this number, but at most `HEADS` to a task: the
scores of a chunk are computed once a task. It depends on the shapes only, so that results do not on the threads."""
HEADS = 4


@dataclass(frozen=True)
class ScanInputs:
    """What `nano_pretrain.kernels.ssd.chunk_scan` takes, as the kernels need it.

    Args:
        x: [batch, length, heads, channels], the last two contiguous; so for b and c.
        dt: [batch, length, heads], contiguous, in the wide dtype (float32, or float64 for float64).
        a: [heads], wide.
        b: [batch, length, groups, state].
        c: [batch, length, groups, state].
        d: [heads], wide, or None.
        seq_idx: [batch, length] int32, contiguous, or None.
    """

    x: Tensor
    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor | None
    seq_idx: Tensor | None

    @property
    def heads_per_task(self) -> int:
        """See `TASKS`."""
        tasks_of_one_head = self.x.shape[0] * self.x.shape[2]
        return max(1, min(HEADS, self.x.shape[2] // self.b.shape[2], tasks_of_one_head // TASKS))

    @property
    def blocks(self) -> int:
        """Tasks of a group."""
        return -(-self.x.shape[2] // self.b.shape[2] // self.heads_per_task)

    def shape(self, y: Tensor, dx: Tensor) -> ctypes.Array[ctypes.c_int64]:
        """scan::Shape; `y` and `dx` are of the shape of x, `dx` is used in the backward pass only."""
        batch, length, heads, channels = self.x.shape
        strides = (t.stride(i) for t in (self.x, self.b, self.c, y, dx) for i in (0, 1))
        groups, state = self.b.shape[2:]
        return (ctypes.c_int64 * 17)(batch, length, heads, groups, channels, state, self.heads_per_task, *strides)


def scan_inputs(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, seq_idx: Tensor | None
) -> ScanInputs:
    """Inputs brought into the form of `ScanInputs`, without a copy where they have it.

    Raises:
        ValueError: shapes or dtypes do not fit together: a kernel would read beyond them.
    """
    (batch, length, heads, _), groups = x.shape, b.shape[2]
    if not b.shape == c.shape == (batch, length, groups, b.shape[3]) or groups == 0 or heads % groups:
        raise ValueError(f"scan: x, B and C of shapes {[tuple(t.shape) for t in (x, b, c)]} do not fit together")
    if not x.dtype == b.dtype == c.dtype:
        raise ValueError(f"scan: x, B and C are {x.dtype}, {b.dtype}, {c.dtype}")
    if dt.shape != (batch, length, heads) or a.shape != (heads,):
        raise ValueError(f"scan: dt {tuple(dt.shape)} and A {tuple(a.shape)} do not fit x {tuple(x.shape)}")
    steps, rates = (t.to(wide(x.dtype)).contiguous() for t in (dt, a))
    return ScanInputs(
        rows_contiguous(x),
        steps,
        rates,
        rows_contiguous(b),
        rows_contiguous(c),
        parameter(d, (heads,), wide(x.dtype)),
        parameter(seq_idx, (batch, length), torch.int32),
    )


def rows_contiguous(t: Tensor) -> Tensor:
    """[batch, length, heads, channels] whose last two dimensions are one contiguous row; batch and token may stride."""
    if t.stride(3) == 1 and (t.stride(2) == t.shape[3] or t.shape[2] == 1):
        return t
    return t.contiguous()


def scan_forward(
    library: Library, inputs: ScanInputs, initial: Tensor | None, y: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Fill y; the last state [batch, heads, channels, state], and the states that `scan_backward` needs."""
    x, wide_ = inputs.x, inputs.dt.dtype
    batch, length, heads, channels = x.shape
    state = inputs.b.shape[3]
    last = x.new_empty((batch, heads, channels, state), dtype=wide_)
    kept = None
    if keep:
        segments = library.integer("scan_segments", length)
        size = library.integer("scan_state_size", x.dtype, state, channels)
        kept = x.new_empty((batch, segments, heads, size), dtype=wide_)
    library.call(
        "scan_forward", x.dtype, inputs.shape(y, y), x, inputs.dt, inputs.a, inputs.b, inputs.c, inputs.d, initial,
        inputs.seq_idx, y, last, kept,
    )  # fmt: skip
    return last, kept


@dataclass(frozen=True)
class ScanGradients:
    """Gradients of the scan's inputs; in the wide dtype but for x, which was given."""

    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    initial: Tensor | None


def scan_backward(
    library: Library, inputs: ScanInputs, kept: Tensor, dy: Tensor, dlast: Tensor | None, dx: Tensor, initial: bool
) -> ScanGradients:
    """Fill dx; `dy` and `dx` have rows as x in `ScanInputs`. `initial` asks for its gradient."""
    x, b = inputs.x, inputs.b
    batch, _, heads, channels = x.shape
    wide_ = inputs.dt.dtype
    ddt = torch.empty_like(inputs.dt)
    da, dd = (x.new_empty((batch, heads), dtype=wide_) for _ in range(2))
    db, dc = (x.new_empty((inputs.blocks, *b.shape), dtype=wide_) for _ in range(2))
    dinitial = x.new_empty((batch, heads, channels, b.shape[3]), dtype=wide_) if initial else None
    library.call(
        "scan_backward", x.dtype, inputs.shape(dy, dx), x, inputs.dt, inputs.a, b, inputs.c, inputs.d, inputs.seq_idx,
        kept, dy, dlast, dx, ddt, da, db, dc, dd, dinitial,
    )  # fmt: skip
    return ScanGradients(ddt, da.sum(0), _sum_blocks(db), _sum_blocks(dc), dd.sum(0), dinitial)


def _sum_blocks(t: Tensor) -> Tensor:
    return t[0] if t.shape[0] == 1 else t.sum(0)


def native_scan(
    library: Library,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`chunk_scan` with the native kernels; keeps its inputs and one state in 1,024 tokens for the backward pass."""
    differentiable = torch.is_grad_enabled()  # inside a Function it is always off
    found: tuple[Tensor, Tensor] = _Scan.apply(  # type: ignore[no-untyped-call]
        library, differentiable, x, dt, a, b, c, d, initial_states, seq_idx
    )
    return found


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        library: Library,
        differentiable: bool,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor | None,
        initial: Tensor | None,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = scan_inputs(x, dt, a, b, c, d, seq_idx)
        initial_ = parameter(initial, (x.shape[0], *x.shape[2:], b.shape[3]), inputs.dt.dtype)
        y = torch.empty(x.shape, dtype=x.dtype)
        last, kept = scan_forward(library, inputs, initial_, y, keep=differentiable and any(ctx.needs_input_grad))
        ctx.save_for_backward(x, dt, a, b, c, d, seq_idx, kept)
        ctx.library, ctx.initial = library, None if initial is None else initial.dtype
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> Any:
        x, dt, a, b, c, d, seq_idx, kept = ctx.saved_tensors
        inputs = scan_inputs(x, dt, a, b, c, d, seq_idx)
        dx = torch.empty(x.shape, dtype=x.dtype)
        found = scan_backward(
            ctx.library, inputs, kept, rows_contiguous(dy), dlast.contiguous(), dx, ctx.initial is not None
        )
        return (
            None,
            None,
            dx,
            found.dt.to(dt.dtype),
            found.a.to(a.dtype),
            found.b.to(b.dtype),
            found.c.to(c.dtype),
            None if d is None else found.d.to(d.dtype),
            None if found.initial is None else found.initial.to(ctx.initial),
            None,
        )
