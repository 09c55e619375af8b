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
