"""The curriculum of a recipe whose sources' sizes are not known: everything but how often they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.ranges import SourceSize
from nano_pretrain.recipe.acts import Act
from nano_pretrain.recipe.schema import Recipe

ENDLESS = SourceSize((10**30,))
"""More tokens than any run reads, so that none is read twice."""


def sizeless_curriculum(recipe: Recipe, acts: Sequence[Act] = ()) -> Curriculum:
    """The curriculum as if every source had no end.

    Args:
        recipe: blends as mappings source -> weight.
        acts: what the run was told in mid-run, as in the recipe.

    Raises:
        RecipeError: as `Curriculum`.
    """
    blends = [phase.blend for stage in recipe.stages.values() for phase in stage.phases.values()]
    earlier = [act.before for act in acts if isinstance(act.before, Mapping)]
    return Curriculum(recipe, {source: ENDLESS for blend in (*blends, *earlier) for source in blend}, acts)
