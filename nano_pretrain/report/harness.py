"""Scores of lm-evaluation-harness, after each stage side by side."""

from __future__ import annotations

from math import isfinite, nan

from nano_pretrain.report import words
from nano_pretrain.report.facts import Table
from nano_pretrain.report.record import Record


def harness_table(record: Record) -> Table:
    """A row for each task, metric and conditions, a column for each evaluated point; empty without tasks."""
    found = sorted(record.tasks, key=lambda each: each.tokens)
    points = dict.fromkeys((each.tokens, each.stage) for each in found)
    # The same again replaces what was before.
    scores = {
        (each.task, metric, each.conditions, each.tokens, each.stage): score
        for each in found
        for metric, score in each.metrics.items()
    }
    rows = []
    for task, metric, conditions in dict.fromkeys(key[:3] for key in scores):
        found_here = [scores.get((task, metric, conditions, *point), (nan, nan)) for point in points]
        rows.append((", ".join([task, *conditions]), metric, *map(_score, found_here)))
    return Table(("task", "metric", *(f"{stage}, {words.count(tokens)}" for tokens, stage in points)), rows)


def _score(pair: tuple[float, float]) -> str:
    score, error = pair
    if not isfinite(score):
        return "-"
    return words.decimal(score, 3) + (f" ± {error:.3f}" if isfinite(error) else "")
