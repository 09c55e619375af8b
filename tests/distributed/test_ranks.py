"""The helper that all tests with several ranks stand on."""

import time

import pytest

from tests.distributed import rank_functions
from tests.distributed.ranks import RanksFailedError, run_ranks


def test_results_come_in_the_order_of_the_ranks() -> None:
    assert run_ranks(rank_functions.rank, 3) == [0, 1, 2]
    assert run_ranks(rank_functions.sum_of_ranks, 2, 5) == [5.0, 5.0]


def test_the_rank_that_failed_first_is_shown_first() -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(rank_functions.fails_on, 2, 1)
    message = str(caught.value)
    assert message.startswith("rank 1 of 2:\nTraceback")
    assert "ValueError: the trouble of rank 1" in message.split("rank 0", maxsplit=1)[0]
    assert "last words" in message


def test_a_rank_that_dies_is_named_and_the_others_are_ended() -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailedError, match=r"^rank 0 of 2:\ndied, exit code 7"):
        run_ranks(rank_functions.dies, 2, 0)
    assert time.monotonic() - start < 50, "not after the timeout"


def test_a_rank_that_hangs_ends_with_its_stack() -> None:
    with pytest.raises(RanksFailedError, match="never_ends"):
        run_ranks(rank_functions.never_ends, 1, timeout=2)
