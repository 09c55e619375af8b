"""FP32 matrix products stay FP32, whichever library computes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nano_pretrain.platform import products


@pytest.fixture
def setting() -> Iterator[Any]:
    """torch's setting, which is put back."""
    mkldnn: Any = torch.backends.mkldnn
    before = mkldnn.matmul.fp32_precision
    yield mkldnn.matmul
    mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("inner", [1, 33, 256, 1552])
@pytest.mark.parametrize("columns", [1, 16, 100, 512])
def test_products_are_fp32_in_all_layouts_of_a_linear(setting: Any, rows: int, inner: int, columns: int) -> None:
    products.use_onednn_for_fp32()
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, inner, generator=generator) for n in (rows, columns))
    grad = torch.randn(rows, columns, generator=generator)
    for left, right in ((x, weight.T), (grad, weight), (grad.T, x)):
        exact = left.double() @ right.double()
        error = (left @ right - exact).norm() / exact.norm()
        # Rounding of fp32 in sums of up to 1,552 terms; BF16 factors would give 2e-3.
        assert error < 2e-6


def test_amx_is_left_alone(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.fp32_precision = "none"
    monkeypatch.setattr(products, "_amd_with_avx512", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not products.use_onednn_for_fp32()
    assert setting.fp32_precision == "none"


def test_a_product_that_rounds_its_factors_is_seen_and_undone(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.fp32_precision = "none"
    multiply = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: multiply(a.bfloat16().float(), b))
    monkeypatch.setattr(products, "_amd_with_avx512", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not products.use_onednn_for_fp32()
    assert setting.fp32_precision == "none"
