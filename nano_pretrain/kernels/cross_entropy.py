"""Cross-entropy of logits whose vocabulary is divided among tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_pretrain.kernels.native.layout import wide
from nano_pretrain.kernels.native.library import Library, active

PIECE = 2**20
"""Logits that the plain kernels widen at a time, so that they never hold a wide copy of all."""


def vocabulary_cross_entropy(
    logits: Tensor, labels: Tensor, vocab_size: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """`log(sum(exp(logits))) - logits[label]` of each token, without the columns that pad the vocabulary.

    The backward pass writes the gradient over the logits: nothing else may read them after it. Autograd sees to that; a
    second backward pass raises.

    Args:
        logits: this rank's columns [length, batch, padded vocabulary / ranks].
        labels: [batch, length] in [0, vocab_size), equal on all ranks.
        vocab_size: columns of all ranks that are not padding; those after them get no probability and no gradient.
        group: the ranks, in the order of their columns; None for one.

    Returns:
        Loss in nats [batch, length], in fp32 (float64 for float64).

    Raises:
        ValueError: a label is not in the vocabulary, or shapes do not fit.
    """
    length, batch, columns = logits.shape
    if labels.shape != (batch, length):
        raise ValueError(f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}")
    _check_labels(labels, vocab_size)
    first = group.rank() * columns if group else 0
    valid = min(max(vocab_size - first, 0), columns)
    local = labels.t().flatten().long() - first
    losses: Tensor = _CrossEntropy.apply(logits, local, valid, group)  # type: ignore[no-untyped-call]
    return losses.view(length, batch).t().contiguous()


def _check_labels(labels: Tensor, vocab_size: int) -> None:
    if not labels.numel():
        return
    smallest, largest = labels.aminmax()
    if smallest < 0 or largest >= vocab_size:
        raise ValueError(f"labels from {smallest} to {largest} are not all in a vocabulary of {vocab_size}")


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits, and three numbers of each token."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, valid: int, group: dist.ProcessGroup | None) -> Tensor:
        logits = logits.contiguous()
        rows = logits.view(-1, logits.shape[-1])
        library = active(rows)
        peaks, totals = _plain_sums(rows, valid) if library is None else _native_sums(library, rows, valid)
        here = (labels >= 0) & (labels < valid)
        at_label = rows.gather(1, torch.where(here, labels, 0).unsqueeze(1)).squeeze(1).to(totals.dtype)
        at_label = torch.where(here, at_label, 0)
        if group and group.size() > 1:
            peaks, totals, at_label = _over_ranks(peaks, totals, at_label, group)
        ctx.library, ctx.valid = library, valid
        ctx.save_for_backward(logits, labels, peaks, totals)
        return totals.log() - (at_label - peaks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        logits, labels, peaks, totals = ctx.saved_tensors
        gradient = logits.detach()
        rows, grad = gradient.view(-1, logits.shape[-1]), grads[0].contiguous()
        if ctx.library is None:
            _plain_gradient(rows, labels, peaks, totals, grad, ctx.valid)
        else:
            tensors = (rows, labels, peaks, totals, grad)
            ctx.library.call("cross_entropy_backward", rows.dtype, *tensors, *rows.shape, ctx.valid)
            torch.autograd.graph.increment_version(rows)
        return gradient, None, None, None


def _over_ranks(
    peaks: Tensor, totals: Tensor, at_label: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Peaks, sums and label's logits of the whole vocabulary from those of the ranks."""
    highest = peaks.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    sums = torch.stack([totals * (peaks - highest).exp(), at_label])
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    return highest, *sums


def _native_sums(library: Library, rows: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """The largest valid logit of each row, and the sum of `exp(logit - largest)`."""
    peaks, totals = (rows.new_empty(rows.shape[0], dtype=wide(rows.dtype)) for _ in range(2))
    library.call("cross_entropy_sums", rows.dtype, rows, peaks, totals, *rows.shape, valid)
    return peaks, totals


def _plain_sums(rows: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    dtype = wide(rows.dtype)
    if valid == 0:
        return rows.new_full(rows.shape[:1], -torch.inf, dtype=dtype), rows.new_zeros(rows.shape[0], dtype=dtype)
    peaks = rows[:, :valid].amax(1).to(dtype)
    parts = zip(*(t.split(_rows_of_a_piece(rows)) for t in (rows[:, :valid], peaks)), strict=True)
    return peaks, torch.cat([_exponentials(part, peak).sum(1) for part, peak in parts])


def _plain_gradient(rows: Tensor, labels: Tensor, peaks: Tensor, totals: Tensor, grad: Tensor, valid: int) -> None:
    """Write the gradient over `rows`; labels outside [0, valid) are another rank's."""
    pieces = zip(*(t.split(_rows_of_a_piece(rows)) for t in (rows, labels, peaks, totals, grad)), strict=True)
    for row, label, peak, total, gradient in pieces:
        found = _exponentials(row[:, :valid], peak).mul_((gradient / total).unsqueeze(1))
        (here,) = torch.where((label >= 0) & (label < valid))
        found[here, label[here]] -= gradient[here]
        row[:, :valid] = found
    rows[:, valid:] = 0


def _exponentials(rows: Tensor, peaks: Tensor) -> Tensor:
    return (rows - peaks.unsqueeze(1)).exp_()


def _rows_of_a_piece(rows: Tensor) -> int:
    return max(1, PIECE // rows.shape[1])
