"""Which source each sample of a phase comes from: exact quotas in windows, and ramps from one blend to the next.

Nothing here knows how long a phase is: lengthening it changes nothing of what was read.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from nano_pretrain.data.order import keyed_shuffle, numbered_key, order_key

Weights = Mapping[str, Fraction]
"""Source -> weight, none negative, at least one positive; they need not add up to anything."""

MOST_PLATEAUS = 32
"""Steps of a ramp; the blend then moves by about three percent of the way at a time."""

LARGEST_WINDOW = 1 << 20
"""Samples; the order inside a window is a table in memory."""

CACHED_WINDOWS = 2
"""Of each blend: those that a step reads."""


def widened_window(weights: Weights, window: int) -> int:
    """The smallest multiple of `window` in which every source of positive weight has at least one sample."""
    positive = [weight for weight in weights.values() if weight]
    return window * math.ceil(sum(positive) / (min(positive) * window))


class QuotaBlend:
    """Which source each sample comes from, by weights that hold exactly at the end of every window.

    With C_0 = 0 and C_i the sum of the first i normalised weights, sources in the order of their names, source i
    has given exactly floor(C_i m) - floor(C_(i-1) m) of the first m samples, wherever m is the end of a window. The
    sums of these over i telescope to m. Inside a window the samples are permuted by a key. The order has no end.

    Where a weight is worth less than one sample in a window, the formula can ask for less at a window's end than at
    the one before, which no order can do. Such a window is widened to the smallest multiple that holds a sample of
    every source; then every source's quota grows (for x + 1 <= y, ceil(x) <= floor(y)).

    Args:
        weights: weight of each source; sources of weight 0 are left out.
        window: samples after which the quotas hold, at least 1.
        key: of the permutations; see `order_key`.

    Attributes:
        sources: names, in order.
        window: samples of a window, after widening.
    """

    def __init__(self, weights: Weights, window: int, key: int) -> None:
        self.sources = tuple(sorted(name for name, weight in weights.items() if weight > 0))
        self.window = widened_window(weights, window)
        self._key = key
        scale = math.lcm(*(weights[name].denominator for name in self.sources))
        self._cumulative = tuple(accumulate((int(weights[name] * scale) for name in self.sources), initial=0))
        self._sum = self._cumulative[-1]
        self._order = lru_cache(CACHED_WINDOWS)(self._order_of)

    def locate(self, position: int) -> tuple[str, int]:
        """The source of the sample at `position`, and how many samples the source gave before.

        Time: O(number of sources + window), of which the window's part is a few sorted words.

        Raises:
            IndexError: `position` is negative.
        """
        window, offset = self._window_of(position)
        order = self._order(window)
        source = int(order[offset])
        before = int(np.count_nonzero(order[:offset] == source))
        return self.sources[source], self._given(source, window) + before

    def counts(self, position: int) -> dict[str, int]:
        """How many of the first `position` samples come from each source.

        Closed form at the end of a window; inside one, the window's samples so far are counted.

        Raises:
            IndexError: `position` is negative.
        """
        window, offset = self._window_of(position)
        so_far = [0] * len(self.sources)
        if offset:
            so_far = np.bincount(self._order(window)[:offset], minlength=len(self.sources)).tolist()
        return {name: self._given(source, window) + so_far[source] for source, name in enumerate(self.sources)}

    def position_of(self, source: str, number: int) -> int:
        """Where the sample of `source` lies before which it gave `number`: the inverse of `locate`.

        Raises:
            ValueError: `source` is none of the blend's.
        """
        index = self.sources.index(source)
        # Every window has a sample of the source, so that window `number` begins after at least so many of them.
        window = bisect_right(range(number + 1), number, key=lambda window: self._given(index, window)) - 1
        offsets = np.flatnonzero(self._order(window) == index)
        return window * self.window + int(offsets[number - self._given(index, window)])

    def _window_of(self, position: int) -> tuple[int, int]:
        if position < 0:
            raise IndexError(f"there is no position {position}")
        return divmod(position, self.window)

    def _given(self, source: int, window: int) -> int:
        """Samples of source number `source` before window number `window`: the formula of the quotas."""
        samples, before, after = window * self.window, self._cumulative[source], self._cumulative[source + 1]
        return after * samples // self._sum - before * samples // self._sum

    def _order_of(self, window: int) -> npt.NDArray[np.int16]:
        """Number of the source of each sample of a window."""
        start, end = window * self.window, (window + 1) * self.window
        edges = [part * end // self._sum - part * start // self._sum for part in self._cumulative]
        sources = np.repeat(np.arange(len(self.sources), dtype=np.int16), np.diff(edges))
        return sources[keyed_shuffle(self.window, numbered_key(self._key, window))]


class PhaseBlend:
    """The blend of a phase: the plateaus of a ramp, if there is one, then its own blend without end.

    Args:
        parts: position at which each begins, ascending from 0, and its blend.

    Attributes:
        parts: see above.
        sources: names of all parts' sources, in order.
    """

    def __init__(self, parts: Sequence[tuple[int, QuotaBlend]]) -> None:
        self.parts = tuple(parts)
        self._starts = [start for start, _ in parts]
        self.sources = tuple(sorted({name for _, part in parts for name in part.sources}))
        self._given = [dict.fromkeys(self.sources, 0)]
        for (start, part), (end, _) in pairwise(parts):
            self._given.append(_added(self._given[-1], part.counts(end - start)))

    def locate(self, position: int) -> tuple[str, int]:
        """The source of the sample at `position` of the phase, and how many samples the source gave before.

        Raises:
            IndexError: `position` is negative.
        """
        number, start, part = self._part_at(position)
        source, before = part.locate(position - start)
        return source, self._given[number][source] + before

    def counts(self, position: int) -> dict[str, int]:
        """How many of the first `position` samples come from each source of any part.

        Raises:
            IndexError: `position` is negative.
        """
        number, start, part = self._part_at(position)
        return _added(self._given[number], part.counts(position - start))

    def position_of(self, source: str, number: int) -> int:
        """Where the sample of `source` lies before which it gave `number`.

        Raises:
            ValueError: the phase never gives so many.
        """
        index = bisect_right([given[source] for given in self._given], number) - 1
        start, part = self.parts[index]
        return start + part.position_of(source, number - self._given[index][source])

    def _part_at(self, position: int) -> tuple[int, int, QuotaBlend]:
        number = max(bisect_right(self._starts, position) - 1, 0)
        return number, *self.parts[number]


def _added(counts: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    return {name: count + more.get(name, 0) for name, count in counts.items()}


def steady(weights: Weights, window: int, key: tuple[int | str, ...]) -> PhaseBlend:
    """One blend from the first sample on."""
    return PhaseBlend([(0, QuotaBlend(weights, window, order_key(*key, 0)))])


def ramped(
    before: Weights, weights: Weights, samples: int, window: int, key: tuple[int | str, ...]
) -> PhaseBlend | None:
    """A blend that is reached from another in plateaus of equal length, up to a window, within `samples` samples.

    Plateau j of n has the blend at (2 j + 1) / (2 n) of the way from one blend to the other, both normalised, and is
    a whole number of windows, so that weights are constant inside each. There are as many plateaus as there is room
    for, up to `MOST_PLATEAUS`. None if there is no room for one.
    """
    for plateaus in range(MOST_PLATEAUS, 0, -1):
        # Weights are linear in the way, so that each is smallest on the first or the last plateau.
        wide = max(widened_window(_level(before, weights, end, plateaus), window) for end in (0, plateaus - 1))
        windows = samples // wide
        if plateaus <= windows and wide <= LARGEST_WINDOW:
            levels = [_level(before, weights, plateau, plateaus) for plateau in range(plateaus)]
            blends = [QuotaBlend(level, wide, order_key(*key, number)) for number, level in enumerate(levels)]
            blends.append(QuotaBlend(weights, window, order_key(*key, plateaus)))
            return PhaseBlend([(wide * (windows * n // plateaus), blend) for n, blend in enumerate(blends)])
    return None


def _level(before: Weights, after: Weights, plateau: int, plateaus: int) -> dict[str, Fraction]:
    """Normalised weights of a plateau: those in its middle."""
    way, sums = Fraction(2 * plateau + 1, 2 * plateaus), (sum(before.values()), sum(after.values()))
    return {
        name: (1 - way) * before.get(name, Fraction(0)) / sums[0] + way * after.get(name, Fraction(0)) / sums[1]
        for name in {**before, **after}
    }
