"""The causal convolution against `F.conv1d`, and its hand-written backward pass against numerical differentiation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nano_pretrain.kernels.conv import causal_conv_silu, native_conv_silu, native_conv_silu_backward
from nano_pretrain.kernels.native import library
from tests.kernels.compare import Inputs, assert_close, random_tensor, values_and_gradients
from tests.kernels.implementations import assert_rounded_once, kept_by_autograd, using
from tests.kernels.layouts import seen, widened
from tests.kernels.references import convolution_silu
from tests.kernels.scan_cases import documents

pytestmark = pytest.mark.usefixtures("implementation")


def convolution_inputs(
    length: int,
    width: int,
    *,
    batch: int = 2,
    channels: int = 3,
    bias: bool = True,
    reset: bool = True,
    seed: int = 0,
) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    return {
        "x": random_tensor(g, batch, length, channels),
        "weight": random_tensor(g, channels, width),
        "bias": random_tensor(g, channels) if bias else None,
        "seq_idx": documents(g, batch, length) if reset else None,
    }


def output_gradient(inputs: Inputs) -> Tensor:
    return random_tensor(torch.Generator().manual_seed(1), *inputs["x"].shape)


def converted(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: t.to(dtype) if t is not None and t.is_floating_point() else t for name, t in inputs.items()}


cases = st.builds(
    convolution_inputs,
    st.integers(1, 90),
    st.integers(1, 6),
    batch=st.integers(1, 3),
    channels=st.integers(1, 70) | st.just(515),
    bias=st.booleans(),
    reset=st.booleans(),
    seed=st.integers(0, 1000),
)
"""Lengths below the filter's and over several blocks of tokens, channels beyond one piece, odd numbers of both."""


@given(cases)
def test_equals_the_convolution_of_each_document(inputs: Inputs) -> None:
    gradients = [output_gradient(inputs)]
    expected = values_and_gradients(convolution_silu, inputs, gradients)
    # Sums of at most 3 * 90 products in float64, and their cancellation.
    assert_close(values_and_gradients(causal_conv_silu, inputs, gradients), expected, 1e-12)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("length", "width"), [(1, 4), (2, 4), (7, 4), (9, 2)])
def test_gradients_equal_numerical_ones(length: int, width: int, reset: bool) -> None:
    inputs = convolution_inputs(length, width, reset=reset)
    if reset:
        inputs["seq_idx"] = (torch.arange(length) // 3).expand(2, -1)
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    assert torch.autograd.gradcheck(lambda x, w, b: causal_conv_silu(x, w, b, inputs["seq_idx"]), leaves)


@pytest.mark.parametrize("width", [4, 7])
def test_fp32_is_as_exact_as_fp32(width: int) -> None:
    inputs = converted(convolution_inputs(200, width, channels=40), torch.float32)
    gradients = [output_gradient(inputs).float()]
    expected = values_and_gradients(convolution_silu, converted(inputs, torch.float64), gradients)
    # Some ten roundings of 2^-24 in each result.
    assert_close(values_and_gradients(causal_conv_silu, inputs, gradients), expected, 1e-6)


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32])
def test_bf16_is_computed_in_fp32_and_rounded_once(parameters: torch.dtype) -> None:
    inputs = converted(convolution_inputs(200, 4, channels=40), torch.bfloat16)
    gradients = [output_gradient(inputs).bfloat16()]
    expected = values_and_gradients(convolution_silu, converted(inputs, torch.float64), gradients)
    inputs |= {name: inputs[name].to(parameters) for name in ("weight", "bias")}
    actual = values_and_gradients(causal_conv_silu, inputs, gradients)
    assert {actual[name].dtype for name in ("dweight", "dbias")} == {parameters}
    assert_rounded_once({name: t.bfloat16() for name, t in actual.items()}, expected)


def test_channels_of_a_wider_tensor_are_used_where_they_are() -> None:
    inputs = convolution_inputs(50, 4, channels=20)
    gradient = output_gradient(inputs)
    expected = values_and_gradients(causal_conv_silu, inputs, [gradient])

    def of_wider(x: Tensor, **others: Any) -> Tensor:
        return causal_conv_silu(seen(x), **others)

    actual = values_and_gradients(of_wider, {**inputs, "x": widened(inputs["x"])}, [seen(widened(gradient))])
    assert actual["0"].transpose(0, 1).is_contiguous()
    # The plain sums over tokens follow the order of memory.
    assert_close({**actual, "dx": seen(actual["dx"])}, expected, 1e-14)


@pytest.mark.parametrize("gradient", [torch.ones(1).expand(2, 30, 3), torch.ones(2, 3, 30).transpose(1, 2)])
def test_gradients_of_any_layout_are_taken(gradient: Tensor) -> None:
    inputs = convolution_inputs(30, 4)
    inputs["x"] = inputs["x"].transpose(1, 2).contiguous().transpose(1, 2)
    expected = values_and_gradients(convolution_silu, inputs, [torch.ones(2, 30, 3)])
    assert_close(values_and_gradients(causal_conv_silu, inputs, [gradient]), expected, 1e-13)


