"""A model of ours and what transformers makes of its export."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from nano_pretrain.checkpoint.sharded import load_checkpoint
from nano_pretrain.platform import Platform
from nano_pretrain.recipe.schema import ParallelConfig, Recipe
from tests.convert.conversions import assert_equal, exported, imported, saved, tensors_of
from tests.model.building import build, logits
from tests.peers.shapes import SMALL, Shape, any_shape

if TYPE_CHECKING:
    from nano_pretrain.train.step import StepResult

SMALL_STEP = -8.0
"""dt_bias of every other head: softplus gives 0.0003, under the 0.001 at which transformers clamps by default."""
LOGITS = 1e-4
"""Largest difference of fp32 logits: sums of some hundred products in another order; 2e-6 was the largest."""


def trained(platform: Platform, recipe: Recipe, length: int) -> Any:
    """A model none of whose weights has its initial value, some with very short time steps."""
    model = build(platform, recipe, length)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
            if name.endswith("dt_bias"):
                parameter[::2] = SMALL_STEP
    return model


def peer_of(directory: Path) -> Any:
    """transformers' model of an export, in fp32."""
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not any(loading.values()), loading
    return model.eval()


def both(platform: Platform, shape: Shape, directory: Path) -> tuple[Any, Any]:
    """Our model and transformers', of its export."""
    recipe = shape.recipe()
    ours = trained(platform, recipe, shape.length)
    return ours, peer_of(exported(recipe, saved(ours, directory / "run"), directory / "hf"))


def difference(ours: Any, theirs: Any, tokens: Tensor, vocab_size: int) -> float:
    with torch.no_grad():
        found = theirs(tokens, use_cache=False).logits
    return float((logits(ours, tokens)[..., :vocab_size] - found).abs().max())


@pytest.mark.parametrize("pattern", SMALL)
def test_logits_are_transformers(platform: Platform, pattern: str, tmp_path: Path) -> None:
    shape = SMALL[pattern]
    ours, theirs = both(platform, shape, tmp_path)
    tokens = shape.batch().tokens
    for length in (shape.length, shape.length // 2 + 1):
        assert difference(ours, theirs, tokens[:, :length], shape.model.vocab_size) < LOGITS


@given(any_shape())
@settings(max_examples=6)
def test_logits_are_transformers_of_any_shape(one_rank: Platform, shape: Shape) -> None:
    with tempfile.TemporaryDirectory() as directory:
        ours, theirs = both(one_rank, shape, Path(directory))
        assert difference(ours, theirs, shape.batch().tokens, shape.model.vocab_size) < LOGITS


def test_clamp_that_transformers_has_by_default_would_be_seen(platform: Platform, tmp_path: Path) -> None:
    shape = SMALL["M-M*-M-"]
    ours, theirs = both(platform, shape, tmp_path)
    for layer in theirs.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.001, float("inf"))
    assert difference(ours, theirs, shape.batch().tokens, shape.model.vocab_size) > 10 * LOGITS


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_imported_weights_are_those_of_the_model(platform: Platform, precision: str, tmp_path: Path) -> None:
    """Also in a model that rounds them."""
    recipe = SMALL["M-M*-M-"].recipe(precision)
    ours = trained(platform, recipe, 64)
    there = imported(recipe, exported(recipe, saved(ours, tmp_path / "run"), tmp_path / "hf"), tmp_path / "imported")
    again = build(platform, recipe, 64)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.fill_(7.0)
    load_checkpoint(there, again, None)
    for (name, wanted), (_, found) in zip(ours.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(found, wanted), name


def trainable(platform: Platform, model: Any, recipe: Recipe) -> Any:
    """A trainer's model with a new, sharded optimizer."""
    from nano_pretrain.train.step import Trainable

    return Trainable(recipe, ParallelConfig(overlap=False), platform, model)


def steps(of: Any, shape: Shape, count: int, lr: float = 1e-2) -> list[StepResult]:
    size = (shape.length, shape.samples)
    return [of.step(iter([shape.batch(number)]), 1, size, lr=lr, stop=False) for number in range(count)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_main_weights_come_back_bit_for_bit(platform: Platform, precision: str, tmp_path: Path) -> None:
    """Exported in fp32, imported under a new optimizer, saved and exported again."""
    shape = SMALL["M-M*-M-"]
    recipe = shape.recipe(precision)
    first = trainable(platform, trained(platform, recipe, shape.length), recipe)
    steps(first, shape, 3)
    export = exported(recipe, saved(first.model, tmp_path / "run", first.optimizer), tmp_path / "hf")
    assert any((tensor != tensor.bfloat16()).any() for tensor in tensors_of(export).values())
    second = trainable(platform, build(platform, recipe, shape.length), recipe)
    load_checkpoint(imported(recipe, export, tmp_path / "imported"), second.model, second.optimizer)
    steps(second, shape, 1, lr=0.0)  # megatron-core saves no optimizer that has not stepped.
    again = exported(recipe, saved(second.model, tmp_path / "again", second.optimizer), tmp_path / "hf-again")
    assert_equal(tensors_of(again), tensors_of(export))


def test_step_of_imported_weights_is_the_step_of_the_original(platform: Platform, tmp_path: Path) -> None:
    """Each with a new optimizer, bit for bit in fp32."""
    shape = SMALL["M-M*-M-"]
    recipe = shape.recipe()
    first = trainable(platform, trained(platform, recipe, shape.length), recipe)
    export = exported(recipe, saved(first.model, tmp_path / "run"), tmp_path / "hf")
    second = trainable(platform, build(platform, recipe, shape.length), recipe)
    load_checkpoint(imported(recipe, export, tmp_path / "imported"), second.model, second.optimizer)
    assert steps(first, shape, 1) == steps(second, shape, 1)
    for (name, wanted), (_, found) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(found, wanted), name
