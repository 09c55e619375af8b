"""Whether what a longer stage reads lies in documents longer than the samples of the stage before it; closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.stage_plan import StagePlan
from nano_pretrain.recipe.errors import RecipeError

LITTLE = 0.1
"""Share of a stage's tokens below which it is said that there is little to learn from its length."""


@dataclass(frozen=True)
class LongText:
    """How much of what an extension reads is long.

    Attributes:
        before: sequence length of the stage before it.
        least: documents of at least so many tokens are counted: the longest known length that is not above `before`, or
            else the shortest.
        share: of the stage's tokens, expected, that lie in such documents.
    """

    before: int
    least: int
    share: float


def long_text(curriculum: Curriculum, by_length: Mapping[str, Mapping[int, int]]) -> dict[str, LongText]:
    """Each stage with longer samples than the stage before it, where the lengths of its documents are known.

    Args:
        curriculum: what is read.
        by_length: source -> length -> training tokens in documents of at least that length.

    Raises:
        RecipeError: not one document of a stage is as long as a sample of the stage before.
    """
    found = {}
    for before, stage in pairwise(curriculum.stages):
        known = [set(by_length.get(source, ())) for source in stage.reads]
        lengths = sorted(length for length in set.intersection(*known) if length <= stage.sequence_length)
        if stage.sequence_length > before.sequence_length and lengths:
            found[stage.name] = _of_stage(curriculum, stage, before.sequence_length, lengths, by_length)
    return found


def _of_stage(
    curriculum: Curriculum,
    stage: StagePlan,
    before: int,
    lengths: Sequence[int],
    by_length: Mapping[str, Mapping[int, int]],
) -> LongText:
    least = max((length for length in lengths if length <= before), default=lengths[0])
    long = sum(
        samples * by_length[source][least] / curriculum.sizes[source].tokens for source, samples in stage.reads.items()
    )
    if not long and least <= before:
        raise RecipeError(
            f"stages.{stage.name}.sequence_length",
            f"no document of its blends has {least:,} tokens, and samples of the stage before have {before:,}: "
            f"{stage.sequence_length:,} would teach nothing",
            "prepare long documents, for example long_document_qa, or lower it",
        )
    return LongText(before, least, long / sum(stage.reads.values()))
