"""Squared ReLU and the SiLU gate against their formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nano_pretrain.kernels.activation import silu_gate, squared_relu
from tests.kernels.compare import Inputs, assert_close, random_tensor, values_and_gradients
from tests.kernels.implementations import assert_rounded_once, kept_by_autograd
from tests.kernels.layouts import seen, widened

pytestmark = pytest.mark.usefixtures("implementation")

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 90), st.integers(1, 70))
"""Of activations, down to one number and over several blocks of tokens."""


def gate_formula(y: Tensor, z: Tensor) -> Tensor:
    return y * z * torch.sigmoid(z)


def squared_relu_formula(x: Tensor) -> Tensor:
    return torch.where(x > 0, x * x, 0)


def gate_inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Inputs:
    g = torch.Generator().manual_seed(0)
    return {name: random_tensor(g, *shape).to(dtype) for name in ("y", "z")}


def output_gradient(*shape: int) -> Tensor:
    return random_tensor(torch.Generator().manual_seed(1), *shape)


def doubled(inputs: Inputs) -> Inputs:
    return {name: t.double() for name, t in inputs.items()}


@given(SHAPES)
def test_the_gate_equals_its_formula(shape: tuple[int, ...]) -> None:
    gradients = [output_gradient(*shape)]
    expected = values_and_gradients(gate_formula, gate_inputs(*shape), gradients)
    # A handful of roundings in float64; dz is a difference of two terms near z = -1.28.
    assert_close(values_and_gradients(silu_gate, gate_inputs(*shape), gradients), expected, 1e-13)


def test_the_gate_in_fp32_is_as_exact_as_fp32() -> None:
    inputs, gradients = gate_inputs(2, 90, 70, dtype=torch.float32), [output_gradient(2, 90, 70).float()]
    expected = values_and_gradients(gate_formula, doubled(inputs), gradients)
    # Some five roundings of 2^-24 in each result.
    assert_close(values_and_gradients(silu_gate, inputs, gradients), expected, 5e-7)


def test_the_gate_in_bf16_is_rounded_once_or_as_often_as_it_has_steps(implementation: str) -> None:
    inputs, gradients = gate_inputs(2, 90, 70, dtype=torch.bfloat16), [output_gradient(2, 90, 70).bfloat16()]
    expected = values_and_gradients(gate_formula, doubled(inputs), gradients)
    actual = values_and_gradients(silu_gate, inputs, gradients)
    if implementation == "native":
        assert_rounded_once(actual, expected)
    # The plain one rounds up to three times in bf16, each with a mean-square error of at most 2^-8 / sqrt(3).
    assert_close(actual, expected, 3 * 2**-8 / 3**0.5)


def test_the_gate_takes_channels_of_wider_tensors_where_they_are() -> None:
    inputs, gradient = gate_inputs(2, 90, 20), output_gradient(2, 90, 20)
    expected = values_and_gradients(silu_gate, inputs, [gradient])

    def of_wider(y: Tensor, z: Tensor) -> Tensor:
        return silu_gate(seen(y), seen(z))

    actual = values_and_gradients(of_wider, {name: widened(t) for name, t in inputs.items()}, [seen(widened(gradient))])
    assert actual["0"].transpose(0, 1).is_contiguous()
    # PyTorch's exponential for the last few of a row is another than for whole vectors.
    assert_close({name: t if name == "0" else seen(t) for name, t in actual.items()}, expected, 1e-15)


@pytest.mark.parametrize("channels", [1, 6])
def test_the_gate_takes_any_layout(channels: int) -> None:
    inputs, shape = gate_inputs(2, 9, channels), (2, 9, channels)
    expected = values_and_gradients(gate_formula, inputs, [torch.ones(shape)])
    turned = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in inputs.items()}
    # One gradient for all, as of a sum.
    assert_close(values_and_gradients(silu_gate, turned, [torch.ones(1).expand(shape)]), expected, 1e-14)


def test_a_gate_of_another_dtype_is_taken() -> None:
    inputs = gate_inputs(2, 9, 6, dtype=torch.float32)
    found = silu_gate(inputs["y"].double(), inputs["z"])
    assert_close({"0": found}, {"0": gate_formula(**doubled(inputs))}, 1e-6)  # SiLU of an fp32 gate is fp32


def test_a_gate_of_another_shape_is_refused() -> None:
    inputs = gate_inputs(2, 9, 6)
    with pytest.raises(RuntimeError, match="size"):
        silu_gate(inputs["y"], inputs["z"][:, :-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@given(shape=SHAPES)
def test_squared_relu_is_its_formula_rounded(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, gradient = gate_inputs(*shape, dtype=dtype)["y"], output_gradient(*shape).to(dtype)
    expected = values_and_gradients(squared_relu_formula, {"x": x.double()}, [gradient])
    actual = values_and_gradients(squared_relu, {"x": x}, [gradient])
    # The products are exact in the wider type, so both round the same number.
    assert torch.equal(actual["0"], expected["0"].to(dtype))
    assert torch.equal(actual["dx"], expected["dx"].to(dtype))


def test_squared_relu_takes_any_layout() -> None:
    x = gate_inputs(2, 9, 6)["y"]
    expected = values_and_gradients(squared_relu_formula, {"x": x}, [torch.ones(2, 9, 6)])
    turned = x.transpose(0, 2).contiguous().transpose(0, 2)
    for layout, gradient in ((turned, torch.ones(1).expand(2, 9, 6)), (x, torch.ones(6, 9, 2).transpose(0, 2))):
        found = values_and_gradients(squared_relu, {"x": layout}, [gradient])
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0, 2.0], dtype=dtype).repeat(20)
    expected = torch.tensor([torch.nan, torch.inf, 0.0, 0.0, 4.0], dtype=dtype).repeat(20)
    assert torch.equal(squared_relu(x).nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    one = torch.ones_like(x)[None, None]
    gate = silu_gate(one, x[None, None])[0, 0]
    # SiLU of minus infinity is 0 in the limit; -inf / (1 + inf), as PyTorch has it, is NaN.
    assert torch.equal(gate.isnan(), torch.tensor([True, False, True, False, False]).repeat(20))
    assert gate[1] == torch.inf
    assert silu_gate(x[None, None], one)[0, 0].isfinite().sum() == 40


def test_the_gate_is_exact_from_closed_to_open() -> None:
    z = torch.linspace(-80, 80, 40_001)[None, None]
    gate, expected = silu_gate(torch.ones_like(z), z), gate_formula(torch.ones(1), z.double())
    # Five roundings of 2^-24: exponential (2 of them), sum, quotient, product; those of expected are float64's.
    assert ((gate - expected).abs() <= 5 * 2**-24 * expected.abs()).all()


def test_far_from_zero_the_gate_is_open_or_closed() -> None:
    z = torch.tensor([-1e4, -200.0, -100.0, 100.0, 200.0, 1e4]).repeat(8)[None, None].requires_grad_()
    gate = silu_gate(torch.ones(1, 1, 48), z)
    gate.sum().backward()
    assert z.grad is not None
    # Beyond 88 the exponential leaves fp32.
    torch.testing.assert_close(gate, z.clamp(min=0), rtol=0, atol=1e-37)
    torch.testing.assert_close(z.grad, (z > 0).float(), rtol=0, atol=1e-37)


def test_only_the_gradients_asked_for_are_given() -> None:
    y, z = gate_inputs(2, 9, 6).values()
    silu_gate(y, z.requires_grad_()).sum().backward()
    assert y.grad is None
    assert z.grad is not None
    with torch.no_grad():
        assert not silu_gate(y, z).requires_grad
        assert not squared_relu(z).requires_grad


def test_the_native_ones_keep_only_their_inputs(implementation: str) -> None:
    leaves = [t.requires_grad_() for t in gate_inputs(2, 9, 6).values()]
    addresses = {t.untyped_storage().data_ptr() for t in leaves}
    kept = kept_by_autograd(lambda: (silu_gate(*leaves), squared_relu(leaves[0])))
    assert (kept == addresses) == (implementation == "native")
