"""The documents of packed samples, as the kernels compare them."""

from __future__ import annotations

import torch
from torch import Tensor


def document_numbers(seq_idx: Tensor | None) -> Tensor | None:
    """The document of each token in int32, with the same borders.

    Args:
        seq_idx: document of each token [batch, length], non-decreasing, or None; int32 is taken as it is.

    Raises:
        ValueError: seq_idx is not of integers: rounded, neighbours would become one document.
    """
    if seq_idx is None or seq_idx.dtype == torch.int32:
        return seq_idx
    if seq_idx.is_floating_point() or seq_idx.is_complex():
        raise ValueError(f"seq_idx: documents are numbered by integers, not in {seq_idx.dtype}")
    # Counted anew: documents that are 2^32 apart would be one in int32.
    begins = seq_idx[:, 1:] != seq_idx[:, :-1]
    return torch.nn.functional.pad(begins, (1, 0)).cumsum(1, dtype=torch.int32)[:, : seq_idx.shape[1]]
