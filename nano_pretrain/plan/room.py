"""Whether a stage has room in memory: one question, in the same words, for `plan` and for `train`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from nano_pretrain.plan.device import Device
from nano_pretrain.plan.memory import stage_memory
from nano_pretrain.platform.base import Memory, PlatformName
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.rules import CHOICES
from nano_pretrain.recipe.rules_layout import layout_field
from nano_pretrain.recipe.schema import Recipe, RecomputeConfig


def without_room_on(device: Device, recipe: Recipe) -> Iterator[RecipeError]:
    """The stages that do not fit planned hardware; none if its memory is not known."""
    if device.memory_bytes is not None:
        yield from without_room(recipe, recipe.stages, device.platform, Memory(device.name, device.memory_bytes))


def without_room(
    recipe: Recipe, stage_names: Iterable[str], platform: PlatformName, memory: Memory
) -> Iterator[RecipeError]:
    """The stages whose tensors need more than there is, each as the refusal of it.

    Args:
        recipe: a recipe that the rules accept.
        stage_names: stages of it.
        platform: whose kernels run.
        memory: of one device or machine; the others of the run are taken to be like it.
    """
    for name in stage_names:
        needed, where = _needed(recipe, name, platform, memory.ranks)
        if needed > memory.capacity:
            problem = f"needs {_gigabytes(needed)} {where}, {memory.name} has {_gigabytes(memory.capacity)}"
            yield RecipeError(f"stages.{name}", problem, _fix(recipe, name, platform, memory))


def _needed(recipe: Recipe, stage_name: str, platform: PlatformName, sharing: int) -> tuple[float, str]:
    """Bytes that the fullest memory of a stage has to hold at least, and for whom.

    Which ranks share a memory is not asked: the fullest has the largest rank, or as many ranks of average size if that
    is more. Peaks of ranks that share a machine add up, though they come at different moments: on a CPU a rank keeps
    what it frees.
    """
    totals = [rank.total for rank in stage_memory(recipe, stage_name, platform=platform)]
    largest, together = max(totals), sharing * sum(totals) / len(totals)
    if together > largest:
        return together, f"on {sharing} ranks together"
    return largest, "on its largest rank"


def _fix(recipe: Recipe, stage_name: str, platform: PlatformName, memory: Memory) -> str:
    """The least recomputation with which the stage has room, or else a larger layout."""
    for granularity in CHOICES["recompute.granularity"]:  # from least to most
        trial = replace(recipe, recompute=RecomputeConfig(granularity))
        if _needed(trial, stage_name, platform, memory.ranks)[0] <= memory.capacity:
            return f"write recompute.granularity={granularity}"
    layout = layout_field(stage_name, recipe.stages[stage_name])
    return (
        f"divide it over more devices with {layout}.tensor or {layout}.pipeline, or let plan.search=true look for a "
        "layout"
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
