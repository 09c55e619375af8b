"""Which layers each pipeline position holds.

megatron-core 0.16 divides a hybrid into equal numbers of layers and drops the remainder without a word. Layers of a
hybrid differ in cost, and the last position computes the head as well: here each position gets a run of layers of any
length, so that the slowest is as fast as it can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate

from nano_pretrain.recipe.derived import padded_vocab_size, stage_layout, stage_ranks
from nano_pretrain.recipe.flops import attention_layer_flops, feed_forward_layer_flops, mamba_layer_flops
from nano_pretrain.recipe.pattern import LayerType, parse_pattern
from nano_pretrain.recipe.schema import ModelConfig, ParallelConfig, Recipe, StageConfig


def pipeline_split(model: ModelConfig, layout: ParallelConfig, sequence_length: int) -> tuple[int, ...]:
    """Layers of each pipeline position of a layout that the rules accept.

    They are `pipeline_layers`, or balance the FLOPs of a token: of the splits whose costliest position costs least, the
    one whose costs are most equal (least sum of squares). A position has at least one layer. The head counts for the
    last position; the embedding is a lookup.
    """
    if layout.pipeline_layers is not None:
        return tuple(layout.pipeline_layers)
    layers = parse_pattern(model.pattern)
    cost = {
        LayerType.MAMBA: mamba_layer_flops(model).total,
        LayerType.FEED_FORWARD: feed_forward_layer_flops(model),
        LayerType.ATTENTION: attention_layer_flops(model, sequence_length).total,
    }
    head = 2 * model.hidden_size * padded_vocab_size(model)
    return _balanced(tuple(cost[kind] for kind in layers), head, layout.pipeline)


def stage_build(recipe: Recipe, stage: StageConfig) -> tuple[ParallelConfig, int, tuple[int, ...]]:
    """What ranks are built for: layout, their number, layers of each pipeline position.

    The same process trains consecutive stages for which it is the same.
    """
    layout = stage_layout(recipe, stage)
    return layout, stage_ranks(recipe, stage), pipeline_split(recipe.model, layout, stage.sequence_length)


@lru_cache
def _balanced(costs: tuple[int, ...], head: int, positions: int) -> tuple[int, ...]:
    """Sizes of the runs of `costs`, the last with `head` added: least largest sum, then least sum of squares."""
    largest, _ = _best_runs(costs, head, positions, max)
    _, sizes = _best_runs(costs, head, positions, lambda cost, rest: rest + cost**2 if cost <= largest else math.inf)
    return sizes


def _best_runs(
    costs: tuple[int, ...], head: int, positions: int, join: Callable[[int, float], float]
) -> tuple[float, tuple[int, ...]]:
    """Least value of a split and its sizes; `join` is the value of a run's cost and the runs behind it."""
    before, layers = [0, *accumulate(costs)], len(costs)
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        first: (join(before[layers] - before[first] + head, 0), (layers - first,)) for first in range(layers)
    }
    for behind in range(1, positions):
        best = {
            first: min(
                (join(before[end] - before[first], best[end][0]), (end - first, *best[end][1]))
                for end in range(first + 1, layers - behind + 1)
            )
            for first in range(layers - behind)
        }
    return best[0]
