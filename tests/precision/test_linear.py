"""FP8 products against a float64 emulation of the same quantised operands, and the linear made of them on one rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nano_pretrain.precision import linear
from nano_pretrain.precision.linear import BLOCKWISE, CURRENT_SCALING, Fp8Recipe
from nano_pretrain.precision.losses import QuantisationLosses
from nano_pretrain.precision.parallel import Fp8Forward
from nano_pretrain.precision.quantize import E4M3, E5M2, Quantizer, Tile
from tests.kernels.implementations import kept_by_autograd

pytestmark = pytest.mark.usefixtures("implementation")

RECIPES = {
    "blockwise": BLOCKWISE,
    "blockwise, E5M2 gradients": replace(BLOCKWISE, gradient_format=E5M2),
    "blockwise, FP32 scales": replace(BLOCKWISE, power_of_two=False),
    "current scaling": CURRENT_SCALING,
}
DTYPES = [torch.float32, torch.bfloat16]
UNIT = 2.0**-24
"""The largest relative error of an FP32 operation."""


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    """Rows and columns of unlike size, so that it matters which of them share a scale."""
    g = torch.Generator().manual_seed(seed)
    normal, down, across = (torch.randn(shape, generator=g) for shape in ((rows, columns), (rows, 1), (1, columns)))
    return normal * torch.exp2(3 * down + 3 * across)


def emulated(x: Tensor, tile: Tile, fmt: torch.dtype, recipe: Fp8Recipe) -> Tensor:
    """The quantised matrix in float64: codes times inverse scales."""
    quantizer = Quantizer(Tile.TENSOR if recipe.per_tensor else tile, fmt, recipe.power_of_two)
    found, (height, width) = quantizer.quantize(x), quantizer.tile.shape(x)
    inverse = found.inverse_scales.double().repeat_interleave(height, 0).repeat_interleave(width, 1)
    return found.codes.double() * inverse[: x.shape[0], : x.shape[1]]


def assert_product(found: Tensor, left: Tensor, right: Tensor) -> None:
    """That it is `left right` up to the roundings of FP32 and of the result's dtype.

    A sum of k products in FP32, in any order and with or without fused operations, errs by at most g(k) |left| |right|
    with g(n) = n u / (1 - n u), u = 2^-24 (Higham 2002, section 3.1): each product passes through at most k roundings.
    Operands whose scales are no powers of two are rounded once each, and per tensor there are the product of the
    factors and that with the sum: two roundings more in either case.
    A BF16 result is rounded once: half a unit in 8 bits, 2^-8.
    """
    exact, size, roundings = left @ right, left.abs() @ right.abs(), left.shape[1] + 2
    bound = roundings * UNIT / (1 - roundings * UNIT) * size
    if found.dtype == torch.bfloat16:
        bound = bound + 2**-8 * (exact.abs() + bound)
    error = (found.double() - exact).abs()
    assert (error <= bound).all(), f"an error is {(error / bound).nan_to_num(0).max():.1f} times the bound"


def check_products(name: str, dtype: torch.dtype, tokens: int, inputs: int, outputs: int) -> None:
    recipe = RECIPES[name]
    x, gradient = matrix(tokens, inputs, 0).to(dtype), matrix(tokens, outputs, 1).to(dtype)
    weight, gradients = matrix(outputs, inputs, 2).to(dtype), recipe.gradient_format
    blocks = emulated(weight, Tile.BLOCK, E4M3, recipe)

    forward = linear.forward_product(x, weight, recipe)
    assert forward.dtype == dtype
    assert_product(forward, emulated(x, Tile.ROW, E4M3, recipe), blocks.T)

    dx = linear.data_gradient(gradient, weight, recipe)
    assert dx.dtype == dtype
    assert_product(dx, emulated(gradient, Tile.ROW, gradients, recipe), blocks)

    of_tokens = emulated(gradient, Tile.COLUMN, gradients, recipe).T, emulated(x, Tile.COLUMN, E4M3, recipe)
    for of_result in DTYPES:
        dweight = linear.weight_gradient(gradient, x, recipe, of_result)
        assert dweight.dtype == of_result
        assert_product(dweight, *of_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_products_over_several_tiles(recipe: str, dtype: torch.dtype) -> None:
    check_products(recipe, dtype, tokens=260, inputs=300, outputs=200)


@given(st.sampled_from(list(RECIPES)), st.sampled_from(DTYPES), *[st.integers(1, 150)] * 3)
def test_products_of_any_shape(recipe: str, dtype: torch.dtype, tokens: int, inputs: int, outputs: int) -> None:
    check_products(recipe, dtype, tokens, inputs, outputs)


def operands(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, torch.nn.Parameter, Tensor]:
    """x [length, batch, inputs], weight and the output's gradient."""
    x, gradient = matrix(3 * 70, 40, 0).view(70, 3, 40), matrix(3 * 70, 24, 1).view(70, 3, 24)
    return x.to(dtype).requires_grad_(), torch.nn.Parameter(matrix(24, 40, 2).to(dtype)), gradient.to(dtype)


