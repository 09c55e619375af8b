"""Reading the phases of a stage from the recipe: their lengths and their weights, exact and checked."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from fractions import Fraction

from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import PhaseConfig, StageConfig

_ROUNDING = Fraction(1, 10**9)
"""Shares written with nine digits or more may miss 1 by this much; they are then scaled to it."""


def exact(value: float) -> Fraction:
    """The number as it is written in decimal: 0.1 is one tenth, not the nearest binary fraction."""
    return Fraction(str(value))


def phase_lengths(field: str, stage: StageConfig) -> dict[str, Fraction]:
    """Tokens of each phase, in order; their sum is the stage's tokens exactly.

    Args:
        field: dotted name of the stage.
        stage: its phases give a share or tokens each; both ways may be mixed.

    Raises:
        RecipeError: there are no phases, one has both or neither, they do not add up, or a ramp is longer than its
            phase or has no phase before it.
    """
    if not stage.phases:
        raise RecipeError(f"{field}.phases", "is empty", "name at least one phase")
    lengths = {
        name: _phase_length(f"{field}.phases.{name}", phase, stage.tokens) for name, phase in stage.phases.items()
    }
    total = sum(lengths.values(), Fraction(0))
    if abs(total - stage.tokens) > _ROUNDING * stage.tokens:
        raise RecipeError(f"{field}.phases", *_sum_problem(stage, total))
    lengths = {name: length * stage.tokens / total for name, length in lengths.items()}
    for number, (name, length) in enumerate(lengths.items()):
        _check_ramp(f"{field}.phases.{name}.ramp_tokens", stage.phases[name].ramp_tokens, length, first=number == 0)
    return lengths


def _phase_length(field: str, phase: PhaseConfig, stage_tokens: int) -> Fraction:
    if phase.share is not None and phase.tokens is not None:
        raise RecipeError(field, "has both share and tokens", "give one of them")
    if phase.share is not None:
        return exact(phase.share) * stage_tokens
    if phase.tokens is not None:
        return Fraction(phase.tokens)
    raise RecipeError(field, "has neither share nor tokens", "give one of them")


def _check_ramp(field: str, ramp: int, length: Fraction, *, first: bool) -> None:
    if ramp and first:
        raise RecipeError(field, f"is {ramp}, and the stage has no phase before", "write 0")
    if ramp > length:
        raise RecipeError(field, f"{ramp} is more than the phase's {float(length):.0f} tokens", "write less, or 0")


def _sum_problem(stage: StageConfig, total: Fraction) -> tuple[str, str]:
    if all(phase.tokens is None for phase in stage.phases.values()):
        return f"shares add up to {float(total / stage.tokens):.6g}", "make them add up to 1"
    return f"lengths add up to {float(total):.0f} tokens", f"make them add up to the stage's {stage.tokens}"


def phase_weights(field: str, blend: object, known: Collection[str]) -> dict[str, Fraction]:
    """Weight of each source of a blend, exact; they need not add up to anything.

    Args:
        field: dotted name of the blend.
        blend: mapping source -> weight.
        known: names of the sources there are.

    Raises:
        RecipeError: it is no mapping, a source is unknown, a weight is negative or no finite number, or all are 0.
    """
    if not isinstance(blend, Mapping) or not blend:
        raise RecipeError(field, f"is {blend!r}", "write a mapping source -> weight with at least one source")
    weights = {str(source): _weight(f"{field}.{source}", source, weight, known) for source, weight in blend.items()}
    if not any(weights.values()):
        raise RecipeError(field, "all weights are 0", "give at least one source a positive weight")
    return weights


def _weight(field: str, source: object, weight: object, known: Collection[str]) -> Fraction:
    if source not in known:
        raise RecipeError(field, "unknown source", f"the known ones are {', '.join(sorted(known))}")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
        raise RecipeError(field, f"weight is {weight!r}", "write a finite number that is not negative")
    return exact(weight)
