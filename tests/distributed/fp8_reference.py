"""FP8 linears on one rank whose operands are quantised in the parts that the ranks of a layout have of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nano_pretrain.parallel.context import own_tokens
from nano_pretrain.precision.linear import Fp8Recipe, data_gradient, forward_product, weight_gradient
from nano_pretrain.precision.quantize import Operand, Quantizer
from nano_pretrain.recipe.derived import mamba_shape
from nano_pretrain.recipe.schema import ModelConfig, ParallelConfig
from tests.distributed.fp8_ranks import BATCH, LENGTH, Used

Parts = tuple[Tensor, ...]
"""For each rank the rows or columns of a whole matrix that it has; ranks may have the same."""

INTO_A_LAYER = ("in_proj", "linear_qkv", "linear_fc1")


@dataclass(frozen=True)
class CutQuantizer(Quantizer):
    """Quantises each part of a matrix by itself."""

    rows: Parts
    columns: Parts

    def operand(self, x: Tensor, dtype: torch.dtype) -> Operand:
        values = torch.empty(x.shape, dtype=dtype)
        for place in ((rows[:, None], columns) for rows in self.rows for columns in self.columns):
            part = super().operand(x[place], dtype)
            values[place] = part.values * part.factor
        return Operand(values, 1.0)


@dataclass(frozen=True)
class Place:
    """Where the parts of a linear on the ranks of a layout are in the whole.

    Attributes:
        tokens: which a rank multiplies.
        shared: which it has of the residual stream.
        inputs: columns of the weight.
        outputs: its rows.
        into: whether the linear reads the residual stream; else it writes it.
    """

    tokens: Parts
    shared: Parts
    inputs: Parts
    outputs: Parts
    into: bool

    def whole(self, parts: Sequence[Used]) -> Used:
        """The whole matrices."""
        of_input, of_output = (self.shared, self.tokens) if self.into else (self.tokens, self.shared)
        return Used(
            weight=_joined([part.weight for part in parts], self.outputs, self.inputs),
            x=_joined([part.x for part in parts], of_input, self.inputs),
            y=_joined([part.y for part in parts], of_output, self.outputs),
            dx=_joined([part.dx for part in parts], of_input, self.inputs),
            dy=_joined([part.dy for part in parts], of_output, self.outputs),
            dweight=_joined([part.dweight for part in parts], self.outputs, self.inputs, add=True),
        )


def _joined(parts: Sequence[Tensor], rows: Parts, columns: Parts, add: bool = False) -> Tensor:
    """One matrix; where ranks have the same part they must agree, or their parts are added."""
    whole = torch.full((_size(rows), _size(columns)), torch.nan)
    for part, row, column in zip(parts, rows, columns, strict=True):
        place = row[:, None], column
        there = whole[place]
        if not add:
            assert torch.equal(torch.where(there.isnan(), part, there), part), "copies differ"
        whole[place] = part + there.nan_to_num() if add else part
    assert not whole.isnan().any()
    return whole


def _size(parts: Parts) -> int:
    return 1 + max(int(part.max()) for part in parts)


@dataclass(frozen=True)
class CutRecipe(Fp8Recipe):
    """A recipe whose tiles end where the parts of ranks do."""

    place: Place

    @property
    def weight(self) -> Quantizer:
        return _cut(super().weight, self.place.outputs, self.place.inputs)

    @property
    def input(self) -> Quantizer:
        return _cut(super().input, self.place.tokens, self.place.inputs)

    @property
    def gradient(self) -> Quantizer:
        return _cut(super().gradient, self.place.tokens, self.place.outputs)

    @property
    def input_by_tokens(self) -> Quantizer:
        return _cut(super().input_by_tokens, self.place.tokens, self.place.inputs)

    @property
    def gradient_by_tokens(self) -> Quantizer:
        return _cut(super().gradient_by_tokens, self.place.tokens, self.place.outputs)


def _cut(whole: Quantizer, rows: Parts, columns: Parts) -> Quantizer:
    return CutQuantizer(whole.tile, whole.format, whole.power_of_two, _unlike(rows), _unlike(columns))


def _unlike(parts: Parts) -> Parts:
    return tuple({tuple(part.tolist()): part for part in parts}.values())


def reference(whole: Used, recipe: Fp8Recipe, place: Place | None) -> dict[str, Tensor]:
    """The three products of one rank, quantised in the parts of `place`, or as one rank does."""
    how = recipe
    if place is not None:
        how = CutRecipe(recipe.gradient_format, recipe.per_tensor, recipe.power_of_two, place)
    return {
        "y": forward_product(whole.x, whole.weight, how),
        "dx": data_gradient(whole.dy, whole.weight, how),
        "dweight": weight_gradient(whole.dy, whole.x, how, torch.float32),
    }


def place_of(linear: str, weights: Sequence[Tensor], model: ModelConfig, layout: ParallelConfig) -> Place:
    """Where the ranks of a layout of tensor and context parallelism have their parts.

    Args:
        linear: its name.
        weights: each rank's part of the weight.
        model: widths.
        layout: of the ranks, tensor-parallel ones next to each other.
    """
    ranks = [(context, tensor) for context in range(layout.context) for tensor in range(layout.tensor)]
    positions = torch.arange(LENGTH * BATCH).view(LENGTH, BATCH)
    tokens = [own_tokens(positions, 0, (context, layout.context)) for context, _ in ranks]
    shared = tokens
    if layout.sequence:
        shared = [part.chunk(layout.tensor)[tensor] for part, (_, tensor) in zip(tokens, ranks, strict=True)]
    into = linear.endswith(INTO_A_LAYER)
    rows, columns = weights[0].shape
    outputs, inputs = (
        torch.arange(rows * (layout.tensor if into else 1)),
        torch.arange(columns if into else columns * layout.tensor),
    )
    split = _divided(outputs if into else inputs, linear.endswith("in_proj"), model, layout.tensor)
    divided = tuple(split[tensor] for _, tensor in ranks)
    return Place(
        tokens=tuple(part.flatten() for part in tokens),
        shared=tuple(part.flatten() for part in shared),
        inputs=(inputs,) * len(ranks) if into else divided,
        outputs=divided if into else (outputs,) * len(ranks),
        into=into,
    )


def _divided(channels: Tensor, projects: bool, model: ModelConfig, ranks: int) -> Parts:
    """Channels of each tensor-parallel rank: of z, x, B, C and dt, which a Mamba-2 layer projects, a part of each."""
    if not projects:
        return channels.chunk(ranks)
    inner, state = mamba_shape(model).inner, model.mamba_num_groups * model.mamba_state_dim
    each = [part.chunk(ranks) for part in channels.split([inner, inner, state, state, model.mamba_num_heads])]
    return tuple(torch.cat(parts) for parts in zip(*each, strict=True))
