"""Twenty steps of our trainer and of the peer with torch's AdamW on the same samples, and how far they are apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nano_pretrain.data.loader import MicroBatch
from nano_pretrain.platform import Platform
from nano_pretrain.recipe.schema import ParallelConfig, Recipe, ScheduleConfig
from nano_pretrain.schedule.learning_rate import learning_rate
from nano_pretrain.train.step import StepResult, Trainable
from tests.kernels.compare import relative_error
from tests.peers.pair import Pair, mean_loss
from tests.peers.shapes import Shape

STEPS, MICRO_BATCHES = 20, 2
LIMITS = {
    # Mean over some hundred tokens or more in fp32, of size 10; 2e-6 was the largest.
    "loss": 1e-4,
    # Before clipping; 4e-5 was the largest.
    "gradient norm": 1e-3,
    # 1e-4 was the largest, of the embedding: see movement.
    "weight": 1e-3,
    # Stricter than "weight": twenty steps move vectors by a few thousandths of their norm. Adam divides a gradient by
    # its size, so the one element in a million whose gradient is only rounding may go the other way, which shows as
    # 1e-3 in the norm; 5e-4 was the largest.
    "movement": 1e-2,
}
"""Largest difference: of loss in nats, else relative (tensors: of the norm)."""

Quantity = tuple[str, str]
"""A key of LIMITS, and the step or the tensor."""


@dataclass(frozen=True)
class History:
    """What the steps did.

    Args:
        losses: of each step, nats per token.
        norms: of each step's gradient before clipping.
        before: weights by transformers' names.
        after: the same after the steps.
    """

    losses: list[float]
    norms: list[float]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def rates(shape: Shape) -> list[float]:
    """Learning rate of each step: another in nearly every one."""
    schedule = ScheduleConfig(kind="wsd", lr=shape.peak, min_lr=shape.peak / 10, warmup_tokens=10, decay_tokens=5)
    return [learning_rate(schedule, STEPS, step) for step in range(1, STEPS + 1)]


def samples(shape: Shape, step: int) -> list[MicroBatch]:
    """The micro-batches of a step; no step has another's."""
    return [shape.batch(1 + MICRO_BATCHES * step + number) for number in range(MICRO_BATCHES)]


def take_steps(trainable: Trainable, shape: Shape, steps: Iterable[Sequence[MicroBatch]]) -> list[StepResult]:
    """Our trainer's steps."""
    size = (shape.length, shape.samples)
    return [
        trainable.step(iter(parts), len(parts), size, rate, stop=False)
        for parts, rate in zip(steps, rates(shape), strict=True)
    ]


def our_history(pair: Pair, platform: Platform, layout: ParallelConfig | None = None) -> History:
    """Train our model of the pair, which is used up; the layout is the recipe's if none is given."""
    trainable = Trainable(pair.recipe, layout or pair.recipe.parallel, platform, pair.model)
    before = pair.named(lambda p: p.detach().clone())
    results = take_steps(trainable, pair.shape, (samples(pair.shape, step) for step in range(STEPS)))
    after = pair.named(lambda p: p.detach().clone())
    return History([result.loss for result in results], [result.grad_norm for result in results], before, after)


class PeerTraining:
    """The peer with torch's AdamW and clipping, set up as the recipe says.

    Args:
        pair: the models; the peer is used up.
    """

    def __init__(self, pair: Pair) -> None:
        self.shape = pair.shape
        self.model = pair.peer
        self.clip_grad = pair.recipe.optimizer.clip_grad
        self.rates = rates(pair.shape)
        self.optimizer = _adamw(list(self.model.parameters()), pair.recipe)

    def run(self) -> History:
        """Train."""
        before = self._weights()
        steps = [self._step(samples(self.shape, step), rate) for step, rate in enumerate(self.rates)]
        losses, norms = zip(*steps, strict=True)
        return History(list(losses), list(norms), before, self._weights())

    def _step(self, micro_batches: Sequence[MicroBatch], rate: float) -> tuple[float, float]:
        """All micro-batches in one pass: (loss, gradient norm)."""
        tokens, labels = (torch.cat([getattr(part, name) for part in micro_batches]) for name in ("tokens", "labels"))
        self.optimizer.zero_grad()
        loss = mean_loss(self.model(tokens, use_cache=False).logits, labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return loss.item(), norm.item()

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def _adamw(parameters: list[torch.nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """Matrices and convolutions decay; norms, biases, A_log, D and dt_bias do not."""
    values = recipe.optimizer
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": values.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(values.beta1, values.beta2), eps=values.eps)


def differences(ours: History, theirs: History) -> dict[Quantity, float]:
    """Every quantity's difference, as LIMITS measures it."""
    assert ours.after.keys() == theirs.after.keys()
    found: dict[Quantity, float] = {}
    for step, (our_loss, their_loss) in enumerate(zip(ours.losses, theirs.losses, strict=True), start=1):
        found["loss", f"step {step}"] = abs(our_loss - their_loss)
    for step, (our_norm, their_norm) in enumerate(zip(ours.norms, theirs.norms, strict=True), start=1):
        found["gradient norm", f"step {step}"] = abs(our_norm / their_norm - 1)
    for name in theirs.after:
        our_move, their_move = (history.after[name] - history.before[name] for history in (ours, theirs))
        found["weight", name] = relative_error(ours.after[name], theirs.after[name])
        found["movement", name] = relative_error(our_move, their_move)
    return found


def disagreements(ours: History, theirs: History) -> dict[Quantity, float]:
    """The differences that are above their limits, or not finite."""
    return {key: value for key, value in differences(ours, theirs).items() if not value <= LIMITS[key[0]]}


def unmoved(history: History) -> list[str]:
    """Tensors that changed by less than the limit for weights, so that their agreement would say nothing."""
    after, before = history.after, history.before
    return [name for name in after if relative_error(after[name], before[name]) < LIMITS["weight"]]
