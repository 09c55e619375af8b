from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_pretrain.data.order import KeyedPermutation, QuotaBlend, order_key

KEYS = st.integers(0, 2**64 - 1)
SIZES = st.integers(1, 400) | st.sampled_from([4095, 4096, 4097, 7919])


@given(SIZES, KEYS)
@settings(deadline=None)
def test_a_permutation_takes_every_value_once(size: int, key: int) -> None:
    values = KeyedPermutation(size, key).array(np.arange(size))
    assert sorted(values.tolist()) == list(range(size))


@given(st.integers(1, 2**62), KEYS, st.data())
@settings(deadline=None)
def test_the_array_form_equals_the_single_form(size: int, key: int, data: st.DataObject) -> None:
    permutation = KeyedPermutation(size, key)
    indices = [*data.draw(st.lists(st.integers(0, size - 1), max_size=8)), 0, size - 1]
    values = permutation.array(np.array(indices)).tolist()
    assert values == [permutation(index) for index in indices]
    assert all(0 <= value < size for value in values)


def test_the_order_is_the_same_for_ever() -> None:
    assert order_key(1234, "window", "pretrain", "p1", 0) == 16809510271172777309
    assert KeyedPermutation(10, key=7).array(np.arange(10)).tolist() == [5, 0, 3, 4, 6, 7, 1, 9, 8, 2]
    large = KeyedPermutation(1_464_843_750, key=42)
    assert [large(index) for index in (0, 1, 1_464_843_749)] == [792074418, 1268353549, 627264732]
    largest = KeyedPermutation(2**62, key=2**64 - 1)
    assert [largest(index) for index in (0, 2**62 - 1)] == [1479924789507789721, 2160691981439821863]


def test_keys_tell_numbers_from_names_and_do_not_run_together() -> None:
    parts: list[tuple[int | str, ...]] = [(1, 2), ("1", 2), (12,), (1, "2"), ("a", "bc"), ("ab", "c"), ("abc",)]
    assert len({order_key(*some) for some in parts}) == len(parts)


def test_all_orders_of_four_come_out_equally_often() -> None:
    draws = 24 * 200
    orders = Counter(tuple(KeyedPermutation(4, order_key(n)).array(np.arange(4)).tolist()) for n in range(draws))
    chi_square = sum((orders[order] - 200) ** 2 / 200 for order in orders)
    assert len(orders) == 24
    # 23 degrees of freedom: 49.7 is exceeded by chance once in a thousand, and the draws are fixed.
    assert chi_square < 49.7


def test_neighbours_are_scattered() -> None:
    values = KeyedPermutation(100_000, key=3).array(np.arange(100_000))
    # The standard error of a correlation over 1e5 pairs is 0.003.
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.012
    assert abs(np.corrcoef(np.arange(100_000), values)[0, 1]) < 0.012


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_a_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="not supported"):
        KeyedPermutation(size, key=0)


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_out_of_range_is_refused(index: int) -> None:
    permutation = KeyedPermutation(10, key=0)
    with pytest.raises(IndexError):
        permutation(index)
    with pytest.raises(IndexError):
        permutation.array(np.array([3, index]))


NAMES = st.sampled_from("abcdefg")
WEIGHTS = st.dictionaries(NAMES, st.fractions(0, 100, max_denominator=50), min_size=1).filter(
    lambda weights: any(weights.values())
)
PHASES = st.tuples(WEIGHTS, st.integers(1, 500), st.integers(1, 60), KEYS)


def quota(weights: dict[str, Fraction], samples: int) -> dict[str, int]:
    """The formula of the quotas, as it reads."""
    total, before = sum(weights.values()), Fraction(0)
    quotas = {}
    for source in sorted(weights):
        after = before + weights[source] / total
        quotas[source] = floor(after * samples) - floor(before * samples)
        before = after
    return {source: count for source, count in quotas.items() if weights[source]}


def window_ends(weights: dict[str, Fraction], blend: QuotaBlend) -> list[int]:
    """Where the quotas have to hold: every window's end but one from which no order leads on to the phase's end."""
    ends = list(range(blend.window, blend.samples, blend.window))
    if ends:
        given, due = quota(weights, ends[-1]), quota(weights, blend.samples)
        ends = ends[:-1] if any(due[source] < given[source] for source in due) else ends
    return [*ends, blend.samples]


@given(PHASES)
@settings(deadline=None)
def test_quotas_hold_at_the_end_of_every_window(phase: tuple[dict[str, Fraction], int, int, int]) -> None:
    weights, samples, window, seed = phase
    blend = QuotaBlend(weights, samples, window, (seed,))
    sources = [blend.locate(position)[0] for position in range(samples)]
    for end in window_ends(weights, blend):
        assert {source: sources[:end].count(source) for source in blend.sources} == quota(weights, end)
    assert blend.totals == quota(weights, samples)


