from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_pretrain.data.order import KeyedPermutation, keyed_shuffle, numbered_key, order_key

KEYS = st.integers(0, 2**64 - 1)
SIZES = st.integers(1, 400) | st.sampled_from([4095, 4096, 4097, 7919])


@given(SIZES, KEYS)
@settings(deadline=None)
def test_a_permutation_takes_every_value_once(size: int, key: int) -> None:
    values = KeyedPermutation(size, key).array(np.arange(size))
    assert sorted(values.tolist()) == list(range(size))


def test_walks_of_any_length_end_below_the_size() -> None:
    # Of the values beyond 5 = 3 x 2 - 1 and 7 = 3 x 3 - 2 some lead to each other.
    for size, key in itertools.product((2, 3, 5, 7, 10, 13), range(200)):
        permutation = KeyedPermutation(size, key)
        assert sorted(map(permutation, range(size))) == list(range(size))


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


@given(SIZES, KEYS)
@settings(deadline=None)
def test_a_shuffle_takes_every_place_once(size: int, key: int) -> None:
    assert sorted(keyed_shuffle(size, key).tolist()) == list(range(size))


def test_shuffles_of_a_family_are_the_same_for_ever_and_differ() -> None:
    assert keyed_shuffle(8, numbered_key(7, 0)).tolist() == [1, 5, 6, 0, 7, 4, 3, 2]
    shuffles = {tuple(keyed_shuffle(100, numbered_key(key, n)).tolist()) for key in (1, 2) for n in range(50)}
    assert len(shuffles) == 100


def test_all_shuffles_of_four_come_out_equally_often() -> None:
    orders = Counter(tuple(keyed_shuffle(4, numbered_key(1, n)).tolist()) for n in range(24 * 200))
    # As for the permutations above.
    assert len(orders) == 24
    assert sum((count - 200) ** 2 / 200 for count in orders.values()) < 49.7
