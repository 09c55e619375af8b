"""Pipeline splits: every layer once, and no other split is better balanced."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_pretrain.compose import compose
from nano_pretrain.recipe.flops import attention_layer_flops, count_flops, feed_forward_layer_flops, mamba_layer_flops
from nano_pretrain.recipe.load import tree
from nano_pretrain.recipe.schema import ModelConfig, ParallelConfig
from nano_pretrain.recipe.split import pipeline_split
from tests.model.recipes import small_recipe

NAMES = sorted(path.stem for path in (tree("recipes") / "recipe").glob("*.yaml"))


def costs(model: ModelConfig, split: tuple[int, ...], length: int) -> list[int]:
    """FLOPs of a token on each position."""
    of = {
        "M": mamba_layer_flops(model).total,
        "-": feed_forward_layer_flops(model),
        "*": attention_layer_flops(model, length).total,
    }
    found, first = [], 0
    for size in split:
        found.append(sum(of[letter] for letter in model.pattern[first : first + size]))
        first += size
    found[-1] += count_flops(model, length).head
    return found


def badness(model: ModelConfig, split: tuple[int, ...], length: int) -> tuple[int, int]:
    found = costs(model, split, length)
    return max(found), sum(cost**2 for cost in found)


@given(st.text("M-*", min_size=1, max_size=9), st.data(), st.sampled_from([1, 64, 4096]))
def test_no_split_is_better(pattern: str, data: st.DataObject, length: int) -> None:
    # 1,024 entries need no padding: the head costs what it costs the model.
    model = small_recipe(pattern=pattern, vocab_size=1024).model
    positions = data.draw(st.integers(1, len(pattern)))
    split = pipeline_split(model, ParallelConfig(pipeline=positions), length)
    ends = combinations(range(1, len(pattern)), positions - 1)
    every = [tuple(b - a for a, b in zip((0, *cut), (*cut, len(pattern)), strict=True)) for cut in ends]
    assert split in every
    assert badness(model, split, length) == min(badness(model, other, length) for other in every)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_and_pipeline_size_holds_each_layer_once(name: str) -> None:
    recipe = compose([f"recipe={name}"]).recipe
    layers = len(recipe.model.pattern)
    # All up to sixteen; beyond, the cost of a split grows with its square.
    for positions in {*range(1, min(layers, 16) + 1), layers}:
        split = pipeline_split(recipe.model, ParallelConfig(pipeline=positions), 8192)
        assert len(split) == positions
        assert sum(split) == layers
        assert min(split) >= 1


def test_a_written_split_is_taken() -> None:
    model = small_recipe().model
    layout = ParallelConfig(pipeline=2, pipeline_layers=[1, 3])
    assert pipeline_split(model, layout, 48) == (1, 3)
