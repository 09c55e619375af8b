"""Containment of n-grams: equal to its definition."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nano_pretrain.prepare.overlap import NGRAM, containment
from tests.prepare.small_corpus import prose

sentences = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=40).map(" ".join)


def ngrams(text: str) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[place : place + NGRAM]) for place in range(len(words) - NGRAM + 1)]


def by_definition(text: str, training: list[str]) -> float:
    known = {gram for other in training for gram in ngrams(other)}
    own = ngrams(text)
    return sum(gram in known for gram in own) / len(own) if own else 1.0


@given(st.lists(sentences, max_size=5), st.lists(sentences, max_size=8))
def test_it_is_the_share_of_ngrams_found_in_training(heldout: list[str], training: list[str]) -> None:
    expected = [by_definition(text, training) for text in heldout]
    np.testing.assert_allclose(containment(heldout, training), expected, rtol=0, atol=1e-12)


def test_a_part_of_a_long_document_is_found_and_case_and_punctuation_do_not_hide_it() -> None:
    rng = random.Random(0)
    part, other = prose(rng, 60), prose(rng, 60)
    training = [f"{prose(rng, 900)} {part.upper().replace('.', '!')} {prose(rng, 900)}"]
    assert containment([part, other], training).tolist() == [1.0, 0.0]


def test_scripts_without_spaces_are_compared_by_character() -> None:
    text = "日本語の文章には空白がありません。これは試験です"
    shares = containment([text, "全く異なる内容の文がここに書かれている"], [f"前置き{text}後書き"])
    assert shares.tolist() == [1.0, 0.0]


def test_no_ngram_is_counted_across_documents() -> None:
    words = [f"w{number}" for number in range(14)]
    assert containment([" ".join(words)], [" ".join(words[:7]), " ".join(words[7:])]).tolist() == [0.0]
