"""Which tokens of a sequence a context-parallel rank has, and how it sees the others."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nano_pretrain.parallel.context import own_tokens, whole_sequence
from tests.distributed.batches import in_order
from tests.distributed.ranks import run_ranks


@given(st.integers(1, 5), st.integers(1, 4))
def test_every_rank_has_an_early_chunk_and_the_late_one_that_matches(size: int, length: int) -> None:
    whole = torch.arange(2 * size * length)
    parts = [own_tokens(whole, 0, (rank, size)) for rank in range(size)]
    assert all(part.shape == (2 * length,) for part in parts)
    assert in_order([part.numpy() for part in parts]).tolist() == whole.tolist()
    # The same work for all: of a token, what comes before it.
    assert len({int(part.sum()) for part in parts}) == 1
    columns = [own_tokens(whole.expand(3, -1), 1, (rank, size)) for rank in range(size)]
    assert all(torch.equal(column, part.expand(3, -1)) for column, part in zip(columns, parts, strict=True))


def test_a_sequence_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="18 tokens cannot be cut into 4 chunks"):
        own_tokens(torch.zeros(18), 0, (0, 2))
    assert own_tokens(torch.zeros(17), 0, (0, 1)).shape == (17,)


def gather_and_sum() -> tuple[list[float], list[float]]:
    """The sequence 0, 1, 2 ... as this rank gathers it, and the gradient of its own part."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    rank, size = group.rank(), group.size()
    own = own_tokens(torch.arange(4.0 * size), 0, (rank, size)).bfloat16().requires_grad_()
    whole = whole_sequence(own, group)
    gradient = torch.full_like(whole, 256 if rank == 0 else 1)
    whole.backward(gradient)
    dist.destroy_process_group()
    assert isinstance(own.grad, Tensor)
    assert own.grad.dtype == torch.bfloat16
    return whole.tolist(), own.grad.tolist()


def test_every_rank_sees_the_whole_and_gradients_are_summed_before_they_are_rounded() -> None:
    for whole, gradient in run_ranks(gather_and_sum, 4):
        assert whole == list(range(16))
        # 259 lies between two BF16 numbers; sums in BF16 lose a 1 at the first addition to 256.
        assert gradient == [260] * 4
