"""Tokens of each source in each phase, and how often each source is read; closed form, no sample is located."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.long_text import LITTLE, LongText, long_text
from nano_pretrain.data.ranges import SourceSize
from nano_pretrain.data.repeats import Repetition, repetitions
from nano_pretrain.data.shards import MANIFEST_NAME, open_corpus
from nano_pretrain.recipe.schema import Recipe
from nano_pretrain.report import words

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
        long_text: of each stage that extends the one before it; none where the corpus is not prepared.
    """

    curriculum: Curriculum
    tokens: dict[str, dict[str, dict[str, int]]]
    sources: dict[str, SourceUse]
    long_text: dict[str, LongText]


def plan_data(recipe: Recipe) -> DataPlan:
    """What the recipe reads; with the sizes of the sources if its corpus is prepared.

    Raises:
        RecipeError: as `Curriculum` and `long_text`, in the words of `train`.
        UserError: the corpus is damaged.
    """
    path = Path(recipe.data.path)
    corpus = open_corpus(path) if (path / MANIFEST_NAME).exists() else None
    sizes = corpus.sizes if corpus else None
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
    return DataPlan(curriculum, tokens, sources, long_text(curriculum, corpus.tokens_by_length if corpus else {}))


def repetition_notes(repeats: Mapping[str, Repetition], sources: int) -> Iterator[str]:
    """What is read more than once of so many sources, in short."""
    if repeats:
        first, again = min(repeats.items(), key=lambda item: item[1].begins)
        begins = f"{first} first: its second reading begins after {words.count(again.begins)} tokens of the run"
        yield f"{len(repeats)} of {sources} sources are read more than once, {begins}"
    for stages in dict.fromkeys(again.shared_by for again in repeats.values() if again.shared_by):
        names = ", ".join(name for name, again in repeats.items() if again.shared_by == stages)
        yield f"too small to be divided between {' and '.join(stages)}, so that each reads the whole: {names}"


def short_text_notes(found: Mapping[str, LongText]) -> Iterator[str]:
    """Stages whose documents are hardly longer than the samples of the stage before."""
    for stage, text in found.items():
        if text.share < LITTLE:
            yield (
                f"stages.{stage}.sequence_length: only {words.small_share(text.share)} of what it reads lies in "
                f"documents of at least {text.least:,} tokens, and samples of the stage before have {text.before:,}; "
                "prepare long documents, for example long_document_qa, or lower it"
            )


def _named_sources(recipe: Recipe) -> list[str]:
    """Sources of all blends, in the order in which they first occur."""
    phases = [phase for stage in recipe.stages.values() for phase in stage.phases.values()]
    return list(dict.fromkeys(str(source) for phase in phases for source in phase.blend))
