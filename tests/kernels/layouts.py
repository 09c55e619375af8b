"""Activations as the model has them: channels of a wider tensor, [length, batch, ...] in memory."""

from __future__ import annotations

import torch
from torch import Tensor

BEFORE, AFTER = 2, 3
"""Channels of others around them."""


def widened(t: Tensor) -> Tensor:
    """The wider tensor [length, batch, wide] that holds [batch, length, channels] among random others."""
    length, batch = t.shape[1], t.shape[0]
    g = torch.Generator().manual_seed(0)
    before, after = (torch.randn(length, batch, n, generator=g).to(t.dtype) for n in (BEFORE, AFTER))
    return torch.cat([before, t.transpose(0, 1), after], -1)


def seen(wide: Tensor) -> Tensor:
    """The channels [batch, length, channels] of the wider tensor, without a copy."""
    return wide.transpose(0, 1)[..., BEFORE:-AFTER]
