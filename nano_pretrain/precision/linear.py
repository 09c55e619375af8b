"""The three products of a linear, with quantised operands.

Each product's operands are quantised along the axis that it contracts, from high precision: no operand is quantised
twice. The products are those of CPU torch, which sum in FP32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
    operands = recipe.operand_dtype(dtype)
    left = recipe.gradient_by_tokens.operand(gradient.flatten(0, -2), operands)
    right = recipe.input_by_tokens.operand(x.flatten(0, -2), operands)
    return _product(left.transposed(), right, dtype)


def _product(left: Operand, right: Operand, dtype: torch.dtype) -> Tensor:
    # The factor is applied to the FP32 sums, before they are rounded.
    nothing = left.values.new_empty(right.values.shape[1:])
    return torch.addmm(nothing, left.values, right.values, beta=0, alpha=left.factor * right.factor).to(dtype)
