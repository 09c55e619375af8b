"""FP8 products in the place of those of megatron-core's tensor-parallel linears, with the same communication.

Operands are quantised as the rank has them, as by Transformer Engine: tiles end where a rank's part of a matrix does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_global_memory_buffer
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_pretrain.precision.linear import Fp8Recipe, data_gradient, forward_product, weight_gradient
from nano_pretrain.precision.losses import QuantisationLosses
from nano_pretrain.precision.placement import FP8_RECIPES, fp8_linears
from nano_pretrain.recipe.schema import PrecisionConfig


def quantise_linears(layers: Iterable[Any], pattern: str, precision: PrecisionConfig) -> QuantisationLosses | None:
    """Let linears of megatron-core compute in FP8.

    Weights and their gradients stay in their dtype, and so do the optimizer's copies.

    Args:
        layers: of this pipeline position.
        pattern: of the whole model.
        precision: which linears, and how.

    Returns:
        What counts their losses; None where the precision is not FP8.
    """
    linears = fp8_linears(pattern, precision)
    if not linears:
        return None
    held = {layer.layer_number - 1: layer for layer in layers}
    losses = QuantisationLosses([str(linear) for linear in linears])
    for number, linear in enumerate(linears):
        if linear.layer in held:
            module = held[linear.layer].get_submodule(linear.name)
            module._forward_impl = Fp8Forward(FP8_RECIPES[precision.name], number, losses)
    return losses


@dataclass(frozen=True)
class Fp8Forward:
    """`_forward_impl` of a ColumnParallelLinear or RowParallelLinear.

    Attributes:
        recipe: formats and scales.
        linear: its number in `losses`.
        losses: where its quantisation is counted.
    """

    recipe: Fp8Recipe
    linear: int
    losses: QuantisationLosses

    def __call__(
        self,
        input: Tensor,  # noqa: A002  (megatron-core's name)
        weight: Tensor,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **others: Any,
    ) -> Tensor:
        """The product with the weight.

        Args:
            input: [length, batch, inputs]; with `sequence_parallel` this rank's part of the length.
            weight: [outputs, inputs].
            allreduce_dgrad: whether the input's gradient is summed over the tensor-parallel ranks.
            sequence_parallel: whether inputs are gathered from them, and gradients summed and scattered to them.
            tp_group: their group, None where neither is asked for.
            **others: what this model does without: bias, fused or deferred gradients of the weight.

        Returns:
            [length, batch, outputs] in the dtype of the input.

        Raises:
            ValueError: there is a bias.
        """
        if others["bias"] is not None:
            raise ValueError("the FP8 linears have no bias")
        ranks = _Ranks(tp_group, sequence_parallel, allreduce_dgrad)
        out: Tensor = _ParallelFp8Linear.apply(input, weight, self, ranks)  # type: ignore[no-untyped-call]
        return out


@dataclass(frozen=True)
class _Ranks:
    """What the tensor-parallel ranks exchange."""

    group: Any
    sequence: bool
    sums_input_gradient: bool

    def gather(self, own: Tensor) -> Tensor:
        """The input of all ranks, in megatron-core's buffer that its other linears use too."""
        if not self.sequence:
            return own
        shape = (own.shape[0] * self.group.size(), *own.shape[1:])
        whole: Tensor = get_global_memory_buffer().get_tensor(shape, own.dtype, "mpu")
        dist.all_gather_into_tensor(whole, own.contiguous(), group=self.group)
        return whole

    def reduce(self, gradient: Tensor) -> Tensor:
        """The input's gradient, summed over the ranks."""
        if self.sequence:
            own = gradient.new_empty(gradient.shape[0] // self.group.size(), *gradient.shape[1:])
            dist.reduce_scatter_tensor(own, gradient, group=self.group)
            return own
        if self.sums_input_gradient:
            dist.all_reduce(gradient, group=self.group)
        return gradient


class _ParallelFp8Linear(torch.autograd.Function):
    """Keeps its inputs as they are: of a sequence that is shared this rank's part, which is gathered again.

    The weight is quantised again in the backward pass: that takes half a percent of the linear's time, and its
    quantised values would take as much memory as the weight itself. Both gradients are always computed: in pretraining
    every weight is trained, and every linear's input depends on weights before it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, how: Fp8Forward, ranks: _Ranks) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how, ctx.ranks = how, ranks
        return forward_product(ranks.gather(x), weight, how.recipe)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (gradient,), (x, weight), how = grads, ctx.saved_tensors, ctx.how
        whole = ctx.ranks.gather(x)
        if how.losses.counting:
            how.losses.add(how.linear, how.recipe, whole, weight, gradient)
        # First, so that the quantised input and the input's gradient are not there at once.
        dweight = weight_gradient(gradient, whole, how.recipe, weight.dtype)
        return ctx.ranks.reduce(data_gradient(gradient, weight, how.recipe)), dweight, None, None
