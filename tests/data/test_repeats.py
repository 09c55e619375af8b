"""What is read more than once, against a count of every token of every sample."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.ranges import SourceSize
from nano_pretrain.data.repeats import repetitions
from nano_pretrain.recipe.acts import Act
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
    epochs = curriculum.epochs(curriculum.consumed(curriculum.total_tokens))
    for source, ranges in curriculum.sources.items():
        assert float(epochs[source]) == pytest.approx(times[source].mean())
        if not ranges.sharing:
            share = found[source].share if source in found else 0
            assert share == pytest.approx((times[source] > 1).mean())


@given(curricula())
@settings(deadline=None)
def test_the_second_reading_begins_where_it_is_said(curriculum: Curriculum) -> None:
    begins: dict[str, int] = {}
    stages_of: dict[str, set[str]] = {}
    for plan in curriculum.stages:
        for number in range(plan.steps * plan.global_batch_size):
            address = curriculum.locate(plan.name, number)
            before = stages_of.setdefault(address.source, set())
            shares = curriculum.sources[address.source].sharing and before - {plan.name}
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
    assert again.share == pytest.approx(0.6 * 0.502 * 8000 / 8001)
    twice = (times_read(curriculum)["web"] > 1).sum() / 8000
    # Drawn without replacement: the standard deviation is 0.0078.
    assert twice == pytest.approx(again.share, abs=0.03)


def told_to_read_more(seed: int) -> Curriculum:
    """Of 1,000 samples the second stage has 30 of its own and reads 330, the first 500 of the others."""
    stages = {
        "s": stage(8 * 500, {"p": share(1.0, web=1)}),
        "t": stage(16 * 15, {"p": share(1.0, web=1)}, sequence_length=16, batch=1),
    }
    config = recipe(stages, seed=seed)
    config.stages["t"].schedule.extend_to = 16 * 165
    acts = [Act(8 * 100, "stages.t.schedule.extend_to", None, 16 * 165)]
    return Curriculum(config, {"web": SourceSize((8 * 1000 + 1,))}, acts)


def test_of_what_a_stage_reads_beyond_its_own_the_share_is_expected() -> None:
    curricula = list(map(told_to_read_more, range(100)))
    (again,) = repetitions(curricula[0]).values()
    # The second stage's range begins a token earlier than its samples need, for the last label.
    assert again.share == pytest.approx(500 / 969 * 150 * 16 / 8001, rel=0.01)
    shares = [(times_read(each)["web"] > 1).mean() for each in curricula]
    # Five standard errors of the mean.
    assert np.mean(shares) == pytest.approx(again.share, abs=5 * np.std(shares) / 10)


def test_an_extension_that_alone_reads_more_than_half_of_a_source_reads_it_as_often_as_it_is_long() -> None:
    stages = {"s": stage(320, {"p": share(1.0, web=1)}), "t": stage(8 * 223, {"p": share(1.0, math=1)}, batch=1)}
    curriculum = Curriculum(recipe(stages), {"web": SourceSize((4000,)), "math": SourceSize((8 * 100 + 1,))})
    again = repetitions(curriculum)["math"]
    assert float(curriculum.epochs(curriculum.consumed(curriculum.total_tokens))["math"]) == 8 * 223 / 801
    assert (again.readings, again.share, again.shared_by) == (2.23, 800 / 801, ())


def test_a_source_read_too_often_is_named_with_how_often() -> None:
    stages = {name: stage(320, {"p": share(1.0, web=1, math=1)}) for name in ("s", "t")}
    sizes = {"web": SourceSize((8 * 16 + 1,)), "math": SourceSize((8 * 1000 + 1,))}
    with pytest.raises(RecipeError, match=r"data\.max_epochs: source web is read 2\.50 times in the range of s and t"):
        Curriculum(recipe(stages, max_epochs=2.4), sizes)
    assert Curriculum(recipe(stages, max_epochs=2.5), sizes).total_tokens == 640
