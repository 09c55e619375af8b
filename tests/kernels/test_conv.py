"""The causal convolution against `F.conv1d`, and its hand-written backward pass against numerical differentiation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nano_pretrain.kernels.conv import causal_conv_silu
from tests.kernels.compare import Inputs, assert_close, random_tensor, values_and_gradients
from tests.kernels.references import convolution_silu
from tests.kernels.scan_cases import documents


def convolution_inputs(length: int, width: int, *, bias: bool = True, reset: bool = True, seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    batch, channels = 2, 3
    return {
        "x": random_tensor(g, batch, length, channels),
        "weight": random_tensor(g, channels, width),
        "bias": random_tensor(g, channels) if bias else None,
        "seq_idx": documents(g, batch, length) if reset else None,
    }


@given(st.integers(1, 40), st.integers(1, 6), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_equals_the_convolution_of_each_document(length: int, width: int, bias: bool, reset: bool, seed: int) -> None:
    # Shorter than the filter, too.
    inputs = convolution_inputs(length, width, bias=bias, reset=reset, seed=seed)
    gradients = [random_tensor(torch.Generator().manual_seed(seed), 2, length, 3)]
    expected = values_and_gradients(convolution_silu, inputs, gradients)
    # Sums of at most 40 products in float64.
    assert_close(values_and_gradients(causal_conv_silu, inputs, gradients), expected, 1e-13)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("length", "width"), [(1, 4), (2, 4), (7, 4), (9, 2)])
def test_gradients_equal_numerical_ones(length: int, width: int, reset: bool) -> None:
    inputs = convolution_inputs(length, width, reset=reset)
    if reset:
        inputs["seq_idx"] = (torch.arange(length) // 3).expand(2, -1)
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    assert torch.autograd.gradcheck(lambda x, w, b: causal_conv_silu(x, w, b, inputs["seq_idx"]), leaves)


def test_bf16_is_computed_in_fp32_and_rounded_once() -> None:
    inputs = {name: None if t is None else t.bfloat16() for name, t in convolution_inputs(200, 4, reset=False).items()}
    gradients = [random_tensor(torch.Generator(), 2, 200, 3).bfloat16()]
    widened = {name: None if t is None else t.double() for name, t in inputs.items()}
    expected = values_and_gradients(convolution_silu, widened, gradients)
    actual = values_and_gradients(causal_conv_silu, inputs, gradients)
    assert {value.dtype for value in actual.values()} == {torch.bfloat16}
    # 2^-8 / sqrt(3) is the largest mean-square error of one rounding.
    assert_close(actual, expected, 2**-8 / 3**0.5)


def test_outputs_do_not_depend_on_later_tokens() -> None:
    inputs = convolution_inputs(30, 4)

    x = inputs["x"]
    changed = {**inputs, "x": torch.cat([x[:, :12], 1e6 * x[:, 12:]], 1)}
    assert torch.equal(causal_conv_silu(**inputs)[:, :12], causal_conv_silu(**changed)[:, :12])
