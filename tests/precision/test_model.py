"""FP8 in a model: each linear computes the products of precision.linear or stays BF16, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nano_pretrain.plan.memory import stage_memory
from nano_pretrain.platform import Platform
from nano_pretrain.precision import linear
from nano_pretrain.precision.losses import OPERANDS, QuantisationLosses, not_finite
from nano_pretrain.precision.placement import FP8_RECIPES
from nano_pretrain.precision.quantize import Statistics
from nano_pretrain.recipe.schema import ParallelConfig, PrecisionConfig, Recipe, RecomputeConfig
from tests.distributed.fp8_ranks import Used, record
from tests.distributed.ranks import run_ranks
from tests.kernels.implementations import using
from tests.model.building import batch, build, losses
from tests.model.recipes import small_recipe
from tests.model.test_recompute import gradients, kept_by
from tests.plan import measured
from tests.plan.measured import Size, recipe_of
from tests.plan.test_memory import TOLERANCE

PATTERN = "M*-M*"
LINEARS = [
    "layers.0.mixer.in_proj", "layers.0.mixer.out_proj", "layers.1.self_attention.linear_qkv",
    "layers.1.self_attention.linear_proj", "layers.2.mlp.linear_fc1", "layers.2.mlp.linear_fc2",
    "layers.3.mixer.in_proj", "layers.3.mixer.out_proj", "layers.4.self_attention.linear_qkv",
    "layers.4.self_attention.linear_proj",
]  # fmt: skip
"""In the order in which a token passes them."""


def fp8_recipe(name: str = "fp8_blockwise", first: int = 2, last: int = 4, **model: Any) -> Recipe:
    """Of ten linears all but the first two and the last four are quantised."""
    precision = PrecisionConfig(name, bf16_first_linears=first, bf16_last_linears=last)
    return replace(small_recipe(**{"pattern": PATTERN, **model}), precision=precision)


@pytest.mark.parametrize("name", FP8_RECIPES)
def test_each_linear_computes_its_three_products(name: str, platform: Platform) -> None:
    recipe = fp8_recipe(name)
    model = build(platform, recipe)
    uses = {linear: record(model.decoder.get_submodule(linear)) for linear in LINEARS}
    losses(model, batch(recipe)).sum().backward()
    for number, module in enumerate(LINEARS):
        found, how = uses[module](), FP8_RECIPES[name] if 2 <= number < 6 else None
        assert found.y.dtype == found.dx.dtype == found.dweight.dtype == torch.bfloat16
        for product, expected in products(found, how).items():
            assert torch.equal(getattr(found, product), expected), (module, product)


def products(used: Used, how: linear.Fp8Recipe | None) -> dict[str, Tensor]:
    if how is None:
        return {
            "y": F.linear(used.x, used.weight),
            "dx": used.dy.matmul(used.weight),
            "dweight": used.dy.T.matmul(used.x),
        }
    return {
        "y": linear.forward_product(used.x, used.weight, how),
        "dx": linear.data_gradient(used.dy, used.weight, how),
        "dweight": linear.weight_gradient(used.dy, used.x, how, torch.bfloat16),
    }


@pytest.mark.parametrize("kernels", ["plain", "native"])
@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputation_changes_no_bit(granularity: str, kernels: str, platform: Platform) -> None:
    recipe = fp8_recipe()
    again = replace(recipe, recompute=RecomputeConfig(granularity=granularity))
    with using(kernels):
        (wanted, expected), (found, actual) = (gradients(platform, each, in_flight=2) for each in (recipe, again))
    assert torch.equal(found, wanted)
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def test_as_much_is_kept_as_in_bf16(platform: Platform) -> None:
    recipe = fp8_recipe(first=0, last=0)
    bf16 = replace(recipe, precision=PrecisionConfig("bf16"))
    with using("native"):
        assert kept_by(platform, recipe) == kept_by(platform, bf16)


def counting(model: Any) -> QuantisationLosses:
    found: QuantisationLosses = model.quantisation_losses
    found.counting = True
    return found


@pytest.mark.parametrize("granularity", ["none", "full"])
def test_losses_are_those_of_all_that_is_quantised(granularity: str, platform: Platform) -> None:
    recipe = replace(fp8_recipe("fp8_current_scaling"), recompute=RecomputeConfig(granularity=granularity))
    model = build(platform, recipe)
    linears = {name: model.decoder.get_submodule(name) for name in LINEARS[2:6]}
    found, how = counting(model), FP8_RECIPES["fp8_current_scaling"]
    expected: dict[tuple[str, str], Statistics] = {}
    for seed in (0, 1):
        uses = {name: record(module) for name, module in linears.items()}
        model.zero_grad()
        losses(model, batch(recipe, seed=seed)).sum().backward()
        for name, use in uses.items():
            for operand, statistics in zip(OPERANDS, _statistics(use(), how), strict=True):
                expected[name, operand] = expected.get((name, operand), Statistics(*[0.0] * 7)) + statistics
    taken = found.take()
    assert {(name, operand): each for name, of in taken.items() for operand, each in of.items()} == expected
    assert found.take()["layers.2.mlp.linear_fc1"]["weight"].elements == 0, "taken once"


@pytest.mark.parametrize("name", FP8_RECIPES)
@pytest.mark.parametrize("kernels", ["plain", "native"])
def test_the_first_named_is_where_a_gradient_became_nan(kernels: str, name: str, platform: Platform) -> None:
    recipe = fp8_recipe(name)
    model = build(platform, recipe)
    found = counting(model)

    def spoil(module: Any, inputs: Any, output: Any) -> None:
        output[0].register_hook(lambda gradient: gradient.index_fill(2, torch.tensor([3]), torch.nan))

    model.decoder.get_submodule(LINEARS[3]).register_forward_hook(spoil)
    with using(kernels):
        losses(model, batch(recipe)).sum().backward()
    # A linear's own quantised products carry it on to those before it, and to none after it.
    assert not_finite(found.take()) == [f"gradient of {linear}" for linear in (LINEARS[3], LINEARS[2])]


def _statistics(used: Used, how: linear.Fp8Recipe) -> Iterator[Statistics]:
    yield how.input.statistics(used.x) + how.input_by_tokens.statistics(used.x)
    yield how.weight.statistics(used.weight)
    yield how.gradient.statistics(used.dy) + how.gradient_by_tokens.statistics(used.dy)


def test_nothing_is_counted_in_an_evaluation_or_unasked(platform: Platform) -> None:
    recipe = fp8_recipe()
    model = build(platform, recipe)
    losses(model, batch(recipe)).sum().backward()
    found = counting(model)
    with torch.no_grad():
        losses(model.eval(), batch(recipe))
    assert all(each.elements == 0 for of_linear in found.take().values() for each in of_linear.values())


def test_other_precisions_have_no_fp8_linears(platform: Platform) -> None:
    assert build(platform, small_recipe("bf16")).quantisation_losses is None


@pytest.mark.full
@pytest.mark.parametrize("granularity", ["none", "full"])
def test_the_peak_of_a_step_is_that_of_the_plan(granularity: str) -> None:
    """Which counts BF16; feed-forward layers have the largest operands beside what they keep."""
    layout = ParallelConfig()
    size = Size("--------", width=256, batch=2, length=1024, vocabulary=512, precision="fp8_blockwise")
    recipe = recipe_of(size, granularity, layout, ranks=1)
    (found,) = run_ranks(measured.peaks, 1, {"": recipe}, layout)
    (plan,) = stage_memory(recipe, "pretrain", "cpu")
    assert plan.total == pytest.approx(found[""].peak, rel=TOLERANCE)
