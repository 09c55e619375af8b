"""The conversion of Tekken: the ids that ranks alone define, from a small file in its form and from the real one."""

from __future__ import annotations

import base64
import itertools
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nano_pretrain.data.shards import token_byte_lengths
from nano_pretrain.prepare.corpus_file import load_package_file
from nano_pretrain.prepare.fetch import fetch
from nano_pretrain.prepare.tekken import convert, load_tekken, parents
from nano_pretrain.prepare.tokenizer import PATTERN
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.load import tree
from nano_pretrain.recipe.rules import TEKKEN_VOCAB_SIZE
from tests.prepare.small_corpus import members, prose, write_wheel

SPECIAL_COUNT = 10


def merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged: list[bytes] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def learn(text: str, merges: int) -> list[bytes]:
    """Byte sequences by rank, learnt the slow way."""
    words = [[word[i : i + 1] for i in range(len(word))] for word in (w.encode() for w in re.findall(r" ?\w+", text))]
    ranked = [bytes([byte]) for byte in range(256)]
    for _ in range(merges):
        counts = Counter(pair for word in words for pair in itertools.pairwise(word))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        words = [merge(word, best) for word in words]
        ranked.append(best[0] + best[1])
    return ranked


def encode(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """What ranks alone define: merge the pair of lowest rank, the leftmost first, until none is left."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[place : place + 1] for place in range(len(word))]
    while pairs := [
        (ranks[left + right], place)
        for place, (left, right) in enumerate(itertools.pairwise(parts))
        if left + right in ranks
    ]:
        _, place = min(pairs)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [ranks[part] for part in parts]


RANKED = learn(prose(random.Random(0), 400), 150)
RANKS = {word: rank for rank, word in enumerate(RANKED)}


def content() -> dict[str, Any]:
    entries = [{"rank": rank, "token_bytes": base64.b64encode(word).decode()} for rank, word in enumerate(RANKED)]
    # The real file lists more entries than the tokenizer has.
    entries.append({"rank": len(RANKED), "token_bytes": base64.b64encode(b"never").decode()})
    size = {"default_vocab_size": SPECIAL_COUNT + len(RANKED), "default_num_special_tokens": SPECIAL_COUNT}
    return {"config": {"pattern": PATTERN, **size}, "vocab": entries}


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    tokenizer = convert(content())
    tokenizer.encode_special_tokens = True
    return tokenizer


@given(seed=st.integers(0, 10**6), words=st.integers(1, 30))
def test_ids_are_those_that_ranks_define(small: Tokenizer, seed: int, words: int) -> None:
    text = prose(random.Random(seed), words)
    assert small.pre_tokenizer is not None
    pieces = [text[start:end] for _, (start, end) in small.pre_tokenizer.pre_tokenize_str(text)]
    expected = [SPECIAL_COUNT + token for piece in pieces for token in encode(piece.encode(), RANKS)]
    assert small.encode(text, add_special_tokens=False).ids == expected


@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_survives(small: Tokenizer, text: str) -> None:
    ids = small.encode(text, add_special_tokens=False).ids
    assert small.decode(ids, skip_special_tokens=False) == text
    assert min(ids, default=SPECIAL_COUNT) >= SPECIAL_COUNT


def test_every_entry_is_the_union_of_its_parents() -> None:
    for word in RANKED[256:]:
        left, right = parents(word, RANKS)
        assert left + right == word
        assert max(RANKS[left], RANKS[right]) < RANKS[word]


def test_an_entry_that_no_merge_makes_is_refused() -> None:
    broken = content()
    broken["vocab"][300]["token_bytes"] = base64.b64encode(b"\x00\x01\x02\x03").decode()
    with pytest.raises(ValueError, match="is no merge of two tokens"):
        convert(broken)


def test_another_wheel_is_refused_in_one_line(tmp_path: Path) -> None:
    write_wheel(tmp_path / "other-1.0-py3-none-any.whl", {"a": "b"})
    with pytest.raises(UserError, match=r"^[^\n]*does not hold the Tekken tokenizer[^\n]*$"):
        load_tekken(tmp_path / "other-1.0-py3-none-any.whl")


@pytest.mark.full
def test_the_real_tekken(tmp_path: Path) -> None:
    package = load_package_file(tree("data_blend") / "tokenizers/tekken.yaml")
    try:
        wheels = fetch([package], Path("data/packages"), lambda _: None)
    except UserError as error:
        pytest.skip(str(error))
    tokenizer = load_tekken(wheels["mistral-common"])
    tokenizer.encode_special_tokens = True
    assert tokenizer.get_vocab_size() == TEKKEN_VOCAB_SIZE
    # Ids of the original (mistral-common 1.13.1 through tiktoken), noted once.
    ids = tokenizer.encode("Hello </s> world 1234 日本語 naïve", add_special_tokens=False).ids
    assert ids == [22177, 2259, 1115, 1062, 4304, 1032, 1049, 1050, 1051, 1052, 30367, 15199, 98355]
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_str())
    lengths = token_byte_lengths(path)
    for text in members().values():
        encoded = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(encoded, skip_special_tokens=False) == text
        assert lengths[encoded].sum() == len(text.encode())