def test_native_results_go_into_a_part_of_a_wider_tensor() -> None:
    inputs = convolution_inputs(50, 4)
    gradient = output_gradient(inputs)
    expected = values_and_gradients(convolution_silu, inputs, [gradient])
    out, dx = (widened(torch.zeros_like(gradient)) for _ in range(2))
    with using("native"):
        kernels = library.active(out)
        assert kernels is not None
        native_conv_silu(kernels, **inputs, out=seen(out))
        native_conv_silu_backward(kernels, **inputs, grad=gradient, dx=seen(dx))
        with pytest.raises(
            ValueError, match=r"cannot write torch.float64 \(2, 50, 3\) into torch.float64 \(2, 50, 8\)"
        ):
            native_conv_silu(kernels, **inputs, out=out.transpose(0, 1))
        with pytest.raises(ValueError, match="cannot write"):
            native_conv_silu(kernels, **inputs, out=torch.empty(2, 3, 50, dtype=torch.float64).transpose(1, 2))
    assert_close({"0": seen(out), "dx": seen(dx)}, {name: expected[name] for name in ("0", "dx")}, 1e-13)
    for t in (out, dx):
        seen(t).zero_()
        assert torch.equal(t, widened(torch.zeros_like(gradient)))


def test_outputs_do_not_depend_on_later_tokens() -> None:
    inputs = convolution_inputs(30, 4)

    x = inputs["x"]
    changed = {**inputs, "x": torch.cat([x[:, :12], 1e6 * x[:, 12:]], 1)}
    assert torch.equal(causal_conv_silu(**inputs)[:, :12], causal_conv_silu(**changed)[:, :12])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [2, 4, 6])
def test_what_is_not_finite_shows_where_the_filter_reaches(
    implementation: str, dtype: torch.dtype, value: float, width: int
) -> None:
    inputs = converted(convolution_inputs(60, width, channels=40, reset=False), dtype)
    end = 30 + width
    if implementation == "native":  # the plain one multiplies by 0 across the border
        inputs["seq_idx"], end = (torch.arange(60) >= 33).expand(2, -1), min(end, 33)
    inputs["x"][1, 30, 7] = value
    found = values_and_gradients(causal_conv_silu, inputs, [output_gradient(inputs)])
    seen_at = torch.zeros(2, 60, 40, dtype=torch.bool)
    seen_at[1, 30:end, 7] = True
    # SiLU of minus infinity is 0 in the limit; -inf / (1 + inf), as PyTorch has it, is NaN.
    assert torch.equal(~found["0"].isfinite(), seen_at)
    assert torch.equal((~found["dweight"].isfinite()).any(1), seen_at.any(0).any(0))


def test_only_the_gradients_asked_for_are_given() -> None:
    inputs = convolution_inputs(30, 4)
    x, weight, bias = inputs["x"].requires_grad_(), inputs["weight"], inputs["bias"].requires_grad_()
    causal_conv_silu(x, weight, bias).sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        assert not causal_conv_silu(x, weight, bias).requires_grad


def test_only_the_inputs_are_kept() -> None:
    inputs = convolution_inputs(30, 4)
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    given = [*leaves, inputs["seq_idx"]]
    assert kept_by_autograd(lambda: causal_conv_silu(*given)) == {t.untyped_storage().data_ptr() for t in given}


def test_a_second_derivative_is_refused() -> None:
    inputs = convolution_inputs(30, 4)
    x, gradient = inputs["x"].requires_grad_(), output_gradient(inputs).requires_grad_()
    (dx,) = torch.autograd.grad(causal_conv_silu(x, inputs["weight"], None), x, gradient, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("wrong", ["weight", "bias", "seq_idx"])
def test_a_shape_that_does_not_fit_is_refused(wrong: str) -> None:
    inputs = convolution_inputs(30, 4)
    with pytest.raises(RuntimeError, match="size"):
        causal_conv_silu(**{**inputs, wrong: inputs[wrong][:, :-1] if wrong == "seq_idx" else inputs[wrong][:-1]})


def test_a_filter_without_taps_is_refused() -> None:
    inputs = convolution_inputs(30, 0)
    with pytest.raises(ValueError, match="filter of width 0"):
        causal_conv_silu(**inputs)


def test_no_tokens_have_no_gradients() -> None:
    inputs = convolution_inputs(0, 4)
    found = values_and_gradients(causal_conv_silu, inputs, [output_gradient(inputs)])
    assert found["0"].shape == found["dx"].shape == (2, 0, 3)
    assert not found["dweight"].any()
