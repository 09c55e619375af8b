"""A linear whose three products have quantised operands.

Each product's operands are quantised along the axis that it contracts, from high precision: no operand is quantised
twice. The products are those of CPU torch, which sum in FP32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_pretrain.precision.quantize import E4M3, E5M2, Operand, Quantizer, Tile


@dataclass(frozen=True)
class Fp8Recipe:
    """Formats and scales of a linear's operands.

    Args:
        gradient_format: of gradients of outputs, E4M3 or E5M2; inputs and weights are E4M3.
        per_tensor: one scale a tensor, instead of tiles of 128 x 128 of weights and of 128 x 1 of the others.
        power_of_two: whether scales are rounded down to a power of two.
    """

    gradient_format: torch.dtype
    per_tensor: bool
    power_of_two: bool

    @property
    def weight(self) -> Quantizer:
        """Of the weight [outputs, inputs], in the products that contract either axis."""
        return self._quantizer(Tile.BLOCK, E4M3)

    @property
    def input(self) -> Quantizer:
        """Of the input [tokens, inputs] in the forward product."""
        return self._quantizer(Tile.ROW, E4M3)

    @property
    def gradient(self) -> Quantizer:
        """Of the output's gradient [tokens, outputs] in the product that gives the input's."""
        return self._quantizer(Tile.ROW, self.gradient_format)

    @property
    def input_by_tokens(self) -> Quantizer:
        """Of the input in the product that gives the weight's gradient."""
        return self._quantizer(Tile.COLUMN, E4M3)

    @property
    def gradient_by_tokens(self) -> Quantizer:
        """Of the output's gradient in the product that gives the weight's."""
        return self._quantizer(Tile.COLUMN, self.gradient_format)

    def operand_dtype(self, result: torch.dtype) -> torch.dtype:
        """Of the values that are multiplied for a result of this dtype.

        The product of BF16 matrices is BF16 in CPU torch: what is to be FP32 needs FP32 factors. So do tiles whose
        scales are no powers of two, since BF16 does not hold their values.
        """
        return result if self.per_tensor or self.power_of_two else torch.float32

    def _quantizer(self, tile: Tile, format_: torch.dtype) -> Quantizer:
        return Quantizer(Tile.TENSOR if self.per_tensor else tile, format_, self.power_of_two)


BLOCKWISE = Fp8Recipe(gradient_format=E4M3, per_tensor=False, power_of_two=True)
"""Transformer Engine's `Float8BlockScaling` with E4M3 throughout: the recipe of Nemotron Nano 2."""

CURRENT_SCALING = Fp8Recipe(gradient_format=E5M2, per_tensor=True, power_of_two=False)
"""Transformer Engine's `Float8CurrentScaling` with its hybrid formats: the recipe of Nemotron-H."""


def fp8_linear(x: Tensor, weight: Tensor, recipe: Fp8Recipe, into_main_grad: bool = False) -> Tensor:
    """`x weight^T` of quantised operands, as are the products of the backward pass.

    Kept for it are x and the weight as they are. The weight is quantised again there: that takes half a percent of the
    linear's time, and its quantised values would take as much memory as the weight itself.

    Args:
        x: [..., inputs] in FP32 or BF16.
        weight: [outputs, inputs] in FP32 or BF16.
        recipe: formats and scales.
        into_main_grad: the weight's gradient is added in FP32 to `weight.main_grad`, and `grad_added_to_main_grad` is
            set, by which megatron-core's gradient hooks know it; autograd gets zeros.

    Returns:
        [..., outputs] in the dtype of x.
    """
    out: Tensor = _Fp8Linear.apply(x, weight, recipe, into_main_grad)  # type: ignore[no-untyped-call]
    return out


def forward_product(x: Tensor, weight: Tensor, recipe: Fp8Recipe) -> Tensor:
    """`x weight^T`: [..., inputs] and [outputs, inputs] to [..., outputs] in the dtype of x."""
    dtype = recipe.operand_dtype(x.dtype)
    left, right = recipe.input.operand(x.flatten(0, -2), dtype), recipe.weight.operand(weight, dtype)
    return _product(left, right.transposed(), x.dtype).view(*x.shape[:-1], -1)


def data_gradient(gradient: Tensor, weight: Tensor, recipe: Fp8Recipe) -> Tensor:
    """`gradient weight`: [..., outputs] and [outputs, inputs] to [..., inputs] in the dtype of the gradient."""
    dtype = recipe.operand_dtype(gradient.dtype)
    left, right = recipe.gradient.operand(gradient.flatten(0, -2), dtype), recipe.weight.operand(weight, dtype)
    return _product(left, right, gradient.dtype).view(*gradient.shape[:-1], -1)


def weight_gradient(gradient: Tensor, x: Tensor, recipe: Fp8Recipe, dtype: torch.dtype) -> Tensor:
    """`gradient^T x`: [..., outputs] and [..., inputs] to [outputs, inputs] in `dtype`."""
    left, right = _weight_gradient_operands(gradient, x, recipe, dtype)
    return _product(left, right, dtype)


def add_weight_gradient(gradient: Tensor, x: Tensor, recipe: Fp8Recipe, total: Tensor) -> None:
    """Add `weight_gradient` to `total` [outputs, inputs] in FP32."""
    left, right = _weight_gradient_operands(gradient, x, recipe, torch.float32)
    total.addmm_(left.values, right.values, alpha=left.factor * right.factor)


def _weight_gradient_operands(
    gradient: Tensor, x: Tensor, recipe: Fp8Recipe, dtype: torch.dtype
) -> tuple[Operand, Operand]:
    operands = recipe.operand_dtype(dtype)
    left = recipe.gradient_by_tokens.operand(gradient.flatten(0, -2), operands)
    return left.transposed(), recipe.input_by_tokens.operand(x.flatten(0, -2), operands)


def _product(left: Operand, right: Operand, dtype: torch.dtype) -> Tensor:
    # The factor is applied to the FP32 sums, before they are rounded.
    nothing = left.values.new_empty(right.values.shape[1:])
    return torch.addmm(nothing, left.values, right.values, beta=0, alpha=left.factor * right.factor).to(dtype)


class _Fp8Linear(torch.autograd.Function):
    """Keeps its inputs as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Fp8Recipe, into_main_grad: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe, ctx.into_main_grad = recipe, into_main_grad
        return forward_product(x, weight, recipe)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        dx = data_gradient(grads[0], weight, ctx.recipe) if ctx.needs_input_grad[0] else None
        return dx, _weight_gradient(ctx, grads[0], x, weight), None, None


def _weight_gradient(ctx: Any, gradient: Tensor, x: Tensor, weight: Any) -> Tensor | None:
    if not ctx.needs_input_grad[1]:
        return None
    if not ctx.into_main_grad:
        return weight_gradient(gradient, x, ctx.recipe, weight.dtype)
    add_weight_gradient(gradient, x, ctx.recipe, weight.main_grad)
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight)
