"""Held-out loss by position in the sample."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from nano_pretrain.data.shards import Corpus
from nano_pretrain.evaluate.retrieval import Done, estimate
from nano_pretrain.evaluate.rows import Passes, Row, Run
from nano_pretrain.evaluate.windows import ENOUGH, check_held_out, concatenated_windows, whole_windows


class LossByPosition:
    """Held-out samples of one length, the same at every evaluation, each source in turn.

    A sample lies within one document that is long enough; where there are fewer than `ENOUGH` of these, samples are cut
    from the streams as training samples are, across documents.

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
        check_held_out([length], corpus, sources)
        streams = [corpus.heldout[name] for name in sources]
        self.length = length
        self._windows = whole_windows(streams, length, count, corpus.eod_id)
        self.whole = len(self._windows) >= min(ENOUGH, count)
        if not self.whole:
            self._windows = concatenated_windows(streams, length, count)

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self._windows)

    def evaluate(self, run: Run, passes: Passes, done: Done) -> dict[str, Any]:
        """Nats per token by bins of positions.

        Returns:
            {"documents": "whole" or "concatenated", "samples", "loss" and "standard_error" over samples of all
            positions together, "bins": {"edges" (position 0 is predicted from one token), "loss", "standard_error"}}.
        """
        edges = bin_edges(self.length)
        inner = torch.tensor(edges[1:-1], device=passes.device)
        sums = torch.zeros(self.samples, len(edges) - 1, dtype=torch.float64, device=passes.device)
        rows = [Row(self.length, partial(each.stream.read, each.start, self.length + 1)) for each in self._windows]
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
