"""Recipes of the plan's tests."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from nano_pretrain.compose import compose
from nano_pretrain.plan.device import Device, load_device
from nano_pretrain.recipe.schema import ClusterConfig, ParallelConfig, PlanConfig, Recipe
from tests.model.recipes import small_recipe

STAGE = "pretrain"


@cache
def named(name: str, *overrides: str) -> Recipe:
    """A recipe of the repository; shared, so not to be changed."""
    return compose([f"recipe={name}", *overrides]).recipe


def small(layout: ParallelConfig | None = None, ranks: int = 1, precision: str = "bf16", **model: Any) -> Recipe:
    """A toy, planned for CPUs; see tests/model/recipes.py."""
    return replace(
        small_recipe(precision, **model),
        parallel=layout or ParallelConfig(),
        cluster=ClusterConfig(gpus=ranks),
        plan=PlanConfig(hardware="cpu"),
    )


def device(name: str) -> Device:
    """Named hardware as its file has it."""
    return load_device(replace(small(), plan=PlanConfig(hardware=name)))
