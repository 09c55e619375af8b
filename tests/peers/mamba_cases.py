"""What is compared with mamba-ssm: inputs by its names, and each function in float64 from the plain references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_pretrain.kernels import mamba
from nano_pretrain.kernels.norm import gated_rms_norm
from tests.kernels.compare import Inputs, Kernel, random_tensor, values_and_gradients
from tests.kernels.references import convolution_silu, sequential_scan
from tests.kernels.test_norm import gated_formula

EPS = 1e-2
WIDTH = 4


@dataclass(frozen=True)
class Case:
    """One call of a function of mamba-ssm.

    Attributes:
        function: its name there.
        inputs: fp32 tensors by its names.
        options: the other arguments, by its names.
        gradients: of each output; none where the function has no backward pass.
    """

    function: str
    inputs: Inputs
    options: dict[str, Any]
    gradients: tuple[Tensor, ...] = ()

    def results(self, functions: dict[str, Kernel], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Values and gradients of this case by one of `functions`, the inputs widened to `dtype`."""
        kernel = functions[self.function]
        inputs = _cast(self.inputs, dtype)
        if self.gradients:
            return values_and_gradients(lambda **t: kernel(**t, **self.options), inputs, self.gradients)
        return {str(number): output for number, output in enumerate(kernel(**inputs, **self.options))}


