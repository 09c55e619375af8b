"""A batch that grows: every size has its own steps and times, and its ranks, in the plan as in the search."""

from __future__ import annotations

import pytest

from nano_pretrain.data.course import step_batches
from nano_pretrain.plan.document import plan_document
from nano_pretrain.plan.search import search_stage
from nano_pretrain.plan.search_refusal import nearest_counts
from nano_pretrain.plan.step_time import batch_time
from nano_pretrain.plan.whole import make_plan
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.rules import check
from nano_pretrain.recipe.schema import BatchRampConfig, Recipe
from tests.plan.recipes import STAGE, device, small
from tests.plan.test_tables import row, shown

CPU = device("cpu")


def ramped(ranks: int = 1) -> Recipe:
    """Steps of 4 samples for 4 x 48 tokens, 8 until the 24 samples of the ramp are over, then 12."""
    recipe = small(ranks=ranks)
    stage = recipe.stages[STAGE]
    stage.global_batch_size, stage.tokens = 12, 48 * 48
    stage.batch_ramp = BatchRampConfig(4, 4, 24 * 48)
    recipe.run.name, recipe.data.path = "ramped", "nowhere"
    return recipe


def test_each_batch_has_its_steps_and_their_time() -> None:
    recipe = ramped()
    plan = make_plan(recipe)
    report = plan.stages[STAGE]
    found = [(each.global_batch_size, each.micro_batches, each.steps) for each in report.batches]
    assert found == [(4, 2, 3), (8, 4, 2), (12, 6, 2)]
    seconds = [batch_time(recipe, STAGE, batch, CPU).total for batch in (4, 8, 12)]
    assert [each.step_seconds for each in report.batches] == pytest.approx(seconds)
    assert report.time.total == pytest.approx(seconds[-1])
    total = 3 * seconds[0] + 2 * seconds[1] + 2 * seconds[2]
    assert report.cost.tokens_per_second == pytest.approx(report.cost.tokens / total)
    assert 3 * seconds[0] > 1.01 * seconds[2], "three steps of 4 samples take longer than one of 12"
    document = plan_document(plan, "")["stages"][STAGE]
    assert [batch["steps"] for batch in document["batches"]] == [3, 2, 2]
    assert sum(batch["steps"] for batch in document["batches"]) == document["steps"]
    text = shown(plan)
    assert row(text, "sequences of a step") == ["4 to 12"]
    assert row(text, "micro-batches of a rank") == ["2 to 6"]
    assert "pretrain's batch grows" in text


def test_ranks_that_do_not_divide_a_batch_of_the_ramp_are_refused_by_plan_and_search() -> None:
    recipe = ramped(ranks=3)
    check(recipe)
    words = (
        r"stages\.pretrain\.batch_ramp: 4 is not divisible by 3 data-parallel ranks \(3 ranks, 1 to a model\) x "
        r"micro_batch_size 2; write cluster\.gpus=1 or 2, or write stages\.pretrain\.batch_ramp\.start and \.increment "
    )
    with pytest.raises(RecipeError, match=words):
        make_plan(recipe)
    found = search_stage(recipe, STAGE, CPU, 1.0)
    assert found.recipe_rejected is not None
    assert "batch_ramp: 4 is not divisible by 3" in found.recipe_rejected.text
    assert {candidate.data * candidate.micro_batch_size for candidate in found.fitting} <= {1, 2, 4}
    assert nearest_counts(recipe, STAGE, CPU)[0] == 2


def test_a_ramp_that_cannot_be_is_refused_when_the_recipe_is_checked() -> None:
    recipe = ramped()
    stage = recipe.stages[STAGE]
    assert step_batches(STAGE, stage) == [4, 8, 12]
    stage.batch_ramp.increment = 0
    with pytest.raises(RecipeError, match=r"^stages\.pretrain\.batch_ramp\.increment: 0 never lets the batch grow; "):
        check(recipe)
    stage.batch_ramp = BatchRampConfig(4, 4, stage.tokens)
    with pytest.raises(RecipeError, match=r"^stages\.pretrain\.batch_ramp\.ramp_tokens: 2304 is not between 0 and "):
        check(recipe)
    # What the batch grows to may have been told anew in mid-run, to less than it began with.
    stage.batch_ramp = BatchRampConfig(16, 4, 480)
    check(recipe)
    with pytest.raises(RecipeError, match="16 is not below global_batch_size = 12"):
        step_batches(STAGE, stage)