@given(PHASES)
@settings(deadline=None)
def test_every_sample_of_every_source_comes_once(phase: tuple[dict[str, Fraction], int, int, int]) -> None:
    weights, samples, window, seed = phase
    blend = QuotaBlend(weights, samples, window, (seed,))
    located = [blend.locate(position) for position in range(samples)]
    assert sorted(located) == [(source, number) for source in blend.sources for number in range(blend.totals[source])]


@given(PHASES)
@settings(deadline=None, max_examples=30)
def test_counts_equal_counting(phase: tuple[dict[str, Fraction], int, int, int]) -> None:
    weights, samples, window, seed = phase
    blend = QuotaBlend(weights, samples, window, (seed,))
    counted = dict.fromkeys(blend.sources, 0)
    for position in range(samples):
        assert blend.counts(position) == counted
        counted[blend.locate(position)[0]] += 1
    assert blend.counts(samples) == counted


def test_a_window_longer_than_a_chunk_is_counted_whole() -> None:
    blend = QuotaBlend({"a": Fraction(3), "b": Fraction(1)}, samples=200_000, window=200_000, key=(0,))
    counts = blend.counts(150_000)
    assert sum(counts.values()) == 150_000
    # Drawn without replacement: the standard deviation is 97.
    assert abs(counts["a"] - 112_500) < 500


@given(PHASES)
@settings(deadline=None)
def test_only_a_weight_below_one_sample_widens_the_window(phase: tuple[dict[str, Fraction], int, int, int]) -> None:
    weights, samples, window, seed = phase
    smallest = min(weight for weight in weights.values() if weight) / sum(weights.values())
    blend = QuotaBlend(weights, samples, window, (seed,))
    assert blend.window % window == 0
    assert smallest * blend.window >= 1
    assert blend.window == window or smallest * (blend.window - window) < 1


def test_without_widening_the_formula_would_take_a_sample_back() -> None:
    weights = {"a": Fraction(49), "b": Fraction(1), "c": Fraction(50)}
    assert (quota(weights, 2)["b"], quota(weights, 3)["b"]) == (1, 0)
    assert QuotaBlend(weights, samples=300, window=1, key=(0,)).window == 100


def test_a_last_window_that_would_take_a_sample_back_is_merged() -> None:
    weights = {"a": Fraction(2), "b": Fraction(1), "c": Fraction(2)}
    assert (quota(weights, 12)["b"], quota(weights, 13)["b"]) == (3, 2)
    blend = QuotaBlend(weights, samples=13, window=6, key=(0,))
    assert blend.counts(6) == quota(weights, 6)
    assert blend.counts(13) == blend.totals == quota(weights, 13)


def test_a_last_window_that_can_is_cut_to_what_is_left() -> None:
    weights = {"a": Fraction(1), "b": Fraction(1)}
    blend = QuotaBlend(weights, samples=13, window=6, key=(0,))
    assert blend.counts(12) == {"a": 6, "b": 6}
    assert blend.locate(12) == ("b", 6)


def test_the_order_of_the_mapping_does_not_matter_and_the_key_does() -> None:
    weights = {"a": Fraction(2), "b": Fraction(3), "c": Fraction(5)}
    turned = dict(reversed(weights.items()))
    first, same, other = (
        [QuotaBlend(chosen, 100, 50, key).locate(position) for position in range(100)]
        for chosen, key in [(weights, ("p1",)), (turned, ("p1",)), (weights, ("p2",))]
    )
    assert first == same
    assert first != other
    sources = [source for source, _ in first]
    assert sources[:50] != sources[50:]
    assert sources[:50] != sorted(sources[:50])


def test_hundreds_of_sources_over_a_billion_samples() -> None:
    weights = {f"source-{n:03}": Fraction(n + 1) for n in range(300)}
    blend = QuotaBlend(weights, samples=10**9, window=1024, key=(0,))
    position = 987_654_321
    source, number = blend.locate(position)
    start = position - position % blend.window
    assert blend.counts(start) == quota(weights, start)
    assert blend.counts(start)[source] <= number < blend.counts(start + blend.window)[source]
    assert sum(blend.counts(position).values()) == position


@pytest.mark.parametrize("position", [-1, 10])
def test_a_position_outside_the_phase_is_refused(position: int) -> None:
    blend = QuotaBlend({"a": Fraction(1)}, samples=10, window=4, key=(0,))
    with pytest.raises(IndexError):
        blend.locate(position)
    with pytest.raises(IndexError):
        blend.counts(position + 1 if position > 0 else position)
