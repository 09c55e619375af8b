"""Initial weights: distributions, reproducibility, independence of each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nano_pretrain.platform import Platform
from tests.model.building import build, parameter, parameters
from tests.model.recipes import small_recipe

STD, PATTERN = 0.05, "M*-M"
NORMAL = {
    "word_embeddings.weight": STD,
    "output_layer.weight": STD,
    "in_proj.weight": STD,
    "linear_qkv.weight": STD,
    "linear_fc1.weight": STD,
    # Added to the residual stream: divided by the root of the number of layers.
    "out_proj.weight": STD / 2,
    "linear_proj.weight": STD / 2,
    "linear_fc2.weight": STD / 2,
}


def wide(platform: Platform, seed: int = 1) -> Any:
    """Wide enough for statistics."""
    shape: dict[str, Any] = {
        "hidden_size": 96,
        "ffn_hidden_size": 160,
        "mamba_num_heads": 128,
        "mamba_head_dim": 4,
        "head_dim": 32,
    }
    return build(platform, small_recipe(seed=seed, pattern=PATTERN, init_std=STD, vocab_size=1000, **shape))


def assert_sampled(values: Tensor, mean: float, std: float) -> None:
    """Mean and standard deviation are within five standard errors; 1.4 std / sqrt(n) bounds that of std."""
    error = 5 * std / math.sqrt(values.numel())
    assert float(values.mean()) == pytest.approx(mean, abs=error)
    assert float(values.std()) == pytest.approx(std, abs=1.4 * error)


@pytest.mark.parametrize("ending", NORMAL)
def test_linears_and_embeddings_are_normal(platform: Platform, ending: str) -> None:
    values = parameter(wide(platform), ending)[:1000].double()
    assert_sampled(values, 0.0, NORMAL[ending])
    within = float((values.abs() < NORMAL[ending]).double().mean())
    assert within == pytest.approx(0.6827, abs=5 * 0.47 / math.sqrt(values.numel())), "a normal distribution"


def test_mamba_parameters(platform: Platform) -> None:
    model = wide(platform)
    a = parameter(model, ".A_log").double().exp()
    assert a.min() >= 1
    assert a.max() <= 16
    assert_sampled(a, 8.5, 15 / math.sqrt(12))
    assert parameter(model, ".D").eq(1).all()
    step = torch.nn.functional.softplus(parameter(model, ".dt_bias").double())
    assert step.min() >= 1e-3 * (1 - 1e-4)
    assert step.max() <= 1e-1 * (1 + 1e-4)
    assert_sampled(step.log(), math.log(1e-2), math.log(100) / math.sqrt(12))


@pytest.mark.parametrize("ending", ["conv1d.weight", "conv1d.bias"])
def test_convolutions_are_uniform(platform: Platform, ending: str) -> None:
    values = parameter(wide(platform), ending).double()
    assert values.abs().max() <= 0.5
    assert_sampled(values, 0.0, 0.5 / math.sqrt(3))


def test_norms_are_one_and_padding_is_zero(platform: Platform) -> None:
    model = wide(platform)
    norms = parameters(model, ("norm.weight",))
    assert len(norms) == len(PATTERN) + PATTERN.count("M") + 1
    assert all(norm.eq(1).all() for norm in norms.values())
    for ending in ("word_embeddings.weight", "output_layer.weight"):
        table = parameter(model, ending)
        assert table.shape[0] == 1024
        assert not table[1000:].any()
        assert table[:1000].any(1).all()


def test_weights_follow_from_the_seed(platform: Platform) -> None:
    first, again, other = (dict(wide(platform, seed).named_parameters()) for seed in (1, 1, 2))
    constant = ("norm.weight", ".D")
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, other[name]) == name.endswith(constant), name


def test_no_two_tensors_are_alike(platform: Platform) -> None:
    drawn = [p.flatten()[:4] for name, p in wide(platform).named_parameters() if p.dim() > 1]
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn)


def test_building_leaves_the_cpu_generator_alone(platform: Platform) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    wide(platform)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_parameter_without_a_rule_is_an_error(platform: Platform) -> None:
    from nano_pretrain.model.initialisation import initialise_weights

    recipe = small_recipe(pattern="-")
    for module, message in (
        ("final_norm", "no initialisation rule .*final_norm.extra"),
        ("layers.0.mlp", "2 elements"),
    ):
        model = build(platform, recipe)
        model.decoder.get_submodule(module).register_parameter("extra", torch.nn.Parameter(torch.ones(2)))
        with pytest.raises(KeyError, match=message):
            initialise_weights(model, recipe.model, seed=1)


def test_norms_have_the_names_that_they_have_when_fused_into_linears(platform: Platform) -> None:
    """Transformer Engine fuses a norm into the linear that follows; checkpoints are the same on all platforms."""
    keys = build(platform, small_recipe(pattern="M-*")).sharded_state_dict()
    names = {value.key for value in keys.values() if hasattr(value, "key")}
    assert {
        "decoder.layers.0.mixer.in_proj.layer_norm_weight",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.0.mixer.norm.weight",
    } <= names
    assert not [name for name in names if name.endswith(("pre_mlp_layernorm.weight", "input_layernorm.weight"))]
