"""Memory grows linearly with the sequence, documents included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nano_pretrain.kernels.attention import CausalAttention
from nano_pretrain.kernels.conv import causal_conv_silu
from nano_pretrain.kernels.ssd import chunk_scan
from tests.kernels.allocations import largest_tensor

pytestmark = pytest.mark.usefixtures("implementation")

SHORT, LONG = 512, 2048
HEADS, CHANNELS = 2, 4


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def documents(length: int, reset: bool) -> Tensor | None:
    """Two documents, so that a mask over the longer would still be quadratic."""
    return (torch.arange(length) >= length // 4).int()[None] if reset else None


def attention(length: int, reset: bool, dtype: torch.dtype) -> None:
    q, k, v = (leaf(length, 1, heads, CHANNELS, dtype=dtype) for heads in (HEADS, 1, 1))
    CausalAttention(config=None, layer_number=1)(q, k, v, documents(length, reset)).sum().backward()


def scan(length: int, reset: bool, dtype: torch.dtype) -> None:
    x = leaf(1, length, HEADS, CHANNELS, dtype=dtype)
    b, c = (leaf(1, length, 1, CHANNELS, dtype=dtype) for _ in range(2))
    dt = torch.rand(1, length, HEADS, requires_grad=True)
    y, _ = chunk_scan(x, dt, -torch.rand(HEADS), b, c, None, None, documents(length, reset))
    y.sum().backward()


def convolution(length: int, reset: bool, dtype: torch.dtype) -> None:
    x, weight = leaf(1, length, CHANNELS, dtype=dtype), leaf(CHANNELS, 4, dtype=dtype)
    causal_conv_silu(x, weight, None, documents(length, reset)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("kernel", [attention, scan, convolution])
def test_no_tensor_grows_faster_than_the_sequence(kernel: object, reset: bool, dtype: torch.dtype) -> None:
    assert callable(kernel)
    short, long = (largest_tensor(lambda n=n: kernel(n, reset, dtype)) for n in (SHORT, LONG))  # type: ignore[misc]
    assert long <= LONG / SHORT * short


def test_a_mask_would_be_seen() -> None:
    def masked(length: int) -> None:
        q, k, v = (leaf(1, HEADS, length, CHANNELS) for _ in range(3))
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()

    assert largest_tensor(lambda: masked(LONG)) >= LONG * LONG
