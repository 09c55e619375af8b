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
from nano_pretrain.data.repeats import repetitions
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


def test_what_is_told_again_at_the_same_moment_is_as_if_told_once() -> None:
    before = Curriculum(two_stages(), KNOWN)
    sooner = told(before, 1280, END, 1600)
    assert [phase.end_tokens for phase in sooner.stages[0].phases] == [1280, 1440, 1600]
    assert steps(told(sooner, 1280, END, None)) == steps(before)


@given(curricula(), st.data())
@settings(deadline=None)
def test_of_one_moment_the_last_act_holds(curriculum: Curriculum, data: st.DataObject) -> None:
    tokens = data.draw(st.sampled_from([tokens for tokens, _ in steps(curriculum)]))
    plan = data.draw(st.sampled_from(curriculum.stages))
    options: dict[str, st.SearchStrategy[Any]] = {f"phases.{phase.name}.blend": BLENDS for phase in plan.phases}
    options["global_batch_size"] = st.integers(1, 12)
    options["schedule.extend_to"] = st.integers(1, 3 * plan.config.tokens)
    field, values = data.draw(st.sampled_from(list(options.items())))
    name, first, last = f"stages.{plan.name}.{field}", data.draw(values), data.draw(values)
    try:
        once = told(curriculum, tokens, name, last)
        again = told(told(curriculum, tokens, name, first), tokens, name, last)
    except RecipeError:
        assume(False)
    assert steps(again) == steps(once)


def test_an_act_told_after_a_fall_back_holds_from_its_moment_on() -> None:
    before = Curriculum(two_stages(), KNOWN)
    assert steps(told(told(before, 1280, END, 4800), 640, END, 6400)) == steps(told(before, 640, END, 6400))


def test_the_extension_stage_keeps_its_own_text_whatever_the_run_is_told() -> None:
    before = Curriculum(two_stages(), KNOWN)
    own = before.sources["web"].by_stage["extension"].spans
    after = told(told(before, 320, "stages.extension.phases.long.blend", {"web": 1}), 640, END, 6400)
    # It needs more than that by now, and reads its own first.
    assert after.sources["web"].by_stage["extension"].spans == (*own, (0, own[0][0]))
    assert after.sources["web"].by_stage["pretrain"].spans == before.sources["web"].by_stage["pretrain"].spans


def test_a_source_that_a_stage_is_told_to_read_is_shared() -> None:
    before = Curriculum(two_stages(), KNOWN)
    after = told(before, 320, "stages.extension.phases.long.blend", {"code": 1, "web": 1})
    assert after.sources["code"].sharing == ("pretrain", "extension")
    assert after.sources["code"].by_stage["extension"].spans == ((0, KNOWN["code"].tokens),)


LONGER = "stages.extension.schedule.extend_to"


def with_long_source() -> Curriculum:
    """A source more, which only the extension reads."""
    config = two_stages()
    config.stages["extension"].phases["long"].blend = {"long": 1, "web": 4}
    return Curriculum(config, {**KNOWN, "long": SourceSize((4000,), lambda token: token - token % 50)})


def spans(curriculum: Curriculum, source: str) -> dict[str, tuple[tuple[int, int], ...]]:
    return {stage: part.spans for stage, part in curriculum.sources[source].by_stage.items()}


def test_a_stage_that_has_not_begun_is_extended_as_in_a_fresh_run_where_nobody_has_begun_to_read() -> None:
    before = with_long_source()
    after = told(before, 320, LONGER, 6000)
    fresh = Curriculum(after.recipe, after.sizes)
    assert spans(after, "long") == spans(fresh, "long") != spans(before, "long")


def test_a_stage_that_has_not_begun_reads_what_others_have_only_after_its_own() -> None:
    before = with_long_source()
    after = told(before, 320, LONGER, 6000)
    ((border, end),) = spans(before, "web")["extension"]
    assert spans(after, "web") == {"pretrain": ((0, border),), "extension": ((border, end), (0, border))}
    own = before.sources["web"].by_stage["extension"].samples
    read = [a for _, samples in steps(after) for a in samples if (a.stage, a.source) == ("extension", "web")]
    assert [a.start >= border for a in read] == own * [True] + (len(read) - own) * [False]
    again = repetitions(after)["web"]
    first = next(tokens for tokens, samples in steps(after) if read[own] in samples)
    assert again.shared_by == ("pretrain", "extension")
    assert 0 <= again.begins - first < 64


def test_a_begun_stage_that_is_told_to_read_a_source_of_another_has_what_that_one_leaves() -> None:
    before = with_long_source()
    after = told(before, 320, "stages.pretrain.phases.p2.blend", {"web": 1, "long": 1})
    fresh = Curriculum(after.recipe, after.sizes)
    assert spans(after, "long") == spans(fresh, "long")
    assert spans(after, "long")["extension"] == spans(before, "long")["extension"]
    assert after.sources["long"].sharing == ()
    assert "long" not in repetitions(after)


def test_a_stage_that_has_begun_keeps_what_it_has() -> None:
    before = with_long_source()
    after = told(before, 3264, LONGER, 6000)
    assert [spans(after, source) for source in after.sources] == [spans(before, source) for source in before.sources]
    after.recipe.data.max_epochs = 2
    with pytest.raises(RecipeError, match=r"source \w+ is read \d+\.\d+ times in the range of extension"):
        Curriculum(after.recipe, after.sizes, after.acts)


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
    before = Curriculum(config, KNOWN)
    problem = r"^stages\.s\.global_batch_size: no step of 800 tokens begins in phase b; write at most 16$"
    with pytest.raises(RecipeError, match=problem):
        told(before, 320, "stages.s.global_batch_size", 100)
    assert [phase.name for phase in told(before, 320, "stages.s.global_batch_size", 16).stages[0].phases] == ["a", "b"]


def test_an_end_that_swallows_a_phase_is_named_with_one_that_does_not() -> None:
    config = recipe({"s": stage(6400, {"a": share(0.98, web=1), "b": share(0.02, math=1)})})
    before, end = Curriculum(config, KNOWN), "stages.s.schedule.extend_to"
    problem = rf"^{end}: no step of 32 tokens begins in phase b; write at least 1600$"
    with pytest.raises(RecipeError, match=problem):
        told(before, 320, end, 600)
    assert [phase.name for phase in told(before, 320, end, 1600).stages[0].phases] == ["a", "b"]
    config.stages["s"].schedule.extend_to = 600
    with pytest.raises(RecipeError, match=problem):
        Curriculum(config, KNOWN)


def test_an_end_has_room_for_warm_up_and_decay() -> None:
    config = two_stages()
    schedule = config.stages["pretrain"].schedule
    schedule.warmup_tokens, schedule.decay_tokens, schedule.extend_to = 320, 640, 959
    with pytest.raises(RecipeError, match=r"extend_to: 959 is less than the 320 .* write at least 960"):
        Curriculum(config, KNOWN)
    schedule.extend_to = 960
    assert Curriculum(config, KNOWN).stages[0].end_tokens == 960
