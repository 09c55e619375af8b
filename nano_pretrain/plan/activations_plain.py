"""Activations on a CPU with the kernels in plain PyTorch: what autograd keeps of their operations.

Linears, reductions and the optimizer are those of `activations_cpu`.
"""

from __future__ import annotations

from dataclasses import replace

from nano_pretrain.plan.activations import HeadActivations, LayerActivations, Sizes
from nano_pretrain.plan.activations_cpu import entering, head_linear, leaving
from nano_pretrain.recipe.derived import mamba_shape, padded_vocab_size
from nano_pretrain.recipe.pattern import LayerType

CHUNK, SEGMENT = 64, 1024
"""Tokens of a chunk of the scan, and tokens that its backward pass computes again at a time."""

PIECE = 2**20
"""Logits that the loss widens at a time; the piece before is released when the next one is there."""


def mamba(sizes: Sizes) -> LayerActivations:
    """A Mamba-2 layer.

    Kept between the projections: the convolution's output; dt before and after its softplus in FP32; y; SiLU of z; the
    gated output and its norm in FP32, and the norm. States: one in FP32 before each segment of the scan.

    Backward, the largest of: out_proj; the gated norm, five FP32 tensors beside its input, while its two outputs are
    gone; the scan of a segment, with the gradients of y and z, and those of the other segments' inputs, while what lies
    behind the scan is gone; the convolution, with the gradients of its output and z and five FP32 tensors, six with
    documents, and its input in FP32, while all else between the projections is gone; in_proj and the norm.
    """
    model, shape = sizes.model, mamba_shape(sizes.model)
    steps = sizes.per_token(model.mamba_num_heads)
    behind = 3 * sizes.inner + 2 * sizes.per_token(shape.inner)
    dropped = sizes.convolved + 2 * steps + behind
    states = _states(sizes, -(-sizes.sequence // SEGMENT))
    kept = _norm(sizes) + sizes.projected + dropped
    out_proj = leaving(sizes, sizes.inner, shape.inner, released=sizes.inner)
    norm = 4 * sizes.per_token(shape.inner) - sizes.inner
    segment = replace(sizes, sequence=min(SEGMENT, sizes.sequence))
    others = sizes.convolved + steps - segment.convolved - segment.per_token(model.mamba_num_heads)
    scan = 2 * sizes.inner + others + _segment(segment) - behind
    wide_taps = 5 + sizes.documents + (sizes.element < 4)
    taps = sizes.inner + sizes.convolved + wide_taps * _in_fp32(sizes, sizes.convolved) - dropped - states
    in_proj = _entering(sizes, sizes.projected, shape.projected) - kept - states
    return LayerActivations(
        input=sizes.residual,
        kept=kept,
        states=states,
        working=sizes.residual + max(out_proj, norm, scan, taps, in_proj),
        dropped=dropped,
        again=sizes.inner,
    )


def _segment(sizes: Sizes) -> int:
    """The backward pass of the scan of one segment, with all that it computes again.

    The larger of two moments, with the scores by group and of tensors [heads, tokens, chunk]: the product that gives y,
    with the FP32 decay, the weighted scores and their gradient, seven tensors of x's size, as many of B's, one more of
    each if the last chunk is padded, and two FP32 states of each chunk; the decay, with the gradient of the weighted
    scores and three FP32 ones that come of it.
    """
    model = sizes.model
    square = sizes.per_token(model.mamba_num_heads * CHUNK)
    weighted = square * sizes.element // 4
    scores, by_group = (sizes.width(sizes.groups * n) for n in (CHUNK, model.mamba_state_dim))
    products = square + 2 * weighted + (7 + (sizes.sequence % CHUNK > 0)) * (sizes.inner + by_group)
    decay = 4 * square + (weighted if sizes.element < 4 else 0) + 3 * sizes.inner + 2 * by_group
    states = _states(sizes, 2 * -(-sizes.sequence // CHUNK))
    return _whole_chunks(sizes, scores) + max(_whole_chunks(sizes, products) + states, _whole_chunks(sizes, decay))


def _states(sizes: Sizes, count: int) -> int:
    """So many FP32 states of all heads of the rank."""
    model, ranks = sizes.model, sizes.layout.tensor * sizes.layout.context
    return 4 * count * sizes.batch * model.mamba_num_heads * model.mamba_head_dim * model.mamba_state_dim // ranks


def _whole_chunks(sizes: Sizes, size: int) -> int:
    """A tensor of so many bytes, padded to whole chunks."""
    return size * (-(-sizes.sequence // CHUNK) * CHUNK) // sizes.sequence


def _in_fp32(sizes: Sizes, size: int) -> int:
    """An FP32 tensor with as many numbers as one of so many bytes."""
    return 4 * size // sizes.element


def _norm(sizes: Sizes) -> int:
    """The norm before a layer: its input and the result without weights in FP32, and the output."""
    return 2 * _in_fp32(sizes, sizes.residual) + sizes.residual


def _entering(sizes: Sizes, channels: int, rows: int) -> int:
    """As `entering`; the norm's backward pass has five FP32 tensors beside its input."""
    wide = _in_fp32(sizes, sizes.residual)
    return max(entering(sizes, channels, rows) - sizes.residual + 2 * wide, 6 * wide)


def feed_forward(sizes: Sizes) -> LayerActivations:
    """A feed-forward layer.

    Kept: by the norm; ReLU's output, its square (by fc2). What selective recomputation computes from is fc1's output.

    Backward, the largest of: fc2; the square, with its gradient and three products, while the square is gone; fc1 and
    the norm.
    """
    model = sizes.model
    kept = _norm(sizes) + 2 * sizes.ffn
    fc2 = leaving(sizes, sizes.ffn, model.ffn_hidden_size, released=sizes.ffn)
    fc1 = _entering(sizes, sizes.ffn, model.ffn_hidden_size) - kept
    return LayerActivations(
        input=sizes.residual,
        kept=kept,
        working=sizes.residual + max(fc2, 3 * sizes.ffn, fc1),
        dropped=sizes.ffn,
        again=2 * sizes.ffn,
    )


def attention(sizes: Sizes) -> LayerActivations:
    """An attention layer.

    Kept: by the norm; queries, keys, values, output and log-sum-exp in FP32; in BF16 and with documents the output
    again, by linear_proj; in FP32, in which nothing is copied, linear_qkv's output, whose views keys and values are,
    beside the queries.

    Backward, the largest of: linear_proj; the kernel with the FP32 gradients of its output, of queries, keys and
    values, while linear_proj's input is gone; linear_qkv and the norm.
    """
    model = sizes.model
    projected, channels = sizes.queries + 2 * sizes.keys, model.num_attention_heads * model.head_dim
    wide = 4 // sizes.element
    own = sizes.queries if sizes.element == 2 or sizes.documents else 0
    inputs = wide * projected if sizes.element == 2 else projected + _parted_queries(sizes)
    kept = _norm(sizes) + inputs + wide * sizes.queries + own + sizes.per_token(model.num_attention_heads)
    linear_proj = leaving(sizes, sizes.queries, channels, released=own)
    kernel = wide * (sizes.queries + projected) - own
    linear_qkv = _entering(sizes, projected, channels + 2 * model.num_query_groups * model.head_dim) - kept
    return LayerActivations(
        input=sizes.residual, kept=kept, working=sizes.residual + max(linear_proj, kernel, linear_qkv)
    )


def _parted_queries(sizes: Sizes) -> int:
    return sizes.queries if sizes.model.num_query_groups > sizes.layout.tensor else 0


def head(sizes: Sizes) -> HeadActivations:
    """Final norm, head and loss, which has two pieces of the logits in FP32 at a time, and in BF16 a copy of one.

    The columns that pad the vocabulary, of which the first rank has fewest, are not among them.
    """
    columns = padded_vocab_size(sizes.model) // sizes.layout.tensor
    valid = min(sizes.model.vocab_size, columns)
    logits = sizes.tokens * columns
    pieces = 4 * (min(2 * PIECE, logits) + (min(PIECE, logits) if sizes.element < 4 else 0))
    working = max(pieces * valid // columns, head_linear(sizes))
    return HeadActivations(kept=_norm(sizes), logits=sizes.logits, working=working)


LAYERS = {LayerType.MAMBA: mamba, LayerType.FEED_FORWARD: feed_forward, LayerType.ATTENTION: attention}
