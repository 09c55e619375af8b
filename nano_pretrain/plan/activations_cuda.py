"""Activations on a GPU: what Transformer Engine 2.9 (to 2.11), mamba-ssm 2.3 and megatron-core 0.16 keep, by source.

Not measured on a GPU. Transformer Engine's linears keep their input, in FP8 its column-wise copy only;
`LayerNormLinear` keeps the norm's input, its output and an FP32 1 / sigma for each token, under sequence parallelism of
the rank's own tokens. Weight gradients exist once in BF16 (`gradient_accumulation_fusion` is off). FP8 copies of
gradients, which live for one product, and the splits by which the scan sums dB, dC and dCB are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable

from nano_pretrain.plan.activations import HeadActivations, LayerActivations, Sizes
from nano_pretrain.plan.buffers import ParameterBuffer
from nano_pretrain.recipe.derived import mamba_shape, padded_vocab_size
from nano_pretrain.recipe.pattern import LayerType

CHUNK = 128
"""Tokens of a chunk of mamba-ssm's scan: the default of megatron-core's mixer."""


def mamba(sizes: Sizes) -> LayerActivations:
    """A Mamba-2 layer.

    Kept: what `LayerNormLinear` keeps; `zxbcdt` and `out_x` (the scan's output before the gate) by
    `MambaSplitConv1dScanCombinedFn`, which computes the convolution and the chunks' states again; `x` (gated) and the
    FP32 `rstd` of each group by the gated norm; the input of out_proj.

    Backward, the largest of: out_proj with the gradients of its input and weight; `_mamba_chunk_scan_combined_bwd` with
    `dout`, `dout_x`, `dzxbcdt`, `xBC_conv`, `dxBC`, in FP32 `dt`, `dA_cumsum` and two gradients of theirs, `dB`, `dC`,
    and three chunk x chunk matrices a group (`CB`, `dCB`, their sum), while the input of out_proj and `x` are gone; its
    states of each chunk are FP32 and BF16, and so are their gradients.
    """
    model, shape = sizes.model, mamba_shape(sizes.model)
    out_input, per_group = sizes.input_of_linear(sizes.inner), sizes.per_token(sizes.groups)
    dropped = 2 * sizes.inner + per_group + out_input
    out_proj = sizes.gathered + sizes.inner + sizes.weight(model.hidden_size, shape.inner)
    scan = 2 * sizes.inner + sizes.projected + 2 * sizes.convolved + 4 * sizes.per_token(model.mamba_num_heads)
    scan += per_group * (2 * model.mamba_state_dim + 3 * CHUNK)
    scan -= out_input + sizes.inner + per_group
    return LayerActivations(
        input=sizes.residual,
        kept=_norm_linear(sizes) + sizes.projected + dropped,
        working=sizes.residual + max(out_proj, scan),
        working_states=3 * sizes.per_token(shape.inner * model.mamba_state_dim // CHUNK),
        dropped=dropped,
        again=max(out_proj + sizes.inner, scan + 2 * sizes.inner) - max(out_proj, scan),
    )


def _norm_linear(sizes: Sizes) -> int:
    """`inputmat`, `ln_out` and `rsigma` of `LayerNormLinear`."""
    return sizes.residual + sizes.input_of_linear(sizes.residual) + 4 * sizes.residual_tokens


def _entering(sizes: Sizes, channels: int, rows: int) -> int:
    """The backward pass of `LayerNormLinear` with all that is there, the gathered norm and the scattered gradient too.

    That of a Mamba-2 layer is never the largest: the scan's has as many tensors of more channels.

    Args:
        sizes: sizes.
        channels: bytes of the gradient of its output.
        rows: of its weight.
    """
    sharded = sizes.residual if sizes.layout.sequence else 0
    gradients = channels + sizes.whole + sharded + sizes.weight(rows, sizes.model.hidden_size)
    return _norm_linear(sizes) + sizes.input_of_linear(sizes.gathered) + gradients


def feed_forward(sizes: Sizes) -> LayerActivations:
    """A feed-forward layer.

    Kept: what `LayerNormLinear` keeps, ReLU's output, the input of fc2, which is its square.

    Backward, the largest of: fc2 with the gradients of its input and weight; the square, with the gradient and two
    products, while the input of fc2 is gone; fc1.
    """
    model = sizes.model
    fc2_input = sizes.input_of_linear(sizes.ffn)
    kept = _norm_linear(sizes) + sizes.ffn + fc2_input
    fc2 = sizes.gathered + sizes.ffn + sizes.weight(model.hidden_size, model.ffn_hidden_size)
    fc1 = _entering(sizes, sizes.ffn, model.ffn_hidden_size) - kept
    return LayerActivations(
        input=sizes.residual,
        kept=kept,
        working=sizes.residual + max(fc2, 3 * sizes.ffn - fc2_input, fc1),
        dropped=fc2_input,
        again=sizes.ffn,
    )


def attention(sizes: Sizes) -> LayerActivations:
    """An attention layer.

    Kept: what `LayerNormLinear` keeps; queries, keys and values, made contiguous, the output and the FP32 log-sum-exp
    by the fused kernel. linear_proj keeps the output too, in FP8 as a copy.

    Backward, the largest of: linear_proj with the gradients of its input and weight; the kernel with the gradients of
    its output, of queries, keys and values, and an FP32 sum for the queries', then all in one tensor; linear_qkv.
    Context parallelism passes keys, values and their gradients on in a ring, each in two buffers.
    """
    model = sizes.model
    projected = sizes.queries + 2 * sizes.keys
    copy = sizes.input_of_linear(sizes.queries) if sizes.fp8 else 0
    channels = model.num_attention_heads * model.head_dim
    kept = _norm_linear(sizes) + projected + sizes.queries + copy + sizes.per_token(model.num_attention_heads)
    linear_proj = sizes.gathered + sizes.queries + sizes.weight(model.hidden_size, channels)
    linear_qkv = _entering(sizes, projected, channels + 2 * model.num_query_groups * model.head_dim) - kept
    ring = 8 * sizes.keys if sizes.layout.context > 1 else 0
    sums = 4 * sizes.queries // sizes.element
    kernel = sizes.queries + projected + max(sums, projected) + ring
    return LayerActivations(
        input=sizes.residual, kept=kept, working=sizes.residual + max(linear_proj, kernel, linear_qkv)
    )


def head(sizes: Sizes) -> HeadActivations:
    """Final norm, head and loss, at the larger of two moments.

    Kept: input and output of the final norm, its 1 / sigma. The loss (`vocab_parallel_cross_entropy`): logits, or their
    gradient, and an FP32 softmax; where the vocabulary is padded a masked copy of the logits too. The head: the
    gradient of the logits and those of its input and weight.
    """
    kept = 2 * sizes.residual + 4 * sizes.residual_tokens
    copies = 1 + (padded_vocab_size(sizes.model) > sizes.model.vocab_size)
    softmax = 4 * sizes.logits // sizes.element if sizes.element < 4 else 0
    loss = HeadActivations(kept, copies * sizes.logits + softmax, 0)
    shard = sizes.residual if sizes.layout.sequence else 0
    linear = HeadActivations(kept, sizes.logits, sizes.whole + shard + sizes.table_gradient)
    return max(loss, linear, key=lambda moment: moment.logits + moment.working)


def held(sizes: Sizes, last: bool) -> int:
    """The buffer in which megatron-core's head gathers its input under sequence parallelism.

    Args:
        sizes: sizes.
        last: whether the position ends with the head.
    """
    return sizes.gathered if last else 0


def embedding(sizes: Sizes) -> int:
    """The gradients of the embedding's output and of the embedding."""
    return sizes.table_gradient + sizes.gathered + sizes.residual


def update(buffers: Iterable[ParameterBuffer], last: int) -> int:
    """NCCL sums the gradients, and the fused kernels of clipping and Adam write them, where they are."""
    return 0


def copied(buffers: Iterable[ParameterBuffer], layer: int) -> int:
    """NCCL needs no copies of gradients."""
    return 0


LAYERS = {LayerType.MAMBA: mamba, LayerType.FEED_FORWARD: feed_forward, LayerType.ATTENTION: attention}
