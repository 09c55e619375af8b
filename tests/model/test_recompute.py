"""Recomputation changes no bit of a loss or a gradient, and keeps what the plan says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from nano_pretrain.plan.activations import RECOMPUTATION, Sizes
from nano_pretrain.plan.activations_cpu import LAYERS, head
from nano_pretrain.platform import Platform
from nano_pretrain.recipe.pattern import parse_pattern
from nano_pretrain.recipe.schema import Recipe, RecomputeConfig
from tests.kernels.implementations import using
from tests.model.building import batch, build, losses
from tests.model.recipes import ALONE, small_recipe
from tests.plan.allocations import LiveTensors

GRANULARITIES = tuple(RECOMPUTATION)
RECOMPUTED = [name for name in GRANULARITIES if name != "none"]


def recipe_with(granularity: str, precision: str = "fp32", **model: Any) -> Recipe:
    return replace(small_recipe(precision, **model), recompute=RecomputeConfig(granularity=granularity))


def gradients(platform: Platform, recipe: Recipe, in_flight: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and summed gradients of micro-batches whose forward passes all come before the first backward pass."""
    model = build(platform, recipe).train()
    found = [losses(model, batch(recipe, seed=seed)) for seed in range(in_flight)]
    for loss in found:
        loss.sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    return torch.stack(found).detach(), grads


@pytest.mark.parametrize("kernels", ["plain", "native"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("granularity", RECOMPUTED)
def test_losses_and_gradients_are_equal_bit_for_bit(
    granularity: str, precision: str, kernels: str, platform: Platform
) -> None:
    # Two micro-batches with other documents: what is computed again for the first must not see those of the second.
    with using(kernels):
        wanted = gradients(platform, recipe_with("none", precision), in_flight=2)
        found = gradients(platform, recipe_with(granularity, precision), in_flight=2)
    assert torch.equal(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    assert [name for name in wanted[1] if not torch.equal(found[1][name], wanted[1][name])] == []


@pytest.mark.parametrize("granularity", RECOMPUTED)
def test_evaluation_recomputes_nothing(granularity: str, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    from nano_pretrain.model import recompute

    def refuse(*args: object) -> None:
        raise AssertionError("checkpointed")

    recipe = recipe_with(granularity)
    model = build(platform, recipe)
    monkeypatch.setattr(recompute, "checkpoint", refuse)
    monkeypatch.setattr(recompute, "CheckpointWithoutOutput", refuse)
    with torch.no_grad():
        losses(model, batch(recipe))
    with torch.no_grad():
        losses(model.eval(), batch(recipe))


WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "ffn_hidden_size": 256,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_num_groups": 2,
    "mamba_state_dim": 64,
}
BATCH, LENGTH = 2, 1536


def kept_by(platform: Platform, recipe: Recipe) -> int:
    """Bytes that are there after the forward pass and were not before."""
    tensors = LiveTensors()
    with tensors:
        model = build(platform, recipe, LENGTH).train()
        micro_batch = batch(recipe, BATCH, LENGTH, eod_id=None)
        before = tensors.count()
        held = losses(model, micro_batch)
        after = tensors.count()
    assert held.requires_grad
    return after - before


def planned(recipe: Recipe) -> int:
    sizes = Sizes(recipe.model, ALONE, BATCH, LENGTH, element=4)
    again = RECOMPUTATION[recipe.recompute.granularity]
    layers = [again(LAYERS[kind](sizes)) for kind in parse_pattern(recipe.model.pattern)]
    end = head(sizes)
    return sum(layer.kept + layer.states for layer in layers) + end.kept + end.logits


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("pattern", ["MMMM", "----", "****", "M-*-"])
def test_a_layer_keeps_what_the_plan_says(pattern: str, granularity: str, platform: Platform) -> None:
    recipe = recipe_with(granularity, pattern=pattern, **WIDE)
    with using("native"):
        found = kept_by(platform, recipe)
    # Not planned: label, loss and two sums of each token; decay rates of a few heads.
    unplanned = found - planned(recipe) - 20 * BATCH * LENGTH
    assert 0 <= unplanned <= 64 * len(pattern)


@pytest.mark.parametrize(("pattern", "less"), [("MMMM", RECOMPUTED), ("----", RECOMPUTED), ("****", ["full"])])
def test_recomputation_keeps_less(pattern: str, less: Sequence[str], platform: Platform) -> None:
    with using("native"):
        kept = {name: kept_by(platform, recipe_with(name, pattern=pattern, **WIDE)) for name in GRANULARITIES}
    for name in RECOMPUTED:
        if name in less:
            assert kept[name] < 0.8 * kept["none"]
        else:
            assert kept[name] == kept["none"]
