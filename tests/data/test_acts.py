"""What was read before an act does not depend on it; what comes after follows it."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nano_pretrain.data.curriculum import Curriculum, SampleAddress
from nano_pretrain.data.ranges import SourceSize
from nano_pretrain.recipe.acts import Act
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import BatchRampConfig, Recipe
from nano_pretrain.train.told import check_act
from tests.data.curricula import KNOWN, curricula, recipe, share, stage, two_stages

BLENDS = st.dictionaries(st.sampled_from(sorted(KNOWN)), st.integers(1, 5), min_size=1)
BATCH, END = "stages.pretrain.global_batch_size", "stages.pretrain.schedule.extend_to"


def steps(curriculum: Curriculum, until: int | None = None) -> list[tuple[int, list[SampleAddress]]]:
    """Tokens before each step, and its samples."""
    found, tokens = [], 0
    while tokens < (curriculum.total_tokens if until is None else until):
        now = curriculum.stage_at(tokens)
        samples = now.samples_at(tokens)
        found.append((tokens, curriculum.samples(tokens, range(samples))))
        tokens += samples * now.sequence_length
    return found


def told(curriculum: Curriculum, tokens: int, field: str, after: Any) -> Curriculum:
    """The curriculum of a run that is told this, as a start of it makes it."""
    changed = copy.deepcopy(curriculum.recipe)
    node: Any = changed
    *path, last = field.split(".")
    for part in path:
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    act = Act(tokens, field, getattr(node, last), after)
    check_act(act, curriculum)
    setattr(node, last, after)
    return Curriculum(changed, curriculum.sizes, (*curriculum.acts, act))


@given(curricula(), st.data())
@settings(deadline=None)
def test_no_act_changes_what_was_read(curriculum: Curriculum, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        borders = [tokens for tokens, _ in steps(curriculum)]
        tokens, plan = data.draw(st.sampled_from(borders)), data.draw(st.sampled_from(curriculum.stages))
        field, value = data.draw(
            st.sampled_from(
                [
                    ("global_batch_size", st.integers(1, 12)),
                    ("schedule.extend_to", st.integers(1, 3 * plan.config.tokens)),
                ]
                + [(f"phases.{p.name}.blend", BLENDS) for p in plan.phases]
            )
        )
        try:
            changed = told(curriculum, tokens, f"stages.{plan.name}.{field}", data.draw(value))
        except RecipeError:
            assume(False)
        assert steps(changed, tokens) == steps(curriculum, tokens)
        assert changed.consumed(tokens) == curriculum.consumed(tokens)
        curriculum = changed


def test_the_batch_changes_from_there_on() -> None:
    before = Curriculum(two_stages(), KNOWN)
    after = told(before, 320, BATCH, 8)
    assert [len(samples) for _, samples in steps(after)[:14]] == 10 * [4] + 4 * [8]
    # No sample is lost or read twice: the same numbers of the stage, in other steps.
    flat = [[address for _, samples in steps(each, 2000) for address in samples] for each in (before, after)]
    shortest = min(map(len, flat))
    assert flat[0][:shortest] == flat[1][:shortest]


def test_an_extension_moves_the_ends_that_lie_ahead() -> None:
    before = Curriculum(two_stages(), KNOWN)
    assert [phase.end_tokens for phase in before.stages[0].phases] == [1920, 2880, 3200]
    after = told(before, 2048, END, 6400)
    assert [phase.end_tokens for phase in after.stages[0].phases] == [1920, 5760, 6400]
    assert after.total_tokens == before.total_tokens + 3200
    sooner = told(before, 2048, END, 2240)
    # The second phase would have ended at 2016: it ends now.
    assert [(phase.name, phase.end_tokens) for phase in sooner.stages[0].phases] == [
        ("p1", 1920), ("p2", 2048), ("p3", 2240),
    ]  # fmt: skip


def test_the_extension_stage_keeps_its_own_text_whatever_the_run_is_told() -> None:
    before = Curriculum(two_stages(), KNOWN)
    own = before.sources["web"].by_stage["extension"].spans
    after = told(told(before, 320, "stages.extension.phases.long.blend", {"web": 1}), 640, END, 6400)
    assert after.sources["web"].by_stage["extension"].spans == own
    assert after.sources["web"].by_stage["pretrain"].spans == before.sources["web"].by_stage["pretrain"].spans


def test_a_source_that_a_stage_is_told_to_read_is_shared() -> None:
    before = Curriculum(two_stages(), KNOWN)
    after = told(before, 320, "stages.extension.phases.long.blend", {"code": 1, "web": 1})
    assert after.sources["code"].shared
    assert after.sources["code"].by_stage["extension"].spans == ((0, KNOWN["code"].tokens),)


def test_a_source_that_an_act_brought_in_stays_where_it_is() -> None:
    before = Curriculum(two_stages(), {**KNOWN, "new": SourceSize((6000,))})
    first = told(before, 320, "stages.pretrain.phases.p2.blend", {"new": 1, "web": 1})
    second = told(first, 2560, "stages.extension.phases.long.blend", {"new": 1, "web": 1})
    third = told(second, 2560, "stages.extension.schedule.extend_to", 1200)
    for changed in (second, third):
        assert any(address.source == "new" for _, samples in steps(changed, 2560) for address in samples)
        assert steps(changed, 2560) == steps(first, 2560)


@pytest.mark.parametrize(
    ("tokens", "field", "value", "problem"),
    [
        (1952, "stages.pretrain.phases.p2.blend", {"web": 1}, "phase p2 began after 1,920"),
        (3200, BATCH, 8, "stage pretrain ended after 3,200"),
        (2624, END, 9600, "the decay of stage pretrain began after 2,560"),
        (1280, END, 1900, "1900 is less than the 1280 tokens consumed and the 640 of the decay; write at least 1920"),
    ],
)
def test_what_has_begun_can_not_be_changed(tokens: int, field: str, value: object, problem: str) -> None:
    config = two_stages()
    config.stages["pretrain"].schedule.decay_tokens = 640
    with pytest.raises(RecipeError, match=problem):
        told(Curriculum(config, KNOWN), tokens, field, value)


def test_a_cosine_has_no_stable_part() -> None:
    config = two_stages()
    config.stages["pretrain"].schedule.kind = "cosine"
    with pytest.raises(RecipeError, match="decay of stage pretrain began"):
        told(Curriculum(config, KNOWN), 320, END, 9600)


def ramped(start: int, increment: int, tokens: int) -> Recipe:
    config = recipe({"s": stage(6400, {"a": share(0.5, web=1), "b": share(0.5, math=1)}, batch=16)})
    config.stages["s"].batch_ramp = BatchRampConfig(start, increment, tokens)
    return config


def test_a_batch_that_grows_reads_the_same_samples() -> None:
    plain = recipe({"s": stage(6400, {"a": share(0.5, web=1), "b": share(0.5, math=1)}, batch=16)})
    grown = Curriculum(ramped(4, 4, 960), KNOWN)
    sizes = [len(samples) for _, samples in steps(grown)]
    assert sizes == 10 * [4] + 5 * [8] + 4 * [12] + (len(sizes) - 19) * [16]
    read = [[a for _, samples in steps(each, 3000) for a in samples] for each in (grown, Curriculum(plain, KNOWN))]
    shortest = min(map(len, read))
    assert read[0][:shortest] == read[1][:shortest]


def test_shares_of_phases_do_not_depend_on_the_batch() -> None:
    (plan,) = Curriculum(ramped(4, 4, 960), KNOWN).stages
    assert abs(plan.phases[0].end_tokens - Fraction(6400, 2)) < 16 * 8


@pytest.mark.parametrize(
    ("ramp", "problem"),
    [
        ((16, 4, 960), "16 is not below global_batch_size = 16"),
        ((4, 5, 960), "5 does not divide 16 - 4 = 12"),
        ((4, 4, 6400), "6400 is not between 0 and the stage's 6400"),
        ((4, 0, 960), "0 never lets the batch grow"),
    ],
)
def test_a_ramp_that_leads_nowhere_is_refused(ramp: tuple[int, int, int], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        Curriculum(ramped(*ramp), KNOWN)


def test_the_batch_can_be_changed_when_it_has_grown() -> None:
    grown = Curriculum(ramped(4, 4, 960), KNOWN)
    with pytest.raises(RecipeError, match="the batch of stage s grows until 960 tokens"):
        told(grown, 320, "stages.s.global_batch_size", 2)
    later = next(tokens for tokens, _ in steps(grown) if tokens >= 960)
    after = told(grown, later, "stages.s.global_batch_size", 2)
    assert {len(samples) for tokens, samples in steps(after) if tokens >= later} == {2}


def test_an_act_does_not_swallow_a_phase() -> None:
    config = recipe({"s": stage(6400, {"a": share(0.98, web=1), "b": share(0.02, math=1)})})
    with pytest.raises(RecipeError, match=r"phases\.b: no step of"):
        told(Curriculum(config, KNOWN), 320, "stages.s.global_batch_size", 100)
