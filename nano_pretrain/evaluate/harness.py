"""lm-evaluation-harness on a native model; importing it imports lm_eval, which is optional."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from tokenizers import Tokenizer

from nano_pretrain.evaluate.requests import Answer, Continuation, Prompt, Requests

BOOTSTRAPS = 1000
"""Resamples for the standard error of the few metrics that have no closed form for it, such as perplexity."""


class NativeModel(TemplateLM):
    """lm_eval's view of a model that `Requests` asks; texts begin after the end of a document, as in training.

    Args:
        requests: the model, on its first rank.
        tokenizer: of the corpus, which takes text that spells a special token as text.
    """

    def __init__(self, requests: Requests, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._requests = requests
        self._tokenizer = tokenizer

    @property
    def eot_token_id(self) -> int:
        """What ends a document, and stands before a text without context."""
        return self._requests.eod_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; nothing is ever added."""
        ids: list[int] = self._tokenizer.encode(string).ids
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[Answer]:
        return self._requests.likelihoods([Continuation(context, tokens) for _, context, tokens in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token predicted once, in windows as lm_eval's own models have them."""
        owners, windows = list[int](), list[Continuation]()
        for number, request in enumerate(requests):
            (text,) = request.args
            pairs = utils.get_rolling_token_windows(
                self.tok_encode(text), self.eot_token_id, max_seq_len=self._requests.longest, context_len=1
            )
            for pair in pairs:
                owners.append(number)
                windows.append(Continuation(*utils.make_disjoint_window(pair)))
        sums = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._requests.likelihoods(windows), strict=True):
            sums[owner] += likelihood
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop; `load_tasks` has refused tasks that want others."""
        return self._requests.texts([self._prompt(request) for request in requests])

    def _prompt(self, request: Any) -> Prompt:
        context, asked = request.args
        wanted = normalize_gen_kwargs(asked)
        stops = tuple(stop for stop in wanted["until"] if stop)
        return Prompt(self.tok_encode(context) or [self.eot_token_id], wanted["max_gen_toks"], stops)


def scores(requests: Requests, tokenizer: Tokenizer, tasks: Any, limit: int | None) -> list[dict[str, Any]]:
    """Run tasks on the first rank, while the others serve its requests.

    Args:
        requests: the model.
        tokenizer: of the corpus.
        tasks: of `load_tasks`.
        limit: examples of a task, at most; None for all.

    Returns:
        For each task, and group of tasks, {"task", "version", "examples", "fewshot", "metrics": {name: {"score",
        "standard_error" or None}}}; a metric's name has the filter's behind a comma where there is one.
    """
    # lm_eval would fork a process for each core, from one that has threads and connections.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    model = NativeModel(requests, tokenizer)
    with redirect_stdout(sys.stderr):
        found = evaluate(model, tasks, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)
    return [_line(name, found) for name in found["results"]]


def _line(name: str, found: Any) -> dict[str, Any]:
    measured: dict[str, Any] = found["results"][name]
    metrics = {}
    for key, value in measured.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = measured.get(f"{metric}_stderr,{filtered}")
            label = metric if filtered == "none" else key
            metrics[label] = {"score": value, "standard_error": error if _is_number(error) else None}
    return {
        "task": name,
        "version": found["versions"].get(name),
        "examples": measured["sample_len"],
        "fewshot": found["n-shot"].get(name),
        "metrics": metrics,
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)
