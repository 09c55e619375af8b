"""Documents as any integers; what is not an integer is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nano_pretrain.kernels.conv import causal_conv_silu
from nano_pretrain.kernels.documents import document_numbers
from nano_pretrain.kernels.ssd import chunk_scan
from tests.kernels.scan_cases import ScanCase
from tests.kernels.test_conv import convolution_inputs
from tests.kernels.test_mamba_names import layer, split_inputs

pytestmark = pytest.mark.usefixtures("implementation")

NUMBERS = torch.tensor([0, 0, 1, 2, 2, 2, 5], dtype=torch.int32).repeat_interleave(10).expand(2, -1)


def convolution(seq_idx: Tensor) -> Tensor:
    return causal_conv_silu(**{**convolution_inputs(70, 4), "seq_idx": seq_idx})


def scan(seq_idx: Tensor) -> Tensor:
    return chunk_scan(**{**ScanCase(length=70).inputs(), "seq_idx": seq_idx})[0]


def mixer(seq_idx: Tensor) -> Tensor:
    return layer(**{**split_inputs(), "seq_idx": seq_idx})


KERNELS = pytest.mark.parametrize("kernel", [convolution, scan, mixer])


@KERNELS
@pytest.mark.parametrize(
    "numbers", [NUMBERS.long() * 2**32, NUMBERS.long() + 2**40, NUMBERS.to(torch.uint8), NUMBERS.to(torch.uint64)]
)
def test_integers_of_any_width_have_the_same_borders(kernel: Callable[[Tensor], Tensor], numbers: Tensor) -> None:
    assert torch.equal(kernel(numbers), kernel(NUMBERS))
    assert not torch.equal(kernel(numbers), kernel(torch.zeros_like(NUMBERS)))


@KERNELS
@pytest.mark.parametrize("numbers", [NUMBERS / 10, NUMBERS.double()])
def test_what_is_not_an_integer_is_refused(kernel: Callable[[Tensor], Tensor], numbers: Tensor) -> None:
    with pytest.raises(ValueError, match=f"numbered by integers, not in {numbers.dtype}"):
        kernel(numbers)


def test_int32_is_taken_as_it_is() -> None:
    assert document_numbers(NUMBERS) is NUMBERS
    assert document_numbers(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)  # type: ignore[union-attr]
