"""Interpolated modified Kneser-Ney n-gram models: the baselines that a trained model has to beat.

Chen and Goodman 1998, "An empirical study of smoothing techniques for language modeling" (TR-10-98), section 3, the
interpolated form: with c the count of an n-gram, h its first tokens and h' those without the first of them,

    p(w | h) = max(c(h w) - D(c(h w)), 0) / c(h) + gamma(h) p(w | h')

where c(h) is the sum of the counts after h, D takes three values, for counts of 1, 2, and 3 or more, and gamma(h) is
what the discounts after h set free, divided by c(h). The longest n-grams count occurrences. A shorter one counts the
different tokens found before it, the start of a segment being one of them. The recursion ends in 1 / vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""Used where the counts of counts give none, as in a few hundred tokens or where every n-gram occurs twice."""


@dataclass(frozen=True)
class _Level:
    """The n-grams of one length, packed into integers, and their contexts; both sorted."""

    ngrams: Ints
    discounted: Floats
    contexts: Ints
    totals: Ints
    gammas: Floats


class NgramModel:
    """An interpolated modified Kneser-Ney model of order `order`.

    Args:
        tokens: training tokens, [n], ids from 0 to vocab_size - 1. Text that a run read twice should be here once:
            repetition tells an n-gram model nothing and spoils the estimate of the discounts.
        segment_starts: first positions of the segments, [segments], ascending from 0. N-grams do not cross them.
        vocab_size: number of different token ids.
        order: length of the longest n-gram: 2 is a bigram model, 3 a trigram model.

    Raises:
        ValueError: an id is out of range, the segments are not ascending from 0, there is nothing to train on, or
            n-grams of this order and vocabulary do not fit into 63 bits.
    """

    def __init__(self, tokens: npt.NDArray[Any], segment_starts: npt.NDArray[Any], vocab_size: int, order: int) -> None:
        if order < 1 or (vocab_size + 1) ** order >= 1 << 63:
            raise ValueError(f"order {order} with a vocabulary of {vocab_size} does not fit into 63 bits")
        if not tokens.size:
            raise ValueError("an n-gram model needs at least one training token")
        self.order = order
        self.vocab_size = vocab_size
        stream, depths = self._checked(tokens, segment_starts)
        self._levels = [self._train_level(stream, depths, length) for length in range(1, order + 1)]

    def nats(self, tokens: npt.NDArray[Any], segment_starts: npt.NDArray[Any]) -> Floats:
        """Negative log-probability of each token given those before it in its segment, [n], in nats.

        The first tokens of a segment are predicted from as many as there are.

        Raises:
            ValueError: an id is out of range, or the segments are not ascending from 0.
        """
        stream, depths = self._checked(tokens, segment_starts)
        probabilities = np.full(len(stream), 1.0 / self.vocab_size)
        for length, level in enumerate(self._levels, start=1):
            positions = np.flatnonzero(depths >= length - 1)
            ngrams = self._packed(stream, positions, length)
            row, known = _find(level.contexts, ngrams // self.vocab_size)
            positions, ngrams, row = positions[known], ngrams[known], row[known]
            column, seen = _find(level.ngrams, ngrams)
            own = np.where(seen, level.discounted[column], 0.0) / level.totals[row]
            probabilities[positions] = own + level.gammas[row] * probabilities[positions]
        nats: Floats = -np.log(probabilities)
        return nats

    def _checked(self, tokens: npt.NDArray[Any], segment_starts: npt.NDArray[Any]) -> tuple[Ints, Ints]:
        """The tokens, and how many tokens of its segment precede each."""
        stream, starts = tokens.astype(np.int64), segment_starts.astype(np.int64)
        if stream.size and not (stream.min() >= 0 and stream.max() < self.vocab_size):
            raise ValueError(f"token ids must lie in range({self.vocab_size})")
        lengths = np.diff(starts, append=len(stream))
        if stream.size and (not starts.size or starts[0] != 0 or lengths.min() < 1):
            raise ValueError("segment starts must ascend from 0 and stay below the number of tokens")
        return stream, np.arange(len(stream)) - np.repeat(starts, lengths)

    def _packed(self, stream: Ints, positions: Ints, length: int) -> Ints:
        """The n-grams of `length` tokens that end at `positions`, as digits to the base of the vocabulary."""
        packed = np.zeros(len(positions), dtype=np.int64)
        for back in range(length - 1, -1, -1):
            packed = packed * self.vocab_size + stream[positions - back]
        return packed

    def _train_level(self, stream: Ints, depths: Ints, length: int) -> _Level:
        positions = np.flatnonzero(depths >= length - 1)
        packed = self._packed(stream, positions, length)
        if length < self.order:
            before = np.where(depths[positions] >= length, stream[positions - length], self.vocab_size)
            packed = packed * (self.vocab_size + 1) + before
        packed.sort()
        if length < self.order:
            packed = _runs(packed)[0] // (self.vocab_size + 1)
        return _level(*_runs(packed), self.vocab_size)


def _level(ngrams: Ints, counts: Ints, vocab_size: int) -> _Level:
    discounts = np.array(_discounts(counts))[np.minimum(counts, 3) - 1]
    contexts, followers = _runs(ngrams // vocab_size)
    ends = np.cumsum(followers)
    totals = _segment_sums(counts, ends)
    gammas = _segment_sums(discounts, ends) / totals
    return _Level(ngrams, counts - discounts, contexts, totals, gammas)


def _discounts(counts: Ints) -> tuple[float, float, float]:
    """The discounts of n-grams that occur once, twice, and more often (Chen and Goodman, equation 26).

    Each has to lie above 0 and not above the count it is taken from; otherwise the counts of counts are no estimate.
    """
    once, twice, thrice, four = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].tolist()
    if not (once and twice and thrice):
        return _FALLBACK_DISCOUNTS
    share = once / (once + 2 * twice)
    found = (1 - 2 * share * twice / once, 2 - 3 * share * thrice / twice, 3 - 4 * share * four / thrice)
    return found if all(discount > 0 for discount in found) else _FALLBACK_DISCOUNTS


def _runs(ordered: Ints) -> tuple[Ints, Ints]:
    """The different values of a sorted array, and how often each occurs."""
    firsts = np.flatnonzero(np.diff(ordered, prepend=-1))
    return ordered[firsts], np.diff(firsts, append=len(ordered))


def _segment_sums(values: npt.NDArray[Any], ends: Ints) -> npt.NDArray[Any]:
    """Sums of consecutive non-empty stretches of `values` that end before `ends`."""
    return np.add.reduceat(values, np.concatenate(([0], ends[:-1]))) if len(ends) else values


def _find(ordered: Ints, wanted: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Where each wanted value would stand in a sorted array (never past its end), and whether it is there."""
    if not ordered.size:
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=np.bool_)
    places = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return places, ordered[places] == wanted
