"""What Transformer Engine is told of FP8, checked without it: names, layers, and calls, against published sources."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nano_pretrain.platform import Platform
from nano_pretrain.platform.cuda_limits import check_bf16_layers
from nano_pretrain.precision.placement import engine_fields, fp8_linears
from nano_pretrain.precision.primary import in_high_precision
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import ParallelConfig, PrecisionConfig
from tests.model.building import batch, build, losses
from tests.model.recipes import small_recipe
from tests.platform.published import release, versions
from tests.platform.sources import megatron_source, parameters

PATTERN = "M-M*-M-M*-"


@pytest.mark.parametrize(
    ("name", "formats"), [("fp8_blockwise", ("e4m3", "blockwise")), ("fp8_current_scaling", ("hybrid", "tensorwise"))]
)
def test_fields_of_megatron_cores_configurations(
    name: str, formats: tuple[str, str], platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.distributed import DistributedDataParallelConfig

    from nano_pretrain.model.config import transformer_config
    from nano_pretrain.train import step

    monkeypatch.setattr(platform, "name", "cuda")
    recipe = replace(small_recipe(pattern=PATTERN), precision=PrecisionConfig(name, 4, 2))
    config = transformer_config(recipe, ParallelConfig(), platform)
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == (*formats, True)
    ends = config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16
    assert (config.first_last_layers_bf16, *ends) == (True, 2, 1)
    assert step._optimizer_config(recipe, ParallelConfig(), config).fp8_recipe == formats[1]
    assert "fp8_param_gather" in {field.name for field in fields(DistributedDataParallelConfig)}


def test_bf16_and_a_cpu_know_nothing_of_it(platform: Platform) -> None:
    from nano_pretrain.model.config import transformer_config
    from nano_pretrain.train import step

    for name in ("bf16", "fp8_blockwise"):
        config = transformer_config(small_recipe(name), ParallelConfig(), platform)
        assert (config.fp8, config.fp8_param, config.first_last_layers_bf16) == (None, False, False)
        assert step._optimizer_config(small_recipe(name), ParallelConfig(), config).fp8_recipe is None


@pytest.mark.parametrize(("first", "last"), [(0, 0), (4, 4), (2, 6), (0, 20), (8, 0)])
def test_megatron_core_keeps_the_same_linears_in_bf16(first: int, last: int, platform: Platform) -> None:
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    precision = PrecisionConfig("fp8_blockwise", first, last)
    told = SimpleNamespace(num_layers=len(PATTERN), **engine_fields(precision, platform="cuda"))
    ours = [linear.layer for linear in fp8_linears(PATTERN, precision)]
    theirs = [layer for layer in range(len(PATTERN)) if not is_first_last_bf16_layer(told, layer)]
    assert ours == [layer for layer in theirs for _ in range(2)]


@pytest.mark.parametrize("name", ["bf16_first_linears", "bf16_last_linears"])
def test_megatron_core_takes_as_many_bf16_layers_as_the_rule(
    name: str, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nano_pretrain.model.config import transformer_config

    monkeypatch.setattr(platform, "name", "cuda")
    layout, most = ParallelConfig(pipeline=4), 2 * (len(PATTERN) // 4)
    for linears in (most, most + 2):
        precision = PrecisionConfig("fp8_blockwise", **{name: linears})
        recipe = replace(small_recipe(pattern=PATTERN), precision=precision, parallel=layout)
        if linears == most:
            check_bf16_layers(recipe, "pretrain")
            transformer_config(recipe, layout, platform)
            continue
        with pytest.raises(RecipeError, match=rf"^precision\.{name}: 6 linears are 3 layers"):
            check_bf16_layers(recipe, "pretrain")
        with pytest.raises(ValueError, match="in_bf16"):
            transformer_config(recipe, layout, platform)


class HeldInFp8(nn.Parameter):
    """As a weight of Transformer Engine's: quantised, beside what it was made of."""

    first: torch.Tensor

    def get_high_precision_init_val(self) -> torch.Tensor:
        return self.first


