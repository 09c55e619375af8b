"""The verb `evaluate`: a checkpoint on one rank, and tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from nano_pretrain.checkpoint.corpus import check_corpus
from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.shards import open_corpus
from nano_pretrain.evaluate.generate import ALONE, chosen_checkpoint, model_of, without_fp8
from nano_pretrain.evaluate.harness_suite import HarnessSuite
from nano_pretrain.evaluate.length import LengthSuite, Subject, greedy
from nano_pretrain.evaluate.room import without_room_for_weights
from nano_pretrain.evaluate.rows import Run
from nano_pretrain.platform import current_platform
from nano_pretrain.recipe.acts import read_acts
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import EvaluateConfig, Recipe


def evaluate_checkpoint(recipe: Recipe, options: EvaluateConfig, run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Evaluate a checkpoint at each length and by each task; returns the lines of each file.

    As `generate`, in the dtype of the weights: BF16 where the run was in FP8.

    Args:
        recipe: the run's recipe.
        options: what to evaluate.
        run_dir: directory of the run.

    Raises:
        UserError: neither length nor task is given, there is no such checkpoint, the corpus is another, or a length
            does not fit the tasks, the held-out text or the memory.
    """
    if not (options.lengths or options.harness_tasks):
        fix = "write for example evaluate.lengths=[512,4096], or evaluate.harness_tasks=[TASK]"
        raise RecipeError("evaluate.lengths", "is empty", fix)
    path = chosen_checkpoint(run_dir, options.checkpoint, "evaluate")
    corpus = open_corpus(Path(recipe.data.path))
    check_corpus(path, corpus, what=str(path))
    tokens, alone = int(path.name), without_fp8(recipe)
    suite = LengthSuite(options, alone, corpus)
    harness = HarnessSuite(options, alone, corpus, first_rank=True) if options.harness_tasks else None
    stage = Curriculum(recipe, corpus.sizes, read_acts(run_dir)).stage_at(max(0, tokens - 1))
    shapes, place = suite.shapes(ALONE, stage.config), {"tokens": tokens, "stage": stage.name}
    _check_room(alone, shapes)
    with model_of(recipe, path, max(options.lengths, default=stage.sequence_length)) as model:
        model.eval()
        complete = greedy(model, corpus.eod_id, recipe.model.vocab_size)
        subject = Subject(_run_of(model), complete, next(model.parameters()).device)
        found: dict[str, list[dict[str, Any]]] = {}
        if options.lengths:
            with _bar(suite.tokens) as progress:
                found["evaluation.jsonl"] = suite.evaluate(replace(subject, progress=progress), shapes)
        if harness:
            found["harness.jsonl"] = harness.evaluate(subject, model, ALONE, stage.config, tokens)
    return {name: [{**place, **line} for line in lines] for name, lines in found.items()}


def show(found: dict[str, list[dict[str, Any]]], console: Console) -> None:
    """Print the scores of each task and length, the loss by position, and the scores of each task of the harness."""
    first = next(line for lines in found.values() for line in lines)
    console.print(f"after {first['tokens']:,} tokens, stage {first['stage']}", style="bold")
    for table in _tables(found):
        console.print(table)


def _tables(found: dict[str, list[dict[str, Any]]]) -> Iterator[Table]:
    if lines := found.get("evaluation.jsonl", []):
        if lines[0]["retrieval"]:
            yield _retrieval_table(lines)
        yield _positions_table(lines)
    if lines := found.get("harness.jsonl", []):
        yield _harness_table(lines)


def _harness_table(lines: list[dict[str, Any]]) -> Table:
    table = Table("task", "version", "examples", "few-shot", "metric", "score")
    for line in lines:
        row = [str(line[name] if line[name] is not None else "") for name in ("task", "version", "examples", "fewshot")]
        for metric, measured in line["metrics"].items():
            table.add_row(*row, metric, _estimate(measured))
    return table


def _retrieval_table(lines: list[dict[str, Any]]) -> Table:
    table = Table("task", "length", "examples", "right answer ranked first", "chance", "generated exactly")
    for line in lines:
        for task, found in line["retrieval"].items():
            row = (task, f"{line['length']:,}", str(line["examples"]), _estimate(found["rank"]))
            table.add_row(*row, f"{found['chance']:.2f}", _estimate(found["match"]))
    return table


def _positions_table(lines: list[dict[str, Any]]) -> Table:
    table = Table("held-out loss at positions", *(f"{line['length']:,} tokens" for line in lines))
    samples = (f"{line['positions']['samples']}, {line['positions']['documents']} documents" for line in lines)
    table.add_row("samples", *samples)
    rows: dict[int, list[str]] = {}
    for number, line in enumerate(lines):
        bins = line["positions"]["bins"]
        for start, loss, error in zip(bins["edges"], bins["loss"], bins["standard_error"], strict=False):
            cells = rows.setdefault(start, [""] * len(lines))
            cells[number] = _estimate({"score": loss, "standard_error": error})
    for start, cells in sorted(rows.items()):
        table.add_row(f"from {start:,}", *cells)
    table.add_row("all", *(_estimate({**line["positions"], "score": line["positions"]["loss"]}) for line in lines))
    return table


def _estimate(found: dict[str, Any]) -> str:
    error = found["standard_error"]
    return f"{found['score']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _check_room(recipe: Recipe, shapes: list[tuple[int, int]]) -> None:
    platform = current_platform()
    for refusal in without_room_for_weights(recipe, ALONE, shapes, platform.name, platform.memory(0)):
        raise refusal


def _run_of(model: Any) -> Run:
    """What `Trainable.run` does, for a model of one rank without its optimizer."""

    def run(batches: Iterator[Any], count: int, shape: tuple[int, int], forward_only: bool, score: Any) -> list[Any]:
        return [
            score(batch, model(batch.tokens, None, batch.documents, labels=batch.labels))
            for batch in islice(batches, count)
        ]

    return run


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task("evaluating", total=total)
        yield lambda tokens: bar.advance(task, tokens)
