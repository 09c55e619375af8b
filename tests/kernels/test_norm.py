"""RMSNorm and its gated form against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nano_pretrain.kernels.mamba import GatedRMSNorm
from nano_pretrain.kernels.norm import gated_rms_norm, rms_norm
from tests.kernels.compare import Inputs, assert_close, random_tensor, values_and_gradients

EPS = 1e-2
"""Large, so that a norm without it is seen."""
ROUNDED_ONCE = 2**-8 / 3**0.5
"""Largest relative error of one rounding to bf16 in the mean square."""


def gated_formula(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """A group at a time."""
    gated = x if z is None else x * z * torch.sigmoid(z)
    groups = gated.split(group_size, -1)
    return torch.cat([group / (group.pow(2).mean(-1, keepdim=True) + eps).sqrt() for group in groups], -1) * weight


def norm_inputs(gate: bool = True, channels: int = 12) -> Inputs:
    g = torch.Generator().manual_seed(0)
    z = random_tensor(g, 5, 2, channels) if gate else None
    return {"x": random_tensor(g, 5, 2, channels), "z": z, "weight": random_tensor(g, channels)}


def output_gradient(channels: int = 12) -> Tensor:
    return random_tensor(torch.Generator().manual_seed(1), 5, 2, channels)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("group_size", [1, 3, 12])
def test_gated_norm_equals_its_formula(gate: bool, group_size: int) -> None:
    arguments: dict[str, Any] = {"eps": EPS, "group_size": group_size}
    inputs, gradients = norm_inputs(gate), [output_gradient()]
    expected = values_and_gradients(lambda **t: gated_formula(**t, **arguments), inputs, gradients)
    actual = values_and_gradients(lambda **t: gated_rms_norm(**t, **arguments), inputs, gradients)
    assert_close(actual, expected, 1e-13)


@pytest.mark.parametrize("gate", [True, False])
def test_gated_norm_in_bf16_is_rounded_once(gate: bool) -> None:
    inputs: Inputs = {name: None if t is None else t.bfloat16() for name, t in norm_inputs(gate, 256).items()}
    widened: Inputs = {name: None if t is None else t.double() for name, t in inputs.items()}
    arguments: dict[str, Any] = {"eps": EPS, "group_size": 64}
    expected = gated_formula(**widened, **arguments)
    actual = gated_rms_norm(**inputs, **arguments)
    assert actual.dtype == torch.bfloat16
    assert_close({"y": actual}, {"y": expected}, ROUNDED_ONCE)


def test_rms_norm_equals_torchs() -> None:
    inputs = {name: t for name, t in norm_inputs(gate=False).items() if t is not None}
    gradients = [output_gradient()]
    expected = values_and_gradients(lambda x, weight: F.rms_norm(x, (12,), weight, EPS), inputs, gradients)
    assert_close(values_and_gradients(lambda x, weight: rms_norm(x, weight, EPS), inputs, gradients), expected, 1e-13)


def test_module_has_the_constructor_of_mamba_ssm() -> None:
    norm = GatedRMSNorm(12, eps=EPS, group_size=3, norm_before_gate=False, dtype=torch.float64)
    x, z = norm_inputs()["x"], norm_inputs()["z"]
    assert torch.equal(norm(x, z), gated_rms_norm(x, z, torch.ones(12, dtype=torch.float64), EPS, 3))
    assert GatedRMSNorm(12, norm_before_gate=False).group_size == 12
    with pytest.raises(ValueError, match="norm_before_gate=False"):
        GatedRMSNorm(12)
