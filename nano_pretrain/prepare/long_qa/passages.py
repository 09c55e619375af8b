"""Sampled chunks of documents, and what a writer makes of them."""

from __future__ import annotations

import hashlib
import itertools
import struct
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nano_pretrain.prepare.documents import Document


@dataclass(frozen=True)
class Passage:
    """A sampled chunk.

    Attributes:
        document: the whole document.
        start, end: the chunk, in characters.
        key: 64-bit number, uniform over the chunks of all documents and the same everywhere.
    """

    document: Document
    start: int
    end: int
    key: int

    @property
    def text(self) -> str:
        """The chunk."""
        return self.document.text[self.start : self.end]


@dataclass(frozen=True)
class Pair:
    """A question about a chunk, and its answer; each is one line."""

    question: str
    answer: str

    @property
    def text(self) -> str:
        """As it is appended to the document."""
        return f"Question: {self.question}\nAnswer: {self.answer}"


Writer = Callable[[Sequence[Passage], Callable[[], None]], list[Pair | None]]
"""Asks about passages: a pair or None for each, in order. It calls the second argument after each passage."""


def one_line(text: str) -> str | None:
    """The text with its white space collapsed; None if nothing is left or it holds what no text has."""
    line = " ".join(text.split())
    # Control characters, surrogates (which UTF-8 cannot spell), private and unassigned ones.
    faulty = any(unicodedata.category(character) in {"Cc", "Cs", "Co", "Cn"} for character in line)
    return None if faulty or not line else line


def sample(document: Document, bounds: Sequence[int], share: float, seed: int) -> list[Passage]:
    """Sample a share of a document's chunks, at least one, in an order that says nothing about where they lie.

    Args:
        document: the document.
        bounds: characters at which chunks begin, and the end of the last one.
        share: of the chunks, above 0 and at most 1.
        seed: another one samples others.
    """
    spans = itertools.pairwise(bounds)
    chunks = [Passage(document, a, b, _key(document, number, seed)) for number, (a, b) in enumerate(spans)]
    return sorted(chunks, key=lambda chunk: chunk.key)[: max(1, round(share * len(chunks)))]


def _key(document: Document, number: int, seed: int) -> int:
    chunk = struct.pack("<q", number) + document.digest
    return int.from_bytes(hashlib.blake2b(f"{seed} ".encode() + chunk, digest_size=8, person=b"long_qa").digest())
