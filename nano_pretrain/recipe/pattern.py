"""The layer pattern: one symbol a layer, in the order of the layers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from nano_pretrain.recipe.errors import RecipeError


class LayerType(StrEnum):
    """What one symbol of a pattern stands for."""

    MAMBA = "M"
    FEED_FORWARD = "-"
    ATTENTION = "*"


@dataclass(frozen=True)
class LayerCounts:
    """How many layers of each type a pattern has."""

    mamba: int
    feed_forward: int
    attention: int

    @property
    def total(self) -> int:
        """Layers of all types."""
        return self.mamba + self.feed_forward + self.attention


def parse_pattern(pattern: str) -> tuple[LayerType, ...]:
    """The type of each layer, first layer first.

    Raises:
        RecipeError: the pattern is empty or has a letter that is no layer type; positions count from 1.
    """
    fix = "write one of M (Mamba-2), - (feed-forward), * (attention) for each layer"
    if not pattern:
        raise RecipeError("model.pattern", "is empty", fix)
    known = set(LayerType)
    for position, letter in enumerate(pattern, start=1):
        if letter not in known:
            raise RecipeError("model.pattern", f"unknown letter {letter!r} at position {position}", fix)
    return tuple(LayerType(letter) for letter in pattern)


def count_layers(pattern: str) -> LayerCounts:
    """Layers of each type.

    Raises:
        RecipeError: as `parse_pattern`.
    """
    layers = parse_pattern(pattern)
    return LayerCounts(
        mamba=layers.count(LayerType.MAMBA),
        feed_forward=layers.count(LayerType.FEED_FORWARD),
        attention=layers.count(LayerType.ATTENTION),
    )
