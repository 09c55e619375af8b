"""Checkpoints have the same names on CPU and CUDA: shown with modules that have Transformer Engine's parameters.

That Transformer Engine's own are called so is for test_cuda_signatures.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nano_pretrain.checkpoint.sharded import load_checkpoint, sharded_state
from nano_pretrain.platform import Platform
from nano_pretrain.platform.cuda import CudaPlatform, without_extra_state
from nano_pretrain.recipe.schema import ParallelConfig, Recipe
from tests.distributed.training import save_state
from tests.model.building import batch, build, losses
from tests.model.recipes import small_recipe

Build = Callable[[Recipe], Any]


@pytest.fixture
def separate(platform: Platform) -> Build:
    """Builds the model of a CPU, whose norms are modules."""
    return partial(build, platform)


@pytest.fixture
def fused(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Builds it from modules as Transformer Engine's, the final norm treated as on CUDA."""
    from megatron.core.ssm import mamba_block

    from tests.platform.fused_norm import FusedPlatform, NormWithState

    def built(recipe: Recipe) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(mamba_block, "TENorm", without_extra_state(NormWithState))
            return build(FusedPlatform(), recipe)

    return built


def places(model: Any) -> dict[str, tuple[Any, ...]]:
    """Key in the checkpoint -> global shape, this rank's place in it, and which copy it is."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    return {value.key: (value.global_shape, value.global_offset, value.replica_id) for value in nested_values(state)}


def test_both_divisions_into_modules_have_the_same_checkpoint(separate: Build, fused: Build) -> None:
    recipe = small_recipe()
    names = [{name for name, _ in make(recipe).named_parameters()} for make in (separate, fused)]
    assert {"decoder.layers.0.mixer.in_proj.layer_norm_weight"} <= names[1] - names[0]
    expected = places(separate(recipe))
    assert "decoder.layers.0.mixer.in_proj.layer_norm_weight" in expected
    assert places(fused(recipe)) == expected


@pytest.mark.parametrize("fused_first", [False, True])
def test_each_reads_what_the_other_wrote(fused_first: bool, separate: Build, fused: Build, tmp_path: Path) -> None:
    recipe = small_recipe()
    writer, reader = (make(recipe) for make in ((fused, separate) if fused_first else (separate, fused)))
    with torch.no_grad():
        for parameter in writer.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    micro_batch = batch(recipe)
    expected = losses(writer, micro_batch)
    assert not torch.allclose(losses(reader, micro_batch), expected)
    save_state(sharded_state(writer, None, loading=False), tmp_path)
    load_checkpoint(tmp_path, reader, None)
    # The same kernels on the same numbers.
    assert torch.equal(losses(reader, micro_batch), expected)


def test_initial_weights_are_the_same(separate: Build, fused: Build) -> None:
    micro_batch = batch(small_recipe())
    assert torch.equal(losses(fused(small_recipe()), micro_batch), losses(separate(small_recipe()), micro_batch))


def test_fields_of_megatron_cores_configuration_exist(platform: Platform) -> None:
    from megatron.core.transformer import TransformerConfig

    given = CudaPlatform().prepare_model(small_recipe(), ParallelConfig())
    assert set(given) <= {field.name for field in fields(TransformerConfig)}
