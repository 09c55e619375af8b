"""Rules of the evaluation for length and by tasks."""

from __future__ import annotations

from nano_pretrain.recipe.derived import stage_layout
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.rules_layout import layout_field
from nano_pretrain.recipe.schema import RETRIEVAL_TASKS, Recipe

LONGEST = 2**31 - 1
"""Positions are counted in 32 bits by kernels."""


def evaluation(recipe: Recipe) -> None:
    """Tasks that there are, and lengths in tokens, each once."""
    options = recipe.evaluate
    for task in options.tasks:
        if task not in RETRIEVAL_TASKS:
            raise RecipeError("evaluate.tasks", f"{task!r} is unknown", f"choose from {', '.join(RETRIEVAL_TASKS)}")
    for length in options.lengths:
        if not 1 <= length <= LONGEST:
            raise RecipeError("evaluate.lengths", f"{length} is no length", f"write tokens, 1 to {LONGEST}")
    for name in ("tasks", "lengths", "harness_tasks"):
        values = getattr(options, name)
        if len(set(values)) < len(values):
            raise RecipeError(f"evaluate.{name}", "names one twice", "write each once")


def lengths_at_stage_ends(recipe: Recipe) -> None:
    """CUDA graphs and user buffers are made for the one shape that is trained.

    For the verbs that train or plan alone: no other evaluates in the layout of a stage.

    Raises:
        RecipeError: a stage has them, and is to be evaluated at its end.
    """
    options = recipe.evaluate
    if not ((options.lengths or options.harness_tasks) and options.at_stage_end):
        return
    for name, stage in recipe.stages.items():
        for field in ("cuda_graphs", "tensor_overlap"):
            if getattr(stage_layout(recipe, stage), field):
                raise RecipeError(
                    "evaluate.at_stage_end",
                    f"other lengths than the trained one do not go with {layout_field(name, stage)}.{field}",
                    "write evaluate.at_stage_end=false and use the verb evaluate",
                )
