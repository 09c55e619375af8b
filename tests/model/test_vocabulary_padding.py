"""Padded vocabulary entries have no probability, no gradient and no weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nano_pretrain.platform import Platform
from nano_pretrain.recipe.schema import ParallelConfig
from tests.model.building import batch, build, logits, losses, parameters
from tests.model.recipes import small_recipe

TABLES = ("word_embeddings.weight", "output_layer.weight")


@pytest.fixture
def model(platform: Platform) -> Any:
    return build(platform, small_recipe(vocab_size=600))


def test_the_loss_is_the_cross_entropy_of_the_true_vocabulary(model: Any) -> None:
    micro_batch = batch(small_recipe(vocab_size=600))
    found = logits(model, micro_batch.tokens, micro_batch.documents)
    assert found.shape[-1] == 1024
    expected = F.cross_entropy(found[..., :600].flatten(0, 1), micro_batch.labels.flatten(), reduction="none")
    # fp32 rounding of a loss of about 6.
    torch.testing.assert_close(losses(model, micro_batch).flatten(), expected, rtol=0, atol=3e-6)


def test_the_loss_of_gpus_is_the_same(model: Any) -> None:
    # There megatron-core computes it, over masked logits.
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(48, 2, 1024, generator=generator)
    labels = torch.randint(600, (2, 48), generator=generator)
    results = []
    for loss in (model.compute_language_model_loss, model.masked_loss):
        found = values.clone().requires_grad_()
        losses = loss(labels, found * 1)
        results.append((losses, *torch.autograd.grad(losses.square().sum(), found)))
    # fp32 rounding of a loss of about 7, and of its gradient.
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=3e-6)


def test_padding_has_no_probability_whatever_its_weights(model: Any) -> None:
    micro_batch = batch(small_recipe(vocab_size=600))
    before = losses(model, micro_batch)
    with torch.no_grad():
        for table in parameters(model, TABLES).values():
            table[600:] = 100.0
    assert torch.equal(losses(model, micro_batch), before)


def test_padding_has_no_gradient(model: Any) -> None:
    losses(model, batch(small_recipe(vocab_size=600))).sum().backward()
    for name, value in model.named_parameters():
        if name.endswith(TABLES):
            assert value.grad[:600].any()
            assert not value.grad[600:].any()


def test_padding_stays_zero_in_training(platform: Platform, model: Any) -> None:
    from nano_pretrain.train.step import Trainable

    recipe = small_recipe(vocab_size=600)
    trainable = Trainable(recipe, ParallelConfig(), platform, model)
    for _ in range(3):
        trainable.step(iter([batch(recipe)]), 1, (48, 2), lr=1e-2, stop=False)
    for table in parameters(model, TABLES).values():
        assert not table[600:].any()
