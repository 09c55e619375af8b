"""Rules of a stage beyond its layout."""

from __future__ import annotations

from nano_pretrain.recipe.derived import stage_tokens
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import Recipe


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
    """A batch grows by equal steps from a smaller one, before the stage is over."""
    for name, stage in recipe.stages.items():
        ramp, field, size = stage.batch_ramp, f"stages.{name}.batch_ramp", stage.global_batch_size
        if ramp is None:
            continue
        if ramp.start >= size:
            fix = "write a smaller one, or batch_ramp=null"
            raise RecipeError(f"{field}.start", f"{ramp.start} is not below global_batch_size = {size}", fix)
        if (size - ramp.start) % ramp.increment:
            problem = f"{ramp.increment} does not divide {size} - {ramp.start} = {size - ramp.start}"
            raise RecipeError(f"{field}.increment", problem, f"write a divisor of {size - ramp.start}")
        if ramp.tokens >= stage_tokens(stage):
            fix = f"write less than {stage_tokens(stage)}"
            raise RecipeError(f"{field}.tokens", f"{ramp.tokens} is not less than the stage's tokens", fix)
