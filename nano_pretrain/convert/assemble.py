"""Tensors from rows of others, a block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from nano_pretrain.convert.names import Target

BLOCK_BYTES = 1 << 26
ASKED_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""What `hf.dtype` may ask for beside the stored one."""


class Source(Protocol):
    """Where rows come from."""

    def rows(self, name: str, start: int, count: int) -> Tensor:
        """Rows [start, start + count) of a tensor."""


def blocks(target: Target, source: Source, dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows of a tensor in order, in contiguous blocks of some tens of megabytes."""
    row = math.prod(target.shape[1:])
    most = max(1, BLOCK_BYTES // (max(row, 1) * dtype.itemsize))
    end = 0
    for part in target.parts:
        yield from _zeros(part.start - end, target.shape[1:], most, dtype)
        end = part.start + part.count
        for start in range(0, part.count, most):
            count = min(most, part.count - start)
            yield source.rows(part.source, part.source_start + start, count).to(dtype).contiguous()
    yield from _zeros(target.shape[0] - end, target.shape[1:], most, dtype)


def whole(target: Target, source: Source, dtype: torch.dtype) -> Tensor:
    """All of a tensor; where it is one of the source's, that one."""
    if len(target.parts) == 1 and target.parts[0].count == target.shape[0]:
        part = target.parts[0]
        return source.rows(part.source, part.source_start, part.count).to(dtype).contiguous()
    out = torch.empty(target.shape, dtype=dtype)
    start = 0
    for block in blocks(target, source, dtype):
        out[start : start + len(block)] = block
        start += len(block)
    return out


def _zeros(rows: int, rest: tuple[int, ...], most: int, dtype: torch.dtype) -> Iterator[Tensor]:
    for start in range(0, rows, most):
        yield torch.zeros((min(most, rows - start), *rest), dtype=dtype)
