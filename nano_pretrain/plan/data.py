"""Tokens of each source in each phase, and how often each source is read; closed form, no sample is located."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.ranges import SourceSize
from nano_pretrain.data.repeats import Repetition, repetitions
from nano_pretrain.data.shards import MANIFEST_NAME, open_corpus
from nano_pretrain.recipe.schema import Recipe

ENDLESS = SourceSize((10**30,))
"""A source whose size is not known: more tokens than any run reads, so that none is read twice."""


@dataclass(frozen=True)
class SourceUse:
    """What a run reads of one source.

    Attributes:
        tokens: read over all stages.
        available: training tokens it has; None if the corpus is not prepared.
        epochs: how often it is read; None if the corpus is not prepared.
        repeats: what is read more than once; None if nothing is, or the corpus is not prepared.
    """

    tokens: int
    available: int | None
    epochs: float | None
    repeats: Repetition | None


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
    sizes = _sizes(recipe)
    curriculum = Curriculum(recipe, sizes or dict.fromkeys(_named_sources(recipe), ENDLESS))
    tokens = curriculum.consumed(curriculum.total_tokens)
    epochs, repeats = curriculum.epochs(tokens), repetitions(curriculum)
    sources = {
        name: SourceUse(
            tokens=sum(phase.get(name, 0) for stage in tokens.values() for phase in stage.values()),
            available=sizes[name].tokens if sizes else None,
            epochs=float(epochs[name]) if sizes else None,
            repeats=repeats.get(name),
        )
        for name in epochs
    }
    return DataPlan(curriculum, tokens, sources)


def _sizes(recipe: Recipe) -> dict[str, SourceSize] | None:
    """Training tokens of each source; None if nothing is prepared at `data.path`."""
    path = Path(recipe.data.path)
    return open_corpus(path).sizes if (path / MANIFEST_NAME).exists() else None


def _named_sources(recipe: Recipe) -> list[str]:
    """Sources of all blends, in the order in which they first occur."""
    phases = [phase for stage in recipe.stages.values() for phase in stage.phases.values()]
    return list(dict.fromkeys(str(source) for phase in phases for source in phase.blend))
