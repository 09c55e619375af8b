"""What was read: the content of ledger.json, in closed form from the curriculum and the consumed tokens."""

from __future__ import annotations

from typing import TypedDict

from nano_pretrain.data.curriculum import Curriculum


class SourceTotals(TypedDict):
    """What a run has read of one source: tokens, and how often its whole."""

    tokens: int
    epochs: float


class Ledger(TypedDict):
    """Consumed tokens of a run: in all, stage -> phase -> source, and per source."""

    tokens: int
    stages: dict[str, dict[str, dict[str, int]]]
    sources: dict[str, SourceTotals]


def ledger(curriculum: Curriculum, tokens: int) -> Ledger:
    """The ledger after `tokens` consumed tokens; it lists the phases that have begun and every source in them.

    Raises:
        ValueError: `tokens` is neither a step border nor the end of the run.
    """
    consumed = curriculum.consumed(tokens)
    epochs = curriculum.epochs(consumed)
    totals = dict.fromkeys(sorted(epochs), 0)
    for phases in consumed.values():
        for sources in phases.values():
            for source, count in sources.items():
                totals[source] += count
    per_source = {name: SourceTotals(tokens=total, epochs=float(epochs[name])) for name, total in totals.items()}
    return Ledger(tokens=tokens, stages=consumed, sources=per_source)