def documents(generator: torch.Generator, batch: int, length: int) -> Tensor:
    """Document of each token [batch, length], int32, from 0: on average every 20 tokens, one border next to another."""
    starts = torch.rand(batch, length, generator=generator) < 0.05
    starts[:, 0] = False
    starts[:, length // 2 : length // 2 + 2] = True
    return starts.cumsum(1, dtype=torch.int32)


def scan(
    length: int,
    chunk_size: int,
    *,
    batch: int = 1,
    groups: int = 1,
    heads: int = 2,
    channels: int = 8,
    state: int = 16,
    step_bias: bool = True,
    skip: bool = True,
    gate: bool = False,
    states: bool = False,
    packed: bool = False,
) -> Case:
    """A call of `mamba_chunk_scan_combined`; `states`: an initial one is given and the final one has a gradient."""
    g = torch.Generator().manual_seed(length)
    by_head, by_state = (batch, length, heads, channels), (batch, heads, channels, state)
    dt = random_tensor(g, batch, length, heads) - 1
    inputs = {
        "x": random_tensor(g, *by_head),
        "dt": dt if step_bias else F.softplus(dt),
        "A": -random_tensor(g, heads).exp(),
        "B": random_tensor(g, batch, length, groups, state),
        "C": random_tensor(g, batch, length, groups, state),
        "D": random_tensor(g, heads) if skip else None,
        "z": random_tensor(g, *by_head) if gate else None,
        "dt_bias": random_tensor(g, heads) if step_bias else None,
        "initial_states": random_tensor(g, *by_state) if states else None,
    }
    options = {"chunk_size": chunk_size, "dt_softplus": step_bias, "return_final_states": states}
    seq_idx = documents(g, batch, length) if packed else None
    return _differentiated("mamba_chunk_scan_combined", {**inputs, "seq_idx": seq_idx}, options, g)


def layer(
    length: int,
    chunk_size: int,
    *,
    batch: int = 1,
    groups: int = 1,
    heads: int = 2,
    channels: int = 8,
    state: int = 8,
    norm: bool = False,
    packed: bool = False,
) -> Case:
    """A call of `mamba_split_conv1d_scan_combined`; `norm`: with its gated norm, the gate before it."""
    g = torch.Generator().manual_seed(length)
    inner = heads * channels
    convolved = inner + 2 * groups * state
    inputs = {
        "zxbcdt": random_tensor(g, batch, length, inner + convolved + heads),
        "conv1d_weight": random_tensor(g, convolved, WIDTH) / 2,
        "conv1d_bias": random_tensor(g, convolved),
        "dt_bias": random_tensor(g, heads) - 1,
        "A": -random_tensor(g, heads).exp(),
        "D": random_tensor(g, heads),
        "rmsnorm_weight": random_tensor(g, inner) if norm else None,
    }
    seq_idx = documents(g, batch, length) if packed else None
    options: dict[str, Any] = {"chunk_size": chunk_size, "headdim": channels, "ngroups": groups}
    options |= {"rmsnorm_eps": EPS, "norm_before_gate": False}
    return _differentiated("mamba_split_conv1d_scan_combined", {**inputs, "seq_idx": seq_idx}, options, g)


def norm(rows: int, channels: int, group_size: int, *, gate: bool) -> Case:
    """A call of `rmsnorm_fn`, the gate before the norm."""
    g = torch.Generator().manual_seed(channels)
    inputs = {
        "x": random_tensor(g, 2, rows, channels),
        "weight": random_tensor(g, channels),
        "z": random_tensor(g, 2, rows, channels) if gate else None,
    }
    options = {"bias": None, "eps": EPS, "group_size": group_size, "norm_before_gate": False}
    return _differentiated("rmsnorm_fn", inputs, options, g)


def token(batch: int, groups: int, heads: int, channels: int, state: int, *, gate: bool) -> Case:
    """A call of `selective_state_update`, everything per head that Mamba-2 has per head."""
    g = torch.Generator().manual_seed(heads)
    inputs = {
        "state": random_tensor(g, batch, heads, channels, state),
        "x": random_tensor(g, batch, heads, channels),
        "dt": random_tensor(g, batch, heads),
        "A": -random_tensor(g, heads).exp(),
        "B": random_tensor(g, batch, groups, state),
        "C": random_tensor(g, batch, groups, state),
        "D": random_tensor(g, heads),
        "z": random_tensor(g, batch, heads, channels) if gate else None,
        "dt_bias": random_tensor(g, heads),
    }
    return Case("selective_state_update", _cast(inputs, torch.float32), {"dt_softplus": True})


def _differentiated(function: str, inputs: Inputs, options: dict[str, Any], generator: torch.Generator) -> Case:
    """The gradient of each output is the output, weighted by channel, plus noise.

    With noise alone the gradients that are sums over tokens (A, dt_bias) cancel down to a hundredth of their terms by
    chance, and the comparison would measure that.
    """
    answer = FORMULAS[function](**inputs, **options)
    outputs = (answer,) if isinstance(answer, Tensor) else answer
    gradients = []
    for output in outputs:
        weight, noise = (random_tensor(generator, *shape) for shape in (output.shape[2:], output.shape))
        gradients.append((output / output.std() * weight.exp() + noise).float())
    return Case(function, _cast(inputs, torch.float32), options, tuple(gradients))


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {
        name: value.to(dtype) if value is not None and value.is_floating_point() else value
        for name, value in inputs.items()
    }


SMALL: dict[str, Callable[[], Case]] = {
    # Ragged last chunks, both of mamba-ssm's chunk and of ours; groups of 2 and 3 heads.
    "scan": partial(scan, 100, 32),
    "scan shorter than a chunk": partial(scan, 5, 16, step_bias=False, skip=False),
    "scan with gate, first and last state": partial(scan, 70, 32, batch=2, groups=2, heads=4, gate=True, states=True),
    "scan of documents": partial(scan, 150, 32, groups=2, heads=6, packed=True),
    "scan of documents with everything": partial(
        scan, 75, 32, batch=2, groups=4, heads=8, gate=True, states=True, packed=True
    ),
    "layer": partial(layer, 70, 32, groups=2, heads=4),
    "layer of documents": partial(layer, 75, 32, batch=2, groups=1, heads=2, packed=True),
    "layer of documents with norm": partial(layer, 130, 64, groups=2, heads=4, norm=True, packed=True),
    "norm": partial(norm, 7, 48, 48, gate=False),
    "gated norm": partial(norm, 7, 48, 48, gate=True),
    "gated norm in groups": partial(norm, 7, 60, 20, gate=True),
    "token": partial(token, 2, 2, 6, 8, 16, gate=True),
    "token without gate": partial(token, 1, 1, 2, 5, 8, gate=False),
}
"""Up to three seconds each in the interpreter."""

LARGE: dict[str, Callable[[], Case]] = {
    "scan": partial(scan, 512, 128, groups=4, heads=8, channels=64, state=128, gate=True, states=True, packed=True),
    "layer, head dimension 80": partial(
        layer, 300, 128, groups=2, heads=4, channels=80, state=128, norm=True, packed=True
    ),
    "gated norm in groups": partial(norm, 64, 4096, 512, gate=True),
    "token": partial(token, 2, 8, 16, 80, 128, gate=True),
}
"""Shapes of real models, but for the number of heads."""


def one_token(update: Callable[..., Tensor]) -> Kernel:
    """`selective_state_update` as the mixer calls it: what is per head expanded, not copied; also gives the state."""

    def step(**inputs: Any) -> tuple[Tensor, Tensor]:
        state = inputs["state"].clone()
        channels, size = state.shape[2:]
        per_channel = {name: inputs[name].unsqueeze(-1).expand(*inputs[name].shape, channels) for name in PER_HEAD}
        a = inputs["A"][:, None, None].expand(-1, channels, size)
        return update(**inputs | per_channel | {"state": state, "A": a}), state

    return step


PER_HEAD = ("dt", "D", "dt_bias")


def _our_layer(rmsnorm_weight: Tensor | None, rmsnorm_eps: float, **arguments: Any) -> Tensor:
    y = mamba.mamba_split_conv1d_scan_combined(**arguments)
    if rmsnorm_weight is None:
        return y
    return gated_rms_norm(y, None, rmsnorm_weight, rmsnorm_eps, y.shape[-1] // arguments["ngroups"])


def _our_norm(bias: None, norm_before_gate: bool, **arguments: Any) -> Tensor:
    assert not norm_before_gate
    return gated_rms_norm(**arguments)


OURS: dict[str, Kernel] = {
    "mamba_chunk_scan_combined": mamba.mamba_chunk_scan_combined,
    "mamba_split_conv1d_scan_combined": _our_layer,
    "rmsnorm_fn": _our_norm,
    "selective_state_update": one_token(mamba.selective_state_update),
}


def _scan_formula(
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor | None,
    z: Tensor | None,
    chunk_size: int,
    dt_softplus: bool,
    return_final_states: bool,
    **arguments: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    dt = dt if dt_bias is None else dt + dt_bias
    named = {name.lower(): value for name, value in arguments.items()}
    y, last = sequential_scan(x, F.softplus(dt) if dt_softplus else dt, **named)
    y = y if z is None else y * F.silu(z)
    return (y, last) if return_final_states else y


def _layer_formula(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    rmsnorm_weight: Tensor | None,
    seq_idx: Tensor | None,
    headdim: int,
    ngroups: int,
    rmsnorm_eps: float,
    norm_before_gate: bool,
    **arguments: Any,
) -> Tensor:
    heads = arguments["A"].shape[0]
    inner, convolved = heads * headdim, conv1d_weight.shape[0]
    z, xbc, dt = zxbcdt.split([inner, convolved, heads], -1)
    x, b, c = convolution_silu(xbc, conv1d_weight, conv1d_bias, seq_idx).split(
        [inner, *[(convolved - inner) // 2] * 2], -1
    )
    y = _scan_formula(
        x.unflatten(-1, (heads, headdim)),
        dt,
        z=None,
        B=b.unflatten(-1, (ngroups, -1)),
        C=c.unflatten(-1, (ngroups, -1)),
        seq_idx=seq_idx,
        dt_softplus=True,
        return_final_states=False,
        **arguments,
    )
    assert isinstance(y, Tensor)
    if rmsnorm_weight is None:
        return y.flatten(2) * F.silu(z)
    return gated_formula(y.flatten(2), z, rmsnorm_weight, rmsnorm_eps, inner // ngroups)


def _norm_formula(bias: None, norm_before_gate: bool, **arguments: Any) -> Tensor:
    return gated_formula(**arguments)


def _token_formula(state: Tensor, dt_softplus: bool, **arguments: Any) -> tuple[Tensor, Tensor]:
    per_token = ("x", "dt", "B", "C", "z")
    sequence = {
        name: value.unsqueeze(1) if value is not None and name in per_token else value
        for name, value in arguments.items()
    }
    y, last = _scan_formula(
        **sequence, initial_states=state, chunk_size=1, dt_softplus=dt_softplus, return_final_states=True
    )
    return y.squeeze(1), last


FORMULAS: dict[str, Kernel] = {
    "mamba_chunk_scan_combined": _scan_formula,
    "mamba_split_conv1d_scan_combined": _layer_formula,
    "rmsnorm_fn": _norm_formula,
    "selective_state_update": _token_formula,
}
