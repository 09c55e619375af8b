"""The tokenizer of a corpus: a byte-level BPE trained on it, and what it shares with Tekken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from nano_pretrain.prepare.documents import Document
from nano_pretrain.recipe.errors import RecipeError, UserError

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
EOD_ID = SPECIAL_TOKENS.index("</s>")
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Tekken cuts text into words (the `pattern` of its file): case ends a word, every digit stands alone."""


def byte_level(model: models.Model, pattern: str, special_tokens: Sequence[str]) -> Tokenizer:
    """A byte-level tokenizer: words by `pattern`, their bytes spelt as characters, no text lost in decoding."""
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(training: Mapping[str, Sequence[Document]], vocab_size: int, train_bytes: int) -> Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` entries; the same text gives the same bytes everywhere.

    Args:
        training: documents by source, in the order of writing.
        vocab_size: entries, the three special tokens and the 256 bytes included.
        train_bytes: text it is trained on, spread evenly over the sources as far as they reach.

    Raises:
        RecipeError: the text has too few distinct words for so many entries, or there is no room for the bytes.
    """
    least = len(SPECIAL_TOKENS) + len(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < least:
        raise RecipeError("model.vocab_size", f"{vocab_size} entries cannot hold every byte", f"use at least {least}")
    tokenizer = byte_level(models.BPE(), PATTERN, ())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(spread(training, train_bytes), trainer)
    if (entries := tokenizer.get_vocab_size()) != vocab_size:
        raise RecipeError(
            "model.vocab_size", f"the corpus has words for {entries} entries only", f"use {entries} or fewer"
        )
    return tokenizer


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """A tokenizer that was made elsewhere, for example with a model that is imported.

    Args:
        path: its tokenizer.json.
        vocab_size: entries of the model.

    Raises:
        UserError: it cannot be read, is not byte-level, ends documents by another token, or has more entries.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises no other class.
        raise UserError(f"data.tokenizer.file: {path} is no tokenizer.json ({error})") from error
    end, entries = SPECIAL_TOKENS[EOD_ID], tokenizer.get_vocab_size()
    if tokenizer.token_to_id(end) != EOD_ID:
        raise UserError(f"data.tokenizer.file: {path} has no {end} as entry {EOD_ID}; choose another tokenizer")
    if entries > vocab_size:
        raise RecipeError("model.vocab_size", f"the tokenizer has {entries} entries", f"write {entries}")
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        raise UserError(f"data.tokenizer.file: {path} is not byte-level; choose another tokenizer")
    # Documents are their text and the end: nothing is put before them, cut off or filled up.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def spread(training: Mapping[str, Sequence[Document]], total: int) -> Iterator[str]:
    """Texts of about `total` bytes, as evenly over the sources as their sizes allow."""
    sizes = {name: sum(document.bytes for document in documents) for name, documents in training.items()}
    share = even_shares(sizes, total)
    for name, documents in training.items():
        taken = 0
        for document in documents:
            if taken >= share[name]:
                break
            taken += document.bytes
            yield document.text


def even_shares(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Divide `total` evenly, giving what small members cannot take to the others."""
    shares: dict[str, int] = {}
    left = total
    for place, name in enumerate(sorted(sizes, key=lambda name: (sizes[name], name))):
        shares[name] = min(sizes[name], left // (len(sizes) - place))
        left -= shares[name]
    return shares
