"""Tasks of lm-evaluation-harness on a model of any layout, in a run and from a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tokenizers import Tokenizer

from nano_pretrain.data.shards import Corpus
from nano_pretrain.evaluate.harness_tasks import load_tasks
from nano_pretrain.evaluate.length import Subject
from nano_pretrain.evaluate.requests import Requests
from nano_pretrain.evaluate.room import pass_shape
from nano_pretrain.recipe.derived import trained_length
from nano_pretrain.recipe.schema import EvaluateConfig, ParallelConfig, Recipe, StageConfig


class HarnessSuite:
    """The tasks of `evaluate.harness_tasks`, the same at every evaluation.

    The first rank alone imports lm_eval and reads data; the others compute what it asks.

    Args:
        options: tasks, where they are, and how many examples of each.
        recipe: precision and stages.
        corpus: its tokenizer.
        first_rank: whether this is the rank that asks.

    Raises:
        UserError: on the first rank, as `load_tasks`.
    """

    def __init__(self, options: EvaluateConfig, recipe: Recipe, corpus: Corpus, first_rank: bool) -> None:
        self._options = options
        self._recipe = recipe
        self._eod_id = corpus.eod_id
        self._tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
        self._tokenizer.encode_special_tokens = True
        self._tasks = load_tasks(options) if first_rank else None

    def evaluate(
        self,
        subject: Subject,
        model: Any,
        layout: ParallelConfig,
        stage: StageConfig,
        tokens: int,
        there: Sequence[Mapping[str, Any]] = (),
    ) -> list[dict[str, Any]]:
        """Evaluate a model, on all of its ranks together.

        Args:
            subject: the model.
            model: this rank's part of it.
            layout: of the ranks.
            stage: whose micro-batches are the measure of a forward pass.
            tokens: consumed; as many are read at a time as the longest sample so far had.
            there: lines of the same model, which are not made again.

        Returns:
            The other lines of `harness.scores`, each with "precision"; none on other ranks than the first.
        """
        shape_of = partial(pass_shape, self._recipe, layout=layout, stage=stage)
        longest = trained_length(self._recipe, tokens)
        requests = Requests(subject, model, self._tokenizer.decode, self._eod_id, shape_of, longest)
        if self._tasks is None:
            requests.serve()
            return []
        from nano_pretrain.evaluate.harness import scores

        precision, limit = self._recipe.precision.name, self._options.harness_limit
        known = {(line["task"], line["examples"]) for line in there if line["precision"] == precision}
        wanted = {(name, min(len(task.eval_docs), limit or sys.maxsize)) for name, task in self._tasks["tasks"].items()}
        # All or none: a group of tasks has a score over all of them.
        found = [] if wanted <= known else scores(requests, self._tokenizer, self._tasks, limit)
        requests.end()
        return [{"precision": precision, **line} for line in found if (line["task"], line["examples"]) not in known]
