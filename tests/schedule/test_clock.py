from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_pretrain.schedule.clock import TokenClock

CLOCKS = st.builds(TokenClock, st.integers(0, 10**14), st.integers(1, 10**14), st.integers(1, 10**8))


def test_the_12b_takes_3_317_128_steps_and_one_for_the_rest() -> None:
    clock = TokenClock(0, 20_000_000_000_000, 736 * 8192)
    assert clock.steps == 3_317_129
    assert clock.end_tokens - 20_000_000_000_000 == 5_685_248


@given(CLOCKS)
@settings(deadline=None)
def test_the_last_step_is_whole_and_needed(clock: TokenClock) -> None:
    consumed = clock.end_tokens - clock.start_tokens
    assert consumed % clock.tokens_per_step == 0
    assert consumed - clock.tokens_per_step < clock.tokens <= consumed


@given(CLOCKS, st.fractions(0, 10**14))
@settings(deadline=None)
def test_the_first_step_from_a_boundary_starts_there_or_after(clock: TokenClock, boundary: Fraction) -> None:
    step, rest = divmod(clock.border_from(boundary) - clock.start_tokens, clock.tokens_per_step)
    assert rest == 0
    assert step * clock.tokens_per_step >= boundary
    assert step == 0 or (step - 1) * clock.tokens_per_step < boundary


@given(CLOCKS, st.data())
@settings(deadline=None)
def test_step_at_inverts_the_borders(clock: TokenClock, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, clock.steps))
    assert clock.step_at(clock.start_tokens + step * clock.tokens_per_step) == step


@pytest.mark.parametrize("consumed", [99, 101, 110 - 1, 131, 140, 90])
def test_what_is_no_border_of_the_stage_is_refused(consumed: int) -> None:
    with pytest.raises(ValueError, match="no step border"):
        TokenClock(start_tokens=100, tokens=25, tokens_per_step=10).step_at(consumed)


def sizes_one_by_one(clock: TokenClock) -> list[tuple[int, int]]:
    """Consumed tokens before each step, and the step's size, by walking."""
    steps, within = [], 0
    while within < clock.tokens:
        size = [clock.tokens_per_step, *(size for at, size in clock.changes if at <= within)][-1]
        steps.append((clock.start_tokens + within, size))
        within += size
    return [*steps, (clock.start_tokens + within, 0)]


CHANGES = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=5).map(lambda them: tuple(sorted(them)))
CHANGING = st.builds(TokenClock, st.integers(0, 50), st.integers(1, 300), st.integers(1, 40), CHANGES)


@given(CHANGING)
@settings(deadline=None)
def test_steps_change_their_size_at_the_first_border_from_there(clock: TokenClock) -> None:
    *steps, (end, _) = sizes_one_by_one(clock)
    assert (clock.steps, clock.end_tokens) == (len(steps), end)
    for number, (consumed, size) in enumerate(steps):
        assert (clock.step_at(consumed), clock.step_tokens(consumed)) == (number, size)
    with pytest.raises(ValueError, match="end of the stage"):
        clock.step_tokens(end)


@given(CHANGING, st.fractions(0, 300))
@settings(deadline=None)
def test_borders_from_a_boundary_with_changes(clock: TokenClock, boundary: Fraction) -> None:
    borders = [consumed for consumed, _ in sizes_one_by_one(clock)]
    if boundary <= clock.tokens:
        found = clock.border_from(boundary)
        assert found == next(border for border in borders if border - clock.start_tokens >= boundary)
        assert borders[clock.step_at(found)] == found


@given(CHANGING)
@settings(deadline=None)
def test_between_the_borders_is_none(clock: TokenClock) -> None:
    borders = {consumed for consumed, _ in sizes_one_by_one(clock)}
    for consumed in range(clock.end_tokens + 2):
        if consumed not in borders:
            with pytest.raises(ValueError, match="no step border"):
                clock.step_at(consumed)


@given(CHANGING)
@settings(deadline=None)
def test_runs_of_equal_steps(clock: TokenClock) -> None:
    assert [size for size, steps in clock.runs for _ in range(steps)] == [s for _, s in sizes_one_by_one(clock)[:-1]]


@given(CHANGING, st.data())
@settings(deadline=None)
def test_sizes_that_are_ahead(clock: TokenClock, data: st.DataObject) -> None:
    steps = sizes_one_by_one(clock)[:-1]
    number = data.draw(st.integers(0, len(steps) - 1))
    ahead = [size for _, size in steps[number:]]
    distinct = [size for place, size in enumerate(ahead) if place == 0 or size != ahead[place - 1]]
    found = clock.sizes_from(steps[number][0])
    assert [size for place, size in enumerate(found) if place == 0 or size != found[place - 1]] == distinct
