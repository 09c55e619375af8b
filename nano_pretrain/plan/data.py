"""Tokens of each source in each phase, and how often each source is read; closed form, no sample is located."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.shards import MANIFEST_NAME, open_corpus
from nano_pretrain.recipe.schema import Recipe

ENDLESS = 10**30
"""Tokens of a source whose size is not known: more than any run reads, so that it is never read twice."""


@dataclass(frozen=True)
class SourceUse:
    """What a run reads of one source.

    Attributes:
        tokens: read over all stages.
        available: training tokens it has; None if the corpus is not prepared.
        epochs: how often it is read; None if the corpus is not prepared.
    """

    tokens: int
    available: int | None
    epochs: float | None


@dataclass(frozen=True)
class DataPlan:
    """What a run reads.

    Attributes:
        curriculum: stages, phases, steps.
        tokens: stage -> phase -> source -> tokens.
        sources: use of each source, by name.
    """

    curriculum: Curriculum
    tokens: dict[str, dict[str, dict[str, int]]]
    sources: dict[str, SourceUse]


def plan_data(recipe: Recipe) -> DataPlan:
    """What the recipe reads; with the sizes of the sources if its corpus is prepared.

    Raises:
        RecipeError: as `Curriculum`, in the words of `train`.
        UserError: the corpus is damaged.
    """
    available = _available(recipe)
    curriculum = Curriculum(recipe, available or dict.fromkeys(_named_sources(recipe), ENDLESS))
    tokens = curriculum.consumed(curriculum.total_tokens)
    epochs = curriculum.epochs(tokens)
    sources = {
        name: SourceUse(
            tokens=sum(phase.get(name, 0) for stage in tokens.values() for phase in stage.values()),
            available=available[name] if available else None,
            epochs=float(epochs[name]) if available else None,
        )
        for name in epochs
    }
    return DataPlan(curriculum, tokens, sources)


def _available(recipe: Recipe) -> dict[str, int] | None:
    """Training tokens of each source; None if nothing is prepared at `data.path`."""
    path = Path(recipe.data.path)
    if not (path / MANIFEST_NAME).exists():
        return None
    return {name: stream.tokens for name, stream in open_corpus(path).train.items()}


def _named_sources(recipe: Recipe) -> list[str]:
    """Sources of all blends, in the order in which they first occur."""
    phases = [phase for stage in recipe.stages.values() for phase in stage.phases.values()]
    return list(dict.fromkeys(str(source) for phase in phases for source in phase.blend))
