"""Documents to shards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from nano_pretrain.data.indexed_file import IndexedFileWriter, WrittenPair, token_dtype
from nano_pretrain.prepare.documents import Document
from nano_pretrain.prepare.tokenizer import EOD_ID

SHARD_TOKENS = 1 << 26
"""A shard is closed after the batch of documents that takes it past this size."""
DOCUMENTS_AT_A_TIME = 256


@dataclass
class Written:
    """What was written of one source and split.

    Attributes:
        pairs: the shards, in order.
        lengths: tokens of each document, the end-of-document token included.
    """

    pairs: list[WrittenPair] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return sum(pair.tokens for pair in self.pairs)


def write_shards(
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    prefix: Path,
    *,
    done: Callable[[int], None],
    first: int = 0,
    shard_tokens: int = SHARD_TOKENS,
) -> Written:
    """Encode documents, each closed by the end-of-document token, and write them as shards `PREFIX-00000`, ...

    Args:
        tokenizer: text that spells a special token must not become one: `encode_special_tokens` set.
        documents: in the order of writing.
        prefix: beginning of the shards' paths; its directory must exist.
        done: called with the bytes of text written since the last call.
        first: number of the first shard; there are so many already.
        shard_tokens: size at which a shard is closed.

    Returns:
        What was written; without documents and where there is no shard yet, an empty one.
    """
    dtype = token_dtype(tokenizer.get_vocab_size())
    remaining = iter(documents)
    batch = _next_batch(remaining)
    written = Written()
    while batch or not (first or written.pairs):
        with IndexedFileWriter(prefix.with_name(f"{prefix.name}-{first + len(written.pairs):05d}"), dtype) as writer:
            while batch and writer.tokens < shard_tokens:
                written.lengths += _write_batch(tokenizer, batch, writer)
                done(sum(document.bytes for document in batch))
                batch = _next_batch(remaining)
            written.pairs.append(writer.finish())
    return written


def _next_batch(remaining: Iterator[Document]) -> list[Document]:
    return list(itertools.islice(remaining, DOCUMENTS_AT_A_TIME))


def _write_batch(tokenizer: Tokenizer, batch: Sequence[Document], writer: IndexedFileWriter) -> list[int]:
    """Write the documents; returns the length of each."""
    texts = [document.text for document in batch]
    encoded = [[*encoding.ids, EOD_ID] for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    for ids in encoded:
        writer.add(ids)
    return [len(ids) for ids in encoded]
