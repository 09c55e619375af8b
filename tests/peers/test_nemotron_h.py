"""The hybrid against the independent implementation in Hugging Face transformers, from the same weights in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nano_pretrain.platform import Platform
from nano_pretrain.recipe.schema import ModelConfig
from tests.model.building import batch, build, logits, losses
from tests.model.recipes import small_recipe
from tests.peers.nemotron_h import peer, peer_tensors

LENGTH = 150
"""Two and a third chunks of the scan, more than one of transformers'."""
ROUNDING = 1e-4
"""fp32 through up to seven layers of two implementations; logits are of size 1, and 1e-5 was the largest seen."""

SHAPES: dict[str, dict[str, Any]] = {
    # In small what nano_12b_v2 is: head dimension 80/16, d_inner 20 next to a hidden size of 24, 2 heads a group.
    "M-M*-M-": {},
    # Odd sizes: d_inner 21 and 36 query channels beside 28 hidden ones, 3 heads a group, one key/value head for 4.
    "*M-M": {
        "hidden_size": 28,
        "ffn_hidden_size": 33,
        "num_attention_heads": 4,
        "num_query_groups": 1,
        "head_dim": 9,
        "mamba_num_heads": 3,
        "mamba_head_dim": 7,
        "mamba_num_groups": 1,
        "mamba_conv_width": 3,
        "vocab_size": 700,
        "norm_epsilon": 1e-3,
    },
}


class Pair:
    """Our model and its peer with the same weights, every one of them random: ones and zeros would hide mistakes."""

    def __init__(self, platform: Platform, pattern: str) -> None:
        self.recipe = small_recipe(pattern=pattern, **SHAPES[pattern])
        self.model = build(platform, self.recipe)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        self.peer = peer(self.config).eval()
        self.peer.load_state_dict(peer_tensors(self.named(lambda p: p.detach()), self.config), strict=True)
        self.batch = batch(self.recipe, 2, LENGTH, eod_id=None)

    @property
    def config(self) -> ModelConfig:
        return self.recipe.model

    def named(self, of: Any) -> dict[str, Tensor]:
        return {name: of(parameter) for name, parameter in self.model.named_parameters()}


@pytest.fixture(params=SHAPES)
def pair(request: pytest.FixtureRequest, platform: Platform) -> Pair:
    return Pair(platform, request.param)


def test_logits_are_equal(pair: Pair) -> None:
    ours = logits(pair.model, pair.batch.tokens)[..., : pair.config.vocab_size]
    with torch.no_grad():
        theirs = pair.peer(pair.batch.tokens, use_cache=False).logits
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < ROUNDING


def test_loss_and_every_gradient_are_equal(pair: Pair) -> None:
    ours = losses(pair.model, pair.batch).mean()
    ours.backward()
    labels = pair.batch.labels
    logits = pair.peer(pair.batch.tokens, use_cache=False).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    found = peer_tensors(pair.named(lambda p: p.grad), pair.config)
    for name, parameter in pair.peer.named_parameters():
        error = (found[name] - parameter.grad).norm() / parameter.grad.norm()
        # fp32 rounding; A_log's gradient is the sum of many that cancel.
        assert error < 1e-4, name


def test_a_clamped_step_size_would_be_seen(pair: Pair) -> None:
    before = pair.peer(pair.batch.tokens, use_cache=False).logits
    for layer, letter in zip(pair.peer.model.layers, pair.config.pattern, strict=True):
        if letter == "M":
            layer.mixer.time_step_limit = (0.1, float("inf"))
    after = pair.peer(pair.batch.tokens, use_cache=False).logits
    assert (before - after).abs().max() > 10 * ROUNDING
