"""The stack of a pipeline position, whose layers follow from a free split."""

from __future__ import annotations

from typing import Any

from megatron.core.ssm.mamba_block import MambaStack
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset


class HybridStack(MambaStack):
    """MambaStack that holds the layers of its pipeline position, where megatron-core divides them equally.

    Args:
        split: layers of each pipeline position.
        **others: those of megatron-core's MambaStack.
    """

    def __init__(self, *args: Any, split: tuple[int, ...], **others: Any) -> None:
        self.split = split
        super().__init__(*args, **others)

    def _select_layers_for_pipeline_parallel(self, layer_type_list: list[str]) -> tuple[int, list[str]]:
        """Index of the first layer held here, and the types of all that are."""
        first, size = first_layer(self.split, self.pp_group.rank()), self.split[self.pp_group.rank()]
        return first, layer_type_list[first : first + size]


def first_layer(split: tuple[int, ...], position: int) -> int:
    """Index of the first layer of a pipeline position."""
    return sum(split[:position])


class _Placed:
    """A TransformerLayer with the number that it has in the whole model; the class itself adds that of an equal split.

    Args:
        config: megatron-core's TransformerConfig.
        submodules: of the layer.
        layer_number: its number in the stack, from 1.
        first_layer: index of the stack's first layer.
        pg_collection: megatron-core's process groups.
    """

    def __init__(
        self, config: Any, submodules: Any, layer_number: int, first_layer: int, pg_collection: Any, **others: Any
    ) -> None:
        added = get_transformer_layer_offset(config, pp_rank=pg_collection.pp.rank())
        number = layer_number + first_layer - added
        super().__init__(config, submodules, layer_number=number, pg_collection=pg_collection, **others)  # type: ignore[call-arg]


class PlacedTransformerLayer(_Placed, TransformerLayer):
    """An attention layer in a HybridStack."""


class PlacedMLPLayer(_Placed, MLPLayer):
    """A feed-forward layer in a HybridStack."""
