"""What ranks do in the tests of the loss."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nano_pretrain.kernels.cross_entropy import vocabulary_cross_entropy
from nano_pretrain.kernels.native import library


def gathered_loss_and_gradient(
    implementation: str, logits: Tensor, labels: Tensor, vocab_size: int, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """The losses on this rank, and the gradient of its columns of the logits."""
    dist.init_process_group("gloo")
    part = logits.tensor_split(dist.get_world_size(), -1)[dist.get_rank()].clone().requires_grad_()
    with library.implementation(implementation):
        losses = vocabulary_cross_entropy(part, labels, vocab_size, dist.group.WORLD)
        (found,) = torch.autograd.grad(losses, part, gradient)
    dist.destroy_process_group()
    return losses.detach(), found
