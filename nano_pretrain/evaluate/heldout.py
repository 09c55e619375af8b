"""Loss on held-out text, per source and for the blend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nano_pretrain.data.loader import MicroBatch, batch_of
from nano_pretrain.data.shards import Corpus, TokenStream, token_byte_lengths
from nano_pretrain.parallel.context import own_tokens
from nano_pretrain.parallel.groups import context_parallel_place, data_parallel_place, reports_loss
from nano_pretrain.recipe.errors import UserError


@dataclass(frozen=True)
class _Sample:
    """Where a sample is read: the number of its source, its first token, and how many tokens are predicted."""

    source: int
    start: int
    length: int


class HeldOut:
    """The same held-out samples at every evaluation: the first of each source's held-out stream.

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
        self.streams: list[TokenStream] = [corpus.heldout[name] for name in self.sources]
        self.shape = (sequence_length, micro_batch_size)
        self.eod_id = corpus.eod_id if reset_documents else None
        self.device = device
        self.bytes_of = torch.from_numpy(token_byte_lengths(corpus.tokenizer_file)).to(device)
        self.samples: list[_Sample] = []
        for number, stream in enumerate(self.streams):
            end = min(tokens_per_source, stream.tokens - 1)
            if end < 1:
                raise UserError(
                    f"data.path: source {stream.name} has no held-out text in {corpus.path}; raise data.heldout_share "
                    "and prepare again, or leave it out of the blends"
                )
            starts = range(0, end, sequence_length)
            self.samples += [_Sample(number, start, min(sequence_length, end - start)) for start in starts]

    def evaluate(self, run: Callable[..., list[Any]]) -> dict[str, Any]:
        """Nats per token and bits per byte of each source and of the blend.

        Args:
            run: `Trainable.run` of a model in evaluation mode.

        Returns:
            {"sources": {name: {loss, bits_per_byte, tokens, bytes}}, "blend": {loss, bits_per_byte}}.
        """
        rank, size = data_parallel_place()
        mine = self.samples[rank::size]
        width = self.shape[1]
        sums = torch.zeros(len(self.sources), 3, dtype=torch.float64, device=self.device)
        groups = [mine[start : start + width] for start in range(0, len(mine), width)]
        with torch.no_grad():
            reports = run(self._batches(groups), len(groups), self.shape, True, self._score) if groups else []
        if reports_loss():
            positions = own_tokens(torch.arange(self.shape[0], device=self.device), 0, context_parallel_place())
            for group, report in zip(groups, reports, strict=True):
                for sample, row in zip(group, report, strict=False):
                    counted = positions < sample.length
                    sums[sample.source, :2] += row[counted].sum(0)
                    sums[sample.source, 2] += counted.sum()
        dist.all_reduce(sums)
        return self._summary(sums)

    def _batches(self, groups: list[list[_Sample]]) -> Iterator[MicroBatch]:
        length, width = self.shape
        for group in groups:
            # Filled up with zeros, which are not counted: pipeline stages exchange tensors of one shape.
            rows = np.zeros((width, length + 1), np.int64)
            for row, sample in zip(rows, group, strict=False):
                row[: sample.length + 1] = self.streams[sample.source].read(sample.start, sample.length + 1)
            yield batch_of(rows, self.eod_id, self.device).of_context(context_parallel_place())

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
