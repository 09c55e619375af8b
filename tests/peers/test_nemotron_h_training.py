"""Twenty steps of our trainer against transformers' model with torch's AdamW, and our BF16 against our FP32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from nano_pretrain.platform import Platform, current_platform
from nano_pretrain.recipe.schema import ParallelConfig
from nano_pretrain.train.step import StepResult, Trainable
from tests.model.building import build
from tests.model.recipes import ALONE
from tests.peers.pair import Pair
from tests.peers.shapes import REALISTIC, SMALL, Shape, small
from tests.peers.training import (
    STEPS,
    History,
    PeerTraining,
    disagreements,
    our_history,
    samples,
    take_steps,
    unmoved,
)


def assert_trained_alike(platform: Platform, shape: Shape, layout: ParallelConfig | None = None) -> None:
    """Losses, gradient norms and weights agree, every weight has moved, the vocabulary padding is exactly zero."""
    pair = Pair(platform, shape)
    ours = our_history(pair, platform, layout)
    assert disagreements(ours, PeerTraining(pair).run()) == {}
    assert unmoved(ours) == []
    assert pair.padding().count_nonzero() == 0


@pytest.mark.parametrize("name", SMALL)
def test_twenty_steps_are_equal(name: str, platform: Platform, implementation: str) -> None:
    assert_trained_alike(platform, SMALL[name])


def test_twenty_steps_without_the_distributed_optimizer_are_equal(platform: Platform, implementation: str) -> None:
    assert_trained_alike(platform, SMALL["*M-M"], ALONE)


@pytest.mark.full
@pytest.mark.parametrize("name", REALISTIC)
def test_twenty_steps_of_realistic_models_are_equal(name: str, platform: Platform, implementation: str) -> None:
    assert_trained_alike(platform, REALISTIC[name])


QUICK = small(40, pattern="M*-")
"""Its gradient norm is above the clipping threshold in the first half of the steps and below it in the second."""


@pytest.fixture(scope="module")
def ours(one_rank: Platform, implementation: str) -> History:
    current_platform()  # its warning filters: `platform` comes after the fixtures of the module
    return our_history(Pair(one_rank, QUICK), one_rank)


def in_group(number: int, **values: Any) -> Callable[[PeerTraining], None]:
    """Another value in one group of the peer's optimizer."""
    return lambda training: training.optimizer.param_groups[number].update(values)


def everywhere(**values: Any) -> Callable[[PeerTraining], None]:
    """Another value in every group of the peer's optimizer."""

    def change(training: PeerTraining) -> None:
        for group in training.optimizer.param_groups:
            group.update(values)

    return change


def perturb_a_log(training: PeerTraining) -> None:
    training.model.model.layers[0].mixer.A_log.data += 0.1


def do_not_clip(training: PeerTraining) -> None:
    training.clip_grad = float("inf")


def lag_behind(training: PeerTraining) -> None:
    training.rates = [0.0, *training.rates[:-1]]


MISTAKES = {
    "a decay that is off in one layer": perturb_a_log,
    "matrices without weight decay": in_group(0, weight_decay=0.0),
    "vectors with weight decay": in_group(1, weight_decay=0.1),
    "weight decay in the gradient": everywhere(decoupled_weight_decay=False),
    "beta1": everywhere(betas=(0.91, 0.95)),
    "beta2": everywhere(betas=(0.9, 0.96)),
    "eps": everywhere(eps=1e-6),
    "no clipping": do_not_clip,
    "the learning rate of the step before": lag_behind,
}


def test_without_a_mistake_the_quick_shape_agrees(ours: History, platform: Platform) -> None:
    assert disagreements(ours, PeerTraining(Pair(platform, QUICK)).run()) == {}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str, ours: History, platform: Platform) -> None:
    training = PeerTraining(Pair(platform, QUICK))
    MISTAKES[mistake](training)
    seen = {kind for kind, _ in disagreements(ours, training.run())}
    assert seen >= {"gradient norm", "weight", "movement"}


BF16_ROUNDING = 2**-9
"""Largest relative error of a number that is rounded to BF16."""
BF16_SHARE = 4 * BF16_ROUNDING
"""Of what is learned: weights, activations and their gradients are rounded, so that each gradient is off by a few
roundings, and the loss by this share of its way ahead or behind. Up to 1.3 roundings were seen.
"""
SLOW = [replace(SMALL[name], peak=3e-3) for name in ("*M-M", "M*-")]


class RoundedWeights(Trainable):
    """The mistake that FP32 main weights are for: updates below half a BF16 place are lost."""

    def step(self, *args: Any, **kwargs: Any) -> StepResult:
        result = super().step(*args, **kwargs)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.copy_(parameter.data.bfloat16())
        return result


def repeated_losses(
    platform: Platform, shape: Shape, precision: str, trainer: type[Trainable] = Trainable
) -> torch.Tensor:
    """Losses of steps that all have the same samples, so that the loss falls by nats."""
    recipe = shape.recipe(precision)
    trainable = trainer(recipe, recipe.parallel, platform, build(platform, recipe, shape.length))
    return torch.tensor([result.loss for result in take_steps(trainable, shape, [samples(shape, 0)] * STEPS)])


@pytest.mark.parametrize("shape", SLOW, ids=lambda shape: shape.model.pattern)
def test_bf16_learns_as_fp32_does(shape: Shape, platform: Platform, implementation: str) -> None:
    fp32 = repeated_losses(platform, shape, "fp32")
    bf16 = repeated_losses(platform, shape, "bf16")
    rounded = repeated_losses(platform, shape, "bf16", RoundedWeights)
    learned = float(fp32[0] - fp32[-1])
    assert learned > 1
    assert (bf16 - fp32).abs().max() < BF16_SHARE * learned
    assert (rounded - fp32).abs().max() > BF16_SHARE * learned
