"""mamba-ssm's functions, as megatron-core's mixer calls them, against their parts in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nano_pretrain.kernels.mamba import (
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    selective_state_update,
)
from tests.kernels.compare import Inputs, assert_close, random_tensor, values_and_gradients
from tests.kernels.references import convolution_silu, sequential_scan
from tests.kernels.scan_cases import documents

pytestmark = pytest.mark.usefixtures("implementation")

BATCH, LENGTH, HEADS, CHANNELS, GROUPS, STATE, WIDTH = 2, 70, 4, 3, 2, 5, 4
INNER = HEADS * CHANNELS
TOLERANCE = 1e-12
"""Rounding of float64 with the cancellation of sums over 70 tokens."""


def split_inputs() -> Inputs:
    g = torch.Generator().manual_seed(0)
    convolved = INNER + 2 * GROUPS * STATE
    return {
        "zxbcdt": random_tensor(g, BATCH, LENGTH, INNER + convolved + HEADS),
        "conv1d_weight": random_tensor(g, convolved, WIDTH),
        "conv1d_bias": random_tensor(g, convolved),
        "dt_bias": random_tensor(g, HEADS),
        "A": -random_tensor(g, HEADS).exp(),
        "D": random_tensor(g, HEADS),
        "seq_idx": documents(g, BATCH, LENGTH),
    }


def layer_formula(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,  # noqa: N803
    D: Tensor,  # noqa: N803
    seq_idx: Tensor,
) -> Tensor:
    """The same from the references: z | x B C | dt, in this order."""
    z, xbc, dt = zxbcdt.split([INNER, INNER + 2 * GROUPS * STATE, HEADS], -1)
    x, b, c = convolution_silu(xbc, conv1d_weight, conv1d_bias, seq_idx).split([INNER, *[GROUPS * STATE] * 2], -1)
    y, _ = sequential_scan(
        x.unflatten(-1, (HEADS, CHANNELS)),
        F.softplus(dt + dt_bias),
        A,
        b.unflatten(-1, (GROUPS, STATE)),
        c.unflatten(-1, (GROUPS, STATE)),
        D,
        seq_idx=seq_idx,
    )
    return y.flatten(2) * F.silu(z)


def layer(**inputs: Any) -> Tensor:
    return mamba_split_conv1d_scan_combined(**inputs, chunk_size=256, headdim=CHANNELS, ngroups=GROUPS)


def test_the_layer_equals_its_parts_in_values_and_all_gradients() -> None:
    gradients = [random_tensor(torch.Generator(), BATCH, LENGTH, INNER)]
    expected = values_and_gradients(layer_formula, split_inputs(), gradients)
    assert_close(values_and_gradients(layer, split_inputs(), gradients), expected, TOLERANCE)


def scan_inputs() -> Inputs:
    g = torch.Generator().manual_seed(1)
    return {
        "x": random_tensor(g, BATCH, LENGTH, HEADS, CHANNELS),
        "dt": random_tensor(g, BATCH, LENGTH, HEADS),
        "A": -random_tensor(g, HEADS).exp(),
        "B": random_tensor(g, BATCH, LENGTH, GROUPS, STATE),
        "C": random_tensor(g, BATCH, LENGTH, GROUPS, STATE),
        "D": random_tensor(g, HEADS),
        "z": random_tensor(g, BATCH, LENGTH, HEADS, CHANNELS),
        "dt_bias": random_tensor(g, HEADS),
    }


@pytest.mark.parametrize("gate", [True, False])
def test_the_scan_equals_the_recurrence(gate: bool) -> None:
    t = scan_inputs()
    step = F.softplus(t["dt"] + t["dt_bias"])
    y, last = sequential_scan(t["x"], step, t["A"], t["B"], t["C"], t["D"])
    arguments: dict[str, Any] = {**t, "z": t["z"] if gate else None}
    found, state = mamba_chunk_scan_combined(**arguments, chunk_size=8, dt_softplus=True, return_final_states=True)
    expected = y * F.silu(t["z"]) if gate else y
    assert_close({"y": found, "last": state}, {"y": expected, "last": last}, TOLERANCE)
    assert torch.equal(found, mamba_chunk_scan_combined(**arguments, chunk_size=64, dt_softplus=True))


@pytest.mark.parametrize("gate", [True, False])
def test_a_token_at_a_time_equals_the_scan(gate: bool) -> None:
    # As the mixer calls it: one dt, A, D and dt_bias a head, expanded without copies.
    t = scan_inputs()
    arguments: dict[str, Any] = {**t, "z": t["z"] if gate else None}
    y, last = mamba_chunk_scan_combined(**arguments, chunk_size=8, dt_softplus=True, return_final_states=True)
    state = torch.zeros_like(last)
    per_head = {name: t[name].unsqueeze(-1).expand(-1, CHANNELS) for name in ("D", "dt_bias")}
    outputs = [
        selective_state_update(
            state,
            t["x"][:, i],
            t["dt"][:, i].unsqueeze(-1).expand(-1, -1, CHANNELS),
            t["A"][:, None, None].expand(-1, CHANNELS, STATE),
            t["B"][:, i],
            t["C"][:, i],
            z=t["z"][:, i] if gate else None,
            dt_softplus=True,
            **per_head,
        )
        for i in range(LENGTH)
    ]
    assert_close({"y": torch.stack(outputs, 1), "last": state}, {"y": y, "last": last}, TOLERANCE)


def test_what_only_batched_inference_needs_is_refused() -> None:
    t = scan_inputs()
    with pytest.raises(ValueError, match="cu_seqlens"):
        mamba_chunk_scan_combined(**t, chunk_size=8, cu_seqlens=torch.tensor([0, LENGTH]))
    with pytest.raises(ValueError, match="cu_seqlens"):
        mamba_chunk_scan_combined(**t, chunk_size=8, return_varlen_states=True)
    token: Inputs = {"state": t["x"], **{name: t[name] for name in ("x", "dt", "A", "B", "C")}}
    with pytest.raises(ValueError, match="state_batch_indices"):
        selective_state_update(**token, state_batch_indices=torch.zeros(1))


@pytest.mark.parametrize("wrong", [{"activation": "relu", "headdim": CHANNELS}, {"headdim": None}])
def test_a_layer_of_another_kind_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="activation='silu' and a head dimension"):
        mamba_split_conv1d_scan_combined(**split_inputs(), chunk_size=8, ngroups=GROUPS, **wrong)


def test_a_layer_without_a_filter_is_refused() -> None:
    with pytest.raises(ValueError, match="filter of width 0"):
        layer(**{**split_inputs(), "conv1d_weight": split_inputs()["conv1d_weight"][:, :0]})


OTHERS_OF_MAMBA_SSM: list[dict[str, Any]] = [
    {"dt_limit": (0.0, 1.0)},
    {"initial_states": None},
    {"return_final_states": True},
    {"rmsnorm_weight": None},
    {"rmsnorm_eps": 1e-5},
    {"outproj_weight": None},
    {"outproj_bias": None},
]


@pytest.mark.parametrize("other", OTHERS_OF_MAMBA_SSM)
def test_an_argument_that_only_mamba_ssm_has_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(other))):
        layer(**split_inputs(), **other)
    if "dt_limit" in other:
        with pytest.raises(TypeError, match="dt_limit"):
            mamba_chunk_scan_combined(**scan_inputs(), chunk_size=8, **other)


def test_what_follows_the_chunk_size_is_taken_by_name_only() -> None:
    t = scan_inputs()
    # Untyped, since mypy refuses these calls too.
    scan: Any = mamba_chunk_scan_combined
    split_scan: Any = mamba_split_conv1d_scan_combined
    with pytest.raises(TypeError, match="positional"):
        scan(*(t[name] for name in ("x", "dt", "A", "B", "C")), 8, t["D"])
    *first, seq_idx = split_inputs().values()
    with pytest.raises(TypeError, match="positional"):
        split_scan(*first, 8, seq_idx, headdim=CHANNELS, ngroups=GROUPS)
