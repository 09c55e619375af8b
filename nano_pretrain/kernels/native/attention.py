"""The native attention: attention_forward.cpp and attention_backward.cpp on tensors."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_pretrain.kernels.native.layout import wide
from nano_pretrain.kernels.native.library import Library


@dataclass(frozen=True)
class AttentionInputs:
    """Queries, and the keys that they attend to.

    Args:
        query: [length, batch, heads, head dim], the last contiguous; so for key and value.
        key: [key length, batch, groups, head dim].
        value: shape of key.
        starts: the first key that each query sees [batch, length], int32, non-decreasing in the second; None for 0.
        offset: query i sees keys up to i + offset. 0 for a whole sequence; for the keys of another part of it, how far
            the queries' part is behind theirs.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    starts: Tensor | None
    offset: int = 0

    def __post_init__(self) -> None:
        length, batch, heads, dim = self.query.shape
        groups = self.key.shape[2]
        fits = self.key.shape[1:] == (batch, groups, dim) and groups > 0 and heads % groups == 0
        if not fits or self.value.shape != self.key.shape:
            shapes = [tuple(t.shape) for t in (self.query, self.key, self.value)]
            raise ValueError(f"attention: query, key and value of shapes {shapes} do not fit together")
        if not self.query.dtype == self.key.dtype == self.value.dtype:
            dtypes = [str(t.dtype) for t in (self.query, self.key, self.value)]
            raise ValueError(f"attention: query, key and value are {dtypes}")
        if self.starts is not None and (self.starts.shape != (batch, length) or self.starts.dtype != torch.int32):
            raise ValueError(f"attention: {self.starts.dtype} documents {tuple(self.starts.shape)} do not fit")

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What the kernels take first."""
        return self.query, self.key, self.value, self.starts

    def shape(self) -> ctypes.Array[ctypes.c_int64]:
        """attention::Shape."""
        length, batch, heads, dim = self.query.shape
        sizes = (batch, heads, self.key.shape[2], length, self.key.shape[0], dim, self.offset)
        strides = (t.stride(i) for t in (self.query, self.key, self.value) for i in range(3))
        return (ctypes.c_int64 * 16)(*sizes, *strides)

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.query.shape[3] ** -0.5)


def attention_forward(library: Library, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Attention in fp32 (float64 for float64), in memory linear in the lengths.

    Returns:
        Output [length, batch, heads, head dim] in the dtype of the query, and the log-sum-exp of each query's scores
        [batch, heads, length] in fp32 or float64; 0 and minus infinity for a query that sees no key.
    """
    query = inputs.query
    length, batch, heads, dim = query.shape
    key_length, groups = inputs.key.shape[0], inputs.key.shape[2]
    out = query.new_empty(query.shape)
    lse = query.new_empty((batch, heads, length), dtype=wide(query.dtype))
    scratch = lse.new_empty(library.integer("attention_forward_scratch", query.dtype, batch, groups, key_length, dim))
    library.call("attention_forward", query.dtype, inputs.shape(), *inputs.tensors, inputs.scale, out, lse, scratch)
    return out, lse


def attention_backward(
    library: Library, inputs: AttentionInputs, out: Tensor, lse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous.

    Args:
        library: the kernels.
        inputs: those of the forward pass.
        out: its output, contiguous.
        lse: its log-sum-exp.
        dout: gradient of the output, contiguous.
    """
    query, key, value = inputs.tensors[:3]
    length, batch, heads, dim = query.shape
    dquery, dkey, dvalue = (t.new_empty(t.shape) for t in (query, key, value))
    scratch = lse.new_empty(
        library.integer("attention_backward_scratch", query.dtype, batch, heads, length, key.shape[0], dim)
    )
    library.call(
        "attention_backward", query.dtype, inputs.shape(), *inputs.tensors, inputs.scale, out, lse, dout,
        dquery, dkey, dvalue, scratch,
    )  # fmt: skip
    return dquery, dkey, dvalue


def causal_attention(library: Library, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
    """Attention to earlier tokens of the same document, differentiable.

    Args:
        library: the kernels.
        query: [length, batch, heads, head dim], the last of the tokens that have keys.
        key: [key length, batch, groups, head dim].
        value: shape of key.
        documents: document of each key's token [batch, key length], non-decreasing, or None.

    Returns:
        [length, batch, heads, head dim] in the dtype of the query.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    starts = None
    if documents is not None:
        documents = documents.contiguous()
        # The first key of a query is the first token of its document.
        own = documents[:, key.shape[0] - query.shape[0] :].contiguous()
        starts = torch.searchsorted(documents, own, out_int32=True)
    out: Tensor = _NativeAttention.apply(library, query, key, value, starts)  # type: ignore[no-untyped-call]
    return out


class _NativeAttention(torch.autograd.Function):
    """Causal attention of the end of a sequence; keeps its inputs, its output and the log-sum-exp of each query."""

    @staticmethod
    def forward(ctx: Any, library: Library, query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None) -> Tensor:
        inputs = _aligned_at_the_end(_dense_heads(query), _dense_heads(key), _dense_heads(value), starts)
        out, lse = attention_forward(library, inputs)
        ctx.library = library
        ctx.save_for_backward(*inputs.tensors, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, starts, out, lse = ctx.saved_tensors
        inputs = _aligned_at_the_end(query, key, value, starts)
        found = attention_backward(ctx.library, inputs, out, lse, grads[0].contiguous())
        wanted = (g if needed else None for g, needed in zip(found, ctx.needs_input_grad[1:4], strict=True))
        return None, *wanted, None


def _aligned_at_the_end(query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None) -> AttentionInputs:
    """The last query sees the last key."""
    return AttentionInputs(query, key, value, starts, offset=key.shape[0] - query.shape[0])


def _dense_heads(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
