"""What is read more than once, against a count of every token of every sample."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.ranges import SourceSize
from nano_pretrain.data.repeats import repetitions
from nano_pretrain.recipe.errors import RecipeError
from tests.data.curricula import curricula, everything, recipe, share, stage


def times_read(curriculum: Curriculum) -> dict[str, npt.NDArray[np.int64]]:
    """How often each token of each source is predicted."""
    lengths = {plan.name: plan.sequence_length for plan in curriculum.stages}
    times = {name: np.zeros(curriculum.sizes[name].tokens, np.int64) for name in curriculum.sources}
    for address in everything(curriculum):
        times[address.source][address.start + 1 : address.start + 1 + lengths[address.stage]] += 1
    return times


@given(curricula())
@settings(deadline=None)
def test_what_is_read_twice_is_a_count_where_stages_have_ranges(curriculum: Curriculum) -> None:
    found, times = repetitions(curriculum), times_read(curriculum)
    for source, ranges in curriculum.sources.items():
        if not ranges.shared:
            there_is = sum(part.tokens for part in ranges.by_stage.values())
            share = found[source].share if source in found else 0
            assert share == pytest.approx((times[source] > 1).sum() / there_is)


@given(curricula())
@settings(deadline=None)
def test_the_second_reading_begins_where_it_is_said(curriculum: Curriculum) -> None:
    begins: dict[str, int] = {}
    stages_of: dict[str, set[str]] = {}
    for plan in curriculum.stages:
        for number in range(plan.steps * plan.global_batch_size):
            address = curriculum.locate(plan.name, number)
            before = stages_of.setdefault(address.source, set())
            shares = curriculum.sources[address.source].shared and before - {plan.name}
            if address.epoch or shares:
                begins.setdefault(address.source, plan.start_tokens + number * plan.sequence_length)
            before.add(plan.name)
    found = repetitions(curriculum)
    assert {source: again.begins for source, again in found.items()} == begins
    assert {source for source, again in found.items() if again.shared_by} <= set(begins)


def test_a_shared_source_says_how_much_of_it_is_read_twice() -> None:
    stages = {
        "s": stage(8 * 600, {"p": share(1.0, web=1)}),
        "t": stage(8 * 502, {"p": share(1.0, web=1)}, batch=1),
    }
    curriculum = Curriculum(recipe(stages), {"web": SourceSize((8 * 1000 + 1,))})
    (again,) = repetitions(curriculum).values()
    assert again.shared_by == ("s", "t")
    assert (again.begins, again.readings) == (8 * 600, 1.102)
    assert again.share == pytest.approx(0.6 * 0.502)
    twice = (times_read(curriculum)["web"] > 1).sum() / 8000
    # Drawn without replacement: the standard deviation is 0.0078.
    assert twice == pytest.approx(again.share, abs=0.03)


def test_a_source_read_too_often_is_named_with_how_often() -> None:
    stages = {name: stage(320, {"p": share(1.0, web=1, math=1)}) for name in ("s", "t")}
    sizes = {"web": SourceSize((8 * 16 + 1,)), "math": SourceSize((8 * 1000 + 1,))}
    with pytest.raises(RecipeError, match=r"data\.max_epochs: source web is read 2\.50 times, the limit is 2\.4"):
        Curriculum(recipe(stages, max_epochs=2.4), sizes)
    assert Curriculum(recipe(stages, max_epochs=2.5), sizes).total_tokens == 640
