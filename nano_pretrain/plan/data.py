"""Tokens of each source in each phase, and how often each source is read; closed form, no sample is located."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.long_text import LITTLE, LongText, long_text
from nano_pretrain.data.repeats import Repetition, repetitions
from nano_pretrain.data.shards import MANIFEST_NAME, open_corpus
from nano_pretrain.data.sizeless import sizeless_curriculum
from nano_pretrain.recipe.schema import Recipe
from nano_pretrain.report import words


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
    curriculum = Curriculum(recipe, sizes) if sizes else sizeless_curriculum(recipe)
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
        why = "too small, or begun before more was needed"
        yield f"not divided between {' and '.join(stages)} ({why}), so that they may read the same: {names}"


def short_phase_notes(curriculum: Curriculum) -> Iterator[str]:
    """Phases that are over before their quotas first hold."""
    for stage in curriculum.stages:
        for phase in stage.phases:
            window = phase.blend.parts[0][1].window
            if phase.samples < window:
                weights = stage.config.phases[phase.name].blend
                (part,) = stage.plateaus(phase)
                asked = {source: weights[source] / sum(weights.values()) for source in part.shares}
                source = max(asked, key=lambda name: abs(part.shares[name] - asked[name]))
                yield (
                    f"stages.{stage.name}.phases.{phase.name}: its {phase.samples} samples end inside the first window "
                    f"of {window} (data.quota_window), so that shares are near what is asked only: {source} has "
                    f"{part.shares[source]:.1%} for {asked[source]:.1%}; lower data.quota_window or drop small weights"
                )


def shorter_stage_notes(curriculum: Curriculum) -> Iterator[str]:
    """Stages whose samples are shorter than those of the stage before."""
    for before, stage in pairwise(curriculum.stages):
        if stage.sequence_length < before.sequence_length:
            yield (
                f"stages.{stage.name}.sequence_length: {stage.sequence_length:,} tokens are fewer than the "
                f"{before.sequence_length:,} of stage {before.name}"
            )


def short_text_notes(found: Mapping[str, LongText]) -> Iterator[str]:
    """Stages whose documents are hardly longer than the samples of the stage before."""
    for stage, text in found.items():
        if text.share < LITTLE:
            yield (
                f"stages.{stage}.sequence_length: only {words.small_share(text.share)} of what it reads lies in "
                f"documents of at least {text.least:,} tokens, and samples of the stage before have {text.before:,}; "
                "prepare long documents, for example long_document_qa, or lower it"
            )
