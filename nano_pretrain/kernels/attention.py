"""Causal attention for layer specs without Transformer Engine: native kernels, or `scaled_dot_product_attention`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nano_pretrain.kernels.native.attention import causal_attention
from nano_pretrain.kernels.native.layout import wide
from nano_pretrain.kernels.native.library import active
from nano_pretrain.parallel.context import own_chunks, whole_sequence

QUERY_BLOCK = 512
"""Queries of a block of the plain attention to a longer sequence; each block has a mask."""


class CausalAttention(nn.Module):
    """Core attention with grouped queries; memory grows linearly with the sequence, no mask is ever built.

    Takes the place of megatron-core's DotProductAttention, which holds all scores, and has its constructor. The native
    kernels do all but decoding; without them the documents of packed samples are a loop of causal calls of torch's.
    BF16 inputs are computed in FP32: the BF16 flash kernel of CPU torch accumulates the key and value gradients in BF16
    (error 7e-3 against 1.7e-3, growing with the length).

    Under context parallelism a rank has the queries of two chunks of the sequence (see `parallel.context`) and gathers
    the keys and values of all ranks, of which grouped queries need few; a chunk attends to what comes before its end.

    Args:
        config: megatron-core's TransformerConfig.
        layer_number: unused, as every other argument; megatron-core passes them by name.
        pg_collection: megatron-core's process groups; None where nothing is parallel.
        **unused: see layer_number.
    """

    def __init__(self, config: Any, layer_number: int, pg_collection: Any = None, **unused: Any) -> None:
        super().__init__()
        self.config = config
        self.context_group = pg_collection.cp if pg_collection is not None and pg_collection.cp.size() > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend to earlier tokens of the same document.

        Args:
            query: [length, batch, heads, head dim].
            key: [key length, batch, groups, head dim]; longer than the query only while decoding.
            value: shape of key.
            attention_mask: document of each token of the whole sequence [batch, length x context-parallel ranks],
                non-decreasing, or None.
            attn_mask_type: megatron-core's AttnMaskType; `no_mask` while decoding.
            attention_bias: must be None.
            packed_seq_params: must be None: documents come as `attention_mask`.

        Returns:
            [length, batch, heads * head dim].

        Raises:
            ValueError: a bias or packed sequence parameters were given, or shapes or dtypes do not fit together.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("CausalAttention takes documents as attention_mask, and no bias")
        if attn_mask_type is not None and attn_mask_type.name == "no_mask":
            out = _decode(query, key, value)
        elif self.context_group is None:
            out = attend(query, key, value, attention_mask)
        else:
            out = _attend_across_ranks(query, key, value, attention_mask, self.context_group)
        return out.flatten(2)


def _attend_across_ranks(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, group: dist.ProcessGroup
) -> Tensor:
    """Attention of this rank's two chunks to the keys of all ranks."""
    keys, values = whole_sequence(torch.cat((key, value), 2), group).chunk(2, 2)
    answers = []
    for number, chunk in zip(own_chunks(group.rank(), group.size()), query.chunk(2), strict=True):
        end = (number + 1) * chunk.shape[0]
        before = None if documents is None else documents[:, :end]
        answers.append(attend(chunk, keys[:end], values[:end], before))
    return torch.cat(answers)


def attend(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
    """Attention to earlier tokens of the same document.

    Args:
        query: [length, batch, heads, head dim], the last of the tokens that have keys.
        key: [key length, batch, groups, head dim].
        value: shape of key.
        documents: document of each key's token [batch, key length], non-decreasing, or None.

    Returns:
        [length, batch, heads, head dim].
    """
    library = active(query, key, value)
    if library is not None:
        return causal_attention(library, query, key, value, documents)
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    out = _causal(q, k, v) if documents is None else _attend_documents(q, k, v, documents)
    return out.permute(2, 0, 1, 3)


def _decode(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of new tokens to all keys, in the layout of `attend`."""
    return _softmax(*(t.permute(1, 2, 0, 3) for t in (query, key, value))).permute(2, 0, 1, 3)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[batch, heads, length, head dim]; the last query sees the last key.

    Queries that begin behind the first key go in blocks: torch has no kernel for them that needs no mask.
    """
    behind = k.shape[2] - q.shape[2]
    if not behind:
        return _softmax(q, k, v, is_causal=True)
    # Here and not block by block: the gradients of a key from all blocks are summed before they are rounded.
    q_, k_, v_ = _computed(q, k, v)
    answers, end = [], behind
    for block in q_.split(QUERY_BLOCK, 2):
        end += block.shape[2]
        visible = torch.ones(block.shape[2], end, dtype=torch.bool, device=q.device).tril(end - block.shape[2])
        answers.append(_softmax(block, k_[:, :, :end], v_[:, :, :end], attn_mask=visible))
    return torch.cat(answers, 2).to(q.dtype)


def _softmax(q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
    """[batch, heads, length, head dim] of query dtype."""
    q_, k_, v_ = _computed(q, k, v)
    return F.scaled_dot_product_attention(q_, k_, v_, enable_gqa=True, **mask).to(q.dtype)


def _computed(*tensors: Tensor) -> Iterator[Tensor]:
    """In the dtype that attention is computed in: on a CPU a wide one."""
    return (t.to(wide(t.dtype)) if t.device.type == "cpu" else t for t in tensors)


def _attend_documents(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """As `_causal`; each run of queries of one document sees the keys of that document."""
    behind = k.shape[2] - q.shape[2]
    rows = []
    for row, of_keys in enumerate(documents.contiguous()):
        found, counts = of_keys[behind:].unique_consecutive(return_counts=True)
        starts = torch.searchsorted(of_keys, found).tolist()
        answers, first = [], behind
        for start, count in zip(starts, counts.tolist(), strict=True):
            end = first + count
            own = slice(row, row + 1)
            answers.append(
                _causal(q[own, :, first - behind : end - behind], k[own, :, start:end], v[own, :, start:end])
            )
            first = end
        rows.append(torch.cat(answers, 2))
    return torch.cat(rows)
