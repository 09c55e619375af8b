"""RMSNorm and its gated form against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nano_pretrain.kernels.mamba import GatedRMSNorm
from nano_pretrain.kernels.norm import gated_rms_norm, rms_norm
from tests.kernels.compare import Inputs, assert_close, random_tensor, values_and_gradients
from tests.kernels.implementations import assert_rounded_once, kept_by_autograd

pytestmark = pytest.mark.usefixtures("implementation")

EPS = 1e-2
"""Large, so that a norm without it is seen."""


def gated_formula(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """A group at a time."""
    gated = x if z is None else x * z * torch.sigmoid(z)
    groups = gated.split(group_size, -1)
    return torch.cat([group / (group.pow(2).mean(-1, keepdim=True) + eps).sqrt() for group in groups], -1) * weight


def norm_inputs(
    gate: bool = True, channels: int = 12, *, shape: tuple[int, ...] = (5, 2), dtype: torch.dtype = torch.float64
) -> Inputs:
    g = torch.Generator().manual_seed(0)
    z = random_tensor(g, *shape, channels).to(dtype) if gate else None
    return {"x": random_tensor(g, *shape, channels).to(dtype), "z": z, "weight": random_tensor(g, channels).to(dtype)}


def output_gradient(inputs: Inputs) -> Tensor:
    return random_tensor(torch.Generator().manual_seed(1), *inputs["x"].shape)


def doubled(inputs: Inputs) -> Inputs:
    return {name: None if t is None else t.double() for name, t in inputs.items()}


@given(st.booleans(), st.integers(1, 9) | st.just(70), st.integers(1, 40), st.integers(1, 3))
def test_gated_norm_equals_its_formula(gate: bool, rows: int, group_size: int, groups: int) -> None:
    arguments: dict[str, Any] = {"eps": EPS, "group_size": group_size}
    inputs = norm_inputs(gate, groups * group_size, shape=(2, rows))
    gradients = [output_gradient(inputs)]
    expected = values_and_gradients(lambda **t: gated_formula(**t, **arguments), inputs, gradients)
    actual = values_and_gradients(lambda **t: gated_rms_norm(**t, **arguments), inputs, gradients)
    # Sums of at most 140 products in float64. A group of one channel is nearly its own sign: its gradient is eps / x^2
    # of the terms that it is the difference of.
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("gate", [True, False])
def test_fp32_is_as_exact_as_fp32(gate: bool) -> None:
    arguments: dict[str, Any] = {"eps": EPS, "group_size": 64}
    inputs = norm_inputs(gate, 256, shape=(100,), dtype=torch.float32)
    gradients = [output_gradient(inputs).float()]
    expected = values_and_gradients(lambda **t: gated_formula(**t, **arguments), doubled(inputs), gradients)
    # Some ten roundings of 2^-24 in each result.
    assert_close(values_and_gradients(lambda **t: gated_rms_norm(**t, **arguments), inputs, gradients), expected, 1e-6)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32])
def test_bf16_is_computed_in_fp32_and_rounded_once(gate: bool, parameters: torch.dtype) -> None:
    arguments: dict[str, Any] = {"eps": EPS, "group_size": 64}
    inputs = norm_inputs(gate, 256, shape=(100,), dtype=torch.bfloat16)
    gradients = [output_gradient(inputs).bfloat16()]
    expected = values_and_gradients(lambda **t: gated_formula(**t, **arguments), doubled(inputs), gradients)
    inputs["weight"] = inputs["weight"].to(parameters)
    actual = values_and_gradients(lambda **t: gated_rms_norm(**t, **arguments), inputs, gradients)
    assert actual["dweight"].dtype == parameters
    assert_rounded_once({name: t.bfloat16() for name, t in actual.items()}, expected)


def test_a_gate_of_another_dtype_is_taken() -> None:
    inputs = norm_inputs(dtype=torch.float32)
    expected = gated_formula(**doubled(inputs), eps=EPS, group_size=3)
    found = gated_rms_norm(**{**inputs, "x": inputs["x"].double()}, eps=EPS, group_size=3)
    assert_close({"y": found}, {"y": expected}, 1e-13)


@pytest.mark.parametrize("gate", [True, False])
def test_rows_of_any_layout_are_taken(gate: bool) -> None:
    # Rows apart by more than their channels, rows without a common stride, channels apart.
    inputs = norm_inputs(gate, 20, shape=(7, 6))
    gradient = output_gradient(inputs)
    expected = values_and_gradients(lambda **t: gated_formula(**t, eps=EPS, group_size=4), inputs, [gradient])
    layouts = (
        lambda t: F.pad(t, (2, 3))[..., 2:-3],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
    )
    for layout in layouts:

        def kernel(x: Tensor, z: Tensor | None, weight: Tensor, layout: Any = layout) -> Tensor:
            return gated_rms_norm(layout(x), None if z is None else layout(z), weight, EPS, 4)

        assert_close(values_and_gradients(kernel, inputs, [layout(gradient)]), expected, 1e-13)


def test_rms_norm_equals_torchs() -> None:
    inputs = {name: t for name, t in norm_inputs(gate=False).items() if t is not None}
    gradients = [output_gradient(inputs)]
    expected = values_and_gradients(lambda x, weight: F.rms_norm(x, (12,), weight, EPS), inputs, gradients)
    assert_close(values_and_gradients(lambda x, weight: rms_norm(x, weight, EPS), inputs, gradients), expected, 1e-13)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["x", "z"])
def test_what_is_not_finite_shows_in_its_group(name: str, dtype: torch.dtype, value: float) -> None:
    inputs = norm_inputs(channels=96, shape=(40,), dtype=dtype)
    inputs[name][5, 37] = value
    found = values_and_gradients(
        lambda **t: gated_rms_norm(**t, eps=EPS, group_size=32), inputs, [output_gradient(inputs)]
    )
    group = torch.zeros(40, 96, dtype=torch.bool)
    group[5, 32:64] = True
    # An infinite mean square scales the finite values of its group to 0.
    bad = ~found["0"].isfinite()
    assert bad[5, 37]
    assert not bad[~group].any()
    assert bad[group].all() or value == torch.inf
    assert not found["dx"][group].isfinite().all()
    assert found["dx"][~group].isfinite().all()
    assert not found["dweight"][37].isfinite()


def test_only_the_gradients_asked_for_are_given() -> None:
    inputs = norm_inputs()
    x, z, weight = inputs["x"], inputs["z"].requires_grad_(), inputs["weight"]
    gated_rms_norm(x, z, weight, EPS, 3).sum().backward()
    assert z.grad is not None
    assert x.grad is None
    assert weight.grad is None
    with torch.no_grad():
        assert not gated_rms_norm(x, z, weight, EPS, 3).requires_grad


def test_the_native_norm_keeps_only_its_inputs(implementation: str) -> None:
    leaves = {name: t.requires_grad_() for name, t in norm_inputs().items()}
    kept = kept_by_autograd(lambda: gated_rms_norm(**leaves, eps=EPS, group_size=3))
    inputs = {t.untyped_storage().data_ptr() for t in leaves.values()}
    assert (kept == inputs) == (implementation == "native")


def test_shapes_that_do_not_fit_are_refused() -> None:
    inputs = norm_inputs()
    with pytest.raises(RuntimeError, match="size"):
        gated_rms_norm(inputs["x"], inputs["z"][..., :-1], inputs["weight"], EPS, 3)
    with pytest.raises(RuntimeError, match="size"):
        gated_rms_norm(inputs["x"], None, inputs["weight"][:-1], EPS, 3)
    with pytest.raises(ValueError, match="12 channels cannot be divided into groups of 5"):
        gated_rms_norm(inputs["x"], None, inputs["weight"], EPS, 5)


@pytest.mark.parametrize("group_size", [0, -2, -12, 24])
@pytest.mark.parametrize("channels", [12, 0])
def test_a_group_of_no_channels_is_refused(channels: int, group_size: int) -> None:
    inputs = norm_inputs(channels=channels)
    with pytest.raises(ValueError, match=f"{channels} channels cannot be divided into groups of {group_size}"):
        gated_rms_norm(**inputs, eps=EPS, group_size=group_size)


def test_module_has_the_constructor_of_mamba_ssm() -> None:
    norm = GatedRMSNorm(12, eps=EPS, group_size=3, norm_before_gate=False, dtype=torch.float64)
    x, z = norm_inputs()["x"], norm_inputs()["z"]
    assert torch.equal(norm(x, z), gated_rms_norm(x, z, torch.ones(12, dtype=torch.float64), EPS, 3))
    assert GatedRMSNorm(12, norm_before_gate=False).group_size == 12
    with pytest.raises(ValueError, match="norm_before_gate=False"):
        GatedRMSNorm(12)
