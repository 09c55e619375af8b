"""Stages, phases and addresses of samples; what is refused."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_pretrain.data.curriculum import Curriculum, SampleAddress
from nano_pretrain.data.ranges import SourceSize
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import PhaseConfig
from tests.data.curricula import KNOWN, curricula, everything, recipe, share, stage, two_stages


def test_stages_and_phases_lie_end_to_end_on_step_borders() -> None:
    curriculum = Curriculum(two_stages(), KNOWN)
    pretrain, extension = curriculum.stages
    assert (pretrain.start_tokens, pretrain.end_tokens, pretrain.first_step, pretrain.steps) == (0, 3200, 0, 100)
    # 600 tokens in steps of 64: the tenth step is a whole one.
    assert (extension.start_tokens, extension.end_tokens) == (3200, 3840)
    assert (extension.first_step, extension.steps) == (100, 10)
    assert (curriculum.total_steps, curriculum.total_tokens) == (110, 3840)
    assert [(phase.start_tokens, phase.end_tokens) for phase in pretrain.phases] == [
        (0, 1920),
        (1920, 2880),
        (2880, 3200),
    ]


def test_the_12b_changes_phase_at_12_and_18_trillion_tokens() -> None:
    phases = {"p1": share(0.6, web=1), "p2": share(0.3, web=1), "p3": share(0.1, web=1)}
    big = stage(20 * 10**12, phases, sequence_length=8192, batch=736)
    plan = Curriculum(recipe({"pretrain": big}), {"web": SourceSize((10**13,))}).stages[0]
    starts = [phase.start_tokens for phase in plan.phases]
    for start, boundary in zip(starts, [0, 12 * 10**12, 18 * 10**12], strict=True):
        assert 0 <= start - boundary < plan.tokens_per_step


def test_shares_and_tokens_can_be_mixed() -> None:
    # Nemotron-H 56B: 60, 20 and 18.1 percent, and the last 380B of 20T tokens.
    phases = {name: share(value, web=1) for name, value in [("p1", 0.6), ("p2", 0.2), ("p3", 0.181)]}
    phases["p4"] = PhaseConfig(tokens=380 * 10**9, blend={"web": 1})
    big = stage(20 * 10**12, phases, sequence_length=8192, batch=768)
    plan = Curriculum(recipe({"pretrain": big}), {"web": SourceSize((10**13,))}).stages[0]
    assert 0 <= plan.phases[3].start_tokens - (20 * 10**12 - 380 * 10**9) < plan.tokens_per_step


@pytest.mark.parametrize(("boundary", "first_step"), [(319, 10), (320, 10), (321, 11)])
def test_a_phase_begins_at_the_first_step_that_starts_at_or_after_its_boundary(boundary: int, first_step: int) -> None:
    phases = {
        "before": PhaseConfig(tokens=boundary, blend={"web": 1}),
        "after": PhaseConfig(tokens=640 - boundary, blend={"code": 1}),
    }
    curriculum = Curriculum(recipe({"s": stage(640, phases)}), KNOWN)
    sources = [{address.source for address in curriculum.samples(32 * step, range(4))} for step in range(20)]
    assert sources == first_step * [{"web"}] + (20 - first_step) * [{"code"}]
    assert [curriculum.phase_at(32 * step) for step in (first_step - 1, first_step)] == ["before", "after"]
    assert curriculum.phase_at(32 * first_step - 1) == "before"


@pytest.mark.parametrize(("tokens", "name"), [(0, "pretrain"), (3199, "pretrain"), (3200, "extension")])
def test_stage_at_the_borders(tokens: int, name: str) -> None:
    assert Curriculum(two_stages(), KNOWN).stage_at(tokens).name == name


@pytest.mark.parametrize("tokens", [-1, 3840, 10**9])
def test_there_is_no_stage_outside_the_run(tokens: int) -> None:
    curriculum = Curriculum(two_stages(), KNOWN)
    with pytest.raises(ValueError, match="no step starts"):
        curriculum.stage_at(tokens)
    with pytest.raises(ValueError, match="no step starts"):
        curriculum.phase_at(tokens)


@given(curricula())
@settings(deadline=None)
def test_no_sample_of_a_source_comes_twice_before_all_came_once(curriculum: Curriculum) -> None:
    read: dict[tuple[str, str], list[SampleAddress]] = {}
    for address in everything(curriculum):
        read.setdefault((address.stage, address.source), []).append(address)
    for (name, source), addresses in read.items():
        size = curriculum.sources[source].by_stage[name].samples
        spans = curriculum.sources[source].by_stage[name].spans
        for epoch in range(math.ceil(len(addresses) / size)):
            now = addresses[epoch * size : (epoch + 1) * size]
            assert {address.epoch for address in now} == {epoch}
            assert len({address.index for address in now}) == len({address.start for address in now}) == len(now)
            assert {address.index for address in now} <= set(range(size))
            generations = [next(n for n, (_, end) in enumerate(spans) if address.start < end) for address in now]
            assert generations == sorted(generations)


@given(curricula())
@settings(deadline=None)
def test_every_sample_lies_inside_one_generation_of_its_range(curriculum: Curriculum) -> None:
    lengths = {plan.name: plan.sequence_length for plan in curriculum.stages}
    for address in everything(curriculum):
        spans = curriculum.sources[address.source].by_stage[address.stage].spans
        start, end = next((start, end) for start, end in spans if start <= address.start < end)
        assert address.start + lengths[address.stage] < end <= curriculum.sizes[address.source].tokens
        assert (address.start - start) % lengths[address.stage] == 0


def test_epochs_follow_each_other_with_new_orders_across_phases() -> None:
    phases = {"p1": share(0.5, web=1, code=1), "p2": share(0.5, web=1)}
    sizes = {"web": SourceSize((8 * 30 + 1, 8 * 10 + 7)), "code": SourceSize((4000,))}
    curriculum = Curriculum(recipe({"s": stage(4096, phases)}), sizes)
    web = [address for address in everything(curriculum) if address.source == "web"]
    # The first phase ends in the 26th window, after 6 of its 10 samples.
    assert len(web) in range(125 + 256, 131 + 256)
    orders = [[address.index for address in web if address.epoch == epoch] for epoch in range(10)]
    assert all(sorted(order[:30]) == list(range(30)) for order in orders[:9])
    assert all(sorted(order[30:]) == list(range(30, 40)) for order in orders[:9])
    assert len(orders[9]) == len(web) - 360
    assert len({tuple(order) for order in orders[:9]}) == 9


@given(curricula(), st.data())
@settings(deadline=None)
def test_batches_do_not_depend_on_how_ranks_split_them(curriculum: Curriculum, data: st.DataObject) -> None:
    plan = data.draw(st.sampled_from(curriculum.stages))
    tokens = plan.start_tokens + plan.tokens_per_step * data.draw(st.integers(0, plan.steps - 1))
    whole = curriculum.samples(tokens, range(plan.global_batch_size))
    order = data.draw(st.permutations(range(plan.global_batch_size)))
    cut = data.draw(st.integers(0, plan.global_batch_size))
    parts = curriculum.samples(tokens, order[:cut]) + curriculum.samples(tokens, order[cut:])
    assert [whole[offset] for offset in order] == parts


def test_batches_do_not_depend_on_the_batch_size_or_the_micro_batch() -> None:
    def order(batch: int, micro_batch: int) -> list[SampleAddress]:
        config = stage(2880, {"p1": share(0.5, web=3, code=1), "p2": share(0.5, math=1, web=2)}, batch=batch)
        config.micro_batch_size = micro_batch
        return everything(Curriculum(recipe({"s": config}), KNOWN))

    # 1,440 tokens are a whole number of steps of 4, 12 and 30 samples, so the phase changes at the same sample.
    assert order(4, 1) == order(12, 3) == order(30, 2)


@given(curricula())
@settings(deadline=None)
def test_consumed_is_a_count_of_the_samples(curriculum: Curriculum) -> None:
    lengths = {plan.name: plan.sequence_length for plan in curriculum.stages}
    counted: Counter[tuple[str, str, str]] = Counter()
    tokens = 0
    while True:
        closed_form = {
            (stage, phase, source): count
            for stage, phases in curriculum.consumed(tokens).items()
            for phase, sources in phases.items()
            for source, count in sources.items()
        }
        assert sum(closed_form.values()) == tokens
        assert {place: count for place, count in closed_form.items() if count} == counted
        if tokens == curriculum.total_tokens:
            return
        now = curriculum.stage_at(tokens)
        for address in curriculum.samples(tokens, range(now.global_batch_size)):
            counted[address.stage, address.phase, address.source] += lengths[address.stage]
        tokens += now.tokens_per_step


def test_only_step_borders_have_samples_and_counts() -> None:
    curriculum = Curriculum(two_stages(), KNOWN)
    for call in (lambda: curriculum.samples(33, [0]), lambda: curriculum.consumed(33)):
        with pytest.raises(ValueError, match="no step border"):
            call()
    for offset in (-1, 4):
        with pytest.raises(ValueError, match="outside a global batch of 4"):
            curriculum.samples(32, [0, offset])
    for sample in (-1, 400):
        with pytest.raises(ValueError, match="has no sample"):
            curriculum.locate("pretrain", sample)


def test_the_seed_and_the_stage_choose_the_order() -> None:
    def order(seed: int, name: str) -> list[int]:
        config = recipe({name: stage(3200, {"p": share(1.0, web=1)})}, seed=seed)
        return [address.index for address in everything(Curriculum(config, KNOWN))]

    assert order(1, "s") == order(1, "s")
    assert order(1, "s") != order(2, "s")
    assert order(1, "s") != order(1, "t")


def test_the_addresses_are_the_same_for_ever() -> None:
    curriculum = Curriculum(two_stages(), KNOWN)
    first = [(address.source, address.index) for address in curriculum.samples(0, range(4))]
    last = [(address.source, address.index) for address in curriculum.samples(3776, range(2))]
    assert first == [("web", 886), ("code", 73), ("web", 83), ("web", 929)]
    assert last == [("web", 6), ("web", 1)]


def test_weights_are_read_as_decimals() -> None:
    # As binary fractions 0.7 / (0.7 + 0.3) is a little below seven tenths, and code would give 6 of 10 samples.
    config = recipe({"s": stage(8 * 1000, {"p": share(1.0, code=0.7, web=0.3)}, batch=10)}, window=10)
    assert Curriculum(config, KNOWN).consumed(80) == {"s": {"p": {"code": 56, "web": 24}}}


def test_a_source_of_weight_zero_is_left_out() -> None:
    phases = {"p": share(1.0, web=1, code=0)}
    assert Curriculum(recipe({"s": stage(320, phases)}), KNOWN).consumed(320) == {"s": {"p": {"web": 320}}}


def test_a_ramp_moves_from_one_blend_to_the_next() -> None:
    # Four windows of 10 samples of 8 tokens, at 1, 3, 5 and 7 eighths of the way; code has the whole samples of it.
    ramped = PhaseConfig(share=0.5, ramp_tokens=335, blend={"code": 1})
    curriculum = Curriculum(recipe({"s": stage(1280, {"p": share(0.5, web=1), "q": ramped})}), KNOWN)
    read = [address.source for address in everything(curriculum)]
    webs = [read[80 + start : 90 + start].count("web") for start in range(0, 80, 10)]
    assert read[:80] == 80 * ["web"]
    assert webs == [9, 7, 4, 2, 0, 0, 0, 0]


def test_epochs_add_up_over_stages() -> None:
    curriculum = Curriculum(two_stages(), KNOWN)
    consumed = curriculum.consumed(curriculum.total_tokens)
    read = consumed["pretrain"]["p3"]["math"], consumed["extension"]["long"]["math"]
    assert curriculum.epochs(consumed)["math"] == Fraction(sum(read), 3000)


WRONG: list[tuple[dict[str, PhaseConfig], str, str]] = [
    ({"p": share(1.0, web=-1)}, "stages.s.phases.p.blend.web", "weight is -1; write a finite number"),
    ({"p": share(1.0, web=math.nan)}, "stages.s.phases.p.blend.web", "weight is nan"),
    ({"p": share(1.0, web=math.inf)}, "stages.s.phases.p.blend.web", "weight is inf"),
    ({"p": share(1.0, web="much")}, "stages.s.phases.p.blend.web", "weight is 'much'"),
    ({"p": share(1.0, web=True)}, "stages.s.phases.p.blend.web", "weight is True"),
    ({"p": share(1.0, web=0, code=0)}, "stages.s.phases.p.blend", "all weights are 0"),
    ({"p": share(1.0)}, "stages.s.phases.p.blend", "at least one source"),
    ({"p": PhaseConfig(share=1.0, blend="tiny_p1")}, "stages.s.phases.p.blend", "is 'tiny_p1'; write a mapping"),
    ({"p": share(1.0, wep=1)}, "stages.s.phases.p.blend.wep", "unknown source; the known ones are code, math, web"),
    ({"p": share(0.5, web=1), "q": share(0.4, web=1)}, "stages.s.phases", "shares add up to 0.9; make them"),
    (
        {"p": share(0.5, web=1), "q": PhaseConfig(tokens=99, blend={"web": 1})},
        "stages.s.phases",
        "259 tokens; make them",
    ),
    ({"p": PhaseConfig(tokens=321, blend={"web": 1})}, "stages.s.phases", "add up to the stage's 320"),
    ({"p": PhaseConfig(blend={"web": 1})}, "stages.s.phases.p", "neither share nor tokens"),
    ({"p": PhaseConfig(share=1.0, tokens=320, blend={"web": 1})}, "stages.s.phases.p", "both share and tokens"),
    ({"p": share(0.97, web=1), "q": share(0.03, web=1)}, "stages.s.phases.q", "no step of 32 tokens begins"),
    ({}, "stages.s.phases", "is empty"),
    (
        {"p": PhaseConfig(share=1.0, ramp_tokens=8, blend={"web": 1})},
        "stages.s.phases.p.ramp_tokens",
        "no phase before",
    ),
    (
        {"p": share(0.5, web=1), "q": PhaseConfig(share=0.5, ramp_tokens=161, blend={"code": 1})},
        "stages.s.phases.q.ramp_tokens",
        "161 is more than the phase's 160 tokens",
    ),
    (
        {"p": share(0.5, web=1), "q": PhaseConfig(share=0.5, ramp_tokens=79, blend={"code": 1})},
        "stages.s.phases.q.ramp_tokens",
        "79 tokens are less than a window",
    ),
    ({"p": share(1.0, web=1, code=9e-7)}, "stages.s.phases.p.blend.code", "takes windows of more than 1048576 samples"),
    (
        {"p": share(1.0, web=1e300, code=1e-300)},
        "stages.s.phases.p.blend.code",
        ".code: takes windows of more than 1048576 samples, the limit, to have one in each; write 0 or a larger weight",
    ),
]


@pytest.mark.parametrize(("phases", "field", "words"), WRONG, ids=[f"{field}: {words}" for _, field, words in WRONG])
def test_wrong_phases_are_named_with_their_fix(phases: dict[str, PhaseConfig], field: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Curriculum(recipe({"s": stage(320, phases)}), KNOWN)
    assert caught.value.field == field
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_needs_a_stage() -> None:
    with pytest.raises(RecipeError, match="stages: is empty"):
        Curriculum(recipe({}), KNOWN)


def test_a_source_needs_the_tokens_of_one_sample() -> None:
    config = recipe({"s": stage(320, {"p": share(1.0, web=1)})})
    with pytest.raises(RecipeError, match=r"blend\.web: the source has 8 tokens, and one sample is 9"):
        Curriculum(config, {"web": SourceSize((8,))})
    assert Curriculum(config, {"web": SourceSize((9,))}).sources["web"].by_stage["s"].samples == 1
