"""Read a run's directory into arrays and tables, tolerant of what is missing, torn or not a number."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.sizeless import sizeless_curriculum
from nano_pretrain.recipe.acts import HISTORY, Act
from nano_pretrain.recipe.load import recorded_recipe
from nano_pretrain.recipe.rules import check_fields

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Steps:
    """The columns of metrics.jsonl, one entry a step; what was not recorded is NaN.

    Attributes:
        tokens: consumed after the step.
        loss: nats per token.
        lr: learning rate of the step.
        grad_norm: before clipping.
        tokens_per_second: of all ranks.
        mfu: model FLOPs utilisation, 1 is the machine's dense peak.
        places: (stage, phase) of the step.
    """

    tokens: Floats
    loss: Floats
    lr: Floats
    grad_norm: Floats
    tokens_per_second: Floats
    mfu: Floats
    places: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss at one point of the run, in bits per byte."""

    tokens: float
    sources: dict[str, float]
    blend: float


@dataclass(frozen=True)
class TaskScores:
    """Of one retrieval task: (score, standard error) by rank and by generation, NaN where there is none, and chance."""

    rank: tuple[float, float]
    match: tuple[float, float]
    chance: float


@dataclass(frozen=True)
class LengthEvaluation:
    """What was evaluated at one length at one point of the run.

    Attributes:
        tokens: consumed.
        stage: that had just ended, or that the checkpoint belongs to.
        length: tokens of a prompt and of a sample.
        conditions: precision, examples and seed, in words; only what agrees in them compares.
        tasks: scores by task.
        documents: "whole" or "concatenated".
        edges: borders of the bins of positions.
        loss: nats per token of each bin.
        error: standard errors of these.
    """

    tokens: float
    stage: str
    length: float
    conditions: tuple[str, str, str]
    tasks: dict[str, TaskScores]
    documents: str
    edges: Floats
    loss: Floats
    error: Floats


@dataclass(frozen=True)
class TaskEvaluation:
    """What lm-evaluation-harness found of one task at one point of the run.

    Attributes:
        tokens: consumed.
        stage: that had just ended, or that the checkpoint belongs to.
        task: its name.
        conditions: precision, examples and examples in the prompt, in words; only what agrees in them compares.
        metrics: (score, standard error) of each, NaN where there is none.
    """

    tokens: float
    stage: str
    task: str
    conditions: tuple[str, str, str]
    metrics: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Quantisation:
    """What FP8 lost in one step: linear -> operand -> measure, shares and the relative error.

    `not_finite` names operands with infinite or NaN values, first those nearest to the cause.
    """

    step: float
    tokens: float
    not_finite: list[str]
    linears: dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Sample:
    """Generated text: what was given, and what the model added."""

    tokens: float
    prompt: str
    continuation: str
    temperature: float
    top_p: float


@dataclass(frozen=True)
class Record:
    """All that a run has left; `problems` says in a sentence per file what is missing or broken.

    `curriculum` is what the run reads, by its recipe and what it was told; None where they do not say.
    """

    name: str
    steps: Steps
    evaluations: list[Evaluation]
    lengths: list[LengthEvaluation]
    tasks: list[TaskEvaluation]
    quantisation: list[Quantisation]
    samples: list[Sample]
    recipe: dict[str, Any]
    recipe_text: str
    acts: list[Act]
    curriculum: Curriculum | None
    environment: dict[str, Any]
    baselines: dict[str, Any]
    ledger: dict[str, Any]
    exit: dict[str, Any]
    problems: dict[str, str] = field(default_factory=dict)


