"""What the native cross-entropy promises beyond the plain one: threads, and that the tests see its mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.broken_sources import broken_kernels
from tests.kernels.compare import assert_close
from tests.kernels.implementations import assert_bits_do_not_depend_on_threads
from tests.kernels.test_cross_entropy import Case


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    case = Case(length=90, columns=1100, vocab=1090)
    assert_bits_do_not_depend_on_threads(lambda: case.compared(dtype)[0])


MISTAKES = {
    "probability of the padding": ("row * columns, valid, peaks[row]);", "row * columns, columns, peaks[row]);"),
    "a piece left out": ("begin < count; begin += PIECE", "begin < count; begin += 2 * PIECE"),
    "gradient of the label": ("* factor - gradient : W(0)", "* factor : W(0)"),
    "gradient of the padding": ("std::fill(x + valid, x + columns, T{});", ""),
    "gradient without the loss's": ("W factor = gradient / total;", "W factor = 1 / total;"),
}


@pytest.mark.full
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str, tmp_path: Path) -> None:
    case = Case(columns=1100, vocab=1090)
    with broken_kernels("loss.cpp", *MISTAKES[mistake], directory=tmp_path, only="loss"):
        actual, expected = case.compared(torch.float64)
    with pytest.raises(AssertionError, match="is off by"):
        assert_close(actual, expected, 1e-13)
