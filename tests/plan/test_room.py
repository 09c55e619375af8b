"""A stage without room: what it needs, what there is, and the least that helps."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from nano_pretrain.compose import compose
from nano_pretrain.plan.device import load_device
from nano_pretrain.plan.memory import stage_memory
from nano_pretrain.plan.room import without_room, without_room_on
from nano_pretrain.platform.base import Memory
from nano_pretrain.recipe.schema import ParallelConfig, Recipe, RecomputeConfig

GIGABYTES = 10**9


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """The 12B in BF16 on one rank: nothing is shared out."""
    return compose(["recipe=nano_12b_v2", "precision=bf16", "layout=dp", "extension=none", "cluster.gpus=1"]).recipe


def needed(recipe: Recipe, granularity: str = "none") -> int:
    """Bytes of the largest rank of the 12B's first stage on a CPU."""
    trial = replace(recipe, recompute=RecomputeConfig(granularity))
    return max(rank.total for rank in stage_memory(trial, "pretrain", platform="cpu"))


def refusals(recipe: Recipe, capacity: float, ranks: int = 1) -> list[str]:
    """Of the first stage on a CPU."""
    return list(map(str, without_room(recipe, ["pretrain"], "cpu", Memory("this machine", capacity, ranks))))


def test_the_12b_on_a_laptop(recipe: Recipe) -> None:
    (line,) = refusals(recipe, 16 * GIGABYTES)
    # 18 bytes a parameter are there between two steps: weight, gradient, main weight and moments.
    assert needed(recipe) > 18 * 12_310_001_152
    words = rf"needs {needed(recipe) / 1e9:.1f} GB on its largest rank, this machine has 16\.0 GB; divide it over more"
    assert re.fullmatch(rf"stages\.pretrain: {words} devices with parallel\.tensor or .* plan\.search=true .*", line)


def test_exactly_enough_is_enough(recipe: Recipe) -> None:
    assert refusals(recipe, needed(recipe)) == []
    assert len(refusals(recipe, needed(recipe) - 1)) == 1


@pytest.mark.parametrize(("granularity", "before"), [("selective", "none"), ("full", "selective")])
def test_the_least_recomputation_that_helps_is_named(recipe: Recipe, granularity: str, before: str) -> None:
    # With one sample the update, which recomputation leaves as it is, needs more than the backward pass.
    stage = replace(recipe.stages["pretrain"], micro_batch_size=8)
    recipe = replace(recipe, stages={"pretrain": stage})
    capacity = needed(recipe, granularity)
    assert capacity < needed(recipe, before)
    (line,) = refusals(recipe, capacity)
    assert line.endswith(f"; write recompute.granularity={granularity}")
    assert refusals(replace(recipe, recompute=RecomputeConfig(granularity)), capacity) == []


def test_recomputation_that_is_there_already_is_not_named(recipe: Recipe) -> None:
    (line,) = refusals(replace(recipe, recompute=RecomputeConfig("full")), needed(recipe, "full") - 1)
    assert "recompute" not in line


def test_ranks_that_share_a_machine(recipe: Recipe) -> None:
    layout = ParallelConfig(pipeline=2)
    stage = replace(recipe.stages["pretrain"], parallel=layout, gpus=4)
    shared = replace(recipe, stages={"pretrain": stage})
    totals = [rank.total for rank in stage_memory(shared, "pretrain", platform="cpu")]
    both_positions_twice, largest = 2 * sum(totals), max(totals)
    assert refusals(shared, both_positions_twice, ranks=4) == []
    assert refusals(shared, both_positions_twice - 1, ranks=4)
    (line,) = refusals(shared, largest, ranks=4)
    assert f"needs {both_positions_twice / 1e9:.1f} GB on 4 ranks together, this machine has" in line
    assert "stages.pretrain.parallel.tensor" in line, "the layout is the stage's own"
    # Two on each of two machines: which two is not known, and the machines are alike.
    assert refusals(shared, max(largest, both_positions_twice / 2), ranks=2) == []
    assert "on its largest rank" in refusals(shared, largest - 1, ranks=1)[0]


def test_planned_hardware_whose_memory_is_not_known_refuses_nothing(recipe: Recipe) -> None:
    recipe = replace(recipe, plan=replace(recipe.plan, hardware="h100"))
    device = load_device(recipe)
    assert [refusal.field for refusal in without_room_on(device, recipe)] == ["stages.pretrain"]
    assert list(without_room_on(replace(device, memory_gigabytes=None), recipe)) == []
