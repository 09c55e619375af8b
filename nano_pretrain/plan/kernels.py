"""The kernels of each layer type on one rank: FLOPs as they are executed, and bytes moved.

Model FLOPs (`recipe.flops`) say what the mathematics asks for; these say what the kernels do. They differ in four
places: the scan is chunked (`plan.scan`); the convolution is computed again in the backward pass; attention is a flash
kernel, which skips what causality hides (2qeS for each token forward, no kernel used here computes the whole square)
and computes the scores again backward, five products for two; the head has the padded vocabulary.

Bytes are those of the operands between memory and cores, each read or written once a kernel, without caches and
without fusion: norms, gates, residual additions and the casts to FP8 are bound by them.
"""

from __future__ import annotations

from nano_pretrain.plan.scan import convolution_and_scan
from nano_pretrain.plan.work import BYTES, Kernel, Passes, RankWork
from nano_pretrain.recipe.derived import mamba_shape, padded_vocab_size
from nano_pretrain.recipe.pattern import LayerType

CROSS_ENTROPY_BYTES = {"cuda": 48, "cpu": 6}
"""Bytes moved for each logit, both passes, by platform. CUDA is megatron-core's vocab_parallel_cross_entropy: cast to
FP32 (6), maximum (4), shift (8), exponential (8), sum (4), division (8), gradient (10); the CPU's kernel sweeps twice
and writes once."""


def layer_kernels(work: RankWork, kind: LayerType, number_format: str) -> Passes:
    """One layer with its norm and its residual addition."""
    inside = {
        LayerType.MAMBA: _mamba,
        LayerType.FEED_FORWARD: _feed_forward,
        LayerType.ATTENTION: _attention,
    }[kind](work, number_format)
    return _norm(work) + inside + _moving(work, "residual", work.residual_tokens * work.model.hidden_size, (3, 3))


def embedding_kernels(work: RankWork) -> Passes:
    """The lookup, and the scattered addition of its gradient."""
    return _moving(work, "embedding", work.tokens * work.model.hidden_size, (2, 3))


def head_kernels(work: RankWork) -> Passes:
    """Final norm, output head, never in FP8, and cross-entropy."""
    rows = padded_vocab_size(work.model) // work.tensor
    moved = work.tokens * rows * CROSS_ENTROPY_BYTES[work.platform]
    loss = Kernel("loss", "memory", work.activation, 0, moved)
    head = _linear(work, "head", work.model.hidden_size, rows, work.activation)
    return _norm(work) + head + Passes(forward=(loss,))


def _norm(work: RankWork) -> Passes:
    return _moving(work, "norm", work.residual_tokens * work.model.hidden_size, (2, 3))


def _feed_forward(work: RankWork, number_format: str) -> Passes:
    hidden, width = work.model.hidden_size, work.model.ffn_hidden_size // work.tensor
    into = _linear(work, "linear_fc1", hidden, width, number_format)
    activation = _moving(work, "activation", work.tokens * width, (2, 3))
    return into + activation + _linear(work, "linear_fc2", width, hidden, number_format)


def _attention(work: RankWork, number_format: str) -> Passes:
    """Queries of the rank's tokens against the keys of the sequence: context-parallel ranks share the triangle."""
    model = work.model
    queries = model.num_attention_heads * model.head_dim // work.tensor
    keys = model.num_query_groups * model.head_dim // work.tensor
    flops = 2 * work.tokens * queries * work.sequence
    moved = work.tokens * (2 * queries + 2 * keys * work.context) * work.width
    core = Passes(
        (Kernel("attention", "attention", work.activation, flops, moved),),
        (Kernel("attention", "attention", work.activation, 2.5 * flops, 2 * moved),),
    )
    into = _linear(work, "linear_qkv", model.hidden_size, queries + 2 * keys, number_format)
    return into + core + _linear(work, "linear_proj", queries, model.hidden_size, number_format)


def _mamba(work: RankWork, number_format: str) -> Passes:
    model, shape = work.model, mamba_shape(work.model)
    inner = shape.inner // work.tensor
    into = _linear(work, "in_proj", model.hidden_size, shape.projected // work.tensor, number_format)
    gate = _moving(work, "gated norm", work.tokens * inner, (3, 5))
    return into + convolution_and_scan(work) + gate + _linear(work, "out_proj", inner, model.hidden_size, number_format)


def _linear(work: RankWork, name: str, inputs: int, outputs: int, number_format: str) -> Passes:
    """The rank's part of a linear: one product forward, two backward; the weight's is added to an FP32 gradient.

    Under FP8 the input, and backward the output's gradient, are cast before, in both orders of memory.
    """
    tokens, operand = work.tokens, BYTES[number_format]
    weight = inputs * outputs
    moved = {
        "": (tokens * inputs + weight) * operand + tokens * outputs * work.width,
        " dgrad": (tokens * outputs + weight) * operand + tokens * inputs * work.width,
        " wgrad": tokens * (inputs + outputs) * operand + weight * 2 * BYTES["fp32"],
    }
    kernels = [Kernel(name + part, "matrix", number_format, 2 * tokens * weight, size) for part, size in moved.items()]
    products = Passes((kernels[0],), tuple(kernels[1:]))
    return _casts(work, name, tokens * inputs, tokens * outputs) + products if number_format == "fp8" else products


def _casts(work: RankWork, name: str, inputs: int, outputs: int) -> Passes:
    """To FP8, row-wise and column-wise."""
    each = work.width * (2 if work.amax_pass else 1) + 2 * BYTES["fp8"]
    before, after = (Kernel(f"{name} cast", "memory", "fp8", 0, count * each) for count in (inputs, outputs))
    return Passes((before,), (after,))


def _moving(work: RankWork, name: str, numbers: int, moves: tuple[int, int]) -> Passes:
    """Activations that are read or written so many times, forward and backward."""
    forward, backward = (Kernel(name, "memory", work.activation, 0, numbers * work.width * count) for count in moves)
    return Passes((forward,), (backward,))