def read_record(run_dir: Path) -> Record:
    """Read what there is in a run's directory; nothing in it is an error."""
    problems: dict[str, str] = {}
    recipe, recipe_text = _read_yaml(run_dir / "recipe.yaml", problems)
    acts = _acts(run_dir / HISTORY, problems)
    return Record(
        name=run_dir.resolve().name,
        steps=_steps(_read_lines(run_dir / "metrics.jsonl", problems)),
        evaluations=_evaluations(_read_lines(run_dir / "validation.jsonl", problems)),
        lengths=_lengths(run_dir / "evaluation.jsonl", problems),
        tasks=_tasks(run_dir / "harness.jsonl", problems),
        quantisation=_quantisation(run_dir / "fp8.jsonl", problems),
        samples=[_sample(line) for line in _read_lines(run_dir / "samples.jsonl", problems)],
        recipe=recipe,
        recipe_text=recipe_text,
        acts=acts,
        curriculum=_curriculum(run_dir, acts),
        environment=_read_json(run_dir / "environment.json", problems),
        baselines=_read_json(run_dir / "baselines.json", problems),
        ledger=_read_json(run_dir / "ledger.json", problems),
        exit=_read_json(run_dir / "exit.json", problems),
        problems=problems,
    )


def number(value: object) -> float:
    """The value as a float, NaN when it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return nan
    try:
        return float(value)
    except OverflowError:  # JSON knows whole numbers that no float can hold.
        return nan


def mapping(value: object) -> dict[str, Any]:
    """The value as a mapping with text keys, empty when it is none."""
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def _read_text(path: Path, problems: dict[str, str]) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        problems[path.name] = f"{path.name} has not been written."
        return ""
    except OSError as error:
        problems[path.name] = f"{path.name} cannot be read ({error.strerror})."
        return ""
    if not text.strip():
        problems[path.name] = f"{path.name} is empty."
    return text


def _read_json(path: Path, problems: dict[str, str]) -> dict[str, Any]:
    text = _read_text(path, problems)
    try:
        return mapping(json.loads(text)) if text.strip() else {}
    except ValueError:
        problems[path.name] = f"{path.name} is broken: it is not JSON."
        return {}


def _read_yaml(path: Path, problems: dict[str, str]) -> tuple[dict[str, Any], str]:
    text = _read_text(path, problems)
    try:
        return mapping(yaml.safe_load(text)), text
    except yaml.YAMLError:
        problems[path.name] = f"{path.name} is broken: it is not YAML."
        return {}, text


def _read_lines(path: Path, problems: dict[str, str]) -> list[dict[str, Any]]:
    """One mapping a line; a run that was killed may leave its last line torn."""
    lines = [line for line in _read_text(path, problems).splitlines() if line.strip()]
    read = [parsed for line in lines if (parsed := _line(line))]
    if len(read) < len(lines):
        problems[path.name] = f"{len(lines) - len(read)} of {len(lines)} lines of {path.name} cannot be read."
    return read


def _line(text: str) -> dict[str, Any]:
    try:
        return mapping(json.loads(text))
    except ValueError:
        return {}


def _steps(lines: list[dict[str, Any]]) -> Steps:
    lines = [line for line in lines if isfinite(number(line.get("tokens")))]
    return Steps(
        tokens=_column(lines, "tokens"),
        loss=_column(lines, "loss"),
        lr=_column(lines, "lr"),
        grad_norm=_column(lines, "grad_norm"),
        tokens_per_second=_column(lines, "tokens_per_second"),
        mfu=_column(lines, "mfu"),
        places=[(str(line.get("stage", "")), str(line.get("phase", ""))) for line in lines],
    )


def _column(lines: Iterable[dict[str, Any]], key: str) -> Floats:
    return np.array([number(line.get(key)) for line in lines], dtype=np.float64)


def _evaluations(lines: list[dict[str, Any]]) -> list[Evaluation]:
    return [
        Evaluation(
            tokens=number(line.get("tokens")),
            sources={
                name: number(mapping(source).get("bits_per_byte"))
                for name, source in mapping(line.get("sources")).items()
            },
            blend=number(mapping(line.get("blend")).get("bits_per_byte")),
        )
        for line in lines
        if isfinite(number(line.get("tokens")))
    ]


def _acts(path: Path, problems: dict[str, str]) -> list[Act]:
    # Most runs were told nothing.
    lines = _read_lines(path, problems) if path.exists() else []
    return [
        Act(round(tokens), str(line.get("field", "")), line.get("before"), line.get("after"))
        for line in lines
        if isfinite(tokens := number(line.get("tokens")))
    ]


def _curriculum(run_dir: Path, acts: list[Act]) -> Curriculum | None:
    try:
        recipe = recorded_recipe(run_dir)
        check_fields(recipe)
        return sizeless_curriculum(recipe, acts)
    except Exception:  # Nothing but the run's files is at work, and they may hold anything.
        return None


def _lengths(path: Path, problems: dict[str, str]) -> list[LengthEvaluation]:
    # Only runs that were asked to have any.
    lines = _read_lines(path, problems) if path.exists() else []
    return [
        _length_evaluation(line)
        for line in lines
        if isfinite(number(line.get("tokens"))) and 0 < number(line.get("length")) < inf
    ]


def _length_evaluation(line: dict[str, Any]) -> LengthEvaluation:
    positions = mapping(line.get("positions"))
    bins = mapping(positions.get("bins"))
    return LengthEvaluation(
        tokens=number(line.get("tokens")),
        stage=str(line.get("stage", "")),
        length=number(line.get("length")),
        conditions=(
            str(line.get("precision", "precision not recorded")),
            f"{line.get('examples')} examples",
            f"seed {line.get('seed')}",
        ),
        tasks={name: _task_scores(mapping(found)) for name, found in mapping(line.get("retrieval")).items()},
        documents=str(positions.get("documents", "")),
        edges=_numbers(bins.get("edges")),
        loss=_numbers(bins.get("loss")),
        error=_numbers(bins.get("standard_error")),
    )


def _task_scores(found: dict[str, Any]) -> TaskScores:
    return TaskScores(_score(found.get("rank")), _score(found.get("match")), number(found.get("chance")))


def _score(estimate: object) -> tuple[float, float]:
    found = mapping(estimate)
    return number(found.get("score")), number(found.get("standard_error"))


def _tasks(path: Path, problems: dict[str, str]) -> list[TaskEvaluation]:
    # Only runs that were asked to have any.
    lines = _read_lines(path, problems) if path.exists() else []
    return [
        TaskEvaluation(
            tokens=number(line.get("tokens")),
            stage=str(line.get("stage", "")),
            task=str(line.get("task", "")),
            conditions=(
                str(line.get("precision", "precision not recorded")),
                f"{line.get('examples')} examples",
                f"{line.get('fewshot')}-shot",
            ),
            metrics={name: _score(measured) for name, measured in mapping(line.get("metrics")).items()},
        )
        for line in lines
        if isfinite(number(line.get("tokens")))
    ]


def _numbers(values: object) -> Floats:
    return np.array([number(value) for value in values] if isinstance(values, list) else [], dtype=np.float64)


def _quantisation(path: Path, problems: dict[str, str]) -> list[Quantisation]:
    # Most runs have none.
    lines = _read_lines(path, problems) if path.exists() else []
    return [
        Quantisation(
            step=number(line.get("step")),
            tokens=number(line.get("tokens")),
            not_finite=[str(name) for name in names] if isinstance(names := line.get("not_finite"), list) else [],
            linears={
                linear: {
                    operand: {measure: number(value) for measure, value in mapping(measures).items()}
                    for operand, measures in mapping(operands).items()
                }
                for linear, operands in mapping(line.get("linears")).items()
            },
        )
        for line in lines
        if isfinite(number(line.get("tokens")))
    ]


def _sample(line: dict[str, Any]) -> Sample:
    prompt = str(line.get("prompt", ""))
    return Sample(
        tokens=number(line.get("tokens")),
        prompt=prompt,
        continuation=str(line.get("text", "")).removeprefix(prompt),
        temperature=number(line.get("temperature")),
        top_p=number(line.get("top_p")),
    )
