"""FusedAdam against `torch.optim.AdamW`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nano_pretrain.kernels.adam import FusedAdam
from tests.kernels.compare import relative_error

SHAPES = ((7, 5), (5,), (1,))


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def optimizer(kind: type[torch.optim.Optimizer], params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Two groups with hyperparameters of their own."""
    groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "lr": 3e-3, "weight_decay": 0.0}]
    return kind(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)  # type: ignore[call-arg]


def steps(optimizer: torch.optim.Optimizer, numbers: range) -> None:
    """A gradient and a learning rate of its own for each step."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** (number % 5 - 2)
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number)
        optimizer.step()


def test_twenty_steps_equal_torchs() -> None:
    ours, torchs = parameters(), parameters()
    steps(optimizer(FusedAdam, ours), range(20))
    steps(optimizer(torch.optim.AdamW, torchs), range(20))
    for found, expected in zip(ours, torchs, strict=True):
        # 20 updates, each with a few fp32 roundings of 6e-8.
        assert relative_error(found.data, expected.data) < 1e-6


def test_the_step_belongs_to_the_group() -> None:
    adam = optimizer(FusedAdam, parameters())
    steps(adam, range(3))
    assert [group["step"] for group in adam.param_groups] == [3, 3]
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in adam.state.values())


def test_a_parameter_without_gradient_is_left_alone() -> None:
    params = parameters()
    adam = optimizer(FusedAdam, params)
    before = params[0].detach().clone()
    params[1].grad = torch.ones_like(params[1])
    adam.step()
    assert torch.equal(params[0], before)
    assert params[0] not in adam.state


def test_continues_bit_for_bit_from_a_state_dict() -> None:
    whole, resumed = parameters(), parameters()
    steps(optimizer(FusedAdam, whole), range(10))
    first = optimizer(FusedAdam, resumed)
    steps(first, range(5))
    second = optimizer(FusedAdam, resumed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(second, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_decay_coupled_with_the_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="adam_w_mode=True"):
        FusedAdam(parameters(), adam_w_mode=False)
