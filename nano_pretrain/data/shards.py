"""Reading a prepared corpus: shards by memory map, sources as streams of tokens, the corpus from its manifest."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nano_pretrain.data.indexed_file import bin_path, document_start, read_index
from nano_pretrain.data.ranges import SourceSize
from nano_pretrain.data.record import Record, corpus_record
from nano_pretrain.recipe.errors import UserError

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
MANIFEST_FORMAT = 1


class TokenShard:
    """One `.bin`/`.idx` pair: the tokens of its documents, each closed by the end-of-document token, back to back.

    Args:
        prefix: path of the pair without its suffixes.

    Attributes:
        name: last part of `prefix`.
        tokens: number of tokens, end-of-document tokens included.
        documents: number of documents.

    Raises:
        UserError: a file of the pair is missing, truncated or not an index; the message names it.
    """

    def __init__(self, prefix: Path) -> None:
        index = read_index(prefix)
        self.name = prefix.name
        self.tokens = index.tokens
        self.documents = index.documents
        self._prefix = prefix
        self._path = bin_path(prefix)
        self._index = index

    @cached_property
    def _memory(self) -> npt.NDArray[Any]:
        # Mapped at the first read: a run opens hundreds of shards and may need few of them.
        if self.tokens == 0:
            return np.empty(0, self._index.dtype)
        return np.memmap(self._path, self._index.dtype, mode="r", shape=(self.tokens,))

    def read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Copy of the tokens [start, start + length) of the shard.

        Raises:
            ValueError: the range does not lie within the shard.
        """
        _check_range(start, length, self.tokens, str(self._path))
        return self._memory[start : start + length].astype(np.int64)

    def document_start(self, token: int) -> int:
        """First token of the document that holds `token`."""
        return document_start(self._prefix, self._index, token)


