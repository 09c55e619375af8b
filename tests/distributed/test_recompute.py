"""Recomputation changes no bit of the training in any layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nano_pretrain.plan.activations import RECOMPUTATION
from nano_pretrain.recipe.schema import ParallelConfig, Recipe, RecomputeConfig
from tests.corpora import write_corpus
from tests.distributed.ranks import run_ranks
from tests.distributed.training import Run, Steps, groups
from tests.model.recipes import small_recipe

LAYOUTS = {
    "TP2 with SP": (2, ParallelConfig(tensor=2, sequence=True)),
    "PP2": (2, ParallelConfig(pipeline=2)),
    "TP2 x PP2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "CP2": (2, ParallelConfig(context=2)),
    "DP2, many buckets": (2, ParallelConfig(bucket_size=300)),
}


def train_each_way(recipe: Recipe, layout: ParallelConfig) -> dict[str, Steps]:
    """Three steps with each granularity, all from the same weights and data."""
    with groups(layout) as platform:
        recipes = {name: replace(recipe, recompute=RecomputeConfig(granularity=name)) for name in RECOMPUTATION}
        return {name: Run(each, layout, platform).train(3) for name, each in recipes.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradient_norms_are_equal_bit_for_bit(layout: str, tmp_path: Path) -> None:
    ranks, config = LAYOUTS[layout]
    recipe = small_recipe("bf16", corpus=write_corpus(tmp_path))
    for found in run_ranks(train_each_way, ranks, recipe, config):
        assert found["selective"] == found["none"]
        assert found["full"] == found["none"]
        assert len(set(found["none"].losses)) == 3
