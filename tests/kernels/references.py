"""The definitions, as slow and as plain as possible: one token, one tap, one score at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sequential_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `chunk_scan`, with its arguments and results, a token after the other."""
    heads_per_group = x.shape[2] // b.shape[2]
    b, c = (t.repeat_interleave(heads_per_group, 2) for t in (b, c))
    zero = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], b.shape[3])
    state = zero if initial_states is None else initial_states
    outputs = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            state = torch.where((seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None], state, 0.0)
        decay = (dt[:, t] * a).exp()[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        outputs.append((state * c[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, 1)
    return (y if d is None else y + d[:, None] * x), state


def convolution_silu(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None = None) -> Tensor:
    """The arguments and result of `causal_conv_silu`: each document by itself, through `F.conv1d`."""
    rows = []
    for row in range(x.shape[0]):
        lengths = [x.shape[1]] if seq_idx is None else document_lengths(seq_idx[row])
        parts = [F.pad(part.T, (weight.shape[1] - 1, 0)) for part in x[row].split(lengths)]
        rows.append(torch.cat([F.conv1d(part, weight.unsqueeze(1), bias, groups=x.shape[2]) for part in parts], 1).T)
    return F.silu(torch.stack(rows))


def dense_attention(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None = None) -> Tensor:
    """The arguments and result of `CausalAttention`, through all scores."""
    heads_per_group = query.shape[2] // key.shape[2]
    key, value = (t.repeat_interleave(heads_per_group, 2) for t in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / query.shape[-1] ** 0.5
    position = torch.arange(query.shape[0])
    allowed = (position[:, None] >= position)[None, None]
    if documents is not None:
        allowed = allowed & (documents[:, :, None] == documents[:, None, :])[:, None]
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


def document_lengths(documents: Tensor) -> list[int]:
    """Tokens of each document of one row."""
    lengths: list[int] = documents.unique_consecutive(return_counts=True)[1].tolist()
    return lengths
