"""The portable kernels behind mamba-ssm's names, with the arguments that megatron-core's mixer passes.

What follows `chunk_size` is taken by name only, as the mixer passes it: mamba-ssm has more arguments, in another order.
Those that the mixer does not pass (`dt_limit`, `rmsnorm_weight` and others) do not exist here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_pretrain.kernels.activation import silu_gate
from nano_pretrain.kernels.conv import causal_conv_silu
from nano_pretrain.kernels.documents import document_numbers
from nano_pretrain.kernels.mixer import Sizes, native_mixer
from nano_pretrain.kernels.native.layout import wide
from nano_pretrain.kernels.native.library import active
from nano_pretrain.kernels.norm import gated_rms_norm
from nano_pretrain.kernels.ssd import chunk_scan, state_update


def _step_size(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    dt = dt.to(wide(dt.dtype))
    if bias is not None:
        dt = dt + bias
    return F.softplus(dt) if softplus else dt


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803 - mamba-ssm's name
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    chunk_size: int,
    *,
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:
    """The scan with softplus and gate, as `mamba_ssm.ops.triton.ssd_combined` has it.

    Args:
        x: [batch, length, heads, head dim].
        dt: [batch, length, heads] before bias and softplus.
        A: [heads].
        B: [batch, length, groups, state].
        C: [batch, length, groups, state].
        chunk_size: ignored: the result does not depend on it.
        D: [heads] or None.
        z: gate, shape of x, or None.
        dt_bias: [heads] or None.
        initial_states: [batch, heads, head dim, state] or None.
        seq_idx: [batch, length] or None.
        cu_seqlens: must be None: it belongs to batched inference requests of several lengths.
        dt_softplus: whether dt passes through softplus.
        return_final_states: whether the last state is returned too.
        return_varlen_states: must be False, as cu_seqlens.

    Returns:
        y [batch, length, heads, head dim], or (y, final states [batch, heads, head dim, state]).

    Raises:
        ValueError: batched inference with several lengths was asked for.
    """
    if cu_seqlens is not None or return_varlen_states:
        raise ValueError("the portable scan has no states per request of different length (cu_seqlens)")
    y, final = chunk_scan(x, _step_size(dt, dt_bias, dt_softplus), A, B, C, D, initial_states, seq_idx)
    if z is not None:
        y = silu_gate(y.flatten(2), z.flatten(2)).view_as(y)
    return (y, final) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,  # noqa: N803
    D: Tensor,  # noqa: N803
    chunk_size: int,
    *,
    seq_idx: Tensor | None = None,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """Convolution, scan and gate of a Mamba-2 layer, as `mamba_ssm.ops.triton.ssd_combined` has them.

    Args:
        zxbcdt: in_proj's output [batch, length, 2 d_inner + 2 groups state + heads].
        conv1d_weight: [d_inner + 2 groups state, width].
        conv1d_bias: [d_inner + 2 groups state].
        dt_bias: [heads].
        A: [heads].
        D: [heads].
        chunk_size: ignored: the result does not depend on it.
        seq_idx: [batch, length] or None.
        activation: "silu", the only one of Mamba-2.
        headdim: channels of a head.
        ngroups: groups of B and C.
        norm_before_gate: without effect, since the norm is a module of its own.

    Returns:
        gated output before the norm [batch, length, d_inner].

    Raises:
        ValueError: an activation other than SiLU, no head dimension, or seq_idx that is not of integers.
    """
    if activation not in ("silu", "swish") or headdim is None:
        raise ValueError("the portable scan needs activation='silu' and a head dimension")
    heads = A.shape[0]
    inner = heads * headdim
    state = (conv1d_weight.shape[0] - inner) // (2 * ngroups)
    library = active(zxbcdt)
    seq_idx = document_numbers(seq_idx)
    if library:
        sizes = Sizes(heads, headdim, ngroups, state)
        return native_mixer(library, sizes, zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, seq_idx)
    z, xbc, dt = zxbcdt.split([inner, inner + 2 * ngroups * state, heads], -1)
    xbc = causal_conv_silu(xbc, conv1d_weight, conv1d_bias, seq_idx)
    x, b, c = xbc.split([inner, ngroups * state, ngroups * state], -1)
    y, _ = chunk_scan(
        x.unflatten(-1, (heads, headdim)),
        _step_size(dt, dt_bias, softplus=True),
        A,
        b.unflatten(-1, (ngroups, state)),
        c.unflatten(-1, (ngroups, state)),
        D,
        seq_idx=seq_idx,
    )
    return silu_gate(y.flatten(2), z)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of the scan, as `mamba_ssm.ops.triton.selective_state_update` has it.

    Mamba-2 has one dt, A, dt_bias and D per head; the mixer passes them expanded over the head's channels and state.

    Args:
        state: [batch, heads, head dim, state], updated in place.
        x: [batch, heads, head dim].
        dt: [batch, heads, head dim].
        A: [heads, head dim, state].
        B: [batch, groups, state].
        C: [batch, groups, state].
        D: [heads, head dim] or None.
        z: gate, shape of x, or None.
        dt_bias: [heads, head dim] or None.
        dt_softplus: whether dt passes through softplus.
        state_batch_indices: must be None: it belongs to batched inference with requests that come and go.

    Returns:
        y [batch, heads, head dim].

    Raises:
        ValueError: requests that come and go were asked for.
    """
    if state_batch_indices is not None:
        raise ValueError("the portable state update has no state_batch_indices")
    bias = None if dt_bias is None else dt_bias[:, 0].to(wide(dt_bias.dtype))
    step = _step_size(dt[..., 0], bias, dt_softplus)
    y = state_update(state, x, step, A[:, 0, 0], B, C, None if D is None else D[:, 0])
    return y if z is None else (y * F.silu(z)).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """Gated group RMSNorm with the constructor of mamba-ssm's `layernorm_gated.RMSNorm`.

    Args:
        hidden_size: channels.
        eps: added to the mean square.
        group_size: channels that share one scale; None is all.
        norm_before_gate: must be False, the form of Mamba-2.
        device: device of the weight.
        dtype: dtype of the weight.

    Raises:
        ValueError: norm_before_gate is true.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm_before_gate:
            raise ValueError("the portable gated norm applies the gate before the norm (norm_before_gate=False)")
        self.eps = eps
        self.group_size = group_size or hidden_size
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """[..., hidden_size] and an optional gate of the same shape -> [..., hidden_size]."""
        return gated_rms_norm(x, z, self.weight, self.eps, self.group_size)
