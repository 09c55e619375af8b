"""Any pattern builds, has the parameters the plan counts, and trains."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nano_pretrain.plan.params import count_parameters
from nano_pretrain.platform import Platform
from nano_pretrain.recipe.derived import padded_vocab_size
from nano_pretrain.recipe.schema import ParallelConfig
from tests.model.building import batch, build, losses, parameters
from tests.model.recipes import small_recipe

# The process groups of the module are shared by all examples.
shared_groups = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])

MODULES = {"M": "DocumentMambaLayer", "-": "PlacedMLPLayer", "*": "PlacedTransformerLayer"}


@shared_groups
@example("M-M*-M-", "bf16")
@given(st.text("M-*", min_size=1, max_size=5), st.sampled_from(["fp32", "bf16"]))
def test_any_pattern_trains(platform: Platform, pattern: str, precision: str) -> None:
    from nano_pretrain.train.step import Trainable

    recipe = small_recipe(precision, pattern=pattern)
    model = build(platform, recipe)
    assert [type(layer).__name__ for layer in model.decoder.layers] == [MODULES[letter] for letter in pattern]
    trainable = Trainable(recipe, ParallelConfig(), platform, model)
    micro_batch = batch(recipe)
    results = [trainable.step(iter([micro_batch]), 1, (48, 2), lr=1e-2, stop=False) for _ in range(5)]
    assert all(math.isfinite(result.grad_norm) for result in results)
    assert results[0].loss == pytest.approx(math.log(recipe.model.vocab_size), rel=0.1)
    assert results[-1].loss < results[0].loss
    silent = [name for name, p in model.named_parameters() if not p.main_grad.any()]
    assert not silent


@shared_groups
@given(
    st.text("M-*", min_size=1, max_size=4),
    st.integers(1, 3).map(lambda n: 4 * n),
    st.integers(1, 9),
    st.integers(512, 1100),
)
def test_the_plan_counts_the_parameters(platform: Platform, pattern: str, hidden: int, dim: int, vocab: int) -> None:
    widths: dict[str, Any] = {"hidden_size": hidden, "head_dim": 2 * dim, "mamba_head_dim": dim}
    recipe = small_recipe(pattern=pattern, vocab_size=vocab, mamba_num_heads=6, mamba_conv_width=1 + dim % 4, **widths)
    model = build(platform, recipe)
    padding = 2 * (padded_vocab_size(recipe.model) - vocab) * hidden
    assert sum(p.numel() for p in model.parameters()) - padding == count_parameters(recipe.model).total


def test_what_decides_on_the_decay_stays_fp32_in_a_bf16_model(platform: Platform) -> None:
    recipe = small_recipe("bf16")
    model = build(platform, recipe)
    kept = parameters(model, (".A_log", ".D", ".dt_bias"))
    assert len(kept) == 3 * recipe.model.pattern.count("M")
    for name, value in model.named_parameters():
        assert value.dtype == (torch.float32 if name in kept else torch.bfloat16), name
    assert losses(model, batch(recipe)).dtype == torch.float32


def test_every_norm_has_the_recipes_epsilon(platform: Platform) -> None:
    model = build(platform, small_recipe(norm_epsilon=3e-3))
    found = {name: module.eps for name, module in model.named_modules() if hasattr(module, "eps")}
    assert set(found.values()) == {3e-3}
    assert len(found) == 4 + 2 + 1, "one before each layer, one in each Mamba layer, the last"


def test_the_convolution_has_the_recipes_width(platform: Platform) -> None:
    model = build(platform, small_recipe(pattern="M", mamba_conv_width=3))
    assert parameters(model, ("conv1d.weight",)).popitem()[1].shape[-1] == 3


def test_a_bf16_model_is_the_fp32_one_rounded(platform: Platform) -> None:
    recipe = small_recipe()
    exact = losses(build(platform, recipe), batch(recipe))
    rounded = losses(build(platform, small_recipe("bf16")), batch(recipe))
    # Logits of size about 1, rounded to 8 bits after a dozen roundings of the residual stream: 12^(1/2) 2^-8 = 1.4e-2.
    assert (exact - rounded).square().mean().sqrt() < 1.4e-2
