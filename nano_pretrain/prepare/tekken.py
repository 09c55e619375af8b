"""Tekken, the 131,072-entry tokenizer of Mistral NeMo, from its own file into a `tokenizers` tokenizer.

The file lists the byte sequences of the vocabulary by rank and no merges. A byte-level BPE merges the adjacent pair
whose union has the lowest rank; so the merge that makes a token is found by encoding its bytes with the lower ranks
only, which must leave two parts.
"""

from __future__ import annotations

import base64
import itertools
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from nano_pretrain.prepare.tokenizer import SPECIAL_TOKENS, byte_level
from nano_pretrain.recipe.errors import UserError

TEKKEN_MEMBER = "mistral_common/data/tekken_240718.json"

Ranks = Mapping[bytes, int]


def load_tekken(wheel: Path) -> Tokenizer:
    """Convert the Tekken file inside the wheel; ids equal those of the original.

    Raises:
        UserError: the wheel does not hold the file, or the file is not what it was.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = json.loads(archive.read(TEKKEN_MEMBER))
        return convert(content)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{wheel}: does not hold the Tekken tokenizer ({error}); remove the file and run again"
        ) from error


def convert(content: Mapping[str, Any]) -> Tokenizer:
    """Convert the content of a `tekken.json`.

    Raises:
        ValueError: a token cannot be made from two tokens of lower rank.
    """
    config = content["config"]
    special_count = config["default_num_special_tokens"]
    words = [base64.b64decode(entry["token_bytes"]) for entry in content["vocab"]]
    ranks = {word: rank for rank, word in enumerate(words[: config["default_vocab_size"] - special_count])}
    special = special_tokens(special_count)
    vocabulary = {token: number for number, token in enumerate(special)}
    vocabulary |= {_spell(word): rank + special_count for word, rank in ranks.items()}
    pairs = [parents(word, ranks) for word in ranks if len(word) > 1]
    merges = [(_spell(left), _spell(right)) for left, right in pairs]
    return byte_level(models.BPE(vocab=vocabulary, merges=merges), config["pattern"], special)


def special_tokens(count: int) -> list[str]:
    """The special tokens: the three with a meaning in pretraining by name, the others numbered."""
    return [*SPECIAL_TOKENS, *(f"<SPECIAL_{number}>" for number in range(len(SPECIAL_TOKENS), count))]


def parents(word: bytes, ranks: Ranks) -> tuple[bytes, bytes]:
    """The two entries of lower rank whose merge makes `word`.

    Raises:
        ValueError: the entries below it leave more than two parts.
    """
    parts = [word[place : place + 1] for place in range(len(word))]
    limit = ranks[word]
    while len(parts) > 2:
        candidates = [ranks.get(left + right, limit) for left, right in itertools.pairwise(parts)]
        best = min(candidates)
        if best >= limit:
            raise ValueError(f"token {word!r} is no merge of two tokens")
        place = candidates.index(best)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]


def _byte_characters() -> list[str]:
    """The character that spells each byte: printable Latin-1 as itself, the others from U+0100 on (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + rest.index(byte)) for byte in range(256)]


_CHARACTERS = _byte_characters()


def _spell(word: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in word)
