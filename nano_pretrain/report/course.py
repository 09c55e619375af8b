"""The course of a run over tokens: its phases, the blend and the marks of the learning rate, from recipe or metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, nan
from typing import Any

from nano_pretrain.report.record import Record, mapping, number


@dataclass(frozen=True)
class Span:
    """One phase: its tokens from `start` to `end`, and the share of each source, which add up to 1."""

    stage: str
    phase: str
    start: float
    end: float
    shares: dict[str, float]


@dataclass(frozen=True)
class Mark:
    """A token count at which the learning rate turns; the text has room `after` or before it, below the line."""

    tokens: float
    text: str
    after: bool


def spans(record: Record) -> list[Span]:
    """The phases: those that are over as the steps recorded them, the others as the recipe plans them.

    Without a readable recipe all are as recorded.
    """
    return _planned(record) or _recorded(record)


def planned_tokens(record: Record) -> float:
    """Tokens of the whole run; NaN when the recipe does not say."""
    stages = mapping(record.recipe.get("stages"))
    return sum(_stage_tokens(mapping(stage)) for stage in stages.values()) if stages else float("nan")


def source_names(record: Record) -> list[str]:
    """Every source that occurs anywhere, in order of the recipe, then of the ledger and of the evaluations."""
    names = [name for span in spans(record) for name in span.shares]
    names += mapping(record.ledger.get("sources"))
    names += [name for evaluation in record.evaluations for name in evaluation.sources]
    return list(dict.fromkeys(names))


def schedule_marks(record: Record) -> list[Mark]:
    """Where warm-up ends and decay begins, stage by stage."""
    marks: list[Mark] = []
    start = 0.0
    for stage in map(mapping, mapping(record.recipe.get("stages")).values()):
        schedule, tokens = mapping(stage.get("schedule")), _stage_tokens(stage)
        warmup, decay = number(schedule.get("warmup_tokens")), number(schedule.get("decay_tokens"))
        stable = schedule.get("kind") == "wsd"
        if warmup > 0:
            marks.append(Mark(start + warmup, "warm-up to stable" if stable else "warm-up ends", after=True))
        if decay > 0 and stable:
            marks.append(Mark(start + tokens - decay, "stable to decay", after=False))
        start += tokens
    return marks


def _planned(record: Record) -> list[Span]:
    found: list[Span] = []
    reached = dict(zip(record.steps.places, record.steps.tokens.tolist(), strict=True))
    now, end = record.steps.places[-1:], 0.0
    for stage_name, stage in mapping(record.recipe.get("stages")).items():
        stage_start = end
        for name, planned, blend in _planned_phases(mapping(stage)):
            place, start = (stage_name, name), end
            recorded = max(start, reached.get(place, start))
            over = place in reached and place not in now
            # A phase that should have ended before the stage was told to end sooner goes on to where it was told.
            end = recorded if over else max(stage_start + planned, recorded)
            shares = _shares(blend) or _ledger_shares(record, *place)
            found.append(Span(*place, start, end, shares))
    return [span for span in found if span.end > span.start] if all(isfinite(span.end) for span in found) else []


def _planned_phases(stage: dict[str, Any]) -> Iterator[tuple[str, float, object]]:
    """Name of each phase, tokens of the stage at its end, and its blend; NaN where the recipe does not say."""
    tokens, share = number(stage.get("tokens")) or nan, 0.0
    for name, phase in mapping(stage.get("phases")).items():
        own = mapping(phase)
        share += number(own["tokens"]) / tokens if own.get("tokens") is not None else number(own.get("share"))
        yield name, share * _stage_tokens(stage), own.get("blend")


def _stage_tokens(stage: dict[str, Any]) -> float:
    """Tokens at which a stage ends: those that the run was told last, else its own."""
    told = number(mapping(stage.get("schedule")).get("extend_to"))
    return told if isfinite(told) else number(stage.get("tokens"))


def _recorded(record: Record) -> list[Span]:
    """Runs of steps in the same phase."""
    places, tokens = record.steps.places, [0.0, *record.steps.tokens.tolist()]
    turns = [i for i in range(len(places)) if i == 0 or places[i] != places[i - 1]]
    return [
        Span(*places[first], tokens[first], tokens[last], _ledger_shares(record, *places[first]))
        for first, last in pairwise([*turns, len(places)])
    ]


def _ledger_shares(record: Record, stage: str, phase: str) -> dict[str, float]:
    return _shares(mapping(mapping(record.ledger.get("stages")).get(stage)).get(phase))


def _shares(weights: object) -> dict[str, float]:
    known = {name: number(weight) for name, weight in mapping(weights).items()}
    total = sum(known.values())
    return {name: weight / total for name, weight in known.items()} if isfinite(total) and total > 0 else {}
