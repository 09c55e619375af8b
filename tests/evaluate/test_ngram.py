from __future__ import annotations

import math
import time
from collections import Counter
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_pretrain.evaluate.ngram import NgramModel

Segments = list[list[int]]
VOCABULARY = 4


def joined(segments: Segments) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    lengths = [len(segment) for segment in segments]
    return np.array([token for segment in segments for token in segment]), np.cumsum([0, *lengths[:-1]])


class PlainKneserNey:
    """The same model from dictionaries, following the paper's definitions n-gram by n-gram."""

    def __init__(self, segments: Segments, order: int) -> None:
        self.order = order
        self.counts = {length: self.counted(segments, length) for length in range(1, order + 1)}
        self.discounts = {length: discounts(counts) for length, counts in self.counts.items()}

    def counted(self, segments: Segments, length: int) -> Counter[tuple[int, ...]]:
        occurrences: list[tuple[int | None, tuple[int, ...]]] = []
        for segment in segments:
            for start in range(len(segment) - length + 1):
                before = segment[start - 1] if start else None
                occurrences.append((before, tuple(segment[start : start + length])))
        if length == self.order:
            return Counter(ngram for _, ngram in occurrences)
        return Counter(ngram for _, ngram in set(occurrences))

    def probability(self, token: int, context: tuple[int, ...]) -> float:
        shorter = self.probability(token, context[1:]) if context else 1 / VOCABULARY
        counts = self.counts[len(context) + 1]
        after = [count for ngram, count in counts.items() if ngram[:-1] == context]
        if not after:
            return shorter
        one, two, more = self.discounts[len(context) + 1]
        taken = sum({1: one, 2: two}.get(count, more) for count in after)
        count = counts.get((*context, token), 0)
        own = count - {0: 0.0, 1: one, 2: two}.get(count, more)
        return (own + taken * shorter) / sum(after)

    def nats(self, segments: Segments) -> list[float]:
        return [
            -math.log(self.probability(token, tuple(segment[max(0, at - self.order + 1) : at])))
            for segment in segments
            for at, token in enumerate(segment)
        ]


def discounts(counts: Counter[tuple[int, ...]]) -> tuple[float, float, float]:
    n1, n2, n3, n4 = (sum(1 for count in counts.values() if count == wanted) for wanted in (1, 2, 3, 4))
    if n1 and n2 and n3:
        y = n1 / (n1 + 2 * n2)
        found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if min(found) > 0:
            return found
    return 0.5, 1.0, 1.5


TEXTS = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30), min_size=1, max_size=6)
ORDERS = st.sampled_from([1, 2, 3])


@given(TEXTS, TEXTS, ORDERS)
@settings(deadline=None)
def test_it_is_modified_kneser_ney(training: Segments, heldout: Segments, order: int) -> None:
    model = NgramModel(*joined(training), VOCABULARY, order)
    np.testing.assert_allclose(model.nats(*joined(heldout)), PlainKneserNey(training, order).nats(heldout), rtol=1e-12)


@given(TEXTS, ORDERS)
@settings(deadline=None)
def test_probabilities_sum_to_one_in_every_context(training: Segments, order: int) -> None:
    model = NgramModel(*joined(training), VOCABULARY, order)
    for length in range(order):
        for context in product(range(VOCABULARY), repeat=length):
            segments = [[*context, token] for token in range(VOCABULARY)]
            nats = model.nats(*joined(segments))[length :: length + 1]
            assert np.exp(-nats).sum() == pytest.approx(1.0, rel=1e-12)


@given(TEXTS, ORDERS)
@settings(deadline=None)
def test_segments_are_independent(training: Segments, order: int) -> None:
    model = NgramModel(*joined(training), VOCABULARY, order)
    together = model.nats(*joined(training))
    alone = np.concatenate([model.nats(*joined([segment])) for segment in training])
    np.testing.assert_array_equal(together, alone)


def markov_text(length: int, seed: int) -> npt.NDArray[np.int64]:
    """Text of 50 tokens: the last one and the parity of the one before lead to four next tokens, mostly one."""
    random = np.random.default_rng(seed)
    choices = random.choice(4, size=length, p=[0.7, 0.15, 0.1, 0.05]).tolist()
    text = [0, 1]
    for choice in choices:
        text.append((7 * text[-1] + 3 * (text[-2] % 2) + 11 * choice) % 50)
    return np.array(text)


def test_longer_contexts_help_where_the_text_has_them() -> None:
    training, heldout = markov_text(60_000, seed=1), markov_text(5_000, seed=2)
    start = np.array([0])
    means = [NgramModel(training, start, 50, order).nats(heldout, start).mean() for order in (1, 2, 3)]
    entropy = -sum(p * math.log(p) for p in (0.7, 0.15, 0.1, 0.05))
    assert means[0] > means[1] + 0.5
    assert means[1] > means[2] + 0.3
    # The text was made with this entropy; 60,000 tokens for 2,500 contexts leave the estimate a little above it.
    assert entropy < means[2] < entropy + 0.15


def test_the_same_text_twice_still_gives_every_token_a_probability() -> None:
    text = markov_text(2000, seed=3)
    twice, starts = np.concatenate([text, text]), np.array([0, len(text)])
    nats = NgramModel(twice, starts, 50, 3).nats(markov_text(2000, seed=4), np.array([0]))
    assert np.isfinite(nats).all()


def test_millions_of_tokens_train_in_seconds() -> None:
    random = np.random.default_rng(0)
    # Zipf-like ids with a dependence on the one before, in samples of 256 tokens.
    tokens = (random.zipf(1.3, 1_000_000) + np.repeat(random.integers(0, 64, 125_000), 8)) % 4096
    starts = np.arange(0, len(tokens), 256)
    began = time.process_time()
    nats = NgramModel(tokens, starts, 4096, 3).nats(tokens[:50_000], starts[: -(-50_000 // 256)])
    # A quarter of a second when the machine is idle; the limit only excludes a loop over tokens.
    assert time.process_time() - began < 5.0
    assert 0.0 < nats.mean() < math.log(4096)


def test_token_ids_of_128k_fit_and_larger_do_not() -> None:
    tokens = np.array([0, 131_071, 0, 131_071, 5])
    assert np.isfinite(NgramModel(tokens, np.array([0]), 131_072, 3).nats(tokens, np.array([0]))).all()
    with pytest.raises(ValueError, match="does not fit"):
        NgramModel(tokens, np.array([0]), 131_072, 4)


@pytest.mark.parametrize(
    ("tokens", "starts", "words"),
    [
        ([], [0], "at least one"),
        ([0, 4], [0], "range"),
        ([0, -1], [0], "range"),
        ([0, 1], [1], "ascend"),
        ([0, 1], [], "ascend"),
        ([0, 1], [0, 2], "ascend"),
        ([0, 1, 2], [0, 2, 1], "ascend"),
    ],
)
def test_wrong_input_is_refused(tokens: list[int], starts: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NgramModel(np.array(tokens, dtype=np.int64), np.array(starts, dtype=np.int64), VOCABULARY, 2)
