"""A document, identified by its text alone: nothing later depends on where it lay or when it was read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        text: cleaned text.
        digest: identity: SHA-256 of the text with its white space collapsed, so that texts that differ in nothing
            else are the same document.
    """

    text: str
    digest: bytes

    @classmethod
    def of(cls, text: str) -> Document:
        """Make a document of a cleaned text."""
        return cls(text, hashlib.sha256(" ".join(text.split()).encode()).digest())

    @cached_property
    def bytes(self) -> int:
        """Size of the text in UTF-8."""
        return len(self.text.encode())

    def key(self, purpose: str) -> int:
        """A 64-bit number, uniform over documents and independent between purposes."""
        return int.from_bytes(hashlib.blake2b(self.digest, digest_size=8, person=purpose.encode()).digest(), "big")
