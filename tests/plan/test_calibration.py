"""A measured run scales every predicted time, by the recipe and the ranks it ran with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nano_pretrain.plan.calibration import calibrate
from nano_pretrain.plan.notes import assumptions
from nano_pretrain.plan.step_time import batch_time, step_time
from nano_pretrain.plan.whole import make_plan
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.load import to_yaml
from nano_pretrain.recipe.schema import PlanConfig, Recipe
from tests.plan.recipes import STAGE, device, named, small

CPU = device("cpu")


def measured(recipe: Recipe, path: Path) -> Recipe:
    return replace(recipe, plan=PlanConfig(hardware="cpu", metrics=str(path)))


def write(path: Path, speeds: list[float], stage: str = STAGE, batch: int = 8) -> Path:
    each = {"stage": stage, "global_batch_size": batch}
    lines = [json.dumps({"step": i, "tokens_per_second": speed, **each}) for i, speed in enumerate(speeds)]
    path.write_text("\n".join([*lines, '{"step": 99, "stage": "pre']))
    return path


def predicted_speed(recipe: Recipe) -> float:
    return 8 * 48 / step_time(recipe, STAGE, CPU).total


def test_half_the_speed_is_twice_the_time(tmp_path: Path) -> None:
    recipe = small()
    slow = predicted_speed(recipe) / 2
    path = write(tmp_path / "metrics.jsonl", [slow / 9, slow, slow, slow * 1.1, float("nan")])
    found = calibrate(measured(recipe, path), CPU)
    assert found is not None
    assert found.measured == {STAGE: pytest.approx(slow)}, "the median, not the slow first step"
    assert found.factor == pytest.approx(2)
    assert calibrate(recipe, CPU) is None


def test_each_batch_is_compared_with_its_own_steps(tmp_path: Path) -> None:
    recipe = small(ranks=2)
    rest = {batch: batch_time(recipe, STAGE, batch, CPU).total for batch in (4, 8)}
    fast = {batch: batch * 48 / seconds / 2 for batch, seconds in rest.items()}
    assert fast[4] < 0.95 * fast[8], "smaller batches are slower, so that one speed for both would be wrong"
    lines = write(tmp_path / "small.jsonl", 30 * [fast[4]], batch=4).read_text().splitlines()[:-1]
    path = write(tmp_path / "metrics.jsonl", 2 * [fast[8]])
    path.write_text("\n".join([*lines, path.read_text()]))
    found = calibrate(measured(recipe, path), CPU)
    assert found is not None
    assert found.factor == pytest.approx(2)
    tokens, seconds = (30 * 4 + 2 * 8) * 48, 2 * (30 * rest[4] + 2 * rest[8])
    assert found.measured == {STAGE: pytest.approx(tokens / seconds)}
    # Steps of a batch that these ranks do not divide were on others, which nothing here says.
    path.write_text("\n".join([*write(tmp_path / "odd.jsonl", [1.0], batch=3).read_text().splitlines()[:-1], *lines]))
    odd = calibrate(measured(recipe, path), CPU)
    assert odd is not None
    assert odd.factor == pytest.approx(2)


def test_the_run_is_predicted_by_its_own_recipe_on_its_own_ranks(tmp_path: Path) -> None:
    other = small(ranks=1, hidden_size=48)
    other.data.corpus = "any"
    (tmp_path / "recipe.yaml").write_text(to_yaml(other))
    (tmp_path / "environment.json").write_text(json.dumps({"layout": {"world": 2}}))
    path = write(tmp_path / "metrics.jsonl", [1000.0])
    found = calibrate(measured(small(), path), CPU)
    assert found is not None
    assert found.predicted[STAGE] == pytest.approx(predicted_speed(small(ranks=2, hidden_size=48)))


def test_the_plan_scales_times_and_costs(tmp_path: Path) -> None:
    recipe = named("tiny", "plan.hardware=cpu", "data.path=nowhere")
    plain = make_plan(recipe).stages[STAGE]
    speed = plain.cost.tokens_per_second
    path = write(tmp_path / "metrics.jsonl", [speed / 3], batch=16)
    scaled = make_plan(measured(recipe, path)).stages[STAGE]
    assert scaled.cost.tokens_per_second == pytest.approx(speed / 3)
    assert scaled.mfu["bf16"] == pytest.approx(plain.mfu["bf16"] / 3)
    assert scaled.other_seconds == pytest.approx(3 * plain.other_seconds)
    assert scaled.cost.device_hours == pytest.approx(3 * plain.cost.device_hours, rel=1e-3)


def test_it_is_said_by_which_recipe_the_run_is_predicted(tmp_path: Path) -> None:
    recipe = small()
    path = write(tmp_path / "metrics.jsonl", [1000.0])
    alone = calibrate(measured(recipe, path), CPU)
    assert alone is not None
    assert alone.recipe is None
    recipe.data.corpus = "any"
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    beside = calibrate(measured(recipe, path), CPU)
    assert beside is not None
    assert beside.recipe == str(tmp_path / "recipe.yaml")
    settings = PlanConfig(hardware="cpu")
    lines = ["\n".join(assumptions(CPU, settings, found)) for found in (alone, beside)]
    assert "predicted by this recipe, because no recipe.yaml lies beside it)" in lines[0]
    assert f"predicted by {tmp_path}/recipe.yaml)" in lines[1]


@pytest.mark.parametrize(
    ("name", "words"), [("nothing.jsonl", "cannot be read"), ("metrics.jsonl", "has no steps of pretrain")]
)
def test_what_is_no_metrics_file_is_named(tmp_path: Path, name: str, words: str) -> None:
    write(tmp_path / "metrics.jsonl", [1.0], stage="another")
    with pytest.raises(RecipeError) as error:
        calibrate(measured(small(), tmp_path / name), CPU)
    assert str(error.value).startswith("plan.metrics: ")
    assert words in str(error.value)


def test_a_run_on_a_cpu_does_not_calibrate_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"platform": "cpu"}')
    path = write(tmp_path / "metrics.jsonl", [1000.0])
    recipe = replace(small(), plan=PlanConfig(hardware="h100", metrics=str(path)))
    with pytest.raises(RecipeError, match=r"plan.metrics: .* was measured on cpu, and plan.hardware is H100 SXM"):
        calibrate(recipe, device("h100"))
