"""The code of a launch as a function of how its ranks ended."""

from hypothesis import given
from hypothesis import strategies as st

from nano_pretrain.launch.supervise import Cause, End, Outcome

_ITSELF = st.builds(End, st.integers(0, 7), st.sampled_from([0, 1, 2, 75, 127, -6, -9, -11]), st.just(Cause.ITSELF))
_ASKED = st.builds(End, st.integers(0, 7), st.sampled_from([-2, -10, -15]), st.just(Cause.ON_REQUEST))
_KILLED = st.builds(End, st.integers(0, 7), st.just(-9), st.sampled_from([Cause.GRACE_OVER, Cause.PEER_GONE]))
_OUTCOMES = st.lists(_ITSELF | _ASKED | _KILLED, min_size=1, max_size=8).map(lambda ends: Outcome(tuple(ends)))


@given(_OUTCOMES)
def test_done_means_that_every_rank_was_done(outcome: Outcome) -> None:
    assert (outcome.code == 0) == all(end.code == 0 for end in outcome.ends)


@given(_OUTCOMES)
def test_a_failed_rank_is_never_hidden(outcome: Outcome) -> None:
    failed = any(end.failed for end in outcome.ends)
    assert (outcome.code in (1, 2)) == failed
    assert (outcome.failure is not None) == failed


@given(_OUTCOMES)
def test_ranks_ended_with_a_lost_peer_do_not_change_the_code(outcome: Outcome) -> None:
    fallen = End(8, -9, Cause.PEER_GONE)
    if outcome.code != 0:
        assert Outcome((fallen, *outcome.ends, fallen)).code == outcome.code


def test_the_first_killed_rank_is_blamed_before_a_later_user_error() -> None:
    killed, complaint = End(1, -9, Cause.ITSELF), End(0, 2, Cause.ITSELF)
    assert Outcome((killed, complaint)).failure is killed
    assert Outcome((complaint, killed)).failure is complaint
