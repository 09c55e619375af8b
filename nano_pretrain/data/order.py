"""Order as a function: keyed permutations, and a blend that keeps exact quotas. No state, no files, O(1) memory."""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Words = Any
"""An int, or an array of uint64: the same expressions serve both, so that the two forms cannot drift apart."""

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 6
_MAX_SIZE = 1 << 62
_COUNT_CHUNK = 1 << 16


def _mix64(word: Words) -> Words:
    """A bijection of 64-bit words in which each input bit flips each output bit with probability near one half.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
    """
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def order_key(*parts: int | str) -> int:
    """A 64-bit key from numbers and names; the same on every machine and in every version of Python."""
    digest = hashlib.blake2b(json.dumps(parts).encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class KeyedPermutation:
    """A permutation of range(size) chosen by a 64-bit key, evaluated at any index without a table.

    A generalised Feistel network with cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains"). Write an index as left * columns + right, with rows = ceil(sqrt(size)) and columns =
    ceil(size / rows). A half-round adds a hash of one half to the other, modulo its range: subtracting the same
    hash undoes it, so every half-round, and the whole network, is a bijection of range(rows * columns). A result
    beyond `size` goes through the network again until it is below: the first return of a bijection to a subset,
    which is a bijection of the subset, for walking back from a result reaches no other index before its own. The
    walks together are at most one tour of all rows * columns < size + rows values, so an evaluation takes fewer than
    1 + 2 / sqrt(size) passes on average.

    Twelve half-rounds. Four are enough where the halves are large (Luby and Rackoff 1988); the rest make the orders
    of a handful of elements come out equally often. This is a shuffle, not a cipher.

    Args:
        size: length of the range, from 1 to 2**62.
        key: which permutation; see `order_key`.

    Raises:
        ValueError: `size` is out of range.
    """

    __slots__ = ("_columns", "_round_keys", "_rows", "size")

    def __init__(self, size: int, key: int) -> None:
        if not 1 <= size <= _MAX_SIZE:
            raise ValueError(f"a permutation of {size} elements is not supported; 1 to 2**62 are")
        self.size = size
        self._rows = math.isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        keys = [_mix64((key + step * _GOLDEN) & _WORD) for step in range(1, 2 * _ROUNDS + 1)]
        self._round_keys = tuple(zip(keys[::2], keys[1::2], strict=True))

    def __call__(self, index: int) -> int:
        """Where `index` goes.

        Raises:
            IndexError: `index` is outside range(size).
        """
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside range({self.size})")
        value: int = self._pass(index)
        while value >= self.size:
            value = self._pass(value)
        return value

    def array(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where each of `indices` goes: the same values as one call for each.

        Raises:
            IndexError: an index is outside range(size).
        """
        if indices.size and not (indices.min() >= 0 and indices.max() < self.size):
            raise IndexError(f"an index is outside range({self.size})")
        values: npt.NDArray[np.uint64] = self._pass(indices.astype(np.uint64))
        while (beyond := np.flatnonzero(values >= self.size)).size:
            values[beyond] = self._pass(values[beyond])
        return values.astype(np.int64)

    def _pass(self, value: Words) -> Words:
        left, right = value // self._columns, value % self._columns
        for left_key, right_key in self._round_keys:
            # Half of the hash's range, so that the sum with a 32-bit half stays inside 64 bits.
            left = (left + (_mix64(right ^ left_key) >> 1)) % self._rows
            right = (right + (_mix64(left ^ right_key) >> 1)) % self._columns
        return left * self._columns + right


class QuotaBlend:
    """Which source each sample of a phase comes from, by weights that hold exactly at the end of every window.

    With C_0 = 0 and C_i the sum of the first i normalised weights, sources in the order of their names, source i
    has given exactly floor(C_i m) - floor(C_(i-1) m) of the first m samples, wherever m is the end of a window or of
    the phase. The sums of these over i telescope to m. Inside a window the samples are permuted by a key.

    Two windows cannot be what the recipe says. Where a weight is worth less than one sample in a window, the formula
    can ask for less at a window's end than at the one before, which no order can do: the window is widened to the
    smallest multiple that holds a sample of every source; then every source's quota grows (for x + 1 <= y,
    ceil(x) <= floor(y)). And where the shorter window at the end of a phase would ask for that, it is merged into
    the one before.

    Args:
        weights: source -> weight, none negative, at least one positive; sources of weight 0 are left out.
        samples: samples of the phase.
        window: samples after which the quotas hold, at least 1.
        key: parts of the key of the permutations; see `order_key`.

    Attributes:
        sources: names, in order.
        samples: samples of the phase.
        window: samples of a window, after widening.
        totals: source -> samples over the whole phase.
    """

    def __init__(self, weights: Mapping[str, Fraction], samples: int, window: int, key: tuple[int | str, ...]) -> None:
        self.sources = tuple(sorted(name for name, weight in weights.items() if weight > 0))
        self.samples = samples
        self._key = key
        scale = math.lcm(*(weights[name].denominator for name in self.sources))
        parts = [int(weights[name] * scale) for name in self.sources]
        self._cumulative = tuple(accumulate(parts, initial=0))
        self._sum = self._cumulative[-1]
        self.window = window * max(1, math.ceil(Fraction(self._sum, min(parts) * window)))
        self._last = self._last_window()
        self.totals = self._by_source(self._edges(samples))

    def locate(self, position: int) -> tuple[str, int]:
        """The source of the sample at `position` of the phase, and its number among the source's samples of the phase.

        Time: O(number of sources).

        Raises:
            IndexError: `position` is outside the phase.
        """
        if not 0 <= position < self.samples:
            raise IndexError(f"position {position} is outside a phase of {self.samples} samples")
        number, start, end = self._window_of(position)
        given, due = self._edges(start), self._edges(end)
        slot = self._permutation(number, end - start)(position - start)
        taken = [after - before for before, after in zip(given, due, strict=True)]
        source = bisect_right(taken, slot) - 1
        return self.sources[source], given[source + 1] - given[source] + slot - taken[source]

    def counts(self, position: int) -> dict[str, int]:
        """How many of the first `position` samples came from each source.

        Closed form at the end of a window; inside one, the window's samples so far are counted.

        Raises:
            IndexError: `position` is outside the phase.
        """
        if not 0 <= position <= self.samples:
            raise IndexError(f"position {position} is outside a phase of {self.samples} samples")
        if position == self.samples:
            return dict(self.totals)
        number, start, end = self._window_of(position)
        given, due = self._edges(start), self._edges(end)
        taken = np.array([after - before for before, after in zip(given, due, strict=True)], dtype=np.int64)
        permutation = self._permutation(number, end - start)
        counts = np.diff(given)
        for first in range(0, position - start, _COUNT_CHUNK):
            slots = permutation.array(np.arange(first, min(first + _COUNT_CHUNK, position - start)))
            counts += np.bincount(np.searchsorted(taken, slots, side="right") - 1, minlength=len(counts))
        return dict(zip(self.sources, counts.tolist(), strict=True))

    def _edges(self, samples: int) -> list[int]:
        """floor(C_i * samples) for i = 0 .. number of sources."""
        return [part * samples // self._sum for part in self._cumulative]

    def _by_source(self, edges: list[int]) -> dict[str, int]:
        return {name: after - before for name, (before, after) in zip(self.sources, pairwise(edges), strict=True)}

    def _last_window(self) -> int:
        """Number of the last window; it runs to the end of the phase."""
        whole, rest = divmod(self.samples, self.window)
        if not whole or not rest:
            return max(whole - 1, 0)
        before, after = self._by_source(self._edges(whole * self.window)), self._by_source(self._edges(self.samples))
        takes_back = any(after[name] < before[name] for name in self.sources)
        return whole - 1 if takes_back else whole

    def _window_of(self, position: int) -> tuple[int, int, int]:
        """Number, start and end of the window that holds `position`."""
        number = min(position // self.window, self._last)
        start = number * self.window
        return number, start, self.samples if number == self._last else start + self.window

    def _permutation(self, number: int, length: int) -> KeyedPermutation:
        return KeyedPermutation(length, order_key(*self._key, number))
