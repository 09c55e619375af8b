"""What was read stays what it was when a run gets longer or gets more shards."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.ranges import SourceSize
from tests.data.curricula import curricula, recipe, share, stage


def longer(curriculum: Curriculum, name: str, phase: str, steps: int) -> Curriculum:
    """The same with more steps in a phase, and later phases as long as they were."""
    stages = dict(curriculum.recipe.stages)
    config = stages[name]
    more = steps * config.global_batch_size * config.sequence_length
    phases = dict(config.phases)
    phases[phase] = replace(phases[phase], tokens=(phases[phase].tokens or 0) + more)
    stages[name] = replace(config, tokens=config.tokens + more, phases=phases)
    return Curriculum(replace(curriculum.recipe, stages=stages), curriculum.sizes)


@given(curricula(), st.integers(1, 30), st.data())
@settings(deadline=None)
def test_a_longer_phase_of_the_first_stage_changes_nothing_that_was_read(
    curriculum: Curriculum, steps: int, data: st.DataObject
) -> None:
    first, *later = curriculum.stages
    phase = data.draw(st.sampled_from(first.phases))
    changed = longer(curriculum, first.name, phase.name, steps)
    for number in range(phase.first_sample + phase.samples):
        assert changed.locate(first.name, number) == curriculum.locate(first.name, number)
    for plan in later:
        for number in range(plan.steps * plan.global_batch_size):
            assert changed.locate(plan.name, number) == curriculum.locate(plan.name, number)


@given(curricula(), st.integers(0, 3000), st.data())
@settings(deadline=None)
def test_a_generation_changes_nothing_that_was_read_in_a_first_epoch(
    curriculum: Curriculum, tokens: int, data: st.DataObject
) -> None:
    source = data.draw(st.sampled_from(list(curriculum.sources)))
    before = curriculum.sizes[source]
    grown = replace(before, generations=(*before.generations, tokens))
    changed = Curriculum(curriculum.recipe, {**curriculum.sizes, source: grown})
    same, consumed = True, 0
    for _ in range(data.draw(st.integers(0, curriculum.total_steps))):
        plan = curriculum.stage_at(consumed)
        places = [
            [(address.source, address.start) for address in each.samples(consumed, range(plan.global_batch_size))]
            for each in (curriculum, changed)
        ]
        same, consumed = same and places[0] == places[1], consumed + plan.tokens_per_step
    generations = {name: size.generations for name, size in curriculum.sizes.items()}
    assert changed.reordered(generations, consumed) == ([] if same else [source])


@given(curricula(), st.integers(0, 3000), st.data())
@settings(deadline=None)
def test_nothing_is_read_again_when_a_generation_was_added_in_a_first_epoch(
    curriculum: Curriculum, tokens: int, data: st.DataObject
) -> None:
    source = data.draw(st.sampled_from(list(curriculum.sources)))
    before = curriculum.sizes[source]
    grown = replace(before, generations=(*before.generations, tokens))
    changed = Curriculum(curriculum.recipe, {**curriculum.sizes, source: grown})
    stage = data.draw(st.sampled_from(curriculum.stages))
    steps = data.draw(st.integers(0, stage.steps))
    consumed = stage.start_tokens + steps * stage.tokens_per_step
    assume(not changed.reordered({name: size.generations for name, size in curriculum.sizes.items()}, consumed))
    samples = steps * stage.global_batch_size
    past = [curriculum.locate(stage.name, number) for number in range(samples)]
    rest = [changed.locate(stage.name, number) for number in range(samples, stage.steps * stage.global_batch_size)]
    first_reading = [(address.source, address.start) for address in [*past, *rest] if address.epoch == 0]
    assert len(set(first_reading)) == len(first_reading)


def test_shards_may_be_added_until_the_first_epoch_is_over() -> None:
    config = recipe({"s": stage(640, {"p": share(1.0, web=1)})})
    curriculum = Curriculum(config, {"web": SourceSize((8 * 16 + 1, 900))})
    then = {"web": (8 * 16 + 1,)}
    # A step is 4 samples of 8 tokens.
    assert [curriculum.reordered(then, 32 * steps) for steps in (0, 3, 4, 5)] == [[], [], [], ["web"]]


def test_other_shards_reorder_what_was_read_of_them() -> None:
    sizes = {"web": SourceSize((900, 100)), "code": SourceSize((900, 100))}
    config = recipe({"s": stage(320, {"p": share(1.0, web=1, code=1)})})
    then = {name: size.generations for name, size in sizes.items()}
    for generations in [(901, 100), (900, 101), (900,)]:
        changed = Curriculum(config, {**sizes, "code": SourceSize(generations)})
        assert changed.reordered(then, 64) == ["code"]
        assert changed.reordered(then, 0) == []
