"""Evaluation for length: retrieval and loss by position, in a run and from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer

from nano_pretrain.data.shards import Corpus
from nano_pretrain.evaluate.generate import continuation
from nano_pretrain.evaluate.positions import LossByPosition
from nano_pretrain.evaluate.prompts import CANDIDATES, Example, Prompts, check_lengths
from nano_pretrain.evaluate.retrieval import Complete, Done, estimate, match_scores, rank_scores
from nano_pretrain.evaluate.room import pass_shape
from nano_pretrain.evaluate.rows import Passes, Run
from nano_pretrain.evaluate.windows import sources_read
from nano_pretrain.recipe.schema import EvaluateConfig, GenerateConfig, ParallelConfig, Recipe, StageConfig

Progress = Callable[[int], None]
"""Told how many tokens more have gone through the model."""


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated.

    Attributes:
        run: forward passes over all of its ranks.
        complete: greedy generation on this rank alone; None where a rank does not hold the whole model.
        device: of the model.
        progress: told of the tokens done on this rank.
    """

    run: Run
    complete: Complete | None
    device: torch.device
    progress: Progress = lambda tokens: None


class LengthSuite:
    """All that is evaluated at each length of `evaluate.lengths`, the same at every evaluation.

    Args:
        options: lengths, tasks and how many of each.
        recipe: sources, document boundaries and precision.
        corpus: the shards.

    Raises:
        RecipeError: a length is too short for a task, or longer than the held-out text.
    """

    def __init__(self, options: EvaluateConfig, recipe: Recipe, corpus: Corpus) -> None:
        self.tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
        self.tokenizer.encode_special_tokens = True
        check_lengths(options, self.tokenizer)
        self.options = options
        self._recipe = recipe
        self._corpus = corpus
        self._positions = [
            LossByPosition(corpus, sources_read(recipe), length, options.examples) for length in options.lengths
        ]

    @property
    def tokens(self) -> int:
        """Tokens of all forward passes, generation counted as one pass of its prompt; what `Progress` sums up to."""
        prompts = len(self.options.tasks) * self.options.examples * (CANDIDATES + 1)
        return sum(each.length * (each.samples + prompts) for each in self._positions)

    def shapes(self, layout: ParallelConfig, stage: StageConfig) -> list[tuple[int, int]]:
        """(tokens, rows) of the forward passes at each length, see `pass_shape`; no more rows than examples."""
        shapes = (pass_shape(self._recipe, length, layout, stage) for length in self.options.lengths)
        return [(filled, min(rows, self.options.examples)) for filled, rows in shapes]

    def evaluate(
        self, subject: Subject, shapes: Sequence[tuple[int, int]], there: Sequence[Mapping[str, Any]] = ()
    ) -> list[dict[str, Any]]:
        """Evaluate a model, on all of its ranks together.

        Args:
            subject: the model.
            shapes: of the forward passes at each length.
            there: lines of the same model, of which those with the same settings and all tasks are not made again.

        Returns:
            For each other length {"length", "precision", "examples", "seed", "retrieval": {task: {"chance", "rank":
            {"score", "standard_error"}, "match": the same or None}}, "positions": see `LossByPosition.evaluate`}.
        """
        prompts, options, lines = Prompts(self.tokenizer), self.options, []
        for positions, shape in zip(self._positions, shapes, strict=True):
            settings = {
                "length": positions.length,
                "precision": self._recipe.precision.name,
                "examples": options.examples,
                "seed": options.seed,
            }
            if any(settings.items() <= line.items() and {*options.tasks} <= {*line["retrieval"]} for line in there):
                continue
            passes, done = self._passes(shape, subject), partial(_in_tokens, subject.progress, positions.length)
            retrieval = {}
            for task in options.tasks:
                examples = prompts.examples(task, positions.length, options.examples, options.seed)
                retrieval[task] = self._score(subject, passes, examples, done)
            by_position = positions.evaluate(subject.run, passes, done)
            lines.append({**settings, "retrieval": retrieval, "positions": by_position})
        return lines

    def _passes(self, shape: tuple[int, int], subject: Subject) -> Passes:
        reset = self._recipe.data.document_boundaries == "reset"
        return Passes(shape, self._corpus.eod_id if reset else None, subject.device)

    def _score(self, subject: Subject, passes: Passes, examples: Sequence[Example], done: Done) -> dict[str, Any]:
        rank, match = rank_scores(subject.run, passes, examples, done), None
        if subject.complete is not None:
            match = asdict(estimate(match_scores(subject.complete, self.tokenizer, examples, subject.device, done)))
        return {"chance": 1 / CANDIDATES, "rank": asdict(estimate(rank)), "match": match}


def _in_tokens(progress: Progress, length: int, rows: int) -> None:
    progress(rows * length)


def greedy(model: Any, eod_id: int, vocab_size: int) -> Complete:
    """Greedy generation by a model that this rank holds whole."""

    def complete(prompt: list[int], most: int) -> list[int]:
        options = GenerateConfig(max_new_tokens=most, temperature=0.0)
        return list(continuation(model, prompt, options, eod_id, vocab_size))

    return complete