class TokenStream:
    """The shards of one source and split, read as one stream.

    Args:
        name: name of the source.
        shards: the shards in their order.
        text_bytes: UTF-8 bytes of the documents' text, without end-of-document tokens.
        generations: generation of each shard, ascending from 0 without gaps; None if all are of the first.

    Attributes:
        name, tokens, documents: of the whole stream.
        bytes: UTF-8 bytes of its text.
        size: tokens of each generation, and where documents begin.
    """

    def __init__(
        self, name: str, shards: Sequence[TokenShard], text_bytes: int, generations: Sequence[int] | None = None
    ) -> None:
        self.name = name
        self.bytes = text_bytes
        self.documents = sum(shard.documents for shard in shards)
        self._shards = tuple(shards)
        self._ends = list(itertools.accumulate(shard.tokens for shard in shards))
        self.tokens = self._ends[-1] if self._ends else 0
        tokens = Counter({0: 0})
        for shard, generation in zip(shards, generations or [0] * len(shards), strict=True):
            tokens[generation] += shard.tokens
        self.size = SourceSize(tuple(tokens.values()), self._document_start)

    def locate(self, token: int) -> tuple[str, int]:
        """Name of the shard that holds `token`, and the token's number in it.

        Raises:
            ValueError: the stream has no such token.
        """
        _check_range(token, 1, self.tokens, f"source {self.name}")
        shard, offset = self._shard_at(token)
        return shard.name, offset

    def read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Copy of the tokens [start, start + length) of the stream; may cross shards.

        Raises:
            ValueError: the range does not lie within the stream.
        """
        _check_range(start, length, self.tokens, f"source {self.name}")
        out = np.empty(length, np.int64)
        filled = 0
        number = bisect.bisect_right(self._ends, start)
        while filled < length:
            shard = self._shards[number]
            offset = start + filled - (self._ends[number] - shard.tokens)
            count = min(length - filled, shard.tokens - offset)
            out[filled : filled + count] = shard.read(offset, count)
            filled += count
            number += 1
        return out

    def _shard_at(self, token: int) -> tuple[TokenShard, int]:
        number = bisect.bisect_right(self._ends, token)
        shard = self._shards[number]
        return shard, token - (self._ends[number] - shard.tokens)

    def _document_start(self, token: int) -> int:
        shard, offset = self._shard_at(token)
        return token - offset + shard.document_start(offset)


def _check_range(start: int, length: int, tokens: int, what: str) -> None:
    if start < 0 or length < 0 or start + length > tokens:
        raise ValueError(f"tokens [{start}, {start + length}) do not lie within {what} of {tokens} tokens")


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus.

    Attributes:
        path: its directory.
        tokenizer_file: its `tokenizer.json`.
        vocab_size: entries of the tokenizer.
        eod_id: id of the token that ends each document.
        fingerprint: SHA-256 over the hashes of all shards and of the tokenizer.
        record: what checkpoints record of it beside the fingerprint; None if its manifest has no hashes of shards.
        train, heldout: streams by source, in the order of their names.
        categories: category of each source.
        tokens_by_length: of each source, training tokens in documents of at least some lengths; of older corpora none.
    """

    path: Path
    tokenizer_file: Path
    vocab_size: int
    eod_id: int
    fingerprint: str
    record: Record | None
    train: Mapping[str, TokenStream]
    heldout: Mapping[str, TokenStream]
    categories: Mapping[str, str]
    tokens_by_length: Mapping[str, Mapping[int, int]]

    def held_out(self, source: str) -> TokenStream:
        """The held-out stream of a source.

        Raises:
            UserError: it has no token to predict.
        """
        stream = self.heldout[source]
        if stream.tokens < 2:
            raise UserError(
                f"data.path: source {source} has no held-out text in {self.path}; raise data.heldout_share and prepare "
                "again, or leave it out of the blends"
            )
        return stream

    @property
    def sizes(self) -> dict[str, SourceSize]:
        """What the data order has to know of each source."""
        return {name: stream.size for name, stream in self.train.items()}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the corpus directory `path`.

    Raises:
        UserError: there is none, or it is not one of ours.
    """
    file = path / MANIFEST_NAME
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"data.path: {path} holds no prepared corpus; run `nano-pretrain prepare` first") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"data.path: {file} cannot be read ({error}); choose another data.path") from error
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise UserError(f"{file}: not a manifest of format {MANIFEST_FORMAT}; choose another data.path")
    return manifest


def open_corpus(path: Path) -> Corpus:
    """Open a prepared corpus: reads the manifest, checks the size of every file and the hash of the tokenizer.

    Raises:
        UserError: there is no corpus, or a file is missing, truncated or not what the manifest says.
    """
    manifest = read_manifest(path)
    try:
        tokenizer = manifest["tokenizer"]
        _check_tokenizer(path / TOKENIZER_NAME, tokenizer["bytes"], tokenizer["sha256"])
        return Corpus(
            path=path,
            tokenizer_file=path / TOKENIZER_NAME,
            vocab_size=_integer(tokenizer["vocab_size"]),
            eod_id=_integer(tokenizer["eod_id"]),
            fingerprint=manifest["fingerprint"],
            record=corpus_record(manifest),
            train=_open_streams(path, manifest["sources"], "train"),
            heldout=_open_streams(path, manifest["sources"], "heldout"),
            categories={name: source["category"] for name, source in sorted(manifest["sources"].items())},
            tokens_by_length={
                name: _by_length(source["train"]) for name, source in sorted(manifest["sources"].items())
            },
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / MANIFEST_NAME}: damaged ({error!r}); choose another data.path") from error


def _check_tokenizer(file: Path, expected: int, sha256: str) -> None:
    size = file.stat().st_size if file.is_file() else -1
    problem = None
    if size != expected:
        problem = "missing" if size < 0 else f"{size} bytes, the manifest says {expected}"
    elif hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
        problem = "its content is not what the manifest says"
    if problem:
        raise UserError(f"{file}: {problem}; remove {file.parent} and run `nano-pretrain prepare` again")


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _by_length(entry: Mapping[str, Any]) -> dict[int, int]:
    return {int(least): _integer(tokens) for least, tokens in entry.get("tokens_by_length", {}).items()}


def _open_streams(path: Path, sources: Mapping[str, Any], split: str) -> dict[str, TokenStream]:
    return {name: _open_stream(path / split, name, source[split]) for name, source in sorted(sources.items())}


def _open_stream(directory: Path, name: str, entry: Mapping[str, Any]) -> TokenStream:
    shards = [_open_shard(directory / shard["name"], shard["tokens"]) for shard in entry["shards"]]
    generations = [_integer(shard.get("generation", 0)) for shard in entry["shards"]]
    _check_generations(directory.parent / MANIFEST_NAME, [shard.name for shard in shards], generations)
    return TokenStream(name, shards, entry["bytes"], generations)


def _check_generations(manifest: Path, shards: Sequence[str], generations: Sequence[int]) -> None:
    allowed: tuple[int, ...] = (0,)
    for shard, generation in zip(shards, generations, strict=True):
        if generation not in allowed:
            due = " or ".join(map(str, allowed))
            raise UserError(f"{manifest}: shard {shard} has generation {generation}; write {due}, they ascend from 0")
        allowed = (generation, generation + 1)


def _open_shard(prefix: Path, tokens: int) -> TokenShard:
    shard = TokenShard(prefix)
    if shard.tokens != tokens:
        raise UserError(
            f"{bin_path(prefix)}: {shard.tokens} tokens, the manifest says {tokens}; choose another data.path"
        )
    return shard


def token_byte_lengths(tokenizer_file: Path) -> npt.NDArray[np.int64]:
    """Bytes of text that each token id of a byte-level tokenizer stands for; 0 for special tokens.

    A byte-level vocabulary spells every byte as one character, so a token's length in characters is its length in
    bytes (Radford et al. 2019, section 2.2).

    Returns:
        int64 of shape (vocabulary size,).
    """
    content = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    special = {token["id"] for token in content["added_tokens"]}
    ids: dict[str, int] = content["model"]["vocab"]
    lengths = np.zeros(max([*ids.values(), *special]) + 1, np.int64)
    for token, number in ids.items():
        lengths[number] = 0 if number in special else len(token)
    return lengths
