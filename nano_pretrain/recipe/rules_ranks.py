"""Rules of a stage's ranks: the layout divides them, and they divide the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nano_pretrain.recipe.derived import stage_layout, stage_ranks
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.rules_layout import check_split, divisors, layout_field, ranks_field, sequence_shards
from nano_pretrain.recipe.schema import Recipe


def check_layout(recipe: Recipe, stage_name: str) -> None:
    """The layout of a stage divides the model, the ranks and the batch.

    Raises:
        RecipeError: the first that it does not.
    """
    check_split(recipe, stage_name)
    stage = recipe.stages[stage_name]
    check_batches(recipe, stage_name, [stage.global_batch_size])
    shards, length = sequence_shards(stage_layout(recipe, stage)), f"stages.{stage_name}.sequence_length"
    divides(
        length, stage.sequence_length, math.prod(shards.values()), " x ".join(shards), layout_field(stage_name, stage)
    )


def check_batches(recipe: Recipe, stage_name: str, batches: Sequence[int], started: int | None = None) -> None:
    """The layout of a stage divides its ranks, and the ranks divide each of its batches.

    Args:
        recipe: the recipe.
        stage_name: a stage of it.
        batches: samples of its steps, each number that there is.
        started: ranks that somebody has started; None for those that the recipe names.

    Raises:
        RecipeError: the first that is not divided.
    """
    stage = recipe.stages[stage_name]
    layout, ranks = stage_layout(recipe, stage), stage_ranks(recipe, stage) if started is None else started
    source = ranks_field(stage_name, stage) if started is None else "started"
    model_ranks = layout.tensor * layout.pipeline * layout.context
    near = near_ranks(math.gcd(*batches), stage.micro_batch_size, model_ranks, ranks)
    counts = " or ".join(map(str, near)) or f"a multiple of {model_ranks}"
    start = f"start {counts} ranks" if source == "started" else f"write {source}={counts}"
    if ranks % model_ranks:
        raise RecipeError(
            layout_field(stage_name, stage),
            f"tensor x pipeline x context = {model_ranks} does not divide the {ranks} ranks ({source})",
            f"{start} or shrink the layout",
        )
    data_parallel = ranks // model_ranks
    together = data_parallel * stage.micro_batch_size
    for batch in batches:
        if batch % together:
            # Only where the batch grows have steps another one than the stage.
            grown, micro_batch = batch == stage.global_batch_size, f"stages.{stage_name}.micro_batch_size"
            field = f"stages.{stage_name}.{'global_batch_size' if grown else 'batch_ramp'}"
            written = f"{field} as a multiple" if grown else f"{field}.start and .increment as multiples"
            fix = f"write {written} of {together}, or change {micro_batch}"
            raise RecipeError(
                field,
                f"{batch} is not divisible by {data_parallel} data-parallel ranks ({ranks} ranks, "
                f"{model_ranks} to a model) x micro_batch_size {stage.micro_batch_size}",
                f"{start}, or {fix}" if near else fix,
            )


def near_ranks(batch: int, micro_batch_size: int, model_ranks: int, ranks: int) -> list[int]:
    """The two numbers of ranks nearest to `ranks` on which a layout divides a batch, as far as there are."""
    samples, rest = divmod(batch, micro_batch_size)
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
