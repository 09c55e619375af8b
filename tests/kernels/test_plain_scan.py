"""What the plain scan does in segments: it keeps little, and computes the same again."""

from __future__ import annotations

import pytest
import torch

from nano_pretrain.kernels.ssd import SEGMENT, chunk_scan
from tests.kernels.compare import Inputs, assert_close, values_and_gradients
from tests.kernels.implementations import kept_by_autograd
from tests.kernels.references import sequential_scan
from tests.kernels.scan_cases import ScanCase

pytestmark = pytest.mark.usefixtures("plain")

LENGTH = 2 * SEGMENT + 70


def long_inputs(border: int, initial: bool = True) -> tuple[ScanCase, Inputs]:
    """Three segments; the first sample has two documents, the second one."""
    case = ScanCase(length=LENGTH, groups=1, channels=3, state=4, initial=initial)
    inputs = case.inputs()
    inputs["a"] = inputs["a"] * 1e-2  # states live longer than a segment
    inputs["seq_idx"] = torch.stack([torch.arange(LENGTH) >= border, torch.zeros(LENGTH)]).int()
    return case, inputs


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("border", [SEGMENT - 1, SEGMENT, SEGMENT + 1])
def test_segments_equal_the_recurrence(border: int, initial: bool) -> None:
    case, inputs = long_inputs(border, initial)
    expected = values_and_gradients(sequential_scan, inputs, case.output_gradients())
    # Rounding of float64 in sums over 2,000 tokens.
    assert_close(values_and_gradients(chunk_scan, inputs, case.output_gradients()), expected, 1e-12)


def test_a_second_backward_pass_has_the_same_bits() -> None:
    case, inputs = long_inputs(SEGMENT)
    leaves = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in inputs.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    outputs = chunk_scan(**leaves)
    first, second = (torch.autograd.grad(outputs, wanted, case.output_gradients(), retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(outputs, chunk_scan(**inputs), strict=True))


def test_only_the_inputs_and_the_states_between_segments_are_kept() -> None:
    _, inputs = long_inputs(SEGMENT)
    leaves = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in inputs.items()}
    kept = kept_by_autograd(lambda: chunk_scan(**leaves))
    given = {t.untyped_storage().data_ptr() for t in leaves.values()}
    # Of each border between segments the state, and whether the document goes on.
    assert given <= kept
    assert len(kept - given) <= 4
