"""Scores of retrieval prompts: the rank of the right answer by likelihood, and greedy generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from nano_pretrain.evaluate.prompts import Example
from nano_pretrain.evaluate.rows import Passes, Row, Run
from nano_pretrain.parallel.groups import data_parallel_place

Complete = Callable[[list[int], int], list[int]]
"""(prompt, most new tokens) -> the likeliest continuation, a token at a time, on one rank."""
Done = Callable[[int], None]
"""Told how many rows or prompts are done."""


@dataclass(frozen=True)
class Estimate:
    """A mean over examples.

    Attributes:
        score: the mean.
        standard_error: of it, from the examples' variance; None for one example.
    """

    score: float
    standard_error: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of equally weighted values, at least one."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None)
    return Estimate(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count))


def rank_scores(run: Run, passes: Passes, examples: Sequence[Example], done: Done) -> list[float]:
    """1 for each example whose right answer is likelier than every other candidate; a tie is shared equally.

    A model that knows nothing is right once in as many times as there are candidates.
    """
    rows, firsts = [], []
    for example in examples:
        for candidate in example.candidates:
            tokens = [*example.prompt, *candidate]
            rows.append(Row(len(tokens) - 1, partial(np.array, tokens)))
            firsts.append(len(example.prompt) - 1)
    nats = torch.zeros(len(rows), dtype=torch.float64, device=passes.device)
    for number, positions, losses in passes.scores(run, rows, lambda batch, losses: losses.double(), done):
        nats[number] += losses[positions >= firsts[number]].sum()
    dist.all_reduce(nats)
    of_example = nats.view(len(examples), -1)
    best = of_example == of_example.min(1, keepdim=True).values
    shares: list[float] = (best[:, 0] / best.sum(1).clamp(min=1)).tolist()
    return shares


def match_scores(
    complete: Complete, tokenizer: Tokenizer, examples: Sequence[Example], device: torch.device, done: Done
) -> list[float]:
    """The share of each example's references that its greedy continuation contains, whatever their case.

    RULER's `string_match_all`. Data-parallel ranks share the examples; each has to hold the whole model.
    """
    rank, size = data_parallel_place()
    scores = torch.zeros(len(examples), dtype=torch.float64, device=device)
    for number in range(rank, len(examples), size):
        example = examples[number]
        text = tokenizer.decode(complete(example.prompt, example.room)).lower()
        scores[number] = sum(reference.lower() in text for reference in example.references) / len(example.references)
        done(1)
    dist.all_reduce(scores)
    found: list[float] = scores.tolist()
    return found
