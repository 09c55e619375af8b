"""Rules of a stage's ranks: the layout divides them, and they divide the batch."""

from __future__ import annotations

import math

from nano_pretrain.recipe.derived import stage_layout, stage_ranks
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.rules_layout import check_split, divisors, layout_field, ranks_field, sequence_shards
from nano_pretrain.recipe.schema import ParallelConfig, Recipe, StageConfig


def check_layout(recipe: Recipe, stage_name: str) -> None:
    """The layout of a stage divides the model, the ranks and the batch.

    Raises:
        RecipeError: the first that it does not.
    """
    check_split(recipe, stage_name)
    stage = recipe.stages[stage_name]
    prefix, source = layout_field(stage_name, stage), ranks_field(stage_name, stage)
    layout, ranks = stage_layout(recipe, stage), stage_ranks(recipe, stage)
    check_ranks(f"stages.{stage_name}", prefix, stage, layout, ranks, source)


def check_ranks(field: str, prefix: str, stage: StageConfig, layout: ParallelConfig, ranks: int, source: str) -> int:
    """Data-parallel size of a stage on `ranks` ranks.

    Args:
        field: dotted name of the stage.
        prefix: dotted name of the layout.
        stage: the stage.
        layout: its layout.
        ranks: number of ranks.
        source: the field that says how many ranks there are, or "started".

    Raises:
        RecipeError: the layout does not divide the ranks, or the ranks do not divide the batch.
    """
    model_ranks = layout.tensor * layout.pipeline * layout.context
    near = near_ranks(stage, model_ranks, ranks)
    counts = " or ".join(map(str, near)) or f"a multiple of {model_ranks}"
    start = f"start {counts} ranks" if source == "started" else f"write {source}={counts}"
    if ranks % model_ranks:
        raise RecipeError(
            prefix,
            f"tensor x pipeline x context = {model_ranks} does not divide the {ranks} ranks ({source})",
            f"{start} or shrink the layout",
        )
    data_parallel = ranks // model_ranks
    together = data_parallel * stage.micro_batch_size
    if stage.global_batch_size % together:
        fix = f"write {field}.global_batch_size as a multiple of {together}, or change {field}.micro_batch_size"
        raise RecipeError(
            f"{field}.global_batch_size",
            f"{stage.global_batch_size} is not divisible by {data_parallel} data-parallel ranks ({ranks} ranks, "
            f"{model_ranks} to a model) x micro_batch_size {stage.micro_batch_size}",
            f"{start}, or {fix}" if near else fix,
        )
    shards, length = sequence_shards(layout), f"{field}.sequence_length"
    divides(length, stage.sequence_length, math.prod(shards.values()), " x ".join(shards), prefix)
    return data_parallel


def near_ranks(stage: StageConfig, model_ranks: int, ranks: int) -> list[int]:
    """The two numbers of ranks nearest to `ranks` on which the layout divides the batch, as far as there are."""
    samples, rest = divmod(stage.global_batch_size, stage.micro_batch_size)
    if rest:
        return []
    working = {model_ranks * divisor for divisor in divisors(samples)} - {ranks}
    return sorted(sorted(working, key=lambda count: (abs(count - ranks), count))[:2])


def divides(field: str, value: int, divisor: int, by: str, owner: str = "") -> None:
    """Refuse a value that `by` does not divide, which is the field `owner` or follows from it.

    Raises:
        RecipeError: it does not.
    """
    if value % divisor:
        lower, upper = value - value % divisor, value - value % divisor + divisor
        near = f"{lower} or {upper}" if lower else f"{upper}"
        fix = f"write {near}, or change {owner or by}"
        raise RecipeError(field, f"{value} is not divisible by {by} = {divisor}", fix)
