"""Rules of a stage beyond its layout."""

from __future__ import annotations

from nano_pretrain.recipe.derived import stage_tokens
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import Recipe, StageConfig


def whole_steps(recipe: Recipe) -> None:
    """A stage is at least one step long."""
    for name, stage in recipe.stages.items():
        step = stage.global_batch_size * stage.sequence_length
        tokens = stage_tokens(stage)
        if tokens < step:
            raise RecipeError(
                f"stages.{name}.tokens" if tokens == stage.tokens else f"stages.{name}.schedule.extend_to",
                f"{tokens} is less than a step of {stage.global_batch_size} x {stage.sequence_length} tokens",
                f"write at least {step}, or lower stages.{name}.global_batch_size",
            )


def batch_ramps(recipe: Recipe) -> None:
    """A batch grows by something, before its stage is over, or nothing is said of its growth.

    What it grows to may be told anew in mid-run: `check_ramp` compares with what the run began with.
    """
    for name, stage in recipe.stages.items():
        _check_growth(name, stage)


def _check_growth(stage_name: str, stage: StageConfig) -> None:
    ramp, field = stage.batch_ramp, f"stages.{stage_name}.batch_ramp"
    if not ramp.start:
        for name in ("increment", "ramp_tokens"):
            if value := getattr(ramp, name):
                problem = f"{value} does nothing while {field}.start=0"
                raise RecipeError(f"{field}.{name}", problem, f"write {field}.start=SAMPLES, or {field}.{name}=0")
        return
    if not ramp.increment:
        raise RecipeError(f"{field}.increment", "0 never lets the batch grow", "write 1 or more")
    if not 0 < ramp.ramp_tokens < stage.tokens:
        problem = f"{ramp.ramp_tokens} is not between 0 and the stage's {stage.tokens}"
        raise RecipeError(f"{field}.ramp_tokens", problem, f"write 1 to {stage.tokens - 1}")


def check_ramp(stage_name: str, first: StageConfig) -> None:
    """A batch grows by equal steps to that of the stage as the run began with it.

    Raises:
        RecipeError: it does not.
    """
    _check_growth(stage_name, first)
    ramp, size, field = first.batch_ramp, first.global_batch_size, f"stages.{stage_name}.batch_ramp"
    if not ramp.start:
        return
    if ramp.start >= size:
        problem = f"{ramp.start} is not below global_batch_size = {size}"
        raise RecipeError(f"{field}.start", problem, "write a smaller one")
    if (size - ramp.start) % ramp.increment:
        problem = f"{ramp.increment} does not divide {size} - {ramp.start} = {size - ramp.start}"
        raise RecipeError(f"{field}.increment", problem, f"write a divisor of {size - ramp.start}")
