"""Activations on a CPU: what our modules and megatron-core's linears keep, with the native kernels.

The kernels in plain PyTorch (`cluster.cpu_kernels=plain`) keep several times as much in Mamba-2 layers. FP8 recipes are
BF16 here.

Every weight gradient exists once in the dtype of the parameter before it is added to the FP32 buffer.
"""

from __future__ import annotations

from collections.abc import Iterable

from nano_pretrain.plan.activations import HeadActivations, LayerActivations, Sizes
from nano_pretrain.plan.buffers import GRADIENT_BYTES, ParameterBuffer
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
    output and input, of the scan's output and the convolution's, the convolution's output again, FP32 dt five times and
    the FP32 partial sums of B and C, while the tensors kept for out_proj and the gated norm are gone; in_proj. All with
    the gradient of the residual stream.
    """
    model, shape = sizes.model, mamba_shape(sizes.model)
    ranks = sizes.layout.tensor * sizes.layout.context
    heads, segments = model.mamba_num_heads // ranks, -(-sizes.sequence // STATE_TOKENS)
    states = 4 * sizes.batch * segments * heads * _lanes(model.mamba_state_dim) * _lanes(model.mamba_head_dim)
    kept = 2 * sizes.residual + sizes.projected + 3 * sizes.inner
    out_proj = sizes.gathered + sizes.inner + sizes.weight(model.hidden_size, shape.inner)
    mixer = sizes.projected + 2 * sizes.convolved + 5 * sizes.per_token(model.mamba_num_heads) + _scan_sums(sizes)
    in_proj = _input_gradient(sizes) + sizes.weight(shape.projected, model.hidden_size) - 3 * sizes.inner - states
    return LayerActivations(
        input=sizes.residual,
        kept=kept,
        states=states,
        working=sizes.residual + max(out_proj, mixer, in_proj),
        dropped=3 * sizes.inner,
        again=max(out_proj + sizes.inner, mixer + 2 * sizes.inner, in_proj) - max(out_proj, mixer, in_proj),
    )


def _scan_sums(sizes: Sizes) -> int:
    """FP32 gradients of B and C, one for each task of a group, and their sum."""
    model, ranks = sizes.model, sizes.layout.tensor * sizes.layout.context
    heads, groups = model.mamba_num_heads // ranks, sizes.groups // ranks
    heads_of_task = max(1, min(SCAN_HEADS, heads // groups, sizes.batch * heads // SCAN_TASKS))
    blocks = -(-heads // groups // heads_of_task)
    one = sizes.per_token(sizes.groups * model.mamba_state_dim)
    return 2 * one * (blocks + (blocks > 1))


def feed_forward(sizes: Sizes) -> LayerActivations:
    """A feed-forward layer.

    Kept: the input (by the norm), the norm's output (by fc1), fc1's output (by the squared ReLU), its square (by fc2).

    Backward, at fc2: the gradients of the residual stream, of fc2's input and of its weight.
    """
    model = sizes.model
    fc2 = sizes.gathered + sizes.ffn + sizes.weight(model.hidden_size, model.ffn_hidden_size)
    return LayerActivations(
        input=sizes.residual,
        kept=2 * sizes.residual + 2 * sizes.ffn,
        working=sizes.residual + fc2,
        dropped=sizes.ffn,
        again=sizes.ffn,
    )


def attention(sizes: Sizes) -> LayerActivations:
    """An attention layer.

    Kept: the input (by the norm), the norm's output (by linear_qkv), linear_qkv's output, of which keys and values are
    views, the queries again if several groups have to be parted, the output (by the kernel and linear_proj), the FP32
    log-sum-exp.

    Backward, the largest of: linear_proj with the gradients of its input and weight; the kernel with the gradients of
    its output, of queries, keys and values, and its FP32 partial sums. With the gradient of the residual stream.
    """
    model = sizes.model
    projected = sizes.queries + 2 * sizes.keys
    copied = sizes.queries if model.num_query_groups > sizes.layout.tensor else 0
    weight = sizes.weight(model.hidden_size, model.num_attention_heads * model.head_dim)
    linear_proj = sizes.gathered + sizes.queries + weight
    kernel = sizes.queries + projected + _attention_sums(sizes)
    return LayerActivations(
        input=sizes.residual,
        kept=2 * sizes.residual + projected + copied + sizes.queries + sizes.per_token(model.num_attention_heads),
        working=sizes.residual + max(linear_proj, kernel),
    )


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
    return HeadActivations(
        kept=2 * sizes.residual, logits=sizes.logits, working=_input_gradient(sizes) + sizes.table_gradient
    )


def _input_gradient(sizes: Sizes) -> int:
    """Of a linear that leads into a layer: for all tokens, for the rank's own, and gloo's copy while it sums them."""
    return sizes.whole + (sizes.residual + sizes.whole if sizes.layout.sequence else 0)


def held(sizes: Sizes, last: bool) -> int:
    """The buffer in which megatron-core's linears gather the residual stream under sequence parallelism.

    Args:
        sizes: sizes.
        last: whether the position ends with the head.
    """
    return sizes.gathered


def update(buffers: Iterable[ParameterBuffer]) -> int:
    """Gloo's copy of a gradient buffer while it sums it over the ranks, and the scaled copy of the largest gradient."""
    copies = [buffer.gradient_bytes if buffer.sharded else 0 for buffer in buffers]
    return max(*copies, *(GRADIENT_BYTES * max(buffer.sizes) for buffer in buffers))


def _lanes(count: int) -> int:
    return -(-count // LANES) * LANES


LAYERS = {LayerType.MAMBA: mamba, LayerType.FEED_FORWARD: feed_forward, LayerType.ATTENTION: attention}
