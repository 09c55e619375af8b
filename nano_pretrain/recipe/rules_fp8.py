"""FP8 against the layouts: what it cannot take is refused with the values that it can, where every other rule holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any

from nano_pretrain.recipe.derived import stage_layout, stage_ranks
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.rules_layout import divisors, layout_field, ranks_field
from nano_pretrain.recipe.rules_precision import Misfit, fp8_misfits, without_fp8
from nano_pretrain.recipe.rules_ranks import check_layout, near_ranks
from nano_pretrain.recipe.schema import ParallelConfig, Recipe

TRIED = 128
"""Values of a field that are tried to either side: steps of 1 to the next multiple of 16 on 8 ranks."""

NEED_RANKS = ("sequence", "tensor_overlap")
"""What a layout can have on several tensor-parallel ranks only."""


def fp8_multiples(recipe: Recipe) -> None:
    """FP8 takes each stage's dimensions: multiples of 16 on a rank, or of 128 where blocks are gathered."""
    if recipe.plan.search:
        # As with the layouts: the search checks each that it tries.
        return
    for name in recipe.stages:
        for misfit in fp8_misfits(recipe, name):
            raise _refusal(recipe, name, misfit)


def _refusal(recipe: Recipe, stage_name: str, misfit: Misfit) -> RecipeError:
    """Fewer tensor-parallel ranks where they mend it, else another value of its field."""
    if misfit.by_tensor and (fewer := _fewer_ranks(recipe, stage_name, misfit)):
        field = f"{layout_field(stage_name, recipe.stages[stage_name])}.tensor"
        return RecipeError(field, misfit.problem, f"write {fewer}, or {without_fp8(recipe.precision)}")
    near = " or ".join(map(str, _near_values(recipe, stage_name, misfit)))
    unshared = _without_sequence(recipe, stage_name, misfit)
    fix = f"write {near or f'another {misfit.field}'}, {unshared}or {without_fp8(recipe.precision)}"
    return RecipeError(misfit.field, misfit.problem, fix)


def _without_sequence(recipe: Recipe, stage_name: str, misfit: Misfit) -> str:
    """No sequence parallelism, where that mends it and nothing else asks for it."""
    stage = recipe.stages[stage_name]
    layout = stage_layout(recipe, stage)
    trial = _with_ranks(recipe, stage_name, replace(layout, sequence=False), stage_ranks(recipe, stage))
    if layout.tensor_overlap or not _mends(trial, recipe, stage_name, misfit):
        return ""
    return f"{layout_field(stage_name, stage)}.sequence=false "


def _fewer_ranks(recipe: Recipe, stage_name: str, misfit: Misfit) -> str:
    """The change to fewer tensor-parallel ranks that mends most, rather without than with other ranks in all; or none.

    Of those that mend the same it is the one with most tensor-parallel ranks.
    """
    stage = recipe.stages[stage_name]
    layout, ranks = stage_layout(recipe, stage), stage_ranks(recipe, stage)
    tried = [(other, ranks) for other in _fewer(layout)]
    for other in _fewer(layout):
        model_ranks = other.tensor * other.pipeline * other.context
        near = near_ranks(stage.global_batch_size, stage.micro_batch_size, model_ranks, ranks)
        tried += [(other, number) for number in sorted(near, key=lambda number: abs(number - ranks))]
    mending: dict[int, str] = {}
    for other, number in tried:
        trial = _with_ranks(recipe, stage_name, other, number)
        if _mends(trial, recipe, stage_name, misfit):
            prefix = layout_field(stage_name, stage)
            dropped = [f"{prefix}.{name}=false" for name in NEED_RANKS if getattr(layout, name) > getattr(other, name)]
            moved = [f"{ranks_field(stage_name, stage)}={number}"] if number != ranks else []
            words = " ".join([f"{prefix}.tensor={other.tensor}", *dropped, *moved])
            mending.setdefault(len(_all_misfits(trial)), words)
    return mending[min(mending)] if mending else ""


def _fewer(layout: ParallelConfig) -> Iterator[ParallelConfig]:
    """The layout on fewer tensor-parallel ranks, most first; one has none of what is divided among several."""
    for size in reversed(divisors(layout.tensor)[:-1]):
        sequence, overlap = size > 1 and layout.sequence, size > 1 and layout.tensor_overlap
        yield replace(layout, tensor=size, sequence=sequence, tensor_overlap=overlap)


def _with_ranks(recipe: Recipe, stage_name: str, layout: ParallelConfig, ranks: int) -> Recipe:
    """The recipe with other ranks of a stage, and of those that share its fields."""
    stage, cluster, parallel = recipe.stages[stage_name], recipe.cluster, recipe.parallel
    if stage.parallel:
        stage = replace(stage, parallel=layout)
    else:
        parallel = layout
    if stage.gpus is None:
        cluster = replace(cluster, gpus=ranks)
    else:
        stage = replace(stage, gpus=ranks)
    return replace(recipe, stages={**recipe.stages, stage_name: stage}, cluster=cluster, parallel=parallel)


def _near_values(recipe: Recipe, stage_name: str, misfit: Misfit) -> list[int]:
    """The next smaller and the next larger value of a misfit's field that mend it, as far as there are."""
    value, step = misfit.value, misfit.step
    below = range((value - 1) // step * step, 0, -step)
    above = count(value // step * step + step, step)

    def mends(other: int) -> bool:
        return _mends(_with_value(recipe, stage_name, misfit.field, other), recipe, stage_name, misfit)

    return [found for values in (below, above) for found in islice(filter(mends, islice(values, TRIED)), 1)]


def _with_value(recipe: Recipe, stage_name: str, field: str, value: int) -> Recipe:
    """The recipe with another value in a field of the model, or another sequence length of the stage."""
    owner, _, name = field.rpartition(".")
    if owner == "model":
        changed: dict[str, Any] = {name: value}
        return replace(recipe, model=replace(recipe.model, **changed))
    stage = replace(recipe.stages[stage_name], sequence_length=value)
    return replace(recipe, stages={**recipe.stages, stage_name: stage})


def _mends(trial: Recipe, recipe: Recipe, stage_name: str, misfit: Misfit) -> bool:
    """Whether a changed recipe keeps the rules of layouts, without this misfit and without new ones."""
    try:
        for name in trial.stages:
            check_layout(trial, name)
    except RecipeError:
        return False
    return _all_misfits(trial) <= _all_misfits(recipe) - {(stage_name, misfit.what)}


def _all_misfits(recipe: Recipe) -> set[tuple[str, str]]:
    return {(name, misfit.what) for name in recipe.stages for misfit in fp8_misfits(recipe, name)}
