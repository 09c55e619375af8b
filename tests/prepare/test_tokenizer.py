"""The tokenizer of a corpus: exact size, single digits, nothing lost, shares of its training text."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors

from nano_pretrain.data.shards import TokenShard, TokenStream
from nano_pretrain.prepare.documents import Document
from nano_pretrain.prepare.encode import write_shards
from nano_pretrain.prepare.tokenizer import EOD_ID, SPECIAL_TOKENS, even_shares, load_tokenizer, spread, train_bpe
from nano_pretrain.recipe.errors import RecipeError, UserError
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


def written(tokenizer: Tokenizer, path: Path) -> Path:
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_of_a_model_adds_nothing_and_cuts_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    theirs = Tokenizer.from_str(tokenizer.to_str())
    theirs.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    theirs.enable_truncation(3)
    theirs.enable_padding(length=3)
    text = "In 1234: </s> and on"
    assert theirs.encode(text).ids[0] == 1
    loaded = load_tokenizer(written(theirs, tmp_path / "tokenizer.json"), VOCAB_SIZE)
    loaded.encode_special_tokens = True
    assert loaded.encode(text).ids == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_tokenizer_that_does_not_fit_is_refused_by_field(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(UserError, match=r"^data\.tokenizer\.file: .*no\.json is no tokenizer\.json"):
        load_tokenizer(tmp_path / "no.json", VOCAB_SIZE)
    with pytest.raises(RecipeError, match=f"the tokenizer has {VOCAB_SIZE} entries"):
        load_tokenizer(written(tokenizer, tmp_path / "large.json"), VOCAB_SIZE - 1)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, "<unk>"))
    with pytest.raises(UserError, match="is not byte-level"):
        load_tokenizer(written(words, tmp_path / "words.json"), VOCAB_SIZE)
    words = Tokenizer(models.WordLevel({"</s>": 0}, "</s>"))
    with pytest.raises(UserError, match="has no </s> as entry 2"):
        load_tokenizer(written(words, tmp_path / "other.json"), VOCAB_SIZE)
