"""Layouts of a stage on its ranks: which fit, how fast they are, and why the others do not go."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from nano_pretrain.data.course import step_batches
from nano_pretrain.plan.device import Device, check_platform
from nano_pretrain.plan.memory import stage_memory
from nano_pretrain.plan.step_time import step_time
from nano_pretrain.recipe.derived import stage_layout, stage_ranks
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.rules import RULES
from nano_pretrain.recipe.rules_ranks import check_batches
from nano_pretrain.recipe.schema import Recipe, RecomputeConfig

TENSOR = (1, 2, 4, 8, 16)
PIPELINE = tuple(range(1, 17))
CONTEXT = (1, 2, 4, 8, 16, 32, 64)
MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTATION = ("none", "selective", "full")
"""From fast to small; what fits without is not tried with more."""


@dataclass(frozen=True)
class Candidate:
    """A layout that fits.

    Attributes:
        tensor, pipeline, context, data: ranks in each dimension.
        sequence: sequence parallelism; every layout that is tried has it where `tensor` is above 1.
        micro_batch_size: samples.
        recompute: the least recomputation that fits; of the recipe's own layout the recipe's.
        step_seconds: predicted time of a step.
        memory_bytes: of the rank that holds most.
    """

    tensor: int
    pipeline: int
    context: int
    data: int
    sequence: bool
    micro_batch_size: int
    recompute: str
    step_seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class Reason:
    """Why layouts do not go.

    Attributes:
        text: what a rule says of the first of them, or what the nearest miss needs.
        layouts: how many of those that were tried.
        example: the layout that `text` speaks of.
        memory_bytes: what it needs on its largest rank; None if it breaks a rule.
    """

    text: str
    layouts: int
    example: str
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Search:
    """What was found for a stage.

    Attributes:
        devices: ranks of the stage.
        fitting: by step time; of any size if the hardware's memory is not known.
        rejected: by number of layouts.
        recipe: index of the recipe's own layout in `fitting`; None if it does not go.
        recipe_rejected: why it does not; None if it goes.
    """

    devices: int
    fitting: list[Candidate]
    rejected: list[Reason]
    recipe: int | None
    recipe_rejected: Reason | None


def search_stage(recipe: Recipe, stage_name: str, device: Device, factor: float) -> Search:
    """Try the recipe's own layout and every combination of `TENSOR`, `PIPELINE`, `CONTEXT` and `MICRO_BATCHES`.

    Args:
        recipe: the recipe; its own layout need not go.
        stage_name: a stage of it.
        device: the hardware.
        factor: multiplies predicted times.
    """
    own = _judge(_alone(recipe, stage_name), stage_name, device, factor, (recipe.recompute.granularity,))
    found = [_judge(trial, stage_name, device, factor, RECOMPUTATION) for trial in trials(recipe, stage_name)]
    # With other recomputation or sizes than those tried, the recipe's own is one more.
    candidates = dict.fromkeys(candidate for candidate in [own, *found] if isinstance(candidate, Candidate))
    fitting = sorted(candidates, key=lambda candidate: (candidate.step_seconds, candidate.memory_bytes))
    return Search(
        devices=stage_ranks(recipe, recipe.stages[stage_name]),
        fitting=fitting,
        rejected=_summed(reason for reason in found if isinstance(reason, Reason)),
        recipe=fitting.index(own) if isinstance(own, Candidate) else None,
        recipe_rejected=own if isinstance(own, Reason) else None,
    )


def _alone(recipe: Recipe, stage_name: str) -> Recipe:
    """The recipe with nothing but this stage, to be checked."""
    return replace(recipe, stages={stage_name: recipe.stages[stage_name]}, plan=replace(recipe.plan, search=False))


def trials(recipe: Recipe, stage_name: str) -> Iterator[Recipe]:
    """The recipe with nothing but this stage, in each layout, which stands where the recipe has its own."""
    alone = _alone(recipe, stage_name)
    stage = alone.stages[stage_name]
    # What is no number of ranks stays the recipe's; layers of its own pipeline stages fit no other number of them.
    base = replace(stage_layout(recipe, stage), pipeline_layers=None)
    for tensor, pipeline, context, micro_batch in product(TENSOR, PIPELINE, CONTEXT, MICRO_BATCHES):
        layout = replace(base, tensor=tensor, pipeline=pipeline, context=context, sequence=tensor > 1)
        if stage.parallel is None:
            own = replace(stage, micro_batch_size=micro_batch)
            yield replace(alone, parallel=layout, stages={stage_name: own})
        else:
            own = replace(stage, micro_batch_size=micro_batch, parallel=layout)
            yield replace(alone, stages={stage_name: own})


def _judge(
    trial: Recipe, stage_name: str, device: Device, factor: float, recomputation: Iterable[str]
) -> Candidate | Reason:
    """A layout with the first recomputation that makes it fit, or what speaks against it."""
    name = layout_name(trial, stage_name)
    try:
        check_trial(trial, stage_name, device)
    except RecipeError as error:
        return Reason(str(error).partition(";")[0], 1, name)
    needs: dict[int, str] = {}
    for granularity in recomputation:
        found = replace(trial, recompute=RecomputeConfig(granularity))
        memory = largest_rank(found, stage_name, device)
        if has_room(memory, device):
            return _candidate(found, stage_name, memory, factor * step_time(found, stage_name, device).total)
        needs.setdefault(memory, granularity)
    least = min(needs)
    text = (
        f"needs {least / 1e9:.1f} GB of memory on its largest rank with recompute.granularity={needs[least]}, "
        f"{device.name} has {device.memory_gigabytes:g} GB"
    )
    return Reason(text, 1, name, least)


def check_trial(trial: Recipe, stage_name: str, device: Device) -> None:
    """Apply all rules to a layout.

    Raises:
        RecipeError: the first that is broken.
    """
    for rule in RULES:
        rule(trial)
    check_batches(trial, stage_name, step_batches(stage_name, trial.stages[stage_name]))
    check_platform(trial, stage_name, device)


def largest_rank(trial: Recipe, stage_name: str, device: Device) -> int:
    """Bytes of the rank that holds most."""
    return max(rank.total for rank in stage_memory(trial, stage_name, platform=device.platform))


def has_room(memory: int, device: Device) -> bool:
    """Whether a rank of so many bytes fits, or nobody knows."""
    return device.memory_bytes is None or memory <= device.memory_bytes


def _candidate(trial: Recipe, stage_name: str, memory: int, seconds: float) -> Candidate:
    stage = trial.stages[stage_name]
    layout = stage_layout(trial, stage)
    return Candidate(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        context=layout.context,
        data=stage_ranks(trial, stage) // (layout.tensor * layout.pipeline * layout.context),
        sequence=layout.sequence,
        micro_batch_size=stage.micro_batch_size,
        recompute=trial.recompute.granularity,
        step_seconds=seconds,
        memory_bytes=memory,
    )


def _summed(reasons: Iterable[Reason]) -> list[Reason]:
    """One for each rule, and one for memory: the nearest miss."""
    groups: dict[str, list[Reason]] = {}
    for reason in reasons:
        # Numbers aside, a rule says the same of all layouts.
        kind = re.sub(r"\d+", "#", reason.text) if reason.memory_bytes is None else "memory"
        groups.setdefault(kind, []).append(reason)
    nearest = (min(group, key=lambda reason: reason.memory_bytes or 0) for group in groups.values())
    summed = [replace(reason, layouts=len(group)) for reason, group in zip(nearest, groups.values(), strict=True)]
    return sorted(summed, key=lambda reason: -reason.layouts)


def layout_name(recipe: Recipe, stage_name: str) -> str:
    """A layout in short, for example TP8 PP1 CP16 micro-batch 1."""
    stage = recipe.stages[stage_name]
    layout = stage_layout(recipe, stage)
    return f"TP{layout.tensor} PP{layout.pipeline} CP{layout.context} micro-batch {stage.micro_batch_size}"
