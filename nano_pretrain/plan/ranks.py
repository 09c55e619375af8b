"""What one rank holds of the model: its layers under pipeline parallelism and its shards under tensor parallelism."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from nano_pretrain.plan.params import ParameterCount
from nano_pretrain.recipe.derived import mamba_shape, padded_vocab_size
from nano_pretrain.recipe.pattern import LayerType, parse_pattern
from nano_pretrain.recipe.schema import ModelConfig, ParallelConfig
from nano_pretrain.recipe.split import pipeline_split


@dataclass(frozen=True)
class Part:
    """The layers of one pipeline position.

    Attributes:
        position: 0 for the first.
        first_layer: index of its first layer in the pattern.
        layers: type of each of its layers.
        holds_embedding: whether it begins with the embedding.
        holds_head: whether it ends with the final norm and the output head.
    """

    position: int
    first_layer: int
    layers: tuple[LayerType, ...]
    holds_embedding: bool
    holds_head: bool


def pipeline_parts(model: ModelConfig, layout: ParallelConfig, sequence_length: int) -> list[Part]:
    """The part of each pipeline position."""
    layers = parse_pattern(model.pattern)
    sizes = pipeline_split(model, layout, sequence_length)
    ends = list(accumulate(sizes))
    return [
        Part(
            position=position,
            first_layer=end - size,
            layers=layers[end - size : end],
            holds_embedding=position == 0,
            holds_head=position == len(sizes) - 1,
        )
        for position, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


def whole_model(model: ModelConfig) -> Part:
    """The only part where nothing is divided by layers."""
    return Part(0, 0, parse_pattern(model.pattern), holds_embedding=True, holds_head=True)


@dataclass(frozen=True)
class ParameterTensor:
    """One parameter of one rank.

    Attributes:
        name: end of its name in megatron-core.
        shape: this rank's part of it.
        holder: `embedding`, `head`, `final_norm`, or the type of its layer.
        layer: index of its layer in the pattern; -1 outside the layers.
        kept_fp32: whether it is FP32 in a BF16 model.
    """

    name: str
    shape: tuple[int, ...]
    holder: str
    layer: int = -1
    kept_fp32: bool = False

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def is_layer_linear(self) -> bool:
        """Whether it is the weight of a linear inside a layer: what FP8 quantises."""
        return self.layer >= 0 and len(self.shape) == 2


def rank_tensors(model: ModelConfig, layout: ParallelConfig, part: Part) -> tuple[ParameterTensor, ...]:
    """Every parameter of one rank, in the order of `build_model(...).named_parameters()` on a CPU.

    Divided among tensor-parallel ranks: vocabulary rows (padded), rows of the linears that lead into a layer and
    columns of those that lead out of it, and everything of a Mamba-2 layer between these, B and C by groups. Whole on
    each of them: the norms of the residual stream. Context-parallel ranks hold the same.
    """
    return tuple(_tensors(model, layout.tensor, part))


def _tensors(model: ModelConfig, ranks: int, part: Part) -> Iterator[ParameterTensor]:
    table = (padded_vocab_size(model) // ranks, model.hidden_size)
    if part.holds_embedding:
        yield ParameterTensor("word_embeddings.weight", table, "embedding")
    for index, kind in enumerate(part.layers, start=part.first_layer):
        shapes = {
            LayerType.MAMBA: _mamba_shapes,
            LayerType.ATTENTION: _attention_shapes,
            LayerType.FEED_FORWARD: _feed_forward_shapes,
        }[kind](model, ranks)
        for name, shape in shapes.items():
            yield ParameterTensor(name, shape, _HOLDERS[kind], index, name in FP32_NAMES)
    if part.holds_head:
        yield ParameterTensor("final_norm.weight", (model.hidden_size,), "final_norm")
        yield ParameterTensor("output_layer.weight", table, "head")


FP32_NAMES = ("mixer.dt_bias", "mixer.A_log", "mixer.D")
"""What `build_model` keeps in FP32 in a BF16 model."""

_HOLDERS = {LayerType.MAMBA: "mamba", LayerType.FEED_FORWARD: "feed_forward", LayerType.ATTENTION: "attention"}

Shapes = dict[str, tuple[int, ...]]


def _mamba_shapes(model: ModelConfig, ranks: int) -> Shapes:
    shape = mamba_shape(model)
    inner, conv, heads = (size // ranks for size in (shape.inner, shape.conv, model.mamba_num_heads))
    return {
        **dict.fromkeys(FP32_NAMES, (heads,)),
        "mixer.in_proj.weight": (shape.projected // ranks, model.hidden_size),
        "mixer.conv1d.weight": (conv, 1, model.mamba_conv_width),
        "mixer.conv1d.bias": (conv,),
        "mixer.norm.weight": (inner,),
        "mixer.out_proj.weight": (model.hidden_size, inner),
        "norm.weight": (model.hidden_size,),
    }


def _attention_shapes(model: ModelConfig, ranks: int) -> Shapes:
    queries = model.num_attention_heads * model.head_dim // ranks
    keys = model.num_query_groups * model.head_dim // ranks
    return {
        "input_layernorm.weight": (model.hidden_size,),
        "self_attention.linear_proj.weight": (model.hidden_size, queries),
        "self_attention.linear_qkv.weight": (queries + 2 * keys, model.hidden_size),
    }


def _feed_forward_shapes(model: ModelConfig, ranks: int) -> Shapes:
    width = model.ffn_hidden_size // ranks
    return {
        "pre_mlp_layernorm.weight": (model.hidden_size,),
        "mlp.linear_fc1.weight": (width, model.hidden_size),
        "mlp.linear_fc2.weight": (model.hidden_size, width),
    }


@dataclass(frozen=True)
class RankParameters(ParameterCount):
    """Parameters of one rank, the vocabulary with its padding: embedding on the first position, head on the last.

    Attributes:
        kept_fp32: those among `mamba` that are FP32 in a BF16 model: A_log, D and dt_bias.
    """

    kept_fp32: int


def rank_parameters(model: ModelConfig, layout: ParallelConfig, part: Part) -> RankParameters:
    """Parameters that each rank of a pipeline position holds."""
    counts = dict.fromkeys(("embedding", *_HOLDERS.values(), "final_norm", "head"), 0)
    kept_fp32 = 0
    for tensor in rank_tensors(model, layout, part):
        counts[tensor.holder] += tensor.elements
        kept_fp32 += tensor.elements if tensor.kept_fp32 else 0
    return RankParameters(**counts, kept_fp32=kept_fp32)
