"""Activations on a CPU: what our modules and megatron-core's linears keep, with the native kernels.

The kernels in plain PyTorch (`cluster.cpu_kernels=plain`) keep other tensors: see `activations_plain`. FP8 recipes are
BF16 here.

Every weight gradient exists once in the dtype of the parameter before it is added to the FP32 buffer. When it is BF16,
PyTorch copies it to FP32 for that, after the linear's backward pass has released its input and its output's gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

from nano_pretrain.plan.activations import HeadActivations, LayerActivations, Sizes
from nano_pretrain.plan.buffers import EMBEDDING, GRADIENT_BYTES, ParameterBuffer
from nano_pretrain.recipe.derived import mamba_shape
from nano_pretrain.recipe.pattern import LayerType

LANES = 16
"""Numbers of an AVX-512 register: head dimensions and states are padded to a multiple."""

STATE_TOKENS = 1024
"""The scan keeps a state for each so many tokens."""

SCAN_TASKS, SCAN_HEADS = 8, 4
ATTENTION_TASKS, ATTENTION_KEYS, ATTENTION_ROWS = 16, 64, 8
"""How the kernels divide their work, which decides how many partial sums there are."""


def mamba(sizes: Sizes) -> LayerActivations:
    """A Mamba-2 layer.

    Kept: the input (by the norm), the norm's output (by in_proj), in_proj's output and the scan's output before the
    gate (by the mixer), the gated output (by the gated norm), its norm (by out_proj); one FP32 state a head in 1,024
    tokens.

    Backward, the largest of: out_proj with the gradients of its input and weight; the mixer with the gradients of its
    output and input, of the scan's output and the convolution's, the convolution's output again, and in FP32 either dt
    three times and the partial sums of B and C, or dt five times and the sums, while the tensors kept for out_proj and
    the gated norm are gone; in_proj and the norm. All with the gradient of the residual stream.
    """
    model, shape = sizes.model, mamba_shape(sizes.model)
    ranks = sizes.layout.tensor * sizes.layout.context
    heads, segments = model.mamba_num_heads // ranks, -(-sizes.sequence // STATE_TOKENS)
    states = 4 * sizes.batch * segments * heads * _lanes(model.mamba_state_dim) * _lanes(model.mamba_head_dim)
    kept = 2 * sizes.residual + sizes.projected + 3 * sizes.inner
    out_proj = leaving(sizes, sizes.inner, shape.inner, released=sizes.inner)
    mixer = sizes.projected + 2 * sizes.convolved + _scan_sums(sizes)
    in_proj = entering(sizes, sizes.projected, shape.projected) - kept - states
    return LayerActivations(
        input=sizes.residual,
        kept=kept,
        states=states,
        working=sizes.residual + max(out_proj, mixer, in_proj),
        dropped=3 * sizes.inner,
        again=max(out_proj + sizes.inner, mixer + 2 * sizes.inner, in_proj) - max(out_proj, mixer, in_proj),
    )


def _scan_sums(sizes: Sizes) -> int:
    """FP32: dt and gradients of B and C, one for each task of a group and their sum, or more of dt and the sums."""
    model, ranks = sizes.model, sizes.layout.tensor * sizes.layout.context
    heads, groups = model.mamba_num_heads // ranks, sizes.groups // ranks
    heads_of_task = max(1, min(SCAN_HEADS, heads // groups, sizes.batch * heads // SCAN_TASKS))
    blocks = -(-heads // groups // heads_of_task)
    dt, both = sizes.per_token(model.mamba_num_heads), 2 * sizes.per_token(sizes.groups * model.mamba_state_dim)
    return max(3 * dt + both * (blocks + (blocks > 1)), 5 * dt + both)


def feed_forward(sizes: Sizes) -> LayerActivations:
    """A feed-forward layer.

    Kept: the input (by the norm), the norm's output (by fc1), fc1's output (by the squared ReLU), its square (by fc2).

    Backward, the largest of: fc2 with the gradients of its input and weight; fc1 and the norm. With the gradient of the
    residual stream.
    """
    model = sizes.model
    kept = 2 * sizes.residual + 2 * sizes.ffn
    fc2 = leaving(sizes, sizes.ffn, model.ffn_hidden_size, released=sizes.ffn)
    fc1 = entering(sizes, sizes.ffn, model.ffn_hidden_size) - kept
    return LayerActivations(
        input=sizes.residual,
        kept=kept,
        working=sizes.residual + max(fc2, fc1),
        dropped=sizes.ffn,
        again=sizes.ffn,
    )


def attention(sizes: Sizes) -> LayerActivations:
    """An attention layer.

    Kept: the input (by the norm), the norm's output (by linear_qkv), linear_qkv's output, of which keys and values are
    views, the queries again if several groups have to be parted, the output (by the kernel and linear_proj), the FP32
    log-sum-exp.

    Backward, the largest of: linear_proj with the gradients of its input and weight; the kernel with the gradients of
    its output, of queries, keys and values, and its FP32 partial sums; linear_qkv and the norm. With the gradient of
    the residual stream.

    Under context parallelism keys and values are the gathered ones of all ranks, a copy, and the outputs of a rank's
    two chunks are joined in another. Backward, each chunk has gradients for all keys and values, whose sum is laid out
    by ranks in FP32.
    """
    model, gathered = sizes.model, _gathered(sizes)
    projected = sizes.queries + 2 * sizes.keys
    copied = sizes.queries if model.num_query_groups > sizes.layout.tensor else 0
    read = (copied or projected) + gathered + sizes.queries if gathered else projected + copied
    kept = 2 * sizes.residual + read + sizes.queries + sizes.per_token(model.num_attention_heads)
    linear_proj = leaving(sizes, sizes.queries, model.num_attention_heads * model.head_dim, released=0)
    kernel = sizes.queries + projected + _attention_sums(sizes)
    if gathered:
        laid_out = (1 + sizes.element // 4) * gathered * 4 // sizes.element
        kernel = 2 * sizes.queries + gathered + max(gathered + _attention_sums(sizes), laid_out)
    linear_qkv = entering(sizes, projected, (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim)
    return LayerActivations(
        input=sizes.residual,
        kept=kept,
        working=sizes.residual + max(linear_proj, kernel, linear_qkv - kept),
    )


def _gathered(sizes: Sizes) -> int:
    """Keys and values of the whole sequence, where they have to be gathered."""
    context = sizes.layout.context
    return 2 * sizes.keys * context if context > 1 else 0


def _attention_sums(sizes: Sizes) -> int:
    """FP32: gradients of the queries, once for each task of a head, of keys and values, and a number of each query."""
    heads, length = sizes.model.num_attention_heads // sizes.layout.tensor, sizes.sequence // sizes.layout.context
    tasks = max(1, min(ATTENTION_TASKS // (sizes.batch * heads), -(-length // ATTENTION_KEYS)))
    rows = tasks * -(-length // ATTENTION_ROWS) * ATTENTION_ROWS + 2 * length
    return 4 * sizes.batch * heads * (rows * _lanes(sizes.model.head_dim) + length)


def head(sizes: Sizes) -> HeadActivations:
    """Final norm, head and loss.

    Kept: input and output of the final norm. The loss keeps the logits, and its backward pass writes their gradient
    over them. Then the head has the gradients of its input and weight.
    """
    return HeadActivations(kept=2 * sizes.residual, logits=sizes.logits, working=head_linear(sizes))


def head_linear(sizes: Sizes) -> int:
    """What the head's backward pass needs beside the logits."""
    table = sizes.table_gradient
    return max(input_gradient(sizes) + table, table + widened(sizes, table) - sizes.logits)


