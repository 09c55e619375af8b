"""The comparison with one rank sees every mistake that a layout can contain."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import mistakes
from tests.distributed.courses import SAVED, Mistake
from tests.distributed.layouts import LAYOUTS, Courses, misfits, some_quick
from tests.distributed.ranks import RanksFailedError

QUICK: tuple[Mistake, ...] = (
    mistakes.unmarked_norms,
    mistakes.key_gradients_not_summed,
    mistakes.loss_times_context_ranks,
    mistakes.positions_swapped,
    mistakes.convolution_not_waited_for,
    mistakes.padding_not_left_out,
)


@pytest.mark.parametrize("mistake", some_quick(mistakes.MISTAKES, QUICK))
def test_a_mistake_is_seen(mistake: Mistake, courses: Courses, tmp_path: Path) -> None:
    layout, seen_in = mistakes.MISTAKES[mistake]
    wrong = courses.take(LAYOUTS[layout], tmp_path, mistake, end=SAVED)
    assert seen_in in misfits(wrong, courses.of("one rank"))


@pytest.mark.full
def test_layers_with_wrong_numbers_are_no_checkpoint(courses: Courses, tmp_path: Path) -> None:
    # Two pipeline positions then claim the same tensor.
    with pytest.raises(RanksFailedError, match=r"Invalid access pattern for ShardedTensor\(key='decoder\.layers"):
        courses.take(LAYOUTS["PP2"], tmp_path, mistakes.offset_of_an_equal_split, end=SAVED)


@pytest.mark.full
def test_what_is_multiplied_by_the_context_ranks_is_right_without_them(courses: Courses, tmp_path: Path) -> None:
    wrong = courses.take(LAYOUTS["DP2"], tmp_path, mistakes.loss_times_context_ranks, end=SAVED)
    assert not misfits(wrong, courses.of("one rank"))


OVERLAPPING = ("DP2, many buckets", "CP2 x DP2", "TP2 x PP2 x DP2")


@pytest.mark.parametrize("name", some_quick(OVERLAPPING, OVERLAPPING[:1]))
def test_whatever_is_under_way_is_waited_for(name: str, courses: Courses, tmp_path: Path) -> None:
    late = courses.take(LAYOUTS[name], tmp_path, mistakes.gathers_end_late, end=SAVED)
    assert not misfits(late, courses.of("one rank"))
