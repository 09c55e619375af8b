"""Context parallelism: which tokens of a sequence a rank holds, and how it sees the others.

A sequence is cut into 2C equal chunks, of which rank r of C holds chunks r and 2C - 1 - r: with a causal mask all ranks
then have the same number of scores to compute. It is the order that megatron-core's Mamba mixer undoes in its
all-to-all, and that Transformer Engine's attention expects.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def own_chunks(rank: int, size: int) -> tuple[int, int]:
    """Numbers of the chunks, of 2 x size, that a rank holds, in their order on it."""
    return rank, 2 * size - 1 - rank


def own_tokens(whole: Tensor, dim: int, place: tuple[int, int]) -> Tensor:
    """This rank's part of a sequence.

    Args:
        whole: any tensor whose dimension `dim` is the whole sequence, a multiple of twice the ranks.
        dim: the dimension.
        place: rank and size of the context-parallel group.

    Raises:
        ValueError: the sequence cannot be cut into equal chunks.
    """
    rank, size = place
    if size == 1:
        return whole
    if whole.shape[dim] % (2 * size):
        raise ValueError(f"{whole.shape[dim]} tokens cannot be cut into {2 * size} chunks")
    chunks = whole.chunk(2 * size, dim)
    return torch.cat([chunks[number] for number in own_chunks(rank, size)], dim)


def whole_sequence(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The parts of all ranks in the order of the sequence, differentiable.

    Gradients are summed over the ranks in FP32 (FP64 for FP64), whatever the dtype.

    Args:
        own: [length / ranks, ...], in the order of `own_tokens`.
        group: the context-parallel group.

    Returns:
        [length, ...].
    """
    out: Tensor = _WholeSequence.apply(own, group)  # type: ignore[no-untyped-call]
    return out


class _WholeSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = own.new_empty(group.size(), *own.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), own.contiguous(), group=group)
        early, late = parts.chunk(2, 1)
        return torch.cat([early.flatten(0, 1), late.flip(0).flatten(0, 1)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        chunks = grad.to(torch.promote_types(grad.dtype, torch.float32)).unflatten(0, (2 * ctx.group.size(), -1))
        early, late = chunks.chunk(2)
        parts = torch.stack([early, late.flip(0)], 1)
        own = parts.new_empty(parts.shape[1:])
        dist.reduce_scatter_tensor(own.flatten(0, 1), parts.flatten(0, 2), group=ctx.group)
        return own.flatten(0, 1).to(grad.dtype), None
