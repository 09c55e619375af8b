"""Micro-batches of a step, read from the memory-mapped shards in the curriculum's order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.shards import Corpus
from nano_pretrain.parallel.context import own_tokens


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one forward pass.

    Args:
        tokens: inputs [batch, length], int64; under context parallelism this rank's part of them.
        labels: the tokens that follow, shape of tokens.
        documents: document of each input of the whole samples [batch, length], int32, or None where documents are
            ignored.
    """

    tokens: Tensor
    labels: Tensor
    documents: Tensor | None

    def of_context(self, place: tuple[int, int]) -> MicroBatch:
        """The part of a rank whose place in the context-parallel group is `place`, from whole samples."""
        return replace(self, tokens=own_tokens(self.tokens, 1, place), labels=own_tokens(self.labels, 1, place))


class BatchReader:
    """Reads this data-parallel rank's samples of any step.

    Sample m D + r of a step's micro-batches goes to rank r of D, so that the samples of a step do not depend on D.

    Args:
        corpus: the shards.
        curriculum: the order.
        place: rank and size of the data-parallel group.
        reset_documents: whether batches carry document indices.
        device: where batches go.
        context: rank and size of the context-parallel group.
    """

    def __init__(
        self,
        corpus: Corpus,
        curriculum: Curriculum,
        place: tuple[int, int],
        reset_documents: bool,
        device: torch.device,
        context: tuple[int, int] = (0, 1),
    ) -> None:
        self.corpus = corpus
        self.curriculum = curriculum
        self.rank, self.size = place
        self.reset_documents = reset_documents
        self.device = device
        self.context = context

    def micro_batches(self, consumed: int) -> Iterator[MicroBatch]:
        """The micro-batches of the step that starts after `consumed` tokens."""
        stage = self.curriculum.stage_at(consumed)
        width = stage.micro_batch_size
        for start in range(self.rank * width, stage.samples_at(consumed), self.size * width):
            addresses = self.curriculum.samples(consumed, range(start, start + width))
            length = stage.sequence_length
            rows = [self.corpus.train[a.source].read(a.start, length + 1) for a in addresses]
            whole = batch_of(np.stack(rows), self.corpus.eod_id if self.reset_documents else None, self.device)
            yield whole.of_context(self.context)


def batch_of(
    rows: np.ndarray[tuple[int, int], np.dtype[np.int64]], eod_id: int | None, device: torch.device
) -> MicroBatch:
    """A micro-batch from rows of length + 1 tokens; a document ends with `eod_id` where one is given."""
    samples = torch.from_numpy(rows)
    tokens, labels = samples[:, :-1].contiguous(), samples[:, 1:].contiguous()
    documents = None
    if eod_id is not None:
        ended = torch.nn.functional.pad(tokens[:, :-1] == eod_id, (1, 0))
        documents = ended.cumsum(1, dtype=torch.int32).to(device)
    return MicroBatch(tokens.to(device), labels.to(device), documents)
