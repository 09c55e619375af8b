"""The native kernels' bits do not depend on the number of threads."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from nano_pretrain.kernels.activation import silu_gate, squared_relu
from nano_pretrain.kernels.conv import causal_conv_silu
from nano_pretrain.kernels.norm import gated_rms_norm
from tests.kernels.compare import Inputs, Kernel, random_tensor, values_and_gradients
from tests.kernels.implementations import assert_bits_do_not_depend_on_threads
from tests.kernels.scan_cases import documents

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 150), st.sampled_from([1, 5, 32, 70, 515])) | st.just(
    (2, 999, 320)
)
"""Batch, length and channels: up to 14 blocks of tokens, one or two pieces of channels; and work for some 100 us, so
that threads run at the same time."""
DTYPES = st.sampled_from([torch.bfloat16, torch.float32, torch.float64])


def inputs_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, **shapes: tuple[int, ...]) -> tuple[Inputs, Any]:
    g = torch.Generator().manual_seed(0)
    inputs: Inputs = {name: random_tensor(g, *of_input).to(dtype) for name, of_input in shapes.items()}
    return inputs, [random_tensor(g, *shape).to(dtype)]


def check(kernel: Kernel, inputs: Inputs, gradients: Any) -> None:
    assert_bits_do_not_depend_on_threads(lambda: values_and_gradients(kernel, inputs, gradients))


@given(SHAPES, DTYPES, st.integers(1, 5))
def test_convolution(shape: tuple[int, int, int], dtype: torch.dtype, width: int) -> None:
    channels = shape[2:]
    inputs, gradients = inputs_and_gradient(shape, dtype, x=shape, weight=(*channels, width), bias=channels)
    inputs["seq_idx"] = documents(torch.Generator().manual_seed(1), *shape[:2])
    check(causal_conv_silu, inputs, gradients)


@given(SHAPES, DTYPES)
def test_norm(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    channels = shape[2]
    inputs, gradients = inputs_and_gradient(shape, dtype, x=shape, z=shape, weight=(channels,))
    group_size = channels // 5 if channels % 5 == 0 else channels
    check(lambda **t: gated_rms_norm(**t, eps=1e-5, group_size=group_size), inputs, gradients)


@given(SHAPES, DTYPES)
def test_gate(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(silu_gate, *inputs_and_gradient(shape, dtype, y=shape, z=shape))


@given(SHAPES, DTYPES)
def test_squared_relu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(squared_relu, *inputs_and_gradient(shape, dtype, x=shape))
