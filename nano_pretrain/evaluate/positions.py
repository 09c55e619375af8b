"""Held-out loss by position in the sample."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, pairwise, zip_longest
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nano_pretrain.data.shards import Corpus, TokenStream
from nano_pretrain.evaluate.retrieval import Done, estimate
from nano_pretrain.evaluate.rows import Passes, Row, Run
from nano_pretrain.recipe.errors import RecipeError

ENOUGH = 8
"""Samples of whole long documents that are preferred to more samples of concatenated text."""

SEARCHED = 2**24
"""Tokens at the start of each held-out stream in which long documents are looked for."""


@dataclass(frozen=True)
class _Place:
    """First token of a sample in its stream."""

    stream: TokenStream
    start: int


class LossByPosition:
    """Held-out samples of one length, the same at every evaluation, each source in turn.

    A sample lies within one document that is long enough, window after window; where there are fewer than `ENOUGH` of
    these, samples are cut from the streams as training samples are, across documents.

    Args:
        corpus: the shards.
        sources: names of the sources.
        length: tokens of a sample.
        count: samples, at most.

    Attributes:
        length: see above.
        samples: how many there are.
        whole: whether each lies within one document.

    Raises:
        RecipeError: no source has so much held-out text.
    """

    def __init__(self, corpus: Corpus, sources: Sequence[str], length: int, count: int) -> None:
        streams = [corpus.heldout[name] for name in sources]
        self.length = length
        self._places = _in_turn([_within_documents(stream, length, corpus.eod_id) for stream in streams], count)
        self.whole = len(self._places) >= min(ENOUGH, count)
        if not self.whole:
            ends = (stream.tokens - length for stream in streams)
            starts = [range(0, max(0, end), length) for end in ends]
            self._places = _in_turn([_at(stream, each) for stream, each in zip(streams, starts, strict=True)], count)
        if not self._places:
            most = max(stream.tokens for stream in streams) - 1
            raise RecipeError("evaluate.lengths", f"no source has {length} held-out tokens", f"write at most {most}")

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self._places)

    def evaluate(self, run: Run, passes: Passes, done: Done) -> dict[str, Any]:
        """Nats per token by bins of positions.

        Returns:
            {"documents": "whole" or "concatenated", "samples", "loss" and "standard_error" over samples of all
            positions together, "bins": {"edges" (position 0 is predicted from one token), "loss", "standard_error"}}.
        """
        edges = bin_edges(self.length)
        inner = torch.tensor(edges[1:-1], device=passes.device)
        sums = torch.zeros(self.samples, len(edges) - 1, dtype=torch.float64, device=passes.device)
        rows = [Row(self.length, partial(p.stream.read, p.start, self.length + 1)) for p in self._places]
        for number, positions, losses in passes.scores(run, rows, lambda batch, losses: losses.double(), done):
            sums[number].index_add_(0, torch.bucketize(positions, inner, right=True), losses)
        dist.all_reduce(sums)
        widths = torch.tensor([high - low for low, high in pairwise(edges)], device=passes.device)
        means = [estimate(column) for column in (sums / widths).T.tolist()]
        whole = estimate((sums.sum(1) / self.length).tolist())
        return {
            "documents": "whole" if self.whole else "concatenated",
            "samples": self.samples,
            "loss": whole.score,
            "standard_error": whole.standard_error,
            "bins": {
                "edges": edges,
                "loss": [mean.score for mean in means],
                "standard_error": [mean.standard_error for mean in means],
            },
        }


def bin_edges(length: int) -> list[int]:
    """Borders of the bins: 0, 16, then two bins an octave, the length last."""
    edges, octaves = [0], 8
    while (edge := round(2 ** (octaves / 2))) < length:
        edges.append(edge)
        octaves += 1
    return [*edges, length]


def _within_documents(stream: TokenStream, length: int, eod_id: int) -> Iterable[_Place]:
    ends = np.flatnonzero(stream.read(0, min(stream.tokens, SEARCHED)) == eod_id) + 1
    for start, end in pairwise([0, *ends.tolist()]):
        yield from _at(stream, range(start, end - length, length))


def _at(stream: TokenStream, starts: Iterable[int]) -> Iterable[_Place]:
    return (_Place(stream, start) for start in starts)


def _in_turn(of_sources: Sequence[Iterable[_Place]], count: int) -> list[_Place]:
    """The first of each source, then the second of each, up to `count`."""
    rounds = chain.from_iterable(zip_longest(*of_sources))
    return list(islice((place for place in rounds if place is not None), count))