def fp8_linear(x: Tensor, weight: Tensor, recipe: Fp8Recipe = BLOCKWISE, bias: Tensor | None = None) -> Tensor:
    """As megatron-core's linear of one rank calls it."""
    forward = Fp8Forward(recipe, 0, QuantisationLosses(["linear"]))
    return forward(x, weight, bias=bias, allreduce_dgrad=False, sequence_parallel=False, tp_group=None)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_autograd_gets_the_three_products(recipe: Fp8Recipe) -> None:
    x, weight, gradient = operands()
    out = fp8_linear(x, weight, recipe)
    out.backward(gradient)
    assert x.grad is not None
    assert weight.grad is not None
    assert torch.equal(out, linear.forward_product(x.detach(), weight.detach(), recipe))
    assert torch.equal(x.grad, linear.data_gradient(gradient, weight.detach(), recipe))
    assert torch.equal(weight.grad, linear.weight_gradient(gradient, x.detach(), recipe, torch.bfloat16))


def test_an_input_without_a_gradient() -> None:
    x, weight, gradient = operands()
    fp8_linear(x.detach(), weight).backward(gradient)
    assert x.grad is None
    assert weight.grad is not None
    assert torch.equal(weight.grad, linear.weight_gradient(gradient, x.detach(), BLOCKWISE, torch.bfloat16))


def test_a_frozen_weight() -> None:
    x, weight, gradient = operands()
    fp8_linear(x, weight.requires_grad_(False)).backward(gradient)
    assert weight.grad is None
    assert x.grad is not None
    assert torch.equal(x.grad, linear.data_gradient(gradient, weight, BLOCKWISE))


def test_only_the_inputs_are_kept() -> None:
    x, weight, _ = operands()
    kept = kept_by_autograd(lambda: fp8_linear(x, weight))
    assert kept == {x.untyped_storage().data_ptr(), weight.untyped_storage().data_ptr()}


def test_one_gradient_for_all_outputs() -> None:
    x, weight, _ = operands(torch.float32)
    fp8_linear(x, weight).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, linear.data_gradient(torch.ones(70, 3, 24), weight.detach(), BLOCKWISE))


def test_a_bias_is_refused() -> None:
    x, weight, _ = operands()
    with pytest.raises(ValueError, match="no bias"):
        fp8_linear(x, weight, bias=torch.zeros(24))


def test_formats_are_transformer_engines() -> None:
    of = {role: getattr(CURRENT_SCALING, role).format for role in ("input", "weight", "gradient")}
    assert of == {"input": E4M3, "weight": E4M3, "gradient": E5M2}
    assert {BLOCKWISE.input.format, BLOCKWISE.weight.format, BLOCKWISE.gradient_by_tokens.format} == {E4M3}
