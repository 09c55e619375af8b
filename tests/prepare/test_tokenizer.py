"""The tokenizer of a corpus: exact size, single digits, nothing lost, shares of its training text."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nano_pretrain.data.shards import TokenShard, TokenStream
from nano_pretrain.prepare.documents import Document
from nano_pretrain.prepare.encode import write_shards
from nano_pretrain.prepare.tokenizer import EOD_ID, SPECIAL_TOKENS, even_shares, spread, train_bpe
from tests.prepare.small_corpus import prose

VOCAB_SIZE = 500


def training() -> dict[str, list[Document]]:
    rng = random.Random(0)
    return {name: [Document.of(f"In 1234: {prose(rng, 80)}") for _ in range(40)] for name in ("b", "a", "c")}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = train_bpe(training(), VOCAB_SIZE, 100_000)
    made.encode_special_tokens = True
    return made


def test_size_and_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    assert SPECIAL_TOKENS[EOD_ID] == "</s>"


@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert not set(ids) & {0, 1, 2}


def test_spelt_special_tokens_stay_text_and_digits_stand_alone(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("</s> 1234", add_special_tokens=False).ids
    assert EOD_ID not in ids
    assert [tokenizer.id_to_token(token) for token in ids[-4:]] == ["1", "2", "3", "4"]


def test_the_order_of_the_sources_changes_nothing(tokenizer: Tokenizer) -> None:
    again = train_bpe(dict(reversed(training().items())), VOCAB_SIZE, 100_000)
    assert again.to_str() == tokenizer.to_str()


@given(st.dictionaries(st.text("abcdef", min_size=1), st.integers(0, 1000), min_size=1), st.integers(0, 5000))
def test_shares_are_even_and_waste_nothing(sizes: Mapping[str, int], total: int) -> None:
    shares = even_shares(sizes, total)
    assert all(0 <= shares[name] <= sizes[name] for name in sizes)
    assert sum(sizes.values()) - total <= sum(sizes.values()) - sum(shares.values()) or sum(shares.values()) == total
    assert min(total, sum(sizes.values())) - sum(shares.values()) in range(len(sizes))
    open_ended = [shares[name] for name in sizes if shares[name] < sizes[name]]
    assert not open_ended or max(shares.values()) - min(open_ended) <= 1


def test_the_training_text_is_spread_over_the_sources() -> None:
    documents = training()
    texts = list(spread(documents, 6_000))
    for own in documents.values():
        size = sum(len(text.encode()) for text in texts if text in {document.text for document in own})
        assert 2_000 <= size < 2_000 + max(document.bytes for document in own)


def test_shards_are_closed_at_their_size(tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = [Document.of(prose(random.Random(number), 20)) for number in range(700)]
    sizes: list[int] = []
    written = write_shards(tokenizer, documents, tmp_path / "s", done=sizes.append, shard_tokens=5_000)
    assert [pair.name for pair in written.pairs] == ["s-00000", "s-00001", "s-00002"]
    assert written.lengths == [len(tokenizer.encode(document.text).ids) + 1 for document in documents]
    assert sum(sizes) == sum(document.bytes for document in documents)
    stream = TokenStream("s", [TokenShard(tmp_path / pair.name) for pair in written.pairs], sum(sizes))
    assert stream.documents == 700
    texts = tokenizer.decode(stream.read(0, stream.tokens).tolist(), skip_special_tokens=False).split("</s>")
    assert texts == [document.text for document in documents] + [""]


def test_a_split_without_documents_is_an_empty_shard(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (pair,) = write_shards(tokenizer, [], tmp_path / "s", done=lambda _: None).pairs
    assert (pair.documents, TokenShard(tmp_path / "s-00000").tokens) == (0, 0)
