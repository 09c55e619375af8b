"""Causal attention within documents on a GPU, by torch's flex_attention.

Transformer Engine's attention knows documents only as packed sequences: batch 1, and under context parallelism padding
of every document. Here they are the full-sequence indices that the Mamba-2 layers take as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from nano_pretrain.parallel.context import own_tokens, whole_sequence


def document_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """Attention to earlier tokens of the same document; memory grows linearly with the sequence.

    Under context parallelism a rank has the queries of two chunks of the sequence (see `parallel.context`) and gathers
    the keys and values of all ranks.

    Args:
        query: [length, batch, heads, head dim], this rank's.
        key: [length, batch, groups, head dim], this rank's.
        value: shape of key.
        documents: document of each token of the whole sequence [batch, length x context-parallel ranks].
        group: the context-parallel group, or None.

    Returns:
        [length, batch, heads, head dim].
    """
    place = (0, 1)
    if group is not None:
        place = (group.rank(), group.size())
        key, value = whole_sequence(torch.cat((key, value), 2), group).chunk(2, 2)
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    out: Tensor = _compiled(flex_attention)(q, k, v, block_mask=_latest.of(documents, place), enable_gqa=True)
    return out.permute(2, 0, 1, 3)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Either function of torch's builds every score of the sequence unless it is compiled."""
    return torch.compile(function, dynamic=False)


class LatestMask:
    """The block mask of the documents that were last asked for: one micro-batch's, for all of its attention layers.

    A recomputed layer gets its documents as another tensor object with the same storage.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._documents: Tensor | None = None
        self._mask: BlockMask | None = None

    def of(self, documents: Tensor, place: tuple[int, int]) -> BlockMask:
        """The mask of a rank's queries [length / ranks] and all keys [length].

        Args:
            documents: document of each token of the whole sequence [batch, length].
            place: rank and size of the context-parallel group.
        """
        key = (documents.data_ptr(), documents._version, documents.shape, documents.device, place)
        if self._mask is None or key != self._key:
            # Kept, so that no other documents get the same storage.
            self._key, self._documents = key, documents
            self._mask = block_mask(documents, place)
        return self._mask


_latest = LatestMask()


def block_mask(documents: Tensor, place: tuple[int, int]) -> BlockMask:
    """Which blocks of keys a rank's queries see, and which tokens within them; arguments as of `LatestMask.of`."""
    batch, length = documents.shape
    tokens = own_tokens(torch.arange(length, device=documents.device), 0, place)

    def visible(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        token = tokens[query]
        return (key <= token) & (documents[sample, key] == documents[sample, token])

    mask: BlockMask = _compiled(create_block_mask)(visible, batch, None, len(tokens), length, device=documents.device)
    return mask
