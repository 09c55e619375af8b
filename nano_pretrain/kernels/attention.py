"""Causal attention for layer specs without Transformer Engine: native kernels, or `scaled_dot_product_attention`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano_pretrain.kernels.native.attention import causal_attention
from nano_pretrain.kernels.native.layout import wide
from nano_pretrain.kernels.native.library import active


class CausalAttention(nn.Module):
    """Core attention with grouped queries; memory grows linearly with the sequence, no mask is ever built.

    Takes the place of megatron-core's DotProductAttention, which holds all scores, and has its constructor. The native
    kernels do all but decoding; without them the documents of packed samples are a loop of causal calls of torch's.
    BF16 inputs are computed in FP32: the BF16 flash kernel of CPU torch accumulates the key and value gradients in BF16
    (error 7e-3 against 1.7e-3, growing with the length).

    Args:
        config: megatron-core's TransformerConfig.
        layer_number: unused, as every other argument; megatron-core passes them by name.
        **unused: see layer_number.
    """

    def __init__(self, config: Any, layer_number: int, **unused: Any) -> None:
        super().__init__()
        self.config = config

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
            attention_mask: document of each token [batch, length], non-decreasing, or None.
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
        causal = attn_mask_type is None or attn_mask_type.name != "no_mask"
        library = active(query, key, value)
        if library is not None and causal and query.shape[0] == key.shape[0]:
            return causal_attention(library, query, key, value, attention_mask).flatten(2)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = _attend(q, k, v, causal) if attention_mask is None else _attend_documents(q, k, v, attention_mask)
        return out.permute(2, 0, 1, 3).flatten(2)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """[batch, heads, length, head dim] of query dtype."""
    dtype = wide(q.dtype) if q.device.type == "cpu" else q.dtype
    q_, k_, v_ = (t.to(dtype) for t in (q, k, v))
    return F.scaled_dot_product_attention(q_, k_, v_, is_causal=causal, enable_gqa=True).to(q.dtype)


def _attend_documents(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    rows = []
    for row, row_documents in enumerate(documents):
        lengths = row_documents.unique_consecutive(return_counts=True)[1].tolist()
        parts = zip(*(t[row : row + 1].split(lengths, 2) for t in (q, k, v)), strict=True)
        rows.append(torch.cat([_attend(q_, k_, v_, causal=True) for q_, k_, v_ in parts], 2))
    return torch.cat(rows)
