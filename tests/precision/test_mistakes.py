"""The comparisons of this directory see mistakes: each breaks the quantiser in one place, and a comparison fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nano_pretrain.precision import quantize
from nano_pretrain.precision.linear import Fp8Recipe
from nano_pretrain.precision.quantize import Quantizer
from tests.kernels.broken_sources import broken_kernels
from tests.kernels.implementations import using
from tests.precision.test_linear import check_products
from tests.precision.test_vectors import assert_equals_recorded
from tests.precision.vectors import read_vectors


def compare_vectors() -> None:
    for vector in read_vectors():
        assert_equals_recorded(vector)


def compare_products() -> None:
    check_products("blockwise", torch.bfloat16, tokens=260, inputs=300, outputs=200)


right_scale, right_plain = quantize._scale, quantize._plain


def nearest_power_of_two(tiles: Tensor, quantizer: Quantizer, dtype: torch.dtype) -> Tensor:
    scale = right_scale(tiles, Quantizer(quantizer.tile, quantizer.format, power_of_two=False), dtype)
    return scale.log2().round().exp2() if quantizer.power_of_two else scale


def multiplied_by_the_reciprocal(tiles: Tensor, quantizer: Quantizer, dtype: torch.dtype) -> Tensor:
    magnitude = tiles.abs().amax((1, 3), keepdim=True)
    wrong = torch.finfo(quantizer.format).max / magnitude
    right = right_scale(tiles, quantizer, dtype)
    return right if quantizer.power_of_two else torch.where(wrong.isfinite(), wrong, right)


def not_undone(x: Tensor, quantizer: Quantizer, dtype: torch.dtype, scale_back: bool) -> tuple[Tensor, Tensor]:
    return right_plain(x, quantizer, dtype, scale_back=False)


MISTAKES: dict[str, tuple[Callable[[], None], object, str, object]] = {
    "tiles along the other axis": (compare_products, Fp8Recipe, "input", Fp8Recipe.input_by_tokens),
    "tiles along the other axis, by tokens": (compare_products, Fp8Recipe, "gradient_by_tokens", Fp8Recipe.gradient),
    "nearest power of two": (compare_vectors, quantize, "_scale", nearest_power_of_two),
    "reciprocal instead of division": (compare_vectors, quantize, "_scale", multiplied_by_the_reciprocal),
    "scale not undone": (compare_products, quantize, "_plain", not_undone),
}
NATIVE_MISTAKES = {
    "blocks by tokens": (compare_vectors, "if (tile != COLUMN) return", "if (tile != TENSOR) return"),
    "nearest power of two": (
        compare_vectors,
        "float_of(bits_of(scale) & kept_bits)",
        "float_of((bits_of(scale) + (~kept_bits + 1) / 2) & kept_bits)",
    ),
    "scale not undone": (compare_products, "scale_back ? rounded", "false ? rounded"),
    "ties away from zero": (compare_vectors, "(magnitude + shift) - shift", "(magnitude * 1.0000001f + shift) - shift"),
}


@pytest.mark.parametrize("kernels", ["plain", "native"])
@pytest.mark.parametrize("compare", [compare_vectors, compare_products])
def test_as_they_are_they_agree(compare: Callable[[], None], kernels: str) -> None:
    with using(kernels):
        compare()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compare, where, name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(where, name, wrong)
    with using("plain"), pytest.raises(AssertionError, match=r"times the bound|codes of|scales of"):
        compare()


@pytest.mark.full
@pytest.mark.parametrize("mistake", NATIVE_MISTAKES)
def test_a_mistake_in_the_native_kernels_is_seen(mistake: str, tmp_path: Path) -> None:
    compare, right, wrong = NATIVE_MISTAKES[mistake]
    with (
        broken_kernels("quantize.cpp", right, wrong, directory=tmp_path, only="quantize"),
        pytest.raises(AssertionError, match=r"times the bound|codes of|scales of"),
    ):
        compare()