def held(weight: torch.Tensor) -> HeldInFp8:
    parameter = HeldInFp8(weight.detach().clone())
    parameter.first = torch.full_like(weight, 7)
    return parameter


def test_weights_in_fp8_get_the_initial_weights(platform: Platform) -> None:
    from nano_pretrain.model.initialisation import initialise_weights

    recipe = small_recipe("bf16")
    expected, model = build(platform, recipe), build(platform, recipe)
    projection = model.decoder.get_submodule("layers.0.mixer.in_proj")
    projection.weight = parameter = held(projection.weight)
    with torch.no_grad():
        parameter.zero_()
    with in_high_precision(model):
        initialise_weights(model, recipe.model, recipe.run.seed)
    right = expected.decoder.get_submodule("layers.0.mixer.in_proj").weight
    assert projection.weight is parameter
    assert torch.equal(parameter.detach(), right)
    # What the optimizer's FP32 weights begin with.
    assert torch.equal(parameter.first, right)


def test_weights_in_fp8_come_back_after_an_error() -> None:
    model = nn.Linear(4, 2, bias=False)
    parameter = held(model.weight)
    before, model.weight = parameter.detach().clone(), parameter

    def interrupted() -> None:
        with in_high_precision(model):
            nn.init.zeros_(model.weight)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.weight is parameter
    assert torch.equal(parameter, before)


def checkpoints(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments of Transformer Engine's checkpoint, in the place of which there is megatron-core's."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.tensor_parallel import checkpoint

    given: list[tuple[Any, ...]] = []

    def recorded(function: Any, distribute: bool, tracker: Any, group: Any, *tensors: Any) -> Any:
        given.append((distribute, tracker, group))
        return checkpoint(function, distribute, *tensors)

    monkeypatch.setattr(transformer_engine, "te_checkpoint", recorded)
    return given


def test_whole_layers_are_recomputed_by_transformer_engine(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from nano_pretrain.model.recompute import recompute

    given, recipe = checkpoints(monkeypatch), small_recipe("bf16")
    model, expected = build(platform, recipe), losses(build(platform, recipe), batch(recipe))
    # As on CUDA, where the layers and the model share their configuration.
    model.config.fp8 = "e4m3"
    recompute(model, "full")
    found = losses(model, batch(recipe))
    found.sum().backward()
    assert torch.equal(found, expected)
    assert given == [(False, get_cuda_rng_tracker, model.pg_collection.tp)] * len(recipe.model.pattern)
    taken = parameters(megatron_source("megatron.core.extensions.transformer_engine"), "te_checkpoint").names
    assert taken[:4] == ("forward_func", "distribute_saved_activations", "get_rng_state_tracker", "tp_group")


def test_linears_behind_recomputed_parts_keep_their_input(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.extensions import transformer_engine

    from nano_pretrain.model.recompute import recompute

    kept: list[Any] = []
    monkeypatch.setattr(transformer_engine, "set_save_original_input", kept.append)
    model = build(platform, small_recipe("bf16"))
    model.config.fp8 = "e4m3"
    recompute(model, "selective")
    names = ["layers.0.mixer.out_proj", "layers.2.mlp.linear_fc2", "layers.3.mixer.out_proj"]
    assert {id(module) for module in kept} == {id(model.decoder.get_submodule(name)) for name in names}


@pytest.mark.parametrize("version", [versions("transformer-engine")[-1]])
def test_transformer_engine_has_what_this_relies_on(version: str) -> None:
    engine = release("transformer-engine", version)
    base = engine.text("transformer_engine/pytorch/module/base.py")
    assert "_high_precision_init_val = high_precision_init_val" in base
    assert "param.detach().cpu()" in base
    assert "self.save_original_input" in engine.text("transformer_engine/pytorch/module/linear.py")
    recipes = engine.text("transformer_engine/common/recipe/__init__.py")
    assert all(f"class {name}(" in recipes for name in ("Float8BlockScaling", "Float8CurrentScaling"))
