import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import ScheduleConfig
from nano_pretrain.schedule.learning_rate import DECAY_SHAPES, learning_rate, validate_schedule

FIELD = "stages.pretrain.schedule"
TWENTY_TRILLION = 20_000_000_000_000


def nano_12b_v2(shape: str = "minus_sqrt") -> ScheduleConfig:
    return ScheduleConfig(
        kind="wsd",
        lr=4.5e-4,
        min_lr=4.5e-6,
        warmup_tokens=8_000_000_000,
        decay_tokens=3_600_000_000_000,
        decay_shape=shape,
    )


@pytest.mark.parametrize("shape", sorted(DECAY_SHAPES))
def test_the_12b_is_exact_at_its_borders(shape: str) -> None:
    schedule = nano_12b_v2(shape)
    rates = [
        learning_rate(schedule, TWENTY_TRILLION, tokens)
        for tokens in (0, 4_000_000_000, 8_000_000_000, 16_400_000_000_000, TWENTY_TRILLION)
    ]
    assert rates == [0.0, 2.25e-4, 4.5e-4, 4.5e-4, 4.5e-6]


@pytest.mark.parametrize(
    ("shape", "quarter"), [("linear", 0.75), ("cosine", 0.5 + math.sqrt(0.125)), ("minus_sqrt", 0.5)]
)
def test_each_shape_a_quarter_into_the_decay(shape: str, quarter: float) -> None:
    schedule = ScheduleConfig(kind="wsd", lr=1.0, min_lr=0.0, decay_tokens=100, decay_shape=shape)
    assert learning_rate(schedule, 200, 125) == pytest.approx(quarter, rel=1e-15)


def test_the_nemotron_h_cosine_runs_from_the_warm_up_to_one_percent() -> None:
    schedule = ScheduleConfig(kind="cosine", lr=8e-4, min_lr=8e-6, warmup_tokens=1000)
    assert learning_rate(schedule, 9000, 1000) == 8e-4
    assert learning_rate(schedule, 9000, 5000) == pytest.approx((8e-4 + 8e-6) / 2, rel=1e-15)
    assert learning_rate(schedule, 9000, 9000) == 8e-6


def test_constant_stays_at_the_peak() -> None:
    schedule = ScheduleConfig(kind="constant", lr=4.5e-6)
    assert {learning_rate(schedule, 100, tokens) for tokens in (1, 50, 100, 107)} == {4.5e-6}


def test_a_last_step_beyond_the_stage_ends_where_the_stage_ends() -> None:
    assert learning_rate(nano_12b_v2(), TWENTY_TRILLION, TWENTY_TRILLION + 5_000_000) == 4.5e-6
    without_decay = ScheduleConfig(kind="wsd", lr=1e-3)
    assert learning_rate(without_decay, 100, 105) == 1e-3


def test_negative_tokens_are_a_programming_error() -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        learning_rate(nano_12b_v2(), TWENTY_TRILLION, -1)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[ScheduleConfig, int]:
    tokens = draw(st.integers(1, 10**13))
    warmup = draw(st.integers(0, tokens))
    lr, kind = draw(st.floats(1e-8, 1.0)), draw(st.sampled_from(["wsd", "cosine", "constant"]))
    schedule = ScheduleConfig(
        kind=kind,
        lr=lr,
        min_lr=lr if kind == "constant" else lr * draw(st.floats(0.0, 1.0)),
        warmup_tokens=warmup,
        decay_tokens=draw(st.integers(0, tokens - warmup)) if kind == "wsd" else 0,
        decay_shape=draw(st.sampled_from(sorted(DECAY_SHAPES))),
    )
    return schedule, tokens


@given(schedules(), st.data())
@settings(deadline=None)
def test_the_rate_rises_through_the_warm_up_and_never_after(
    drawn: tuple[ScheduleConfig, int], data: st.DataObject
) -> None:
    schedule, tokens = drawn
    validate_schedule(schedule, tokens, FIELD)
    early, late = sorted(data.draw(st.lists(st.integers(0, tokens), min_size=2, max_size=2)))
    first, second = (learning_rate(schedule, tokens, at) for at in (early, late))
    assert 0.0 <= first <= schedule.lr
    # One part in 1e12 is rounding of the interpolation between lr and min_lr.
    if late <= schedule.warmup_tokens:
        assert first <= second * (1 + 1e-12)
    if early >= schedule.warmup_tokens:
        assert second <= first * (1 + 1e-12)
        assert second >= schedule.min_lr * (1 - 1e-12)


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"kind": "wsdd"}, "kind", "wsd, cosine, constant"),
        ({"decay_shape": "exp"}, "decay_shape", "linear, cosine, minus_sqrt"),
        ({"min_lr": 5e-4}, "min_lr", "above the peak"),
        ({"warmup_tokens": TWENTY_TRILLION + 1}, "warmup_tokens", "at most 20000000000000"),
        ({"decay_tokens": 19_999_000_000_000}, "decay_tokens", "at most 19992000000000"),
        ({"kind": "cosine", "decay_tokens": 0, "warmup_tokens": 10**14}, "warmup_tokens", "at most 20000000000000"),
        ({"kind": "cosine"}, "decay_tokens", "does nothing with stages.pretrain.schedule.kind=cosine"),
        ({"kind": "constant", "min_lr": 0.0}, "decay_tokens", "does nothing with"),
        ({"kind": "constant", "decay_tokens": 0}, "min_lr", "4.5e-06 does nothing with"),
    ],
)
def test_a_wrong_schedule_is_named_with_its_fix(change: dict[str, object], field: str, words: str) -> None:
    schedule = nano_12b_v2()
    for name, value in change.items():
        setattr(schedule, name, value)
    with pytest.raises(RecipeError) as caught:
        validate_schedule(schedule, TWENTY_TRILLION, FIELD)
    assert caught.value.field == f"{FIELD}.{field}"
    assert words in str(caught.value)


@pytest.mark.parametrize("min_lr", [0.0, 4.5e-6])
def test_a_constant_rate_may_say_that_it_ends_as_it_is(min_lr: float) -> None:
    validate_schedule(ScheduleConfig(kind="constant", lr=4.5e-6, min_lr=min_lr), 100, FIELD)
