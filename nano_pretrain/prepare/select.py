"""Which documents are trained on and which are held out: deduplicated, ordered, split and capped.

Every choice is made by keyed hashes of the documents' text. It therefore does not depend on the order in which
archives, directories or mappings are read, on the machine, or on the other sources.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from nano_pretrain.prepare.clean import Drop, normalise, reason_to_drop
from nano_pretrain.prepare.documents import Document
from nano_pretrain.prepare.overlap import MAX_CONTAINMENT, containment

MIN_HELDOUT_BYTES = 98_304
"""Text held out of a source even if its share of the documents is less, so that its loss can be measured."""
MAX_HELDOUT_SHARE = 0.1
"""Largest share of a source's bytes that `MIN_HELDOUT_BYTES` may take."""


@dataclass
class Selection:
    """What became of one source.

    Attributes:
        documents_in, bytes_in: as extracted.
        dropped_documents, dropped_bytes: by reason.
        train, heldout: what is kept, in the order of writing.
    """

    documents_in: int = 0
    bytes_in: int = 0
    dropped_documents: Counter[Drop] = field(default_factory=Counter)
    dropped_bytes: Counter[Drop] = field(default_factory=Counter)
    train: list[Document] = field(default_factory=list)
    heldout: list[Document] = field(default_factory=list)

    def drop(self, reason: Drop, size: int) -> None:
        """Count one dropped document of `size` bytes."""
        self.dropped_documents[reason] += 1
        self.dropped_bytes[reason] += size


def select(texts: Iterable[str], seen: set[bytes], heldout_share: float, max_bytes: int | None) -> Selection:
    """Clean, deduplicate, order, split and cap the texts of one source.

    Args:
        texts: as extracted.
        seen: digests of the documents of the sources before this one; those of this one are added.
        heldout_share: share of the documents that is held out.
        max_bytes: cap of the training text; None keeps all.
    """
    selection = Selection()
    documents = shuffle(_distinct(_cleaned(texts, selection), seen, selection))
    selection.heldout, train = split(documents, heldout_share)
    selection.train = capped(train, max_bytes, selection)
    return selection


def _cleaned(texts: Iterable[str], selection: Selection) -> Iterator[Document]:
    for raw in texts:
        size = len(raw.encode())
        selection.documents_in += 1
        selection.bytes_in += size
        text = normalise(raw)
        if reason := reason_to_drop(text):
            selection.drop(reason, size)
        else:
            yield Document.of(text)


def _distinct(documents: Iterable[Document], seen: set[bytes], selection: Selection) -> Iterator[Document]:
    # Equal digests may differ in white space: sorted, the same one survives whatever the order of reading.
    for document in sorted(documents, key=lambda document: (document.digest, document.text)):
        if document.digest in seen:
            selection.drop(Drop.DUPLICATE, document.bytes)
        else:
            seen.add(document.digest)
            yield document


def shuffle(documents: Iterable[Document]) -> list[Document]:
    """The documents in an order that is random to them and the same everywhere."""
    return sorted(documents, key=lambda document: (document.key("order"), document.digest))


def split(documents: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Held-out and training documents, each in the given order.

    Documents are held out by the rank of their keyed hash: the share of the documents, and more until
    `MIN_HELDOUT_BYTES` are held out, but of these more no more than `MAX_HELDOUT_SHARE` of the bytes. At least one
    document is held out and one is left, where there are two.
    """
    ranked = sorted(documents, key=lambda document: (document.key("heldout"), document.digest))
    least = min(max(round(share * len(ranked)), 1), len(ranked) - 1)
    room = MAX_HELDOUT_SHARE * sum(document.bytes for document in ranked)
    chosen: set[bytes] = set()
    held_bytes = 0
    for number, document in enumerate(ranked):
        enough = held_bytes >= MIN_HELDOUT_BYTES or held_bytes + document.bytes > room
        if number >= least and enough:
            break
        chosen.add(document.digest)
        held_bytes += document.bytes
    return (
        [document for document in documents if document.digest in chosen],
        [document for document in documents if document.digest not in chosen],
    )


def capped(documents: list[Document], max_bytes: int | None, selection: Selection) -> list[Document]:
    """The documents from the beginning up to `max_bytes`, at least one; the others are counted as dropped."""
    kept: list[Document] = []
    total = 0
    for document in documents:
        total += document.bytes
        if max_bytes is not None and total > max_bytes and kept:
            selection.drop(Drop.OVER_CAP, document.bytes)
        else:
            kept.append(document)
    return kept


def drop_near_duplicates(selections: Iterable[Selection]) -> None:
    """Drop held-out documents that training text of any source contains, see `overlap`."""
    everything = list(selections)
    heldout = [(selection, document) for selection in everything for document in selection.heldout]
    training = (document.text for selection in everything for document in selection.train)
    shares = containment([document.text for _, document in heldout], training)
    near = {document.digest for (_, document), share in zip(heldout, shares, strict=True) if share >= MAX_CONTAINMENT}
    for selection in everything:
        for document in selection.heldout:
            if document.digest in near:
                selection.drop(Drop.NEAR_DUPLICATE, document.bytes)
        selection.heldout = [document for document in selection.heldout if document.digest not in near]
