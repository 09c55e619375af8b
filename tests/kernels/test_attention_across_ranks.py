"""Attention of context-parallel ranks, put together, against the dense softmax in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.distributed.batches import in_order
from tests.distributed.ranks import run_ranks
from tests.kernels.attention_ranks import attention_of_own_tokens
from tests.kernels.compare import Inputs, assert_close, values_and_gradients
from tests.kernels.references import dense_attention
from tests.kernels.test_attention import BF16, FP32, TILE, attention_inputs, output_gradient, to

TOLERANCES = {torch.float64: 1e-12, torch.float32: FP32, torch.bfloat16: 2 * BF16}
"""In BF16 a key's gradient is rounded in each of a rank's chunks, in their sum, and in that over the ranks: four times,
and independent errors add up as their squares."""


@dataclass(frozen=True)
class Case:
    """A sequence that ranks share."""

    length: int
    dtype: torch.dtype
    reset: bool

    def inputs(self) -> Inputs:
        """Of the whole sequence."""
        return to(self.dtype, attention_inputs(self.length, 2, 3, reset=self.reset, seed=self.length))


@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_a_sequence_equal_the_dense_softmax(implementation: str, size: int) -> None:
    # A token a chunk, chunks within a tile, and chunks of more than one.
    lengths = (2 * size, 48, 2 * size * (TILE + 5))
    cases = [Case(length, dtype, reset) for length in lengths for dtype in TOLERANCES for reset in (False, True)]
    inputs = [case.inputs() for case in cases]
    gradients = [output_gradient(each, case.dtype) for each, case in zip(inputs, cases, strict=True)]
    ranks = run_ranks(attention_of_own_tokens, size, implementation, list(zip(inputs, gradients, strict=True)))
    for number, case in enumerate(cases):
        parts = [rank[number] for rank in ranks]
        actual = {
            name: torch.from_numpy(in_order([part[name].transpose(0, -1).numpy() for part in parts])).transpose(0, -1)
            for name in parts[0]
        }
        expected = values_and_gradients(dense_attention, to(torch.float64, inputs[number]), [gradients[number]])
        assert_close(actual, expected, TOLERANCES[case.dtype])
