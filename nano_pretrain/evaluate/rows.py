"""Rows of tokens through a model of any layout, and what each token of them scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nano_pretrain.data.loader import MicroBatch, batch_of
from nano_pretrain.parallel.context import own_tokens
from nano_pretrain.parallel.groups import context_parallel_place, data_parallel_place, reports_loss

AT_ONCE = 16
"""Forward passes of one call: enough to keep a pipeline busy, few enough for what they report to be small."""

Run = Callable[..., list[Any]]
"""`Trainable.run` of a model in evaluation mode."""


@dataclass(frozen=True)
class Row:
    """One sequence.

    Attributes:
        length: tokens that are predicted.
        read: the length + 1 tokens.
    """

    length: int
    read: Callable[[], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Passes:
    """How rows are laid out in forward passes.

    Attributes:
        shape: (tokens, rows) of a pass, as `Trainable.run` takes it; shorter rows are filled up.
        eod_id: token at which documents are reset, or None.
        device: where batches go.
    """

    shape: tuple[int, int]
    eod_id: int | None
    device: torch.device

    def scores(
        self,
        run: Run,
        rows: Sequence[Row],
        score: Callable[[MicroBatch, Tensor], Tensor],
        done: Callable[[int], None] = lambda count: None,
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """What this rank has to report of each row; all ranks together report every token once.

        All ranks have to consume it whole.

        Args:
            run: the model.
            rows: the same on all ranks.
            score: (batch, loss of each token [batch, length]) -> [batch, length, ...].
            done: told the number of rows after each call of `run`.

        Yields:
            Number of the row, positions [n] of its predicted tokens, counted from 0, and their scores [n, ...].
        """
        place, width = data_parallel_place(), self.shape[1]
        mine = range(len(rows))[place[0] :: place[1]]
        groups = [mine[start : start + width] for start in range(0, len(mine), width)]
        positions = own_tokens(torch.arange(self.shape[0], device=self.device), 0, context_parallel_place())
        for start in range(0, len(groups), AT_ONCE):
            now = groups[start : start + AT_ONCE]
            with torch.no_grad():
                reports = run(self._batches(rows, now), len(now), self.shape, True, score)
            if reports_loss():
                for group, report in zip(now, reports, strict=True):
                    for number, values in zip(group, report, strict=False):
                        counted = positions < rows[number].length
                        yield number, positions[counted], values[counted]
            done(sum(map(len, now)))

    def _batches(self, rows: Sequence[Row], groups: Sequence[range]) -> Iterator[MicroBatch]:
        length, width = self.shape
        for group in groups:
            # Filled up with zeros, which are not counted: pipeline stages exchange tensors of one shape.
            filled = np.zeros((width, length + 1), np.int64)
            for line, number in zip(filled, group, strict=False):
                line[: rows[number].length + 1] = rows[number].read()
            yield batch_of(filled, self.eod_id, self.device).of_context(context_parallel_place())
