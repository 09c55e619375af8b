"""A stage on whose devices no layout goes: the numbers of devices nearby on which one does."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

from nano_pretrain.data.course import step_batches
from nano_pretrain.plan.device import Device
from nano_pretrain.plan.search import Search, check_trial, has_room, largest_rank, trials
from nano_pretrain.recipe.derived import stage_layout, stage_ranks
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.rules_layout import divisors, ranks_field
from nano_pretrain.recipe.schema import Recipe, RecomputeConfig


def check_found(recipe: Recipe, searches: dict[str, Search], device: Device) -> None:
    """Refuse a recipe for one of whose stages the search found nothing.

    Raises:
        RecipeError: names the first such stage's number of devices, and the nearest on which a layout goes; or the
            rule that is broken on any number of them.
    """
    for name, search in searches.items():
        if not search.fitting:
            raise _refusal(recipe, name, search, device)


def _refusal(recipe: Recipe, stage_name: str, search: Search, device: Device) -> RecipeError:
    field, counts = ranks_field(stage_name, recipe.stages[stage_name]), nearest_counts(recipe, stage_name, device)
    problem = f"no layout of stage {stage_name} goes on {search.devices} x {device.name}"
    missed = [reason for reason in search.rejected if reason.memory_bytes is not None]
    if missed:
        problem += f": the nearest miss, {missed[0].example}, {missed[0].text}"
    if missed or not counts:
        other = f"shorten stages.{stage_name}.sequence_length, or choose plan.hardware with more memory"
    else:
        other = f"change stages.{stage_name}.global_batch_size"
    fix = f"write {field}={' or '.join(map(str, counts))}, or {other}" if counts else other
    return RecipeError(field, problem, fix)


def nearest_counts(recipe: Recipe, stage_name: str, device: Device) -> list[int]:
    """The next smaller and the next larger number of devices on which a layout goes, as far as there are.

    Raises:
        RecipeError: on none does one pass the rules.
    """
    layouts, devices = _layouts_by_count(recipe, stage_name, device), stage_ranks(recipe, recipe.stages[stage_name])
    below = sorted((count for count in layouts if count < devices), reverse=True)
    above = sorted(count for count in layouts if count > devices)

    def goes(count: int) -> bool:
        # Those that come last are spread over most ranks.
        return any(_fits(trial, stage_name, device) for trial in reversed(layouts[count]))

    return [count for counts in (below, above) for count in islice(filter(goes, counts), 1)]


def _layouts_by_count(recipe: Recipe, stage_name: str, device: Device) -> dict[int, list[Recipe]]:
    """Numbers of devices and the layouts that pass the rules there, each with its least micro-batch.

    Rules see data parallelism in one place: its ranks times the micro-batch divide every batch.
    """
    found: dict[int, list[Recipe]] = {}
    first: RecipeError | None = None
    seen = set()
    for trial in trials(recipe, stage_name):
        stage = trial.stages[stage_name]
        layout = stage_layout(trial, stage)
        sizes = (layout.tensor, layout.pipeline, layout.context)
        if sizes in seen:
            continue
        alone = _on(trial, stage_name, math.prod(sizes))
        try:
            check_trial(alone, stage_name, device)
        except RecipeError as error:
            first = first or error
            continue
        seen.add(sizes)
        for data in divisors(math.gcd(*step_batches(stage_name, stage)) // stage.micro_batch_size):
            count = math.prod(sizes) * data
            found.setdefault(count, []).append(_on(trial, stage_name, count))
    if first and not found:
        raise first
    return found


def _on(trial: Recipe, stage_name: str, devices: int) -> Recipe:
    return replace(trial, stages={stage_name: replace(trial.stages[stage_name], gpus=devices)})


def _fits(trial: Recipe, stage_name: str, device: Device) -> bool:
    smallest = replace(trial, recompute=RecomputeConfig("full"))
    return has_room(largest_rank(smallest, stage_name, device), device)
