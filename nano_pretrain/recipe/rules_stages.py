"""Rules of a stage beyond divisibility: its length, and Mamba groups under context parallelism."""

from __future__ import annotations

from nano_pretrain.recipe.derived import stage_layout
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.pattern import count_layers
from nano_pretrain.recipe.schema import Recipe


def whole_steps(recipe: Recipe) -> None:
    """A stage is at least one step long."""
    for name, stage in recipe.stages.items():
        step = stage.global_batch_size * stage.sequence_length
        if stage.tokens < step:
            raise RecipeError(
                f"stages.{name}.tokens",
                f"{stage.tokens} is less than a step of {stage.global_batch_size} x {stage.sequence_length} tokens",
                f"write at least {step}, or lower stages.{name}.global_batch_size",
            )


def context_splits_groups(recipe: Recipe) -> None:
    """Context-parallel ranks share the Mamba groups of a tensor-parallel rank, or each group is shared by the ranks."""
    if recipe.plan.search or not count_layers(recipe.model.pattern).mamba:
        return
    for name, stage in recipe.stages.items():
        layout = stage_layout(recipe, stage)
        prefix = f"stages.{name}.parallel" if stage.parallel else "parallel"
        groups = recipe.model.mamba_num_groups // layout.tensor
        if groups % layout.context and layout.context % groups:
            raise RecipeError(
                f"{prefix}.context",
                f"{layout.context} neither divides nor is a multiple of the {groups} Mamba groups of a tensor-parallel "
                "rank",
                f"write {prefix}.context={groups}, or change model.mamba_num_groups",
            )
