"""Documents to shards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from nano_pretrain.data.indexed_file import IndexedFileWriter, WrittenPair, token_dtype
from nano_pretrain.prepare.documents import Document
from nano_pretrain.prepare.tokenizer import EOD_ID

SHARD_TOKENS = 1 << 26
"""A shard is closed after the batch of documents that takes it past this size."""
DOCUMENTS_AT_A_TIME = 256


def write_shards(
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    prefix: Path,
    *,
    done: Callable[[int], None],
    shard_tokens: int = SHARD_TOKENS,
) -> list[WrittenPair]:
    """Encode documents, each closed by the end-of-document token, and write them as shards `PREFIX-00000`, ...

    Args:
        tokenizer: text that spells a special token must not become one: `encode_special_tokens` set.
        documents: in the order of writing.
        prefix: beginning of the shards' paths; its directory must exist.
        done: called with the bytes of text written since the last call.
        shard_tokens: size at which a shard is closed.

    Returns:
        What was written, in order; at least one shard, empty if there are no documents.
    """
    dtype = token_dtype(tokenizer.get_vocab_size())
    remaining = iter(documents)
    batch = _next_batch(remaining)
    pairs: list[WrittenPair] = []
    while batch or not pairs:
        with IndexedFileWriter(prefix.with_name(f"{prefix.name}-{len(pairs):05d}"), dtype) as writer:
            while batch and writer.tokens < shard_tokens:
                _write_batch(tokenizer, batch, writer)
                done(sum(document.bytes for document in batch))
                batch = _next_batch(remaining)
            pairs.append(writer.finish())
    return pairs


def _next_batch(remaining: Iterator[Document]) -> list[Document]:
    return list(itertools.islice(remaining, DOCUMENTS_AT_A_TIME))


def _write_batch(tokenizer: Tokenizer, batch: Sequence[Document], writer: IndexedFileWriter) -> None:
    texts = [document.text for document in batch]
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        writer.add([*encoding.ids, EOD_ID])