def embedding(sizes: Sizes) -> int:
    """The gradients of the embedding's output and of the embedding, or the copy of the latter."""
    return sizes.table_gradient + max(sizes.gathered + sizes.residual, widened(sizes, sizes.table_gradient))


def leaving(sizes: Sizes, channels: int, columns: int, released: int) -> int:
    """The backward pass of the linear that leads out of a layer, beside what is kept.

    Args:
        sizes: sizes.
        channels: bytes of the gradient of its input.
        columns: of its weight.
        released: bytes of its input if nothing else keeps it.
    """
    weight = sizes.weight(sizes.model.hidden_size, columns)
    return channels + weight + max(sizes.gathered, widened(sizes, weight) - released)


def entering(sizes: Sizes, channels: int, rows: int) -> int:
    """The backward pass of the linear that leads into a layer and of the norm before it, with all that is there.

    The norm's input stays to its end. Its output goes with the linear, as the gradient of the linear's output; then
    there are the gradients of the norm's output and input, and the sum of the latter and of the residual stream's.

    Args:
        sizes: sizes.
        channels: bytes of the gradient of the linear's output.
        rows: of its weight.
    """
    weight = sizes.weight(rows, sizes.model.hidden_size)
    linear = sizes.residual + channels + input_gradient(sizes) + weight
    return sizes.residual + max(linear, sizes.residual + weight + widened(sizes, weight), 2 * sizes.residual)


def widened(sizes: Sizes, gradient: int) -> int:
    """The FP32 copy of a weight's gradient of so many bytes."""
    return 2 * gradient if sizes.element == 2 else 0


def input_gradient(sizes: Sizes) -> int:
    """Of a linear that leads into a layer: for all tokens, for the rank's own, and gloo's copy while it sums them."""
    return sizes.whole + (sizes.residual + sizes.whole if sizes.layout.sequence else 0)


def held(sizes: Sizes, last: bool) -> int:
    """The buffer in which megatron-core's linears gather the residual stream under sequence parallelism.

    Args:
        sizes: sizes.
        last: whether the position ends with the head.
    """
    return sizes.gathered


def update(buffers: Iterable[ParameterBuffer], last: int) -> int:
    """What the reduction of the gradients and the optimizer need beside them.

    Under the distributed optimizer gloo copies the gradients before it sums them over several ranks; the copies stay to
    the end of the reduction. The optimizer scales the gradients one by one, by a copy.

    Args:
        buffers: of the rank.
        last: bytes of the last gradient, which is not released before its bucket's reduction has begun.
    """
    return max(copied(buffers, EMBEDDING - 1) + last, *(GRADIENT_BYTES * max(buffer.sizes) for buffer in buffers))


def copied(buffers: Iterable[ParameterBuffer], layer: int) -> int:
    """Gloo's copies of the gradients that are being reduced when the backward pass comes to a layer."""
    return sum(buffer.reduced_before(layer) for buffer in buffers if buffer.sharded and buffer.ranks > 1)


def _lanes(count: int) -> int:
    return -(-count // LANES) * LANES


LAYERS = {LayerType.MAMBA: mamba, LayerType.FEED_FORWARD: feed_forward, LayerType.ATTENTION: attention}
