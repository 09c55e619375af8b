"""A derived source: which documents of its parents are long, their sampled chunks, and the documents that result.

Training documents come from the parents' training documents and held-out ones from their held-out ones, so nothing
that was held out is trained on.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from nano_pretrain.prepare.clean import Drop
from nano_pretrain.prepare.corpus_file import DerivedSource
from nano_pretrain.prepare.documents import Document
from nano_pretrain.prepare.long_qa.passages import Pair, Passage, sample
from nano_pretrain.prepare.select import Selection, capped, shuffle
from nano_pretrain.recipe.errors import UserError

SPLITS = ("train", "heldout")
DOCUMENTS_AT_A_TIME = 32


@dataclass(frozen=True)
class LongDocument:
    """A document that is long enough.

    Attributes:
        document: as its parent has it.
        chunks: number of its chunks.
        passages: those that are sampled.
    """

    document: Document
    chunks: int
    passages: Sequence[Passage]


@dataclass
class Draw:
    """What a derived source is made of, before anything is asked.

    Attributes:
        selection: the parents' documents counted and the short ones dropped; its splits are still empty.
        long: long documents by split, in the order of writing.
    """

    selection: Selection = field(default_factory=Selection)
    long: dict[str, list[LongDocument]] = field(default_factory=dict)

    @property
    def passages(self) -> list[Passage]:
        """All sampled chunks, in the order in which `append` takes their pairs."""
        return [passage for split in SPLITS for each in self.long[split] for passage in each.passages]


@dataclass(frozen=True)
class Derived:
    """A derived source, ready to be written.

    Attributes:
        selection: its documents.
        counts: by split: `documents` long enough, their `chunks`, how many were `sampled`, and the `questions`.
    """

    selection: Selection
    counts: Mapping[str, Mapping[str, int]]


def draw(source: DerivedSource, parents: Mapping[str, Selection], tokenizer: Tokenizer, max_bytes: int | None) -> Draw:
    """Find the long documents of the parents and sample their chunks.

    Args:
        source: the derived source.
        parents: at least its parents.
        tokenizer: counts the tokens.
        max_bytes: cap of the training text, questions not counted; None keeps all.

    Raises:
        UserError: no training document is long enough.
    """
    result = Draw()
    for split in SPLITS:
        documents = shuffle(document for name in source.parents for document in getattr(parents[name], split))
        result.selection.documents_in += len(documents)
        result.selection.bytes_in += sum(document.bytes for document in documents)
        found = list(_long(documents, source, tokenizer, result.selection))
        kept = capped([each.document for each in found], max_bytes if split == "train" else None, result.selection)
        result.long[split] = found[: len(kept)]
    if not result.long["train"]:
        raise UserError(
            f"data.corpus: derived source {source.name}: no training document of {', '.join(source.parents)} has "
            f"{source.min_tokens} tokens; lower its min_tokens, or give it other parents"
        )
    return result


def _long(
    documents: Iterable[Document], source: DerivedSource, tokenizer: Tokenizer, selection: Selection
) -> Iterator[LongDocument]:
    remaining = iter(documents)
    while batch := list(itertools.islice(remaining, DOCUMENTS_AT_A_TIME)):
        for document, starts in zip(batch, token_starts(tokenizer, batch, source.min_tokens), strict=True):
            if len(starts) < source.min_tokens:
                selection.drop(Drop.NOT_LONG, document.bytes)
            else:
                bounds = chunk_bounds(starts, source.chunk_tokens, len(document.text))
                passages = sample(document, bounds, source.share_of_chunks, source.seed)
                yield LongDocument(document, len(bounds) - 1, passages)


def token_starts(tokenizer: Tokenizer, documents: Sequence[Document], min_tokens: int) -> list[list[int]]:
    """Character at which each token of each document begins; empty for one that cannot have `min_tokens`."""
    # A token has at least one byte: short documents need not be encoded.
    texts = [document.text if document.bytes >= min_tokens else "" for document in documents]
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [[start for start, _ in encoding.offsets] for encoding in encodings]


def chunk_bounds(starts: Sequence[int], chunk_tokens: int, characters: int) -> list[int]:
    """Characters at which whole chunks begin, and the end of the last one; what is left at the end is in none."""
    bounds = list(starts[::chunk_tokens])
    return bounds if len(starts) % chunk_tokens else [*bounds, characters]


def append(source: DerivedSource, drawn: Draw, pairs: Sequence[Pair | None]) -> Derived:
    """Append the pairs to their documents; a document without any is dropped.

    Args:
        source: the derived source.
        drawn: its long documents.
        pairs: for each of `drawn.passages` in order; None where nothing could be asked.

    Raises:
        UserError: no training document has a question.
    """
    remaining = iter(pairs)
    selection, counts = drawn.selection, {}
    for split in SPLITS:
        tally: Counter[str] = Counter(documents=len(drawn.long[split]), chunks=0, sampled=0, questions=0)
        for each in drawn.long[split]:
            own = [pair for pair in itertools.islice(remaining, len(each.passages)) if pair]
            tally.update(chunks=each.chunks, sampled=len(each.passages), questions=len(own))
            if own:
                getattr(selection, split).append(with_questions(each.document, own))
            else:
                selection.drop(Drop.NO_QUESTION, each.document.bytes)
        counts[split] = dict(tally)
    if not selection.train:
        raise UserError(
            f"data.long_qa.writer: derived source {source.name}: no usable question about any of "
            f"{counts['train']['sampled']} chunks; take another writer or model, or longer chunks"
        )
    return Derived(selection, counts)


def with_questions(document: Document, pairs: Sequence[Pair]) -> Document:
    """The document, then the questions with their answers."""
    return Document.of("\n\n".join([document.text, *(pair.text for pair in pairs)]))
