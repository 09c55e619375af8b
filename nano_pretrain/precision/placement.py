"""Which linears of the hybrid are quantised, and what megatron-core is told of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nano_pretrain.platform.base import PlatformName
from nano_pretrain.precision.linear import BLOCKWISE, CURRENT_SCALING
from nano_pretrain.recipe.pattern import LayerType, parse_pattern
from nano_pretrain.recipe.rules_precision import LINEARS_PER_LAYER, fp8_layers
from nano_pretrain.recipe.schema import PrecisionConfig

FP8_RECIPES = {"fp8_blockwise": BLOCKWISE, "fp8_current_scaling": CURRENT_SCALING}
"""By `precision.name`."""

ENGINE_RECIPES = {
    "fp8_blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "fp8_current_scaling": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
}
"""The same for Transformer Engine, as fields of megatron-core's TransformerConfig."""

LINEARS = {
    LayerType.MAMBA: ("mixer.in_proj", "mixer.out_proj"),
    LayerType.FEED_FORWARD: ("mlp.linear_fc1", "mlp.linear_fc2"),
    LayerType.ATTENTION: ("self_attention.linear_qkv", "self_attention.linear_proj"),
}
"""Submodules of a layer that multiply by a weight, in the order in which they do."""


@dataclass(frozen=True)
class Linear:
    """A linear of the model.

    Attributes:
        layer: index of its layer in the whole model.
        name: of the submodule in the layer.
    """

    layer: int
    name: str

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.name}"


def fp8_linears(pattern: str, precision: PrecisionConfig) -> list[Linear]:
    """Those that are quantised, of all pipeline positions: all but the first and last of the model."""
    kinds = parse_pattern(pattern)
    return [Linear(layer, name) for layer in fp8_layers(pattern, precision) for name in LINEARS[kinds[layer]]]


def engine_fields(precision: PrecisionConfig, platform: PlatformName) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig by which Transformer Engine quantises the same linears.

    It enters its FP8 context by layer; the rules of the recipe see to it that a layer is quantised as a whole. Weights
    are FP8 tensors there, and gathered as such. None for a CPU, whose linears are not Transformer Engine's.
    """
    if platform == "cpu" or precision.name not in ENGINE_RECIPES:
        return {}
    return {
        **ENGINE_RECIPES[precision.name],
        "fp8_param": True,
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": precision.bf16_first_linears // LINEARS_PER_LAYER,
        "num_layers_at_end_in_bf16": precision.bf16_last_linears // LINEARS_PER_LAYER,
    }
