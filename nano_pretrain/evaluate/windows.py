"""Which held-out tokens the loss by position is measured on; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np

from nano_pretrain.data.shards import Corpus, TokenStream
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import Recipe

ENOUGH = 8
"""Samples of whole long documents that are preferred to more samples of concatenated text."""

SEARCHED = 2**24
"""Tokens at the start of each held-out stream in which long documents are looked for."""


@dataclass(frozen=True)
class Window:
    """A sample and the token behind it.

    Attributes:
        stream: the source.
        start: first token in it.
    """

    stream: TokenStream
    start: int


def sources_read(recipe: Recipe) -> list[str]:
    """Every source that a stage reads."""
    phases = [phase for stage in recipe.stages.values() for phase in stage.phases.values()]
    return sorted({name for phase in phases for name, weight in phase.blend.items() if weight > 0})


def check_held_out(lengths: Iterable[int], corpus: Corpus, sources: Iterable[str]) -> None:
    """Refuse lengths of which no source has a sample.

    Raises:
        RecipeError: the message says the longest that one has.
    """
    most = max((corpus.heldout[name].tokens - 1 for name in sources), default=0)
    for length in lengths:
        if length > most:
            raise RecipeError("evaluate.lengths", f"no source has {length} held-out tokens", f"write at most {most}")


def whole_windows(streams: Sequence[TokenStream], length: int, count: int, eod_id: int) -> list[Window]:
    """Windows that each lie within one document, one behind the other, see `_spread`."""
    return _spread(streams, [_within_documents(stream, length, eod_id) for stream in streams], count)


def concatenated_windows(streams: Sequence[TokenStream], length: int, count: int) -> list[Window]:
    """Windows as training samples are cut, across documents, see `_spread`."""
    return _spread(streams, [range(0, max(0, stream.tokens - length), length) for stream in streams], count)


def _within_documents(stream: TokenStream, length: int, eod_id: int) -> Sequence[int]:
    ends = np.flatnonzero(stream.read(0, min(stream.tokens, SEARCHED)) == eod_id) + 1
    documents = pairwise([0, *ends.tolist()])
    return list(chain.from_iterable(range(start, end - length, length) for start, end in documents))


def _spread(streams: Sequence[TokenStream], starts: Sequence[Sequence[int]], count: int) -> list[Window]:
    """Up to `count` windows, each source in turn; those of a source lie evenly over all that it has.

    Not the first of each: one source may begin with the text of another, as one that is derived from it does.
    """
    numbers = [0] * len(streams)
    turns: list[tuple[int, int]] = []
    while len(turns) < min(count, sum(map(len, starts))):
        for source, found in enumerate(starts):
            if numbers[source] < len(found) and len(turns) < count:
                turns.append((source, numbers[source]))
                numbers[source] += 1
    return [
        Window(streams[source], starts[source][(2 * number + 1) * len(starts[source]) // (2 * numbers[source])])
        for source, number in turns
    ]
