"""Selection: every choice is made by the text alone, and the shares are kept."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_pretrain.prepare.clean import Drop
from nano_pretrain.prepare.documents import Document
from nano_pretrain.prepare.select import (
    MAX_HELDOUT_SHARE,
    MIN_HELDOUT_BYTES,
    Selection,
    drop_near_duplicates,
    select,
    shuffle,
    split,
)
from tests.prepare.small_corpus import prose

texts = st.lists(st.text(st.characters(codec="utf-8", categories=["L", "Zs"]), min_size=1), unique=True, max_size=60)
shares = st.floats(0.001, 0.5)


def of(texts: list[str]) -> list[Document]:
    return list({document.digest: document for document in map(Document.of, texts)}.values())


@given(texts, shares, st.randoms(use_true_random=False))
def test_a_split_divides_and_does_not_depend_on_the_order(texts: list[str], share: float, rng: random.Random) -> None:
    documents = of(texts)
    heldout, train = split(documents, share)
    assert sorted(heldout + train, key=documents.index) == documents
    assert len(heldout) + len(train) == len(documents)
    shuffled = rng.sample(documents, len(documents))
    assert set(split(shuffled, share)[0]) == set(heldout)
    if len(documents) >= 2:
        assert train
        assert len(heldout) >= min(max(round(share * len(documents)), 1), len(documents) - 1)


@given(st.integers(2, 400), st.integers(1, 400), shares)
def test_no_more_is_held_out_than_the_share_the_least_bytes_or_a_tenth(count: int, size: int, share: float) -> None:
    documents = [Document.of(f"{number:04}" + "x" * (size * 10)) for number in range(count)]
    heldout, _ = split(documents, share)
    each = documents[0].bytes
    least = min(max(round(share * count), 1), count - 1)
    if len(heldout) > least:
        assert len(heldout) * each < MIN_HELDOUT_BYTES + each
        assert len(heldout) * each <= MAX_HELDOUT_SHARE * count * each


def test_a_document_stays_where_it_is_when_others_come() -> None:
    rng = random.Random(0)
    documents = [Document.of(prose(rng, 400)) for _ in range(2000)]
    before, after = set(split(documents[:1000], 0.2)[0]), set(split(documents, 0.2)[0])
    # By rank of a hash, not by position: only documents at the edge of the share move.
    assert len(before - after) < 0.25 * len(before)
    assert 0.75 * len(before) < len({document for document in after if document in set(documents[:1000])})


@given(texts, st.randoms(use_true_random=False))
def test_the_shuffle_does_not_depend_on_the_order(texts: list[str], rng: random.Random) -> None:
    documents = of(texts)
    assert shuffle(documents) == shuffle(rng.sample(documents, len(documents)))


def test_the_shuffle_is_one() -> None:
    documents = [Document.of(str(number)) for number in range(500)]
    order = [int(document.text) for document in shuffle(documents)]
    assert sorted(order) == list(range(500))
    runs = sum(b > a for a, b in itertools.pairwise(order))
    assert 200 < runs < 300


def long(number: int) -> str:
    return prose(random.Random(number), 40)


def test_reasons_are_counted_and_the_first_source_keeps_a_duplicate() -> None:
    seen: set[bytes] = set()
    first = select([long(0), long(0).replace(" ", "\n"), "short", long(1) + "\x00"], seen, 0.01, None)
    second = select([long(0), long(2)], seen, 0.01, None)
    assert first.dropped_documents == {Drop.DUPLICATE: 1, Drop.TOO_SHORT: 1, Drop.BINARY: 1}
    assert [document.text for document in first.train] == [min(long(0), long(0).replace(" ", "\n"))]
    assert second.dropped_documents == {Drop.DUPLICATE: 1}
    assert [document.text for document in second.train] == [long(2)]


@given(st.integers(1, 30_000), st.randoms(use_true_random=False))
def test_the_cap_takes_the_same_beginning_whatever_the_order(cap: int, rng: random.Random) -> None:
    texts = [long(number) for number in range(80)]
    selection = select(texts, set(), 0.05, cap)
    whole = select(rng.sample(texts, len(texts)), set(), 0.05, None)
    kept = selection.train
    assert kept == whole.train[: len(kept)]
    assert selection.heldout == whole.heldout
    size = sum(document.bytes for document in kept)
    assert size <= cap or len(kept) == 1
    if len(kept) < len(whole.train):
        assert size + whole.train[len(kept)].bytes > cap
        assert selection.dropped_documents[Drop.OVER_CAP] == len(whole.train) - len(kept)


def test_held_out_text_that_training_contains_is_dropped_from_any_source() -> None:
    copied, fresh, half = long(100), long(101), f"{long(102)} {long(103)}"
    one = Selection(train=of([long(1), f"{long(2)} {copied} {long(3)}"]), heldout=of([fresh]))
    two = Selection(train=of([long(4), long(102).replace(" ", "\n")]), heldout=of([copied, half]))
    drop_near_duplicates([one, two])
    assert one.heldout == of([fresh])
    assert two.heldout == of([half])  # Not quite half of its 8-grams occur in training.
    assert two.dropped_documents == {Drop.NEAR_DUPLICATE: 1}
    assert two.dropped_bytes == {Drop.NEAR_DUPLICATE: len(copied.encode())}


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_documents_to_split(count: int) -> None:
    documents = of([long(number) for number in range(count)])
    assert split(documents, 0.5) == ([], documents)


def test_the_keys_never_change() -> None:
    document = Document.of("The quick brown fox")
    assert document.digest.hex() == "5cac4f980fedc3d3f1f99b4be3472c9b30d56523e632d151237ec9309048bda9"
    assert (document.key("order"), document.key("heldout")) == (6175405137104965409, 9807117914194359753)
