"""Loss on held-out text, per source and for the blend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nano_pretrain.data.loader import MicroBatch
from nano_pretrain.data.shards import Corpus, TokenStream, token_byte_lengths
from nano_pretrain.evaluate.rows import Passes, Row, Run


@dataclass(frozen=True)
class _Sample:
    """Where a sample is read: the number of its source, its first token, and how many tokens are predicted."""

    source: int
    start: int
    length: int


class HeldOut:
    """The same held-out samples at every evaluation: the middle of each source's held-out stream, one after the other.

    Not its beginning, which may be another's: a derived source begins with a document of one that it is derived from.
    The last sample of a source may be shorter.

    Args:
        corpus: the shards.
        weights: share of each source in the blend, for its mean.
        sequence_length: tokens of a sample.
        micro_batch_size: samples of a forward pass.
        tokens_per_source: tokens read of each source, at most.
        reset_documents: as in training.
        device: where batches go.

    Raises:
        UserError: a source of the blend has no held-out text.
    """

    def __init__(
        self,
        corpus: Corpus,
        weights: Mapping[str, float],
        sequence_length: int,
        micro_batch_size: int,
        tokens_per_source: int,
        reset_documents: bool,
        device: torch.device,
    ) -> None:
        self.weights = weights
        self.sources = sorted(weights)
        self.streams: list[TokenStream] = [corpus.held_out(name) for name in self.sources]
        self.device = device
        eod_id = corpus.eod_id if reset_documents else None
        self._passes = Passes((sequence_length, micro_batch_size), eod_id, device)
        self.bytes_of = torch.from_numpy(token_byte_lengths(corpus.tokenizer_file)).to(device)
        self.samples: list[_Sample] = []
        for number, stream in enumerate(self.streams):
            end = min(tokens_per_source, stream.tokens - 1)
            first = (stream.tokens - 1 - end) // 2
            starts = range(0, end, sequence_length)
            self.samples += [_Sample(number, first + start, min(sequence_length, end - start)) for start in starts]

    def evaluate(self, run: Run) -> dict[str, Any]:
        """Nats per token and bits per byte of each source and of the blend.

        Args:
            run: `Trainable.run` of a model in evaluation mode.

        Returns:
            {"sources": {name: {loss, bits_per_byte, tokens, bytes}}, "blend": {loss, bits_per_byte}}.
        """
        sums = torch.zeros(len(self.sources), 3, dtype=torch.float64, device=self.device)
        for number, _, values in self._passes.scores(run, self._rows(), self._score):
            source = self.samples[number].source
            sums[source, :2] += values.sum(0)
            sums[source, 2] += len(values)
        dist.all_reduce(sums)
        return self._summary(sums)

    def _rows(self) -> list[Row]:
        reads = (partial(self.streams[s.source].read, s.start, s.length + 1) for s in self.samples)
        return [Row(sample.length, read) for sample, read in zip(self.samples, reads, strict=True)]

    def _score(self, batch: MicroBatch, losses: Tensor) -> Tensor:
        """Nats and bytes of each token [batch, length, 2]."""
        return torch.stack([losses.double(), self.bytes_of[batch.labels].double()], 2)

    def _summary(self, sums: Tensor) -> dict[str, Any]:
        sources: dict[str, dict[str, float]] = {}
        for name, (nats, size, tokens) in zip(self.sources, sums.tolist(), strict=True):
            sources[name] = {
                "loss": nats / tokens,
                "bits_per_byte": nats / math.log(2) / size,
                "tokens": int(tokens),
                "bytes": int(size),
            }
        total = sum(self.weights[name] for name in sources)
        shares = {name: self.weights[name] / total for name in sources}
        loss = sum(share * sources[name]["loss"] for name, share in shares.items())
        size = sum(share * sources[name]["bytes"] / sources[name]["tokens"] for name, share in shares.items())
        return {"sources": sources, "blend": {"loss": loss, "bits_per_byte": loss / math.log(2) / size}}
