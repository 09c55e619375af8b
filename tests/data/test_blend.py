"""Quotas hold at the end of every window, ramps move in plateaus, and nothing knows how long a phase is."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import pairwise
from math import floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_pretrain.data.blend import MOST_PLATEAUS, PhaseBlend, QuotaBlend, ramped, steady, widened_window

NAMES = st.sampled_from("abcdefg")
FRACTIONS = st.fractions(0, 100, max_denominator=50)
UNEVEN = st.sampled_from([Fraction(1, 997), Fraction(1, 31), Fraction(7, 3), Fraction(1000), Fraction(0)])
WEIGHTS = st.dictionaries(NAMES, FRACTIONS | UNEVEN, min_size=1).filter(lambda weights: any(weights.values()))
BLENDS = st.tuples(WEIGHTS, st.integers(1, 60), st.integers(0, 2**64 - 1))


def quota(weights: dict[str, Fraction], samples: int) -> dict[str, int]:
    """The formula of the quotas, as it reads."""
    total, before = sum(weights.values()), Fraction(0)
    quotas = {}
    for source in sorted(weights):
        after = before + weights[source] / total
        quotas[source] = floor(after * samples) - floor(before * samples)
        before = after
    return {source: count for source, count in quotas.items() if weights[source]}


@given(BLENDS, st.integers(0, 10**15))
@settings(deadline=None)
def test_quotas_hold_at_the_end_of_every_window(blend: tuple[dict[str, Fraction], int, int], far: int) -> None:
    weights, window, key = blend
    found = QuotaBlend(weights, window, key)
    for windows in (0, 1, 2, far):
        assert found.counts(windows * found.window) == quota(weights, windows * found.window)
    samples = min(2 * found.window, 2000)
    sources = [found.locate(position)[0] for position in range(samples)]
    for end in range(found.window, samples + 1, found.window):
        assert {source: sources[:end].count(source) for source in found.sources} == quota(weights, end)


@given(BLENDS, st.integers(0, 10**15))
@settings(deadline=None)
def test_samples_of_a_source_come_in_order_each_once(blend: tuple[dict[str, Fraction], int, int], first: int) -> None:
    weights, window, key = blend
    found = QuotaBlend(weights, window, key)
    counted = found.counts(first)
    for position in range(first, first + 100):
        source, before = found.locate(position)
        assert before == counted[source]
        assert found.position_of(source, before) == position
        counted[source] += 1
    assert found.counts(first + 100) == counted


@given(BLENDS)
@settings(deadline=None)
def test_only_a_weight_below_one_sample_widens_the_window(blend: tuple[dict[str, Fraction], int, int]) -> None:
    weights, window, key = blend
    smallest = min(weight for weight in weights.values() if weight) / sum(weights.values())
    wide = QuotaBlend(weights, window, key).window
    assert wide % window == 0
    assert smallest * wide >= 1
    assert wide == window or smallest * (wide - window) < 1


def test_without_widening_the_formula_would_take_a_sample_back() -> None:
    weights = {"a": Fraction(49), "b": Fraction(1), "c": Fraction(50)}
    assert (quota(weights, 2)["b"], quota(weights, 3)["b"]) == (1, 0)
    assert QuotaBlend(weights, window=1, key=0).window == 100


def test_the_order_of_the_mapping_does_not_matter_and_the_key_does() -> None:
    weights = {"a": Fraction(2), "b": Fraction(3), "c": Fraction(5)}
    turned = dict(reversed(weights.items()))
    first, same, other = (
        [QuotaBlend(chosen, 50, key).locate(position)[0] for position in range(100)]
        for chosen, key in [(weights, 1), (turned, 1), (weights, 2)]
    )
    assert first == same
    assert first != other
    assert first[:50] != first[50:]
    assert first[:50] != sorted(first[:50])


def test_hundreds_of_sources_far_away() -> None:
    weights = {f"source-{n:03}": Fraction(n + 1) for n in range(300)}
    blend = QuotaBlend(weights, window=1024, key=0)
    position = 987_654_321_987_654_321
    source, number = blend.locate(position)
    start = position - position % blend.window
    assert blend.counts(start) == quota(weights, start)
    assert blend.counts(start)[source] <= number < blend.counts(start + blend.window)[source]
    assert sum(blend.counts(position).values()) == position


def test_a_position_before_the_first_is_refused() -> None:
    for call in (blend := steady({"a": Fraction(1)}, 4, (0,))).locate, blend.counts:
        with pytest.raises(IndexError):
            call(-1)


def ramp(before: dict[str, Fraction], after: dict[str, Fraction], window: int, samples: int) -> PhaseBlend:
    found = ramped(before, after, samples, window, (1, "p"))
    assert found is not None
    return found


@given(WEIGHTS, WEIGHTS, st.integers(1, 40), st.integers(0, 10**6))
@settings(deadline=None)
def test_a_ramp_is_plateaus_of_whole_windows(
    before: dict[str, Fraction], after: dict[str, Fraction], window: int, samples: int
) -> None:
    found = ramped(before, after, samples, window, (1, "p"))
    if found is None:
        return
    (*plateaus, (end, own)) = found.parts
    assert 1 <= len(plateaus) <= MOST_PLATEAUS
    assert (own.window, own.counts(own.window)) == (widened_window(after, window), quota(after, own.window))
    wide = plateaus[0][1].window
    assert samples - wide < end <= samples
    lengths = [later - earlier for (earlier, _), (later, _) in pairwise(found.parts)]
    assert max(lengths) - min(lengths) in (0, wide)
    for number, ((_, plateau), length) in enumerate(zip(plateaus, lengths, strict=True)):
        way = Fraction(2 * number + 1, 2 * len(plateaus))
        level = {
            name: (1 - way) * before.get(name, 0) / sum(before.values())
            + way * after.get(name, 0) / sum(after.values())
            for name in {**before, **after}
        }
        assert plateau.window == wide
        assert length % wide == 0
        assert plateau.counts(length) == quota(level, length)


def test_a_ramp_counts_and_finds_its_samples() -> None:
    before, after = {"a": Fraction(3), "b": Fraction(1)}, {"b": Fraction(1), "c": Fraction(3)}
    found = ramp(before, after, window=10, samples=475)
    # The windows of the first plateau have to hold a sample of c, and 12 plateaus of 40 do not fit.
    assert (len(found.parts), found.parts[-1][0]) == (12, 450)
    counted = Counter(dict.fromkeys("abc", 0))
    for position in range(700):
        assert found.counts(position) == counted
        source, number = found.locate(position)
        assert number == counted[source]
        assert found.position_of(source, number) == position
        counted[source] += 1
    assert found.counts(450)["a"] == found.counts(700)["a"] > 0


def test_a_ramp_without_room_for_a_window_is_none() -> None:
    before, after = {"a": Fraction(1)}, {"b": Fraction(1)}
    assert ramped(before, after, 9, 10, (1,)) is None
    assert len(ramp(before, after, window=10, samples=10).parts) == 2
