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
    step = clock.first_step_from(boundary)
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
