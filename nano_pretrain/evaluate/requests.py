"""What lm-evaluation-harness asks of a model, computed by all of its ranks together; knows nothing of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nano_pretrain.data.loader import MicroBatch
from nano_pretrain.evaluate.generate import continuation
from nano_pretrain.evaluate.length import Subject
from nano_pretrain.evaluate.rows import Passes, Row
from nano_pretrain.parallel.groups import data_parallel_place
from nano_pretrain.recipe.schema import GenerateConfig

Answer = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether each of its tokens is the likeliest."""


@dataclass(frozen=True)
class Continuation:
    """Token ids, at least one, and those before them, at least one."""

    context: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Prompt:
    """What is to be continued greedily.

    Attributes:
        tokens: token ids, at least one.
        most: new tokens, at most.
        stops: texts before which the continuation ends.
    """

    tokens: list[int]
    most: int
    stops: tuple[str, ...]


class Requests:
    """Likelihoods and greedy texts, of all ranks at the request of the first.

    Args:
        subject: the model in evaluation mode.
        model: this rank's part of it.
        decode: token ids to text.
        eod_id: id that ends a document, and a text.
        shape_of: (tokens, rows) of the forward passes of rows of so many tokens.
        longest: tokens that are read before the last one that is predicted; of more, the last.
    """

    def __init__(
        self,
        subject: Subject,
        model: Any,
        decode: Callable[[list[int]], str],
        eod_id: int,
        shape_of: Callable[[int], tuple[int, int]],
        longest: int,
    ) -> None:
        self.eod_id = eod_id
        self.longest = longest
        self._subject = subject
        self._model = model
        self._decode = decode
        self._shape_of = shape_of

    def likelihoods(self, asked: Sequence[Continuation]) -> list[Answer]:
        """Of each continuation; for the first rank alone to call."""
        self._broadcast((False, asked))
        return self._likelihoods(asked)

    def texts(self, asked: Sequence[Prompt]) -> list[str]:
        """The greedy continuation of each prompt; for the first rank alone, where each rank holds the whole model."""
        self._broadcast((True, asked))
        return self._texts(asked)

    def end(self) -> None:
        """Nothing more will be asked; for the first rank alone."""
        self._broadcast(None)

    def serve(self) -> None:
        """Take part in what the first rank asks, until its `end`."""
        while (asked := self._broadcast(None)) is not None:
            generates, inputs = asked
            if generates:
                self._texts(inputs)
            else:
                self._likelihoods(inputs)

    def _broadcast(self, asked: Any) -> Any:
        """What the first rank gives: None, or whether texts are asked for, and of what."""
        box = [asked]
        dist.broadcast_object_list(box, src=0, device=self._subject.device)
        return box[0]

    def _likelihoods(self, asked: Sequence[Continuation]) -> list[Answer]:
        rows = [self._row(each) for each in asked]
        # Nats, and tokens that are not the likeliest.
        found = torch.zeros(len(rows), 2, dtype=torch.float64, device=self._subject.device)
        with likeliest_labels(self._model) as likeliest:

            def score(batch: MicroBatch, losses: Tensor) -> Tensor:
                return torch.stack([losses.double(), (~likeliest()).double()], 2)

            for numbers in _of_like_length(rows):
                together = [rows[number] for number in numbers]
                for place, positions, values in self._passes(together).scores(self._subject.run, together, score):
                    first = rows[numbers[place]].length - len(asked[numbers[place]].tokens)
                    found[numbers[place]] += values[positions >= first].sum(0)
        dist.all_reduce(found)
        return [(-nats, missed == 0) for nats, missed in found.tolist()]

    def _row(self, asked: Continuation) -> Row:
        # A context is cut, from the left, as lm-evaluation-harness cuts it, a continuation never.
        length = max(self.longest, len(asked.tokens))
        tokens = [*asked.context, *asked.tokens][-length - 1 :]
        return Row(len(tokens) - 1, partial(np.array, tokens))

    def _passes(self, rows: Sequence[Row]) -> Passes:
        filled, most = self._shape_of(max(row.length for row in rows))
        # A row is one text, in which there is no document to reset at.
        return Passes((filled, min(most, len(rows))), None, self._subject.device)

    def _texts(self, asked: Sequence[Prompt]) -> list[str]:
        rank, size = data_parallel_place()
        mine = {number: self._text(asked[number]) for number in range(rank, len(asked), size)}
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        found = {number: text for part in parts for number, text in part.items()}
        return [found[number] for number in range(len(asked))]

    def _text(self, prompt: Prompt) -> str:
        options = GenerateConfig(max_new_tokens=prompt.most, temperature=0.0)
        tokens = prompt.tokens[-max(1, self.longest - prompt.most) :]
        text, ids = "", list[int]()
        for token in continuation(self._model, tokens, options, self.eod_id, self._model.true_vocab_size):
            ids.append(token)
            text = self._decode(ids)
            if ends := [text.index(stop) for stop in prompt.stops if stop in text]:
                return text[: min(ends)]
        return text


def _of_like_length(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Numbers of rows, the longest first, whose lengths lie between two powers of 2: little is filled up."""

    def octave(number: int) -> int:
        return (rows[number].length - 1).bit_length()

    for _, numbers in groupby(sorted(range(len(rows)), key=octave, reverse=True), octave):
        yield list(numbers)


@contextmanager
def likeliest_labels(model: Any) -> Iterator[Callable[[], Tensor]]:
    """While entered, whether the labels of the last forward pass were the likeliest tokens can be asked.

    Not after the pass: the ranks of a layout that divides the vocabulary never have all logits of a token.

    Args:
        model: this rank's part of a `HybridModel`.

    Yields:
        What gives bools [batch, length], on the ranks that have logits.
    """
    loss, last = model.compute_language_model_loss, list[Tensor]()

    def noting(labels: Tensor, logits: Tensor) -> Tensor:
        last[:] = [likeliest_token(logits, model.true_vocab_size, model.pg_collection.tp).t() == labels]
        found: Tensor = loss(labels, logits)
        return found

    model.compute_language_model_loss = noting
    try:
        yield lambda: last[0]
    finally:
        # The method of the class shows again.
        del model.compute_language_model_loss


def likeliest_token(logits: Tensor, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """The likeliest token of the whole vocabulary, of equal ones the first [length, batch].

    Args:
        logits: this rank's columns [length, batch, padded vocabulary / ranks]; padding is overwritten.
        vocab_size: columns of all ranks that are not padding.
        group: the ranks, in the order of their columns.
    """
    first = group.rank() * logits.shape[-1]
    logits[..., max(0, vocab_size - first) :] = -torch.inf
    peaks, places = logits.max(-1)
    highest = peaks.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    found = (places + first).masked_fill(peaks < highest, torch.iinfo(places.dtype).max)
    dist.all_reduce(found, dist.ReduceOp.MIN, group)
    return found
