"""Layouts of a stage on its ranks: which fit, how fast they are, and why the others do not go."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from nano_pretrain.plan.device import Device
from nano_pretrain.plan.memory import stage_memory
from nano_pretrain.plan.step_time import step_time
from nano_pretrain.platform.cuda_limits import check_scan
from nano_pretrain.recipe.derived import stage_layout, stage_ranks
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.rules import RULES
from nano_pretrain.recipe.schema import ParallelConfig, Recipe, RecomputeConfig

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
        tensor, pipeline, context, data: ranks in each dimension; sequence parallelism goes with tensor parallelism.
        micro_batch_size: samples.
        recompute: the least recomputation that fits.
        step_seconds: predicted time of a step.
        memory_bytes: of the rank that holds most.
    """

    tensor: int
    pipeline: int
    context: int
    data: int
    micro_batch_size: int
    recompute: str
    step_seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class Reason:
    """Why layouts do not go.

    Attributes:
        text: what a rule says of the first of them, or the memory that the smallest of them needs.
        layouts: how many of those that were tried.
        example: the layout that `text` speaks of.
    """

    text: str
    layouts: int
    example: str


@dataclass(frozen=True)
class Search:
    """What was found for a stage: candidates by step time, reasons by number of layouts."""

    devices: int
    fitting: list[Candidate]
    rejected: list[Reason]


def search_stage(recipe: Recipe, stage_name: str, device: Device, factor: float) -> Search:
    """Try every combination of `TENSOR`, `PIPELINE`, `CONTEXT` and `MICRO_BATCHES`.

    Args:
        recipe: the recipe; its own layout does not matter.
        stage_name: a stage of it.
        device: the hardware.
        factor: multiplies predicted times.
    """
    fitting: list[Candidate] = []
    refused: dict[str, list[tuple[str, str]]] = {}
    too_large: list[tuple[int, str]] = []
    for trial in _trials(recipe, stage_name):
        name = layout_name(trial, stage_name)
        if problem := _problem(trial, stage_name, device):
            # Numbers aside, a rule says the same of all of them.
            refused.setdefault(re.sub(r"\d+", "#", problem), []).append((problem, name))
            continue
        found, memory = _least_recomputation(trial, stage_name, device)
        if found is None:
            too_large.append((memory, name))
        else:
            fitting.append(_candidate(found, stage_name, memory, factor * step_time(found, stage_name, device).total))
    reasons = [Reason(found[0][0], len(found), found[0][1]) for found in refused.values()]
    if too_large:
        memory, name = min(too_large)
        reasons.append(Reason(_too_large(memory, device), len(too_large), name))
    return Search(
        devices=stage_ranks(recipe, recipe.stages[stage_name]),
        fitting=sorted(fitting, key=lambda candidate: (candidate.step_seconds, candidate.memory_bytes)),
        rejected=sorted(reasons, key=lambda reason: -reason.layouts),
    )


def _trials(recipe: Recipe, stage_name: str) -> Iterator[Recipe]:
    """The recipe with nothing but this stage, in each layout."""
    stage = recipe.stages[stage_name]
    sharded = stage_layout(recipe, stage).distributed_optimizer
    plan = replace(recipe.plan, search=False)
    for tensor, pipeline, context, micro_batch in product(TENSOR, PIPELINE, CONTEXT, MICRO_BATCHES):
        layout = ParallelConfig(tensor, pipeline, context, sequence=tensor > 1, distributed_optimizer=sharded)
        own = replace(stage, parallel=layout, micro_batch_size=micro_batch, gpus=stage_ranks(recipe, stage))
        yield replace(recipe, stages={stage_name: own}, plan=plan)


def _problem(trial: Recipe, stage_name: str, device: Device) -> str | None:
    """What a rule has against a layout, without the fix."""
    try:
        for rule in RULES:
            rule(trial)
        if device.platform == "cuda":
            check_scan(trial, stage_name)
    except RecipeError as error:
        return str(error).partition(";")[0]
    return None


def _least_recomputation(trial: Recipe, stage_name: str, device: Device) -> tuple[Recipe | None, int]:
    """The trial with as much recomputation as it needs to fit, None if none is enough; bytes of its largest rank."""
    for granularity in RECOMPUTATION:
        found = replace(trial, recompute=RecomputeConfig(granularity))
        memory = max(rank.total for rank in stage_memory(found, stage_name, platform=device.platform))
        if device.memory_bytes is None or memory <= device.memory_bytes:
            return found, memory
    return None, memory


def _candidate(trial: Recipe, stage_name: str, memory: int, seconds: float) -> Candidate:
    stage = trial.stages[stage_name]
    layout = stage_layout(trial, stage)
    return Candidate(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        context=layout.context,
        data=stage_ranks(trial, stage) // (layout.tensor * layout.pipeline * layout.context),
        micro_batch_size=stage.micro_batch_size,
        recompute=trial.recompute.granularity,
        step_seconds=seconds,
        memory_bytes=memory,
    )


def _too_large(memory: int, device: Device) -> str:
    return f"memory: {memory / 1e9:.1f} GB of {device.memory_gigabytes:g} GB on the largest rank, all layers recomputed"


def layout_name(recipe: Recipe, stage_name: str) -> str:
    """A layout in short, for example TP8 PP1 CP16 micro-batch 1."""
    stage = recipe.stages[stage_name]
    layout = stage_layout(recipe, stage)
    return f"TP{layout.tensor} PP{layout.pipeline} CP{layout.context} micro-batch {stage.micro_batch_size}"
