"""The course of a run over tokens: its phases, the blend and the marks of the learning rate, from recipe or metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, nan

from nano_pretrain.data.stage_plan import Plateau
from nano_pretrain.recipe.derived import stage_tokens
from nano_pretrain.report.record import Record, mapping, number


@dataclass(frozen=True)
class Span:
    """One phase: its tokens from `start` to `end`, and its blend, plateau by plateau; none where it is not known."""

    stage: str
    phase: str
    start: float
    end: float
    blend: tuple[Plateau, ...]


@dataclass(frozen=True)
class Mark:
    """A token count at which the learning rate turns; the text has room `after` or before it, below the line."""

    tokens: float
    text: str
    after: bool


def spans(record: Record) -> list[Span]:
    """The phases as the run reads them, with what it was told; without a readable recipe as its steps recorded them."""
    if record.curriculum is None:
        return list(_recorded(record))
    return [
        Span(stage.name, phase.name, phase.start_tokens, phase.end_tokens, tuple(stage.plateaus(phase)))
        for stage in record.curriculum.stages
        for phase in stage.phases
    ]


def planned_tokens(record: Record) -> float:
    """Tokens of the whole run; NaN when the recipe does not say."""
    return record.curriculum.total_tokens if record.curriculum else nan


def source_names(record: Record) -> list[str]:
    """Every source that occurs anywhere, in order of the phases, then of the ledger and of the evaluations."""
    names = [name for span in spans(record) for part in span.blend for name in part.shares]
    names += mapping(record.ledger.get("sources"))
    names += [name for evaluation in record.evaluations for name in evaluation.sources]
    return list(dict.fromkeys(names))


def schedule_marks(record: Record) -> list[Mark]:
    """Where warm-up ends and decay begins, stage by stage."""
    marks: list[Mark] = []
    for stage in record.curriculum.stages if record.curriculum else ():
        schedule, stable = stage.config.schedule, stage.config.schedule.kind == "wsd"
        if schedule.warmup_tokens:
            text = "warm-up to stable" if stable else "warm-up ends"
            marks.append(Mark(stage.start_tokens + schedule.warmup_tokens, text, after=True))
        if schedule.decay_tokens and stable:
            begins = stage.start_tokens + stage_tokens(stage.config) - schedule.decay_tokens
            marks.append(Mark(begins, "stable to decay", after=False))
    return marks


def _recorded(record: Record) -> Iterator[Span]:
    """Runs of steps in the same phase, with the shares of the ledger."""
    places, tokens = record.steps.places, [0, *map(round, record.steps.tokens.tolist())]
    turns = [i for i in range(len(places)) if i == 0 or places[i] != places[i - 1]]
    for first, last in pairwise([*turns, len(places)]):
        (stage, phase), (start, end) = places[first], (tokens[first], tokens[last])
        shares = _shares(mapping(mapping(record.ledger.get("stages")).get(stage)).get(phase))
        yield Span(stage, phase, start, end, (Plateau(start, end, shares),) if shares else ())


def _shares(read: object) -> dict[str, float]:
    known = {name: number(tokens) for name, tokens in mapping(read).items()}
    total = sum(known.values())
    return {name: tokens / total for name, tokens in known.items()} if isfinite(total) and total > 0 else {}
